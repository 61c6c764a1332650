"""The mathematics of differentially private training.

The names below are looked up on first use: reading this package costs nothing, and the static map says which room a
name lives in.
"""

from importlib import import_module
from typing import Any

_WHERE = {
    "Layout": "tree",
    "Tree": "tree",
    "Release": "release",
    "Relation": "release",
    "Bounded": "release",
    "Observed": "release",
    "Batch": "loss.loss",
    "Loss": "loss.loss",
    "CrossEntropy": "loss.loss",
    "Views": "loss.loss",
    "Focal": "loss.focal",
    "Mixed": "loss.mixed",
    "InfoNCE": "loss.contrast",
    "Rotations": "loss.contrast",
    "Sigmoid": "loss.one_vs_all",
    "Squares": "loss.one_vs_all",
    "Clip": "clip",
    "Unclipped": "clip",
    "Flat": "clip",
    "Refined": "clip",
    "Automatic": "clip",
    "PSAC": "clip",
    "PSASC": "clip",
    "GroupWise": "clip",
    "Quantile": "clip",
    "Noise": "noise",
    "NoNoise": "noise",
    "Gaussian": "noise",
    "Correlated": "noise",
    "Banded": "noise",
    "BandedInverse": "noise",
    "TreeAggregation": "noise",
    "Sampler": "sampler",
    "Poisson": "sampler",
    "Fixed": "sampler",
    "Full": "sampler",
    "Shuffle": "sampler",
    "Cyclic": "sampler",
    "CyclicPoisson": "sampler",
    "TruncatedPoisson": "sampler",
    "Optimizer": "optimizer.optimizer",
    "SGD": "optimizer.optimizer",
    "Adam": "optimizer.optimizer",
    "AdamBC": "optimizer.corrected",
    "LowPass": "optimizer.filter",
    "LAMB": "optimizer.optimizer",
    "Scheduled": "optimizer.optimizer",
    "EverySecond": "optimizer.optimizer",
    "Preconditioned": "optimizer.solve",
    "LeastSquares": "optimizer.solve",
    "Path": "path",
    "EMA": "path",
    "Sharp": "path",
    "LookAhead": "path",
    "Midpoint": "path",
    "Mix": "path",
    "Claim": "claim",
    "Method": "method",
    "Ledger": "account",
    "Engine": "engines.engine",
    "Plain": "engines.plain",
    "Loop": "engines.loop",
    "Vmap": "engines.vmap",
    "Ghost": "engines.taped.ghost",
    "BookKeeping": "engines.taped.bookkeeping",
    "Auto": "engines.auto",
    "Feedback": "engines.feedback",
    "Pairs": "engines.pairs",
    "Whole": "engines.whole",
    "WithGram": "engines.moments",
    "Moments": "engines.moments",
}

__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
