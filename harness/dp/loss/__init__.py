"""Losses: what is minimised, for each example or over a batch, and how a trained model is judged."""

from harness.dp.loss.contrast import InfoNCE, Rotations
from harness.dp.loss.loss import Batch, CrossEntropy, Data, Loss, Split, Views
from harness.dp.loss.one_vs_all import Sigmoid, Squares

__all__ = ["Batch", "CrossEntropy", "Data", "InfoNCE", "Loss", "Rotations", "Sigmoid", "Split", "Squares", "Views"]
