"""The kernels as functions of tensors, for tensors that they `serve`."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from harness.dp.gaussian import FINE, MARGIN, Grid, decide, tables
from harness.dp.native import library

_LONG, _INT, _DOUBLE, _AT = ctypes.c_long, ctypes.c_int, ctypes.c_double, ctypes.c_void_p
_Key = ctypes.c_uint32 * 8
_Decide = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.POINTER(ctypes.c_uint32))


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
        found.convolution_gram.argtypes = found.convolution_rows.argtypes
        found.group_norm_rows.argtypes = (_AT, _AT, _AT, _AT, _LONG, _LONG, _LONG, _LONG, _DOUBLE, _INT)
        found.group_norm_rows_last.argtypes = found.group_norm_rows.argtypes
        found.layer_norm_rows.argtypes = (_AT, _AT, _AT, _AT, _LONG, _LONG, _LONG, _DOUBLE, _INT, _INT)
        found.lstm_local.argtypes = (*[_AT] * 5, _LONG, _LONG, _LONG, _INT)
        found.lstm_step.argtypes = (*[_AT] * 5, _LONG, _LONG, _INT)
        found.cipher_words.argtypes = (_Key, ctypes.c_uint64, _AT, _LONG, _INT)
        tables_of = ctypes.POINTER(_Tables)
        found.gaussian.argtypes = (
            _Key, ctypes.c_uint64, tables_of, _AT, _AT, _DOUBLE, _DOUBLE, _INT, _AT, _AT, _LONG, _INT,
        )  # fmt: skip
        found.gaussian.restype = ctypes.c_uint64
        for name in ("squared_norms", "group_norm_rows", "cipher_words", "lstm_local", "lstm_step"):
            getattr(found, name).restype = None
    return found


def serve(*tensors: Tensor) -> ctypes.CDLL | None:
    """The compiled kernels, where they can work on these tensors: float32, on the CPU."""
    for t in tensors:
        if t.dtype is not torch.float32 or not t.is_cpu:
            return None
    return _typed()


def _compiled() -> ctypes.CDLL:
    found = _typed()
    if found is None:
        raise RuntimeError("there are no kernels here: ask `serve` first")
    return found


def squared_norms(rows: Tensor) -> Tensor:
    """Squared norms [N], in float64, of the rows of a contiguous [N, length]."""
    squares = torch.empty(rows.shape[0], dtype=torch.float64)
    _compiled().squared_norms(rows.data_ptr(), squares.data_ptr(), *rows.shape, torch.get_num_threads())
    return squares


def weighted_rows(v: Tensor, rows: Tensor, out: Tensor | None, swap: bool = False) -> Tensor:
    """The sum over i of v[i] * rows[i] in float64, into `out` if given; `v` float64, `rows` float32 and contiguous.

    `swap`: the rows [N, p, ..., C] come with channels last, and the sum [p, C, ...] goes without.
    """
    v = v.contiguous()
    n, shape = len(rows), rows.shape[1:]
    if swap:
        shape = torch.Size((shape[0], shape[-1], *shape[1:-1]))
    if out is None or out.dtype is not torch.float64 or not out.is_contiguous():
        total = v.new_empty(shape)
    else:
        total = out
    outputs, channels = (shape[0], shape[1]) if swap else (1, shape.numel())
    done = _compiled().weighted_rows(
        v.data_ptr(), rows.data_ptr(), total.data_ptr(), n, outputs, shape.numel() // max(1, outputs * channels),
        channels, torch.get_num_threads(),
    )  # fmt: skip
    _had(done)
    return total if out is None or out is total else out.copy_(total)


def convolution_rows(
    x: Tensor,
    g: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """Per-example weight gradients [N, p, kh, kw, C], channels last, and their squared norms [N] in float64.

    From inputs x [N, C, H, W] and output gradients g [N, p, h, w] of an ungrouped convolution, or of one of lines, all
    without the heights; any memory layout. Raises MemoryError.
    """
    shape, n, arguments = _convolution(x, g, kernel, stride, padding, dilation)
    kernel_sides = (shape.kernel_rows, shape.kernel_columns)[-len(kernel) :]
    out = x.new_empty(n, shape.outputs, *kernel_sides, shape.channels)
    squares = torch.empty(n, dtype=torch.float64)
    _had(_compiled().convolution_rows(*arguments[:4], out.data_ptr(), squares.data_ptr(), *arguments[4:]))
    return out, squares


def _convolution(
    x: Tensor,
    g: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[_Shape, int, tuple[Any, ...]]:
    """The shape of a convolution, of lines as one of images a single row high; N; and the arguments of its kernels."""
    if len(kernel) == 1:
        x, g = x.unsqueeze(2), g.unsqueeze(2)
        kernel, stride, padding, dilation = (1, *kernel), (1, *stride), (0, *padding), (1, *dilation)
    n, channels, height, width = x.shape
    _, outputs, rows, columns = g.shape
    shape = _Shape(height, width, channels, rows, columns, outputs, *kernel, *stride, *padding, *dilation)
    places = x.data_ptr(), _Strides(*x.stride()), g.data_ptr(), _Strides(*g.stride())
    return shape, n, (*places, n, ctypes.byref(shape), torch.get_num_threads())


def _had(memory: int) -> None:
    if not memory:
        raise MemoryError("no memory for the examples that each thread works on")


def outer_rows(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """sum_t g_t a_t^T, [N, p, d], and squared norms [N] in float64, from a [N, T, d] and g [N, T, p]."""
    rows, squares = convolution_rows(a.mT, g.mT, (1,), (1,), (0,), (1,))
    return rows.squeeze(2), squares


def convolution_gram(
    x: Tensor,
    g: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """Squared norms [N] of what `convolution_rows` makes, without making it, and (sum_t |patch_t| |g_t|)^2 [N].

    In float64, from Gram matrices. Raises MemoryError.
    """
    _, n, arguments = _convolution(x, g, kernel, stride, padding, dilation)
    squares, bound = (torch.empty(n, dtype=torch.float64) for _ in range(2))
    _had(_compiled().convolution_gram(*arguments[:4], squares.data_ptr(), bound.data_ptr(), *arguments[4:]))
    return squares, bound


def outer_gram(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms [N] of sum_t g_t a_t^T, without making it, and (sum_t |a_t| |g_t|)^2 [N]; as `convolution_gram`."""
    return convolution_gram(a.mT, g.mT, (1,), (1,), (0,), (1,))


