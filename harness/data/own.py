"""A user's own data: ``npz:PATH`` and ``imagefolder:PATH``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from harness.data.arrays import read_npz
from harness.data.canonical import Array, Raw
from harness.data.source import (
    Candidate,
    DatasetError,
    DatasetMissing,
    Places,
    Source,
    files_stamp,
    first_of,
    found_at,
)
from harness.registry import dataset

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
# What is public about any picture: its pixels lie in 0..1.
DEFAULT_IMAGE = ((0.5,), (0.25,), "default for images: mean 0.5, deviation 0.25")
DEFAULT_OTHER = ((0.0,), (1.0,), "default for other inputs: used as they are")

Statistics = tuple[tuple[float, ...], tuple[float, ...], str]


@dataset("npz")
def npz(path: str, root: Places, mean: str | None = None, std: str | None = None) -> Source:
    """A .npz file with x_train y_train x_test y_test: uint8 images, or float inputs of any shape.

    ``mean`` and ``std`` are one number or one per channel ("0.49,0.48,0.45"), of pixels in 0..1; take them
    from public knowledge, not from this data. Default: 0.5 and 0.25 for images, 0 and 1 otherwise. A
    relative path is looked for in the working directory, then in the data root.
    """
    candidates = [_npz_at(place) for place in found_at(path, root)]
    found = first_of(f"npz:{path}", candidates, [f'write the path of an existing .npz, as in "npz:{path}"'])
    return Source(found.read, found.stamp, _Statistics(mean, std))


@dataset("imagefolder")
def imagefolder(
    path: str,
    root: Places,
    size: int | None = None,
    channels: int = 3,
    mean: str | None = None,
    std: str | None = None,
) -> Source:
    """A folder with train/CLASS/*.png and test/CLASS/*.png.

    Classes are the folders of train, in order of names. All pictures must have one size, or ``size=32``
    resizes each to 32x32 (bilinear). ``channels`` is 3 (colour) or 1 (grey). ``mean`` and ``std`` as for
    npz.
    """
    if channels not in (1, 3):
        raise DatasetError(f"imagefolder:{path}?channels={channels}: write 3 (colour) or 1 (grey)")
    if size is not None and size < 1:
        raise DatasetError(f"imagefolder:{path}?size={size}: write a number of pixels, as in size=32")

    return Source(
        read=lambda: _read_folder(picture_folder(path, root), size, channels),
        stamp=lambda: files_stamp([picture_folder(path, root) / part for part in ("train", "test")]),
        normalise=_Statistics(mean, std),
    )


def picture_folder(path: str, root: Places) -> Path:
    """The folder with ``train/`` and ``test/`` that ``path`` leads to, or :class:`DatasetMissing`."""
    looked = found_at(path, root)
    for place in looked:
        if (place / "train").is_dir() and (place / "test").is_dir():
            return place
    raise DatasetMissing(
        f"imagefolder:{path}",
        [f"{place} (folders train/ and test/): not there" for place in looked],
        ["write the path of a folder that holds train/CLASS/*.png and test/CLASS/*.png"],
    )


def _npz_at(file: Path) -> Candidate:
    return Candidate(".npz", (file,), lambda: read_npz(file))


class _Statistics:
    """Checks ``mean`` and ``std`` texts at once; called with the arrays it gives one number per channel."""

    def __init__(self, mean: str | None, std: str | None) -> None:
        self.mean, self.std = _numbers("mean", mean), _numbers("std", std)
        if self.std is not None and min(self.std) <= 0:
            raise DatasetError(f"std={std}: deviations are above 0")

    def __call__(self, raw: Raw) -> Statistics:
        mean: tuple[float, ...]
        std: tuple[float, ...]
        mean, std, words = DEFAULT_IMAGE if raw.x_train.dtype == np.uint8 else DEFAULT_OTHER
        if self.mean is not None or self.std is not None:
            words = "given in the spec"
        mean, std = self.mean or mean, self.std or std
        # Features [N, D] have no channels: one number serves all, unless each feature has its own.
        width = raw.x_train.shape[1] if raw.x_train.ndim > 2 else max(len(mean), len(std))
        return _spread("mean", mean, raw, width), _spread("std", std, raw, width), words


def _numbers(key: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(map(math.isfinite, numbers)):
        raise DatasetError(f'{key}={text}: write one number or one per channel, as in "{key}=0.49,0.48,0.45"')
    return numbers


def _spread(key: str, numbers: tuple[float, ...], raw: Raw, width: int) -> tuple[float, ...]:
    channels = raw.x_train.shape[1]
    if len(numbers) not in (1, channels):
        raise DatasetError(
            f"{key} has {len(numbers)} numbers for {channels} channels; write one, or {channels}"
        )
    return numbers * width if len(numbers) == 1 else numbers


def class_names(folder: Path) -> list[str]:
    """The classes of a folder of pictures: the folders of ``train/``, in order of names."""
    classes = sorted(p.name for p in (folder / "train").iterdir() if p.is_dir())
    if len(classes) < 2:
        raise DatasetError(f"{folder / 'train'}: {len(classes)} class folders; there must be two or more")
    unknown = sorted(p.name for p in (folder / "test").iterdir() if p.is_dir() and p.name not in classes)
    if unknown:
        raise DatasetError(f"{folder / 'test' / unknown[0]}: train/ has no class of that name")
    return classes


def labelled_files(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """Every picture in the class folders of ``folder`` with its class; at least one."""
    files = [
        (file, label)
        for label, name in enumerate(classes)
        for file in sorted((folder / name).glob("*"))
        if file.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not files:
        raise DatasetError(f"{folder}: no pictures in class folders ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def _read_folder(folder: Path, size: int | None, channels: int) -> Raw:
    classes = class_names(folder)
    x_train, y_train, first = _read_split(folder / "train", classes, size, channels)
    x_test, y_test, other = _read_split(folder / "test", classes, size, channels)
    _same_size(first, x_train[0], other, x_test[0])
    source = f"image folder {folder.name}" + (f", resized to {size}x{size}" if size else "")
    return Raw(np.stack(x_train), y_train, np.stack(x_test), y_test, source, len(classes))


def _read_split(
    folder: Path, classes: list[str], size: int | None, channels: int
) -> tuple[list[Array], Array, Path]:
    files = labelled_files(folder, classes)
    images = [_read_image(file, size, channels) for file, _ in files]
    for (file, _), image in zip(files, images, strict=True):
        _same_size(files[0][0], images[0], file, image)
    return images, np.array([label for _, label in files], dtype=np.int64), files[0][0]


def _same_size(one: Path, image: Array, other: Path, its: Array) -> None:
    if image.shape != its.shape:
        raise DatasetError(
            f"{one} is {image.shape[2]}x{image.shape[1]} and {other} is {its.shape[2]}x{its.shape[1]}; "
            'all pictures must have one size, or write "?size=32" to resize them'
        )


def _read_image(file: Path, size: int | None, channels: int) -> Array:
    """uint8 ``[C, H, W]``."""
    from PIL import Image

    image = open_picture(file, "RGB" if channels == 3 else "L")
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.uint8)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1) if channels == 3 else pixels[None])


def open_picture(file: Path, mode: str) -> Picture:
    """The picture in ``file`` in PIL's ``mode``. Raises :class:`DatasetError` naming the file."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as opened:
            return opened.convert(mode)
    except (UnidentifiedImageError, OSError) as error:
        raise DatasetError(f"{file}: not a readable picture ({error})") from error
