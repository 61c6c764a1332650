"""DP-PSASC: per-sample adaptive scaling, whose slope s trades bias for sensitivity C / s (arXiv:2411.03059)."""

from harness.dp import PSASC, SGD, Method
from harness.registry import method


@method("dp-psasc", paper="arXiv:2411.03059", family="clipping")
def dp_psasc(clip: float = 1.0, r: float = 0.1, s: float = 0.5, lr: float = 0.1, momentum: float = 0.9) -> Method:
    """Weight C / (s x + r / (x + r)) for a gradient of norm x; with momentum as in the paper's second form."""
    return Method(clip=PSASC(clip, r, s), optimizer=SGD(lr, momentum))
