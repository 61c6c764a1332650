"""Symmetric matrices as vectors of their own: each entry once, lengths kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def packed(square: Tensor) -> Tensor:
    """A symmetric matrix [D, D] as a vector [D (D + 1) / 2]: the upper triangle, off the diagonal times sqrt(2).

    The vector's l2 norm is the matrix' Frobenius norm, so a bound on one is a bound on the other.
    """
    rows, columns = torch.triu_indices(*square.shape, device=square.device)
    return square[rows, columns].mul_(_weights(rows, columns, square))


def unpacked(vector: Tensor) -> Tensor:
    """The symmetric matrix [D, D] of a vector [D (D + 1) / 2]: the inverse of `packed`."""
    side = (math.isqrt(8 * len(vector) + 1) - 1) // 2
    rows, columns = torch.triu_indices(side, side, device=vector.device)
    entries = vector / _weights(rows, columns, vector)
    square = vector.new_empty(side, side)
    square[rows, columns] = entries
    square[columns, rows] = entries
    return square


def _weights(rows: Tensor, columns: Tensor, like: Tensor) -> Tensor:
    return torch.where(rows == columns, 1.0, math.sqrt(2.0)).to(like.dtype)


def spectrum(square: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [D] and eigenvectors [D, D] of the nearest positive semi-definite matrix, in float64.

    The nearest in Frobenius norm to a symmetric matrix has its eigenvectors, and 0 for each negative eigenvalue.
    """
    values, vectors = torch.linalg.eigh(square.double())
    return values.clamp_(min=0.0), vectors


def projected(square: Tensor) -> Tensor:
    """The positive semi-definite matrix nearest to a symmetric one, in float64."""
    values, vectors = spectrum(square)
    return (vectors * values) @ vectors.T
