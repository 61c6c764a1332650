"""Paths: where to differentiate, where to step from, and which weights to keep. Public values only."""

from harness.dp.path.mix import Midpoint, Mix
from harness.dp.path.sharp import LookAhead, Sharp
from harness.dp.path.straight import EMA, Path

__all__ = ["EMA", "LookAhead", "Midpoint", "Mix", "Path", "Sharp"]
