"""Arrays from files: NumPy archives with Keras' key names, and IDX files (the format of MNIST)."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from pathlib import Path

import numpy as np

from harness.data.canonical import Array, Raw
from harness.data.source import DatasetError

KEYS = ("x_train", "y_train", "x_test", "y_test")
_CHANNELS = (1, 3, 4)


def read_npz(path: Path) -> Raw:
    """A ``.npz`` with ``x_train y_train x_test y_test`` and, if wanted, ``classes`` (their names).

    Images: uint8 ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]``. Other inputs: floats ``[N, ...]``.
    Labels: integers from 0, ``[N]`` or ``[N, 1]``. Raises :class:`DatasetError` naming the file and the
    key.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
            absent = [key for key in KEYS if key not in names]
            if absent:
                raise DatasetError(
                    f"{path}: no array {', '.join(absent)}; an .npz needs {', '.join(KEYS)} and has "
                    f"{', '.join(sorted(names)) or 'nothing'}"
                )
            found = {key: file[key] for key in (*KEYS, "classes") if key in names}
    except (zipfile.BadZipFile, EOFError, AttributeError, TypeError) as error:
        raise DatasetError(f"{path}: not an .npz file ({error}); write it with numpy.savez") from error
    except ValueError as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(
            f"{path}: cannot be read ({error}); write it with numpy.savez, no objects"
        ) from error
    x_train = _inputs(found["x_train"], f"{path}: x_train")
    x_test = _inputs(found["x_test"], f"{path}: x_test")
    y_train = _labels(found["y_train"], len(x_train), f"{path}: y_train")
    y_test = _labels(found["y_test"], len(x_test), f"{path}: y_test")
    if x_train.shape[1:] != x_test.shape[1:] or x_train.dtype != x_test.dtype:
        raise DatasetError(
            f"{path}: x_train holds {x_train.dtype} {x_train.shape[1:]}, "
            f"x_test {x_test.dtype} {x_test.shape[1:]}; they must be alike"
        )
    if len(x_train) == 0 or len(x_test) == 0:
        raise DatasetError(f"{path}: x_train and x_test must hold at least one example each")
    highest = int(max(y_train.max(), y_test.max())) + 1
    classes = found["classes"].size if "classes" in found else max(2, highest)
    if highest > classes:
        raise DatasetError(f"{path}: label {highest - 1}, but classes names only {classes}")
    return Raw(x_train, y_train, x_test, y_test, f"file {path.name}", classes)


def _inputs(x: Array, where: str) -> Array:
    """Images to uint8 ``[N, C, H, W]``, anything else to float32."""
    if x.ndim == 4 and x.shape[-1] in _CHANNELS:  # Keras: channels last
        x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    if x.dtype == np.uint8:
        if x.ndim == 3:
            x = x[:, None]
        if x.ndim != 4:
            raise DatasetError(
                f"{where} is uint8 {list(x.shape)}; images are [N, H, W], [N, H, W, C] or [N, C, H, W]"
            )
        return x
    if not np.issubdtype(x.dtype, np.floating):
        raise DatasetError(f"{where} is {x.dtype}; save images as uint8 and other inputs as float32")
    if x.ndim < 2:
        raise DatasetError(f"{where} has shape {list(x.shape)}; write [N, features] or [N, channels, ...]")
    if not np.isfinite(x).all():
        raise DatasetError(f"{where} holds NaN or infinity; clean it first")
    return x.astype(np.float32)


def _labels(y: Array, n: int, where: str) -> Array:
    if y.shape not in ((n,), (n, 1)):
        raise DatasetError(
            f"{where} has shape {list(y.shape)} for {n} examples; write one class number each, [{n}]"
        )
    if not np.issubdtype(y.dtype, np.integer):
        raise DatasetError(f"{where} is {y.dtype}; labels are whole numbers from 0")
    y = y.reshape(-1).astype(np.int64)
    if n and int(y.min()) < 0:
        raise DatasetError(f"{where} holds the label {int(y.min())}; labels start at 0")
    return y


IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def read_idx(path: Path) -> Array:
    """One IDX file of unsigned bytes, gzipped if its name ends in ``.gz``."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DatasetError(f"{path}: damaged ({error}); fetch it again") from error
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise DatasetError(f"{path}: not an IDX file of unsigned bytes")
    dims = np.frombuffer(data, ">u4", count=data[3], offset=4).astype(np.int64)
    start = 4 + 4 * data[3]
    if len(data) - start != int(dims.prod()):
        raise DatasetError(
            f"{path}: {len(data) - start} bytes where {dims.tolist()} are announced; the file is cut"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(dims)


def read_idx_folder(files: tuple[Path, ...], source: str) -> Raw:
    """The four files of :data:`IDX_FILES`, in that order, as images ``[N, 1, H, W]`` with ten classes."""
    x_train, y_train, x_test, y_test = (read_idx(file) for file in files)
    return Raw(
        x_train[:, None],
        y_train.astype(np.int64),
        x_test[:, None],
        y_test.astype(np.int64),
        source,
        classes=10,
    )
