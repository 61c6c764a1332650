"""Optimizers: from a public gradient to the next weights."""

from harness.dp.optimizer.corrected import AdamBC
from harness.dp.optimizer.filter import LowPass
from harness.dp.optimizer.optimizer import LAMB, SGD, Adam, EverySecond, Optimizer, Scheduled
from harness.dp.optimizer.solve import LeastSquares, Preconditioned

__all__ = [
    "LAMB",
    "SGD",
    "Adam",
    "AdamBC",
    "EverySecond",
    "LeastSquares",
    "LowPass",
    "Optimizer",
    "Preconditioned",
    "Scheduled",
]
