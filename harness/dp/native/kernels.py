"""The kernels as functions of tensors. Each returns None where there is no kernel for what it was given."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from harness.dp.native import library

_LONG, _INT, _DOUBLE, _AT = ctypes.c_long, ctypes.c_int, ctypes.c_double, ctypes.c_void_p


class _Shape(ctypes.Structure):
    _fields_ = [
        (name, _LONG)
        for name in (
            "height", "width", "channels", "rows", "columns", "outputs", "kernel_rows", "kernel_columns", "stride_rows",
            "stride_columns", "padding_rows", "padding_columns", "dilation_rows", "dilation_columns",
        )
    ]  # fmt: skip


class _Strides(ctypes.Structure):
    _fields_ = [(name, _LONG) for name in ("example", "channel", "row", "column")]


@cache
def _typed() -> ctypes.CDLL | None:
    """The library, with the types of its functions' arguments."""
    found = library()
    if found is not None:
        shape = ctypes.POINTER(_Shape)
        found.squared_norms.argtypes = (_AT, _AT, _LONG, _LONG, _INT)
        found.weighted_rows.argtypes = (_AT, _AT, _AT, _LONG, _LONG, _LONG, _LONG, _INT)
        found.convolution_rows.argtypes = (_AT, _Strides, _AT, _Strides, _AT, _AT, _LONG, shape, _INT)
        found.convolution_gram.argtypes = (_AT, _AT, _AT, _AT, _LONG, shape, _INT)
        found.group_norm_rows.argtypes = (_AT, _AT, _AT, _AT, _LONG, _LONG, _LONG, _LONG, _DOUBLE, _INT)
        found.group_norm_rows_last.argtypes = found.group_norm_rows.argtypes
        found.layer_norm_rows.argtypes = (_AT, _AT, _AT, _AT, _LONG, _LONG, _LONG, _DOUBLE, _INT, _INT)
        for name in (
            "squared_norms", "weighted_rows", "convolution_gram", "group_norm_rows", "group_norm_rows_last", "layer_norm_rows"
        ):  # fmt: skip
            getattr(found, name).restype = None
    return found


def serve(*tensors: Tensor) -> ctypes.CDLL | None:
    """The compiled kernels, where they can work on these tensors: float32, on the CPU."""
    for t in tensors:
        if t.dtype is not torch.float32 or not t.is_cpu:
            return None
    return _typed()


def squared_norms(rows: Tensor) -> Tensor | None:
    """Squared norms [N], in float64, of the rows of a contiguous [N, length]."""
    kernels = serve(rows)
    if kernels is None or not rows.is_contiguous():
        return None
    squares = torch.empty(rows.shape[0], dtype=torch.float64)
    kernels.squared_norms(rows.data_ptr(), squares.data_ptr(), *rows.shape, torch.get_num_threads())
    return squares


def weighted_rows(v: Tensor, rows: Tensor, out: Tensor | None, swap: bool = False) -> Tensor | None:
    """The sum over i of v[i] * rows[i], into `out` if given.

    `swap`: the rows [N, p, ..., C] come with channels last, and the sum [p, C, ...] goes without.
    """
    kernels = serve(v, rows)
    if kernels is None or not rows.is_contiguous() or not v.is_contiguous():
        return None
    n, shape = len(rows), rows.shape[1:]
    if swap:
        shape = torch.Size((shape[0], shape[-1], *shape[1:-1]))
    if out is None or out.dtype is not torch.float32 or not out.is_contiguous():
        total = rows.new_empty(shape)
    else:
        total = out
    outputs, channels = (shape[0], shape[1]) if swap else (1, shape.numel())
    kernels.weighted_rows(
        v.data_ptr(), rows.data_ptr(), total.data_ptr(), n, outputs, shape.numel() // max(1, outputs * channels),
        channels, torch.get_num_threads(),
    )  # fmt: skip
    return total if out is None or out is total else out.copy_(total)


