"""Canonical content: one order and one digest for the same examples, whatever file they came from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
KEYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True, eq=False)
class Raw:
    """Arrays as read, in any order: x uint8 ``[N, C, H, W]`` or float32 ``[N, ...]``, y int64 ``[N]``."""

    x_train: Array
    y_train: Array
    x_test: Array
    y_test: Array
    source: str
    classes: int


def _bytes(array: Array) -> memoryview:
    """The array's bytes, little-endian, row by row."""
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).data


def row_hashes(x: Array, y: Array) -> list[bytes]:
    """SHA-256 of each example: its bytes, then its label as a little-endian int64."""
    if len(x) == 0:
        return []
    data, labels = _bytes(x), _bytes(y.astype(np.int64))
    step = len(data) // len(x)
    hashes = []
    for i in range(len(x)):
        h = hashlib.sha256(data[i * step : (i + 1) * step])
        h.update(labels[i * 8 : (i + 1) * 8])
        hashes.append(h.digest())
    return hashes


def _sorted(x: Array, y: Array) -> tuple[Array, Array, list[bytes]]:
    # Identical rows have identical hashes, so it does not matter which of them comes first.
    hashes = row_hashes(x, y)
    order = sorted(range(len(hashes)), key=hashes.__getitem__)
    return _rows(x, order), _rows(y, order), [hashes[i] for i in order]


def _rows(array: Array, order: list[int]) -> Array:
    """Rows in fresh memory with the strides of C order; a model's arithmetic may depend on strides."""
    rows = np.empty((len(order), *array.shape[1:]), array.dtype)
    return np.take(np.ascontiguousarray(array), order, axis=0, out=rows)


def canonical(raw: Raw, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Raw, str]:
    """The same examples, train and test each sorted by content hash, and the digest (16 hex digits).

    The digest covers pixels, labels, the split, the number of classes and the normalisation: all that a
    model sees.
    """
    x_train, y_train, train = _sorted(raw.x_train, raw.y_train)
    x_test, y_test, test = _sorted(raw.x_test, raw.y_test)
    header = {
        "classes": raw.classes,
        "dtype": str(raw.x_train.dtype),
        "mean": mean,
        "shape": raw.x_train.shape[1:],
        "std": std,
        "test": len(test),
        "train": len(train),
    }
    total = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for h in (*train, *test):
        total.update(h)
    return Raw(x_train, y_train, x_test, y_test, raw.source, raw.classes), total.hexdigest()[:16]


def stratified(x: Array, y: Array, train: float, source: str, classes: int) -> Raw:
    """Split by content hash: the share ``train`` of each class, rounded down, goes into train."""
    hashes = row_hashes(x, y)
    first: list[int] = []
    second: list[int] = []
    for label in range(classes):
        members = sorted(np.flatnonzero(y == label).tolist(), key=hashes.__getitem__)
        cut = int(len(members) * train)
        first += members[:cut]
        second += members[cut:]
    return Raw(x[first], y[first], x[second], y[second], source, classes)
