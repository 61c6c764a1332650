"""Pictures to compute features of, in canonical order: held in memory, or read from a folder file by file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from harness import registry
from harness.data import catalog
from harness.data.canonical import Array
from harness.data.dataset import Facts, Split
from harness.data.own import class_names, labelled_files, open_picture, picture_folder
from harness.data.source import DatasetError, DatasetMissing, Places, files_stamp, kept, kept_at
from harness.dp import cache
from harness.provenance.measure import cores

if TYPE_CHECKING:
    from torch import Tensor

# Part of the cache key: raise it when the digest or the order of a folder changes.
FORMAT = 2
# Part of the digest of a folder, which covers the files: raise it when the same files give other pixels.
DECODING = "pixels 2"

# The files of each split with their classes, in order of content hashes.
Files = dict[Split, list[tuple[str, int]]]


@dataclass(frozen=True)
class Base:
    """A data set of pictures that features are made of.

    ``facts.input_shape`` is ``(C, H, W)``, and ``(3, 0, 0)`` where the pictures are of several sizes.
    """

    facts: Callable[[], Facts]
    open: Callable[[], Pictures]
    missing: Callable[[], DatasetMissing | None]


def base(spec: str, root: Places) -> Base:
    """The data set of pictures called ``spec``, without options. Raises the registry's errors for the name."""
    entry = registry.resolve("dataset", spec)
    path = registry.split_name(spec)[1]
    if entry.name == "imagefolder" and path is not None:
        return Base(
            facts=lambda: _known(picture_folder(path, root)),
            open=lambda: _Folder(picture_folder(path, root)),
            missing=lambda: _absent(path, root),
        )
    return Base(
        facts=lambda: _checked(catalog.facts(spec, root.root), spec),
        open=lambda: _Held(spec, root),
        missing=lambda: catalog.missing(spec, root.root),
    )


def resized(x: Tensor, side: int | None, mode: str) -> Tensor:
    """``[B, C, H, W]`` to ``[B, C, side, side]``: the shorter side becomes ``side``, then the middle is taken.

    ``mode`` is "bilinear" or "bicubic", with antialiasing. Without a ``side`` they stay as they are.
    """
    from torch.nn.functional import interpolate

    height, width = x.shape[-2:]
    if side is None or (height, width) == (side, side):
        return x
    short = min(height, width)
    high, wide = round(height * side / short), round(width * side / short)
    x = interpolate(x, size=(high, wide), mode=mode, align_corners=False, antialias=True)
    top, left = (high - side) // 2, (wide - side) // 2
    return x[..., top : top + side, left : left + side].clamp(0, 1)  # bicubic overshoots


# In memory ------------------------------------------------------------------------------------------------


def _checked(facts: Facts, spec: str) -> Facts:
    if len(facts.input_shape) != 3:
        raise DatasetError(
            f"features:{spec}: its examples have shape {list(facts.input_shape)}; features are made of pictures"
        )
    return facts


class _Held:
    """A data set that is loaded whole: ``labels`` are int64 ``[N]``, ``read`` gives some pictures as `resized` does."""

    def __init__(self, spec: str, root: Places) -> None:
        import torch

        self._data = catalog.load(spec, root.root, download=root.download)
        self.source, self.digest = self._data.source, self._data.digest
        if self._data.x_train.dtype != torch.uint8:
            raise DatasetError(f"features:{spec}: its examples are {self._data.x_train.dtype}; pictures are uint8")

    def labels(self, split: Split) -> Array:
        found: Array = (self._data.y_train if split == "train" else self._data.y_test).numpy()
        return found

    def read(self, split: Split, start: int, stop: int, side: int | None, mode: str) -> Tensor:
        x = self._data.x_train if split == "train" else self._data.x_test
        return resized(x[start:stop].float() / 255, side, mode)


# From a folder --------------------------------------------------------------------------------------------


def _absent(path: str, root: Places) -> DatasetMissing | None:
    try:
        picture_folder(path, root)
    except DatasetMissing as error:
        return error
    return None


class _Folder:
    """Pictures that are decoded when they are asked for, on as many threads as there are cores."""

    def __init__(self, folder: Path) -> None:
        self.source = f"image folder {folder.name}"
        facts, self._files = _hashed(folder)  # as it is now, whatever was kept of it
        cache.dump(_kept(folder), asdict(facts))
        self._folder, self.digest = folder, facts.digest

    def labels(self, split: Split) -> Array:
        return np.array([label for _, label in self._files[split]], dtype=np.int64)

    def read(self, split: Split, start: int, stop: int, side: int | None, mode: str) -> Tensor:
        import torch

        def one(name: str) -> Tensor:
            pixels = np.array(open_picture(self._folder / name, "RGB"), dtype=np.uint8)
            return resized(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255, side, mode)

        names = [name for name, _ in self._files[split][start:stop]]
        with ThreadPoolExecutor(cores()) as pool:
            return torch.cat(list(pool.map(one, names)))


def _known(folder: Path) -> Facts:
    """Facts of a folder: every file is read once, then again only when the folder has changed."""
    place = _kept(folder)
    known = kept(place, Facts)
    if known is None:
        known = _hashed(folder)[0]
        cache.dump(place, asdict(known))
    return known


def _kept(folder: Path) -> Path:
    return kept_at("folders", f"{FORMAT}\n{files_stamp([folder / 'train', folder / 'test'])}")


def _hashed(folder: Path) -> tuple[Facts, Files]:
    """Read every file. The order and the digest depend on the bytes and classes of files, not on their names."""
    classes = class_names(folder)
    files: Files = {"train": [], "test": []}
    total = hashlib.sha256(DECODING.encode())
    for split, found in files.items():
        listed = labelled_files(folder / split, classes)
        with ThreadPoolExecutor(cores()) as pool:
            hashes = list(pool.map(_hash, listed))
        order = sorted(range(len(listed)), key=hashes.__getitem__)
        total.update(json.dumps([split, len(classes), len(order)]).encode())
        total.update(b"".join(hashes[i] for i in order))
        found += [(str(listed[i][0].relative_to(folder)), listed[i][1]) for i in order]
    facts = Facts(
        name=f"imagefolder:{folder.name}",
        digest=total.hexdigest()[:16],
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        statistics="none",
        input_shape=(3, 0, 0),
        classes=len(classes),
        n_train=len(files["train"]),
        n_test=len(files["test"]),
    )
    return facts, files


def _hash(labelled: tuple[Path, int]) -> bytes:
    """SHA-256 of a file's bytes and its class as a little-endian int64."""
    file, label = labelled
    with open(file, "rb") as opened:
        h = hashlib.file_digest(opened, "sha256")
    h.update(label.to_bytes(8, "little"))
    return h.digest()


Pictures = _Held | _Folder
"""Pictures in canonical order, to be read a few at a time as float32 ``[B, C, side, side]`` in 0..1."""
