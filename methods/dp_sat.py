"""DP-SAT: sharpness-aware training at no privacy cost (Park et al., ICML 2023)."""

from typing import Literal

from harness.dp import SGD, Flat, Method, Sharp
from harness.registry import method


@method("dp-sat", paper="arXiv:2306.05651", family="path")
def dp_sat(
    rho: float = 0.03,
    along: Literal["gradient", "step"] = "gradient",
    clip: float = 0.1,
    lr: float = 1.0,
    momentum: float = 0.9,
) -> Method:
    """Gradients taken at w + rho * d / |d|: d the last privatised gradient, or the last step (momentum form)."""
    return Method(path=Sharp(rho, along), clip=Flat(clip), optimizer=SGD(lr, momentum))
