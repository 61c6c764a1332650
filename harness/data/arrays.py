"""Arrays from files: NumPy archives with Keras' key names, and IDX files (the format of MNIST)."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from harness.data.canonical import KEYS, Array, Raw
from harness.data.source import DatasetError

_CHANNELS = (1, 3, 4)


def read_npz(path: Path, layout: str | None = None) -> Raw:
    """A ``.npz`` with ``x_train y_train x_test y_test`` and, if wanted, ``classes`` (their names).

    Images: uint8 ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]``. Other inputs: floats ``[N, ...]``, as they are.
    ``layout`` says where the channels of four axes are, "nchw" or "nhwc"; it is needed where the shape does not tell.
    Labels: integers from 0 without gaps (with ``classes`` some may be absent), ``[N]`` or ``[N, 1]``. Raises
    :class:`DatasetError` naming the file and the key.
    """
    found = _arrays(path)
    x_train = _inputs(found["x_train"], f"{path}: x_train", layout)
    x_test = _inputs(found["x_test"], f"{path}: x_test", layout)
    y_train = _labels(found["y_train"], len(x_train), f"{path}: y_train")
    y_test = _labels(found["y_test"], len(x_test), f"{path}: y_test")
    if x_train.shape[1:] != x_test.shape[1:] or x_train.dtype != x_test.dtype:
        raise DatasetError(
            f"{path}: x_train holds {x_train.dtype} {x_train.shape[1:]}, "
            f"x_test {x_test.dtype} {x_test.shape[1:]}; they must be alike"
        )
    if len(x_train) == 0 or len(x_test) == 0:
        raise DatasetError(f"{path}: x_train and x_test must hold at least one example each")
    if x_train[0].size == 0:
        raise DatasetError(f"{path}: x_train has shape {list(x_train.shape)}, examples without a number")
    highest = int(max(y_train.max(), y_test.max())) + 1
    if "classes" not in found:
        _refuse_gaps(path, y_train, y_test)
    classes = found["classes"].size if "classes" in found else max(2, highest)
    if highest > classes:
        raise DatasetError(
            f"{path}: label {highest - 1}, but classes names only {classes}; labels are 0 to {classes - 1}"
        )
    return Raw(x_train, y_train, x_test, y_test, f"file {path.name}", classes)


def _arrays(path: Path) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
            absent = [key for key in KEYS if key not in names]
            if absent:
                raise DatasetError(
                    f"{path}: no array {', '.join(absent)}; an .npz needs {', '.join(KEYS)} and has "
                    f"{', '.join(sorted(names)) or 'nothing'}"
                )
            return {key: file[key] for key in (*KEYS, "classes") if key in names}
    except (DatasetError, MemoryError):
        raise
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (zipfile.BadZipFile, EOFError, AttributeError, TypeError) as error:
        raise DatasetError(f"{path}: not an .npz file ({error}); write it with numpy.savez") from error
    except Exception as error:  # damaged files make zipfile, zlib and NumPy raise all sorts of things
        raise DatasetError(f"{path}: cannot be read ({error}); write it with numpy.savez, no objects") from error


def _inputs(x: Array, where: str, layout: str | None) -> Array:
    """Images to uint8 ``[N, C, H, W]``, anything else to float32."""
    if layout is not None and x.ndim != 4:
        raise DatasetError(f"{where} has shape {list(x.shape)}; layout={layout} is for four axes, leave it out")
    if x.dtype == np.uint8:
        if x.ndim not in (3, 4):
            raise DatasetError(f"{where} is uint8 {list(x.shape)}; images are [N, H, W], [N, H, W, C] or [N, C, H, W]")
        return _channels_first(x, where, layout) if x.ndim == 4 else x[:, None]
    if not np.issubdtype(x.dtype, np.floating):
        raise DatasetError(f"{where} is {x.dtype}; save images as uint8 and other inputs as float32")
    if x.ndim < 2:
        raise DatasetError(f"{where} has shape {list(x.shape)}; write [N, features] or [N, channels, ...]")
    narrow = _float32(x, where)
    return _channels_first(narrow, where, layout) if x.ndim == 4 else narrow


def _channels_first(x: Array, where: str, layout: str | None) -> Array:
    """Four axes with the channels in front, as ``layout`` says or as only one reading of the shape allows."""
    first, last = x.shape[1] in _CHANNELS, x.shape[3] in _CHANNELS
    if layout is None:
        image = x.dtype == np.uint8
        if (first and last) or (image and not first and not last) or (last and not image):
            raise DatasetError(
                f"{where} has shape {list(x.shape)}, which does not tell where the channels are: write ?layout=nchw "
                f"if {x.shape[1]} is their number (then {x.shape[2]} rows of {x.shape[3]}), ?layout=nhwc if "
                f"{x.shape[3]} is (then {x.shape[1]} rows of {x.shape[2]})"
            )
        layout = "nhwc" if last else "nchw"
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if layout == "nhwc" else x


def _float32(x: Array, where: str) -> Array:
    """The same numbers in float32; refuses those that are not finite, or would become infinite or zero."""
    _refuse(~np.isfinite(x), x, where, "clean it first: every number must be finite")
    with np.errstate(over="ignore", under="ignore"):
        narrow: Array = x.astype(np.float32)
    _refuse(~np.isfinite(narrow), x, where, "too large for float32; scale the data by a public constant")
    lost = (narrow == 0) & (x != 0)
    _refuse(lost, x, where, "too small for float32, where it is 0; scale the data, or write 0 if that is meant")
    return narrow


def _refuse(wrong: Array, x: Array, where: str, what: str) -> None:
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise DatasetError(f"{where}{list(place)} is {_shown(x[place])}: {what}")


def _shown(value: Any) -> str:
    return "NaN" if np.isnan(value) else "infinity" if np.isinf(value) else f"{value:g}"


def _labels(y: Array, n: int, where: str) -> Array:
    if y.shape not in ((n,), (n, 1)):
        hint = "; of one-hot rows write y.argmax(1)" if y.ndim == 2 and y.shape[0] == n else ""
        raise DatasetError(
            f"{where} has shape {list(y.shape)} for {n} examples; write one class number each, [{n}]{hint}"
        )
    if not np.issubdtype(y.dtype, np.integer):
        raise DatasetError(f"{where} is {y.dtype}; labels are whole numbers from 0, as in y.astype('int64')")
    y = y.reshape(-1)
    for wrong, what in (
        (y < 0, "labels start at 0"),
        (y > np.iinfo(np.int32).max, "labels are 0 to K - 1 for K classes"),
    ):
        if wrong.any():
            place = int(np.argmax(wrong))
            raise DatasetError(f"{where}[{place}] holds the label {y[place]}; {what}")
    return y.astype(np.int64)


def _refuse_gaps(path: Path, y_train: Array, y_test: Array) -> None:
    """Refuse labels that leave out smaller ones: each would be a class without an example."""
    present = np.unique(np.concatenate([y_train, y_test]))
    absent = np.setdiff1d(np.arange(len(present)), present)
    if not len(absent):
        return
    key, y = ("y_train", y_train) if y_train.max() == present[-1] else ("y_test", y_test)
    place = int(y.argmax())
    if present[0] > 0 and present[-1] - present[0] == len(present) - 1:
        raise DatasetError(
            f"{path}: {key} holds the labels {present[0]} to {present[-1]}; labels start at 0: write "
            f"y - {present[0]}, or save their names, label by label, as classes"
        )
    raise DatasetError(
        f"{path}: {key}[{place}] holds the label {present[-1]}, and no example has the label {absent[0]}; number the "
        f"{len(present)} labels 0 to {len(present) - 1}, or save the names of all as classes"
    )


IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


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
        raise DatasetError(f"{path}: {len(data) - start} bytes where {dims.tolist()} are announced; the file is cut")
    return np.frombuffer(data, np.uint8, offset=start).reshape(dims)


def read_idx_folder(files: tuple[Path, ...], source: str) -> Raw:
    """The four files of :data:`IDX_FILES`, in that order, as images ``[N, 1, H, W]`` with ten classes."""
    x_train, y_train, x_test, y_test = (read_idx(file) for file in files)
    return Raw(x_train[:, None], y_train.astype(np.int64), x_test[:, None], y_test.astype(np.int64), source, classes=10)
