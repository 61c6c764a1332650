"""DP-SGD: clip each example's gradient, add Gaussian noise to the sum, step (Abadi et al., CCS 2016)."""

from harness.dp import SGD, Flat, Method
from harness.registry import method


@method("dp-sgd", paper="arXiv:1607.00133", family="baseline")
def dp_sgd(clip: float = 1.0, lr: float = 1.0, momentum: float = 0.9, weight_decay: float = 0.0) -> Method:
    """DP-SGD with heavy-ball momentum on the privatised gradient."""
    return Method(clip=Flat(clip), optimizer=SGD(lr, momentum, weight_decay=weight_decay))
