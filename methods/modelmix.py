"""ModelMix: step from a random point between the last two iterates (Xiao, Wan, Devadas, IEEE S&P 2023).

The standard epsilon ranks; the amplified one stands beside it as a claim, with its assumptions.
"""

from typing import Literal

from harness.dp import SGD, Flat, Method, Midpoint, Mix, Path, Refined
from harness.registry import method


@method("modelmix", paper="arXiv:2210.03843", family="path")
def modelmix(
    tau: float = 5e-4, clip: float = 0.1, share: float = 0.1, lr: float = 1.0, weight_decay: float = 0.0
) -> Method:
    """Iterates mixed at random, over intervals of `tau` * lr or more, and gradients bounded in two norms."""
    optimizer = SGD(lr, weight_decay=weight_decay)
    return Method(path=Mix(tau * lr), clip=Refined(clip, share), optimizer=optimizer)


@method("modelmix-control", paper="arXiv:2210.03843", family="path")
def modelmix_control(
    average: Literal["none", "midpoint"] = "none", clip: float = 0.1, lr: float = 1.0, weight_decay: float = 0.0
) -> Method:
    """What mixing is compared with: DP-SGD without momentum, stepping from the iterate or the mean of the last two."""
    path = Midpoint() if average == "midpoint" else Path()
    return Method(path=path, clip=Flat(clip), optimizer=SGD(lr, weight_decay=weight_decay))
