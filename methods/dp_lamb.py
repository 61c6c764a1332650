"""DP-LAMB: layer-wise trust ratios on privatised gradients, for huge batches (Mehta et al., TMLR 2023)."""

from harness.dp import LAMB, Flat, Method
from harness.registry import method


@method("dp-lamb", paper="arXiv:2205.02973", family="optimizer")
def dp_lamb(
    clip: float = 0.1, lr: float = 0.02, beta1: float = 0.9, beta2: float = 0.999, weight_decay: float = 0.0
) -> Method:
    """DP-SGD's mechanism under LAMB, which steps in proportion to the length of each layer's weights."""
    return Method(clip=Flat(clip), optimizer=LAMB(lr, beta1, beta2, weight_decay=weight_decay))
