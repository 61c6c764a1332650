"""Clipping rules: from per-example gradient norms to the weights of the clipped sum."""

from harness.dp.clip.flat import Flat, Unclipped
from harness.dp.clip.grouped import GroupWise, Quantile
from harness.dp.clip.refined import Refined
from harness.dp.clip.rule import Clip, State
from harness.dp.clip.scaling import PSAC, PSASC, Automatic

__all__ = [
    "PSAC", "PSASC", "Automatic", "Clip", "Flat", "GroupWise", "Quantile", "Refined", "State", "Unclipped",
]  # fmt: skip
