"""DP-AdamBC: Adam without the bias that noise puts on its second moment (Tang et al., AAAI 2024)."""

from harness.dp import AdamBC, Flat, Method
from harness.registry import method


@method("dp-adambc", paper="arXiv:2312.14334", family="optimizer")
def dp_adambc(
    clip: float = 1.0, lr: float = 1e-3, beta1: float = 0.9, beta2: float = 0.999, floor: float = 1e-8
) -> Method:
    """DP-SGD's mechanism under Adam; the noise's variance, which is public, is taken out of the second moment."""
    return Method(clip=Flat(clip), optimizer=AdamBC(lr, beta1, beta2, floor=floor))
