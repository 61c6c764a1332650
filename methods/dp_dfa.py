"""DP direct feedback alignment: fixed random feedback in place of backpropagation (Lee and Kifer 2020)."""

from harness.dp import SGD, Feedback, Method, Unclipped
from harness.registry import method


@method("dp-dfa", paper="arXiv:2010.03701", family="release")
def dp_dfa(
    error: float = 0.1, activation: float = 1.0, seed: int = 0, lr: float = 1.0, momentum: float = 0.9
) -> Method:
    """Sums of errors times activations, each cut to its own norm; `seed` draws the public feedback matrices."""
    return Method(engine=Feedback(error, activation, seed), clip=Unclipped(), optimizer=SGD(lr, momentum))
