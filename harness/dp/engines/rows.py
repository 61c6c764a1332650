"""Norms and sums of rows of per-example gradients, accurate enough to bound."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.dp.native import kernels

ONEDNN = 1 << 22  # multiply-adds from which oneDNN's way of preparing a product pays
HALF = (torch.float16, torch.bfloat16)
AT_ONCE = 32  # rows that are widened at a time


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """On a GPU, products without TF32, whose ten bits would let a clipped gradient exceed its bound by a thousandth."""
    if device.type != "cuda":
        yield
        return
    switches: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def squared_norms(g: Tensor) -> Tensor:
    """Squared l2 norms [B], in float64, of the rows of `g` [B, ...].

    A float32 norm over a million elements is too small by 1e-4, and a clipped gradient then exceeds its bound. The
    kernel has float32 add within short tiles and float64 add the tiles: one pass over memory, right to 7e-7.
    """
    rows = wide(g.reshape(len(g), -1)).contiguous()
    if kernels.serve(rows):
        return kernels.squared_norms(rows)
    return torch.cat([some.double().square().sum(1) for some in rows.split(AT_ONCE)])


def factor_squares(t: Tensor) -> Tensor:
    """Squared l2 norms [B] of rows [B, ...] that are a factor of a product: in float64, so that none vanishes."""
    rows = t.reshape(len(t), -1)
    if kernels.serve(rows) and rows.is_contiguous():
        return kernels.squared_norms(rows)
    return rows.double().square().sum(1)


def weighted_rows(v: Tensor, g: Tensor, out: Tensor | None = None) -> Tensor:
    """The sum over i of v[i] * g[i], in float64, of the shape of one row of `g` [B, ...]; into `out` if given.

    Float32 rounds a sum to about 1e-7 of its own length. With one example more, other rounding errors make up a part of
    the difference: of 50,000 gradients that point alike, up to a hundredth of the bound. In float64 it is each
    contribution, by itself, that was rounded.
    """
    v = v.double()
    if kernels.serve(g) and g.is_contiguous():
        return kernels.weighted_rows(v, g, out)
    size = g.shape[1:].numel()
    sums = torch.zeros(size, dtype=torch.float64, device=g.device)
    for weights, rows in zip(v.split(AT_ONCE), g.reshape(len(g), size).split(AT_ONCE), strict=True):
        sums.addmv_(rows.double().mT, weights)
    return sums.view(g.shape[1:]) if out is None else out.copy_(sums.view(g.shape[1:]))


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
    """x [..., d] times the transpose of weight [p, d], plus bias [p], plus `plus` [..., p].

    Large ones on a CPU are asked of oneDNN directly: the BLAS behind F.linear does not use the widest instructions of
    every processor, and takes twice as long on some.
    """
    served = x.is_cpu and x.dtype is weight.dtype is torch.float32 and x.numel() * len(weight) >= ONEDNN
    if not (served and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        found = F.linear(x, weight, bias)
        return found if plus is None else found + plus
    if plus is None:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, plus, weight, bias, "add")


def wide(t: Tensor) -> Tensor:
    """`t`, in float32 if it was narrower: norms are never computed in half precision."""
    return t.float() if t.dtype in HALF else t