def group_norm_rows(x: Tensor, g: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Per-example gradients [N, C] of scale and shift of a group norm, from its input and output gradient [N, C, ...].

    The statistics are those of the input itself. Either layout, channels first or last.
    """
    kernels, (n, channels) = _compiled(), x.shape[:2]
    x, g = x.reshape(n, channels, -1), g.reshape(n, channels, -1)
    last = not x.is_contiguous() and x.mT.is_contiguous()
    x, g = (t.mT.contiguous() if last else t.contiguous() for t in (x, g))
    weight, bias = x.new_empty(n, channels), x.new_empty(n, channels)
    run = kernels.group_norm_rows_last if last else kernels.group_norm_rows
    done = run(
        x.data_ptr(), g.data_ptr(), weight.data_ptr(), bias.data_ptr(), n, groups, channels // groups,
        x.shape[1 if last else 2], eps, torch.get_num_threads(),
    )  # fmt: skip
    if last:
        _had(done)
    return weight, bias


def layer_norm_rows(
    x: Tensor, g: Tensor, examples: int, features: int, eps: float, centred: bool = True
) -> tuple[Tensor, Tensor]:
    """Per-example gradients [examples, features] of scale and shift of a layer norm over the last `features` elements.

    From its input and output gradient. `centred` is False for RMSNorm.
    """
    x, g = x.contiguous(), g.contiguous()
    weight, bias = x.new_empty(examples, features), x.new_empty(examples, features)
    done = _compiled().layer_norm_rows(
        x.data_ptr(), g.data_ptr(), weight.data_ptr(), bias.data_ptr(), examples, x.numel() // (examples * features),
        features, eps, centred, torch.get_num_threads(),
    )  # fmt: skip
    _had(done)
    return weight, bias


def cipher_words(key: tuple[int, ...], counter: int, tiles: int) -> Tensor | None:
    """Words of a ChaCha key stream, int32 [tiles, 16, 16], from eight words of key: see `harness.dp.random`."""
    kernels = serve()
    if kernels is None:
        return None
    out = torch.empty(tiles, 16, 16, dtype=torch.int32)
    kernels.cipher_words(_Key(*key), counter, out.data_ptr(), tiles, torch.get_num_threads())
    return out


def gaussian(
    key: tuple[int, ...],
    counter: int,
    n: int,
    value: Tensor | None = None,
    grid: Grid | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, int] | None:
    """`n` integers of a Gaussian (see `harness.dp.gaussian`), or `value` [n], float64, plus these on `grid`; the next
    counter.

    The numbers come as int64, the sum as `dtype`.
    """
    narrow = dtype is torch.float32
    if serve() is None or not (narrow or dtype is torch.float64):
        return None
    out = torch.empty(n, dtype=torch.int64 if grid is None else dtype)
    at = out.data_ptr()
    integers: int | None = at
    places: tuple[Any, ...] = None, 1.0, 1.0, 0, None, None
    if value is not None and grid is not None:
        if not (value.is_cpu and value.is_contiguous()):
            return None
        shift, integers = FINE - grid.bits, None
        places = (value.data_ptr(), 1 / grid.step, grid.step, shift, at if narrow else None, None if narrow else at)
    counter = _compiled().gaussian(
        _Key(*key), counter, ctypes.byref(_tables()), integers, *places, n, torch.get_num_threads()
    )
    _had(counter or not n)
    return out, counter


class _Tables(ctypes.Structure):
    _fields_ = [
        *((name, _AT) for name in ("boxes", "thresholds", "aliases", "heights")),
        ("margin", _DOUBLE),
        ("decide", _Decide),
    ]


@cache
def _tables() -> _Tables:
    pointers = (t.data_ptr() for t in tables()[:4])
    return _Tables(*pointers, MARGIN, _Decide(lambda block: decide(block[:16])))


def lstm_local(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Local derivatives of an LSTM's steps, from what its gates' functions get, [T, N, 4, h], and c_0 [N, h].

    In place of `gates`: d c_t / d (i, f, g) and d h_t / d o, before these functions. Returns d h_t / d c_t, f and h_t,
    [T, N, h] each; `cell` is used up. All contiguous.
    """
    steps, rows, _, h = gates.shape
    slope, forget, shown = (gates.new_empty(steps, rows, h) for _ in range(3))
    _compiled().lstm_local(
        gates.data_ptr(), cell.data_ptr(), slope.data_ptr(), forget.data_ptr(), shown.data_ptr(), steps, rows, h,
        torch.get_num_threads(),
    )  # fmt: skip
    return slope, forget, shown


def lstm_step(gates: Tensor, dh: Tensor, slope: Tensor, forget: Tensor, dc: Tensor) -> None:
    """One step back from dh and dc [N, h]: `gates` [N, 4, h] become gradients, dc that at the step before, in place."""
    dh = dh.contiguous()
    _compiled().lstm_step(
        gates.data_ptr(), dh.data_ptr(), slope.data_ptr(), forget.data_ptr(), dc.data_ptr(), *dc.shape,
        torch.get_num_threads(),
    )  # fmt: skip