def convolution_rows(
    x: Tensor,
    g: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[Tensor, Tensor] | None:
    """Per-example weight gradients [N, p, kh, kw, C], channels last, and their squared norms [N] in float64.

    From inputs x [N, C, H, W] and output gradients g [N, p, h, w] of an ungrouped convolution, or of one of lines, all
    without the heights; any memory layout. Raises MemoryError.
    """
    kernels = serve(x, g)
    if kernels is None or len(kernel) > 2:
        return None
    line = len(kernel) == 1
    if line:
        x, g = x.unsqueeze(2), g.unsqueeze(2)
        kernel, stride, padding, dilation = (1, *kernel), (1, *stride), (0, *padding), (1, *dilation)
    n, channels, height, width = x.shape
    _, outputs, rows, columns = g.shape
    out = x.new_empty(n, outputs, *kernel, channels)
    squares = torch.empty(n, dtype=torch.float64)
    shape = _Shape(height, width, channels, rows, columns, outputs, *kernel, *stride, *padding, *dilation)
    done = kernels.convolution_rows(
        x.data_ptr(), _Strides(*x.stride()), g.data_ptr(), _Strides(*g.stride()), out.data_ptr(), squares.data_ptr(),
        n, ctypes.byref(shape), torch.get_num_threads(),
    )  # fmt: skip
    if not done:
        raise MemoryError(f"no memory for {math.prod(x.shape[1:])} floats in each thread")
    return out.squeeze(2) if line else out, squares


def outer_rows(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor] | None:
    """sum_t g_t a_t^T, [N, p, d], and squared norms [N] in float64, from a [N, T, d] and g [N, T, p]."""
    found = convolution_rows(a.mT, g.mT, (1,), (1,), (0,), (1,))
    return None if found is None else (found[0].squeeze(2), found[1])


def convolution_gram(
    k: Tensor,
    g: Tensor,
    extent: Sequence[int],
    positions: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor] | None:
    """Squared norms [N] of a convolution's per-example weight gradients from two Gram matrices, and their bounds [N].

    `k` [N, M, M] of the pixels of padded inputs, M = H * W being their `extent`; `g` [N, T, T] of the output gradients
    at the T = h * w `positions`. The bound is (sum_t |patch_t| |g_t|)^2: rounding is relative to it.
    """
    kernels = serve(k, g)
    if kernels is None:
        return None
    squares, bound = (torch.empty(len(k), dtype=torch.float64) for _ in range(2))
    shape = _Shape(*extent, 0, *positions, 0, *kernel, *stride, 0, 0, *dilation)
    kernels.convolution_gram(
        k.data_ptr(), g.data_ptr(), squares.data_ptr(), bound.data_ptr(),
        len(k), ctypes.byref(shape), torch.get_num_threads(),
    )  # fmt: skip
    return squares, bound


def group_norm_rows(x: Tensor, g: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor] | None:
    """Per-example gradients [N, C] of scale and shift of a group norm, from its input and output gradient [N, C, ...].

    The statistics are those of the input itself. Either layout, channels first or last.
    """
    kernels = serve(x, g)
    if kernels is None:
        return None
    n, channels = x.shape[:2]
    x, g = x.reshape(n, channels, -1), g.reshape(n, channels, -1)
    last = not x.is_contiguous() and x.mT.is_contiguous()
    x, g = (t.mT.contiguous() if last else t.contiguous() for t in (x, g))
    weight, bias = x.new_empty(n, channels), x.new_empty(n, channels)
    run = kernels.group_norm_rows_last if last else kernels.group_norm_rows
    run(
        x.data_ptr(), g.data_ptr(), weight.data_ptr(), bias.data_ptr(), n, groups, channels // groups,
        x.shape[1 if last else 2], eps, torch.get_num_threads(),
    )  # fmt: skip
    return weight, bias


def layer_norm_rows(
    x: Tensor, g: Tensor, examples: int, features: int, eps: float, centred: bool = True
) -> tuple[Tensor, Tensor] | None:
    """Per-example gradients [examples, features] of scale and shift of a layer norm over the last `features` elements.

    From its input and output gradient. `centred` is False for RMSNorm.
    """
    kernels = serve(x, g)
    if kernels is None:
        return None
    x, g = x.contiguous(), g.contiguous()
    weight, bias = x.new_empty(examples, features), x.new_empty(examples, features)
    kernels.layer_norm_rows(
        x.data_ptr(), g.data_ptr(), weight.data_ptr(), bias.data_ptr(), examples, x.numel() // (examples * features),
        features, eps, centred, torch.get_num_threads(),
    )  # fmt: skip
    return weight, bias
