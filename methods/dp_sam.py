"""DP-SAM: sharpness-aware minimisation with two private gradients a step, the control of DP-SAT (ICML 2023)."""

from harness.dp import SGD, EverySecond, Flat, LookAhead, Method
from harness.registry import method


@method("dp-sam", paper="arXiv:2306.05651", family="path")
def dp_sam(rho: float = 0.03, clip: float = 0.1, lr: float = 1.0, momentum: float = 0.9) -> Method:
    """One private gradient to look uphill, the next to step: each on its own batch, both charged, half the steps."""
    return Method(path=LookAhead(rho), clip=Flat(clip), optimizer=EverySecond(SGD(lr, momentum)))
