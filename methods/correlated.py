"""DP-SGD whose noise is correlated from step to step, so that what adds up over steps is small."""

from typing import Literal

from harness.dp import SGD, Banded, BandedInverse, Cyclic, CyclicPoisson, Flat, Method, TreeAggregation
from harness.registry import method


@method("dp-bandmf", paper="arXiv:2306.08153", family="noise")
def dp_bandmf(
    bands: int = 8,
    order: Literal["poisson", "cyclic"] = "poisson",
    clip: float = 1.0,
    lr: float = 1.0,
    momentum: float = 0.9,
) -> Method:
    """Banded matrix factorisation, its matrix chosen for the run; under cyclic Poisson sampling, or in one order."""
    sampler = CyclicPoisson(bands) if order == "poisson" else Cyclic()
    return Method(noise=Banded(bands), sampler=sampler, clip=Flat(clip), optimizer=SGD(lr, momentum))


@method("dp-banded-inverse", paper="arXiv:2505.12128", family="noise")
def dp_banded_inverse(bands: int = 8, clip: float = 1.0, lr: float = 1.0, momentum: float = 0.9) -> Method:
    """BISR: the inverse of the matrix is banded, so past noise is drawn again and none is kept; in one order."""
    return Method(noise=BandedInverse(bands), sampler=Cyclic(), clip=Flat(clip), optimizer=SGD(lr, momentum))


@method("dp-ftrl", paper="arXiv:2103.00039", family="noise")
def dp_ftrl(
    groups: int = 8,
    order: Literal["poisson", "cyclic"] = "poisson",
    clip: float = 1.0,
    lr: float = 1.0,
    momentum: float = 0.9,
) -> Method:
    """Tree aggregation, a tree for each cycle: the first method of this kind, and its control."""
    sampler = CyclicPoisson(groups) if order == "poisson" else Cyclic()
    return Method(noise=TreeAggregation(), sampler=sampler, clip=Flat(clip), optimizer=SGD(lr, momentum))
