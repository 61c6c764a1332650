"""DP-PSAC: per-sample adaptive clipping, a weight that short gradients cannot blow up (Xia et al., AAAI 2023)."""

from harness.dp import PSAC, SGD, Method
from harness.registry import method


@method("dp-psac", paper="arXiv:2212.00328", family="clipping")
def dp_psac(clip: float = 1.0, r: float = 0.1, lr: float = 0.1, momentum: float = 0.9) -> Method:
    """Weight C / (x + r / (x + r)) for a gradient of norm x."""
    return Method(clip=PSAC(clip, r), optimizer=SGD(lr, momentum))
