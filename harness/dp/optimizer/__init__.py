"""Optimizers: from a public gradient to the next weights."""

from harness.dp.optimizer.optimizer import LAMB, SGD, Adam, EverySecond, Optimizer, Scheduled
from harness.dp.optimizer.solve import LeastSquares, Preconditioned

__all__ = ["LAMB", "SGD", "Adam", "EverySecond", "LeastSquares", "Optimizer", "Preconditioned", "Scheduled"]
