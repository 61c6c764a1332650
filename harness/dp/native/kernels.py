"""The kernels as functions of tensors. Each returns None where there is no kernel for what it was given."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from harness.dp.native import library


class _Shape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_long)
        for name in (
            "height", "width", "channels", "rows", "columns", "outputs", "kernel_rows", "kernel_columns", "stride_rows",
            "stride_columns", "padding_rows", "padding_columns", "dilation_rows", "dilation_columns",
        )
    ]  # fmt: skip


class _Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("example", "channel", "row", "column")]


def serve(*tensors: Tensor) -> ctypes.CDLL | None:
    """The compiled kernels, where they can work on these tensors: float32, on the CPU."""
    if all(t.dtype is torch.float32 and t.device.type == "cpu" for t in tensors):
        return library()
    return None


def _at(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def convolution_rows(
    x: Tensor,
    g: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[Tensor, Tensor] | None:
    """Per-example weight gradients [N, p, kh, kw, C], channels last (without kh for lines), and their squared norms [N] in float64.

    From inputs x [N, C, H, W] and output gradients g [N, p, h, w] of an ungrouped convolution, or the same without H
    and h; any memory layout.
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
        _at(x), _Strides(*x.stride()), _at(g), _Strides(*g.stride()), _at(out), _at(squares),
        ctypes.c_long(n), ctypes.byref(shape), ctypes.c_int(torch.get_num_threads()),
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
    extent: tuple[int, int],
    positions: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
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
        _at(k), _at(g), _at(squares), _at(bound),
        ctypes.c_long(len(k)), ctypes.byref(shape), ctypes.c_int(torch.get_num_threads()),
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
    positions = x.shape[1 if last else 2]
    run = kernels.group_norm_rows_last if last else kernels.group_norm_rows
    run(
        _at(x), _at(g), _at(weight), _at(bias), ctypes.c_long(n), ctypes.c_long(groups),
        ctypes.c_long(channels // groups), ctypes.c_long(positions), ctypes.c_double(eps),
        ctypes.c_int(torch.get_num_threads()),
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
        _at(x), _at(g), _at(weight), _at(bias), ctypes.c_long(examples),
        ctypes.c_long(x.numel() // (examples * features)), ctypes.c_long(features), ctypes.c_double(eps),
        ctypes.c_int(centred), ctypes.c_int(torch.get_num_threads()),
    )  # fmt: skip
    return weight, bias
