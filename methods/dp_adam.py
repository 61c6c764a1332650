"""DP-Adam: the mechanism of DP-SGD with Adam as post-processing (Kingma and Ba, ICLR 2015)."""

from harness.dp import Adam, Flat, Method
from harness.registry import method


@method("dp-adam", paper="arXiv:1412.6980", family="optimizer")
def dp_adam(clip: float = 1.0, lr: float = 1e-3, beta1: float = 0.9, beta2: float = 0.999) -> Method:
    """DP-SGD's mechanism under Adam: moments of privatised gradients cost no privacy."""
    return Method(clip=Flat(clip), optimizer=Adam(lr, beta1, beta2))
