"""Group-wise clipping: a threshold for each layer, following a quantile of its norms (He et al., ICLR 2023)."""

from typing import Literal

from harness.dp import SGD, GroupWise, Method, Quantile
from harness.registry import method


@method("group-wise", paper="arXiv:2212.01539", family="clipping")
def group_wise(
    clip: float = 1.0,
    groups: str = "layer",
    allocation: Literal["global", "equal", "dimension", "optimal"] = "global",
    adaptive: bool = True,
    quantile: float = 0.5,
    rate: float = 0.3,
    budget: float = 0.01,
    lr: float = 1.0,
    momentum: float = 0.9,
) -> Method:
    """Each layer (or block, parameter, shard, list of names) clipped by itself, to fixed or adaptive thresholds."""
    shared = {"clip": clip, "by": groups, "allocation": allocation}
    adapting = {"quantile": quantile, "rate": rate, "budget": budget}
    rule = Quantile(**shared, **adapting) if adaptive else GroupWise(**shared)
    return Method(clip=rule, optimizer=SGD(lr, momentum))
