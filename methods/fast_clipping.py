"""Fast per-example clipping: norms without per-example gradients where that is cheap (Lee and Kifer, PoPETs 2021)."""

from harness.dp import SGD, Flat, Ghost, Method
from harness.registry import method


@method("fast-clipping", paper="arXiv:2009.03106", family="engine")
def fast_clipping(clip: float = 1.0, lr: float = 1.0, momentum: float = 0.9, weight_decay: float = 0.0) -> Method:
    """DP-SGD by another engine: the same mechanism, so accuracies differ by the draw of batches and noise alone."""
    return Method(engine=Ghost(), clip=Flat(clip), optimizer=SGD(lr, momentum, weight_decay=weight_decay))
