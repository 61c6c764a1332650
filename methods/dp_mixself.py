"""DP-MixSelf: views of an image and mixtures of these, one gradient an example (Bao et al., NeurIPS 2023)."""

from harness.dp import SGD, CrossEntropy, Flat, Method, Mixed
from harness.registry import method


@method("dp-mixself", paper="arXiv:2311.01295", family="loss")
def dp_mixself(
    views: int = 4,
    mixtures: int = 4,
    alpha: float = 0.2,
    pad: int = 4,
    flip: bool = True,
    clip: float = 1.0,
    lr: float = 1.0,
    momentum: float = 0.9,
) -> Method:
    """DP-SGD on the mean loss of an example's views and of random mixtures of pairs of them."""
    loss = Mixed(CrossEntropy(), views, pad, flip, mixtures, alpha)
    return Method(loss=loss, clip=Flat(clip), optimizer=SGD(lr, momentum))
