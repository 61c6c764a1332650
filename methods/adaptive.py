"""Adaptive clipping: the clipping norm follows a quantile of the gradient norms (Andrew et al., NeurIPS 2021)."""

from harness.dp import SGD, Method, Quantile
from harness.registry import method


@method("adaptive", paper="arXiv:1905.03871", family="clipping")
def adaptive(
    clip: float = 0.1,
    quantile: float = 0.5,
    rate: float = 0.2,
    count_noise: float = 20.0,
    lr: float = 1.0,
    momentum: float = 0.9,
) -> Method:
    """DP-SGD whose clipping norm starts at `clip` and moves with a noisy count, charged jointly with the gradient."""
    rule = Quantile(clip, by="flat", quantile=quantile, rate=rate, count_noise=count_noise)
    return Method(clip=rule, optimizer=SGD(lr, momentum))
