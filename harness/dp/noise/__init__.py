"""Noise: the only door between a private value and a public one."""

from harness.dp.noise.correlated import Banded, BandedInverse, Correlated, TreeAggregation
from harness.dp.noise.noise import Gaussian, Noise, NoNoise

__all__ = ["Banded", "BandedInverse", "Correlated", "Gaussian", "NoNoise", "Noise", "TreeAggregation"]
