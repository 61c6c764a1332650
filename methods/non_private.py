"""Training without privacy, in the same loop: the accuracy and the speed that privacy is measured against."""

from harness.dp import SGD, Method, NoNoise, Plain, Unclipped
from harness.registry import method


@method("non-private", paper="-", family="baseline")
def non_private(lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 0.0) -> Method:
    """SGD with momentum on Poisson batches: no clipping, no noise, epsilon infinite."""
    optimizer = SGD(lr, momentum, weight_decay=weight_decay)
    return Method(engine=Plain(), clip=Unclipped(), noise=NoNoise(), optimizer=optimizer)
