"""A user's own data: ``npz:PATH`` and ``imagefolder:PATH``."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from harness.data.arrays import read_npz
from harness.data.canonical import Array, Raw
from harness.data.source import Candidate, DatasetError, DatasetMissing, Places, Source, files_stamp, first_of, found_at
from harness.registry import dataset

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
NOTES = frozenset({".txt", ".md", ".csv", ".json", ".xml", ".yaml", ".yml"})  # allowed beside pictures, and passed over
SYSTEM = frozenset({"thumbs.db", "desktop.ini", "__macosx"})  # what other systems leave behind
# What is public about any picture: its pixels lie in 0..1.
DEFAULT_IMAGE = ((0.5,), (0.25,), "default for images: mean 0.5, deviation 0.25")
DEFAULT_OTHER = ((0.0,), (1.0,), "default for other inputs: used as they are")

Statistics = tuple[tuple[float, ...], tuple[float, ...], str]


@dataset("npz")
def npz(
    path: str,
    root: Places,
    mean: str | None = None,
    std: str | None = None,
    layout: Literal["nchw", "nhwc"] | None = None,
) -> Source:
    """A .npz file with x_train y_train x_test y_test: uint8 images, or float inputs of any shape.

    ``mean`` and ``std`` are one number or one per channel ("0.49,0.48,0.45"), of pixels in 0..1; take them
    from public knowledge, not from this data. Default: 0.5 and 0.25 for images, 0 and 1 otherwise. A
    relative path is looked for in the working directory, then in the data root. ``layout`` says where the channels of
    four axes are, for shapes that do not tell.
    """
    candidates = [Candidate(".npz", (file,), partial(read_npz, file, layout)) for file in found_at(path, root)]
    found = first_of(f"npz:{path}", candidates, [f'write the path of an existing .npz, as in "npz:{path}"'])
    return Source(found.read, found.stamp, _statistics(mean=mean, std=std))


@dataset("imagefolder")
def imagefolder(
    path: str, root: Places, size: int | None = None, channels: int = 3, mean: str | None = None, std: str | None = None
) -> Source:
    """A folder with train/CLASS/*.png and test/CLASS/*.png.

    Classes are the folders of train, in order of names; links are followed. Hidden files and folders, Thumbs.db and
    notes (.txt, .csv, .json, ...) are passed over; anything else that is no picture is refused by name. All pictures
    must have one size, or ``size=32`` resizes each to 32x32 (bilinear). ``channels`` is 3 (colour) or 1 (grey).
    Orientation (EXIF) is applied, transparency ignored, grey of 12 or 16 bits scaled to 8. ``mean`` and ``std`` as
    for npz.
    """
    if channels not in (1, 3):
        raise DatasetError(f"imagefolder:{path}?channels={channels}: write 3 (colour) or 1 (grey)")
    if size is not None and size < 1:
        raise DatasetError(f"imagefolder:{path}?size={size}: write a number of pixels, as in size=32")

    return Source(
        read=lambda: _read_folder(picture_folder(path, root), size, channels),
        stamp=lambda: files_stamp([picture_folder(path, root) / part for part in ("train", "test")]),
        normalise=_statistics(mean=mean, std=std),
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


def _statistics(**texts: str | None) -> Callable[[Raw], Statistics]:
    """Checks the texts of ``mean`` and ``std`` at once; what it returns gives one number per channel."""
    given = {key: _numbers(key, text) for key, text in texts.items() if text is not None}
    if min(given.get("std", (1.0,))) <= 0:
        raise DatasetError(f"std={texts['std']}: deviations are above 0")

    def statistics(raw: Raw) -> Statistics:
        mean, std, words = DEFAULT_IMAGE if raw.x_train.dtype == np.uint8 else DEFAULT_OTHER
        found: dict[str, tuple[float, ...]] = {"mean": mean, "std": std, **given}
        channels = raw.x_train.shape[1]
        # Features [N, D] have no channels: one number serves all, unless each feature has its own.
        width = channels if raw.x_train.ndim > 2 else max(map(len, found.values()))
        for key, numbers in found.items():
            if len(numbers) not in (1, channels):
                count = len(numbers)
                raise DatasetError(f"{key} has {count} numbers for {channels} channels; write one, or {channels}")
            found[key] = numbers * width if len(numbers) == 1 else numbers
        return found["mean"], found["std"], "given in the spec" if given else words

    return statistics


def _numbers(key: str, text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(map(math.isfinite, numbers)):
        raise DatasetError(f'{key}={text}: write one number or one per channel, as in "{key}=0.49,0.48,0.45"')
    return numbers


def class_names(folder: Path) -> list[str]:
    """The classes of a folder of pictures: the folders of ``train/``, in order of names."""
    classes = _classes_in(folder / "train")
    if len(classes) < 2:
        raise DatasetError(f"{folder / 'train'}: {len(classes)} class folders; there must be two or more")
    unknown = [name for name in _classes_in(folder / "test") if name not in classes]
    if unknown:
        raise DatasetError(f"{folder / 'test' / unknown[0]}: train/ has no class of that name")
    return classes


def _classes_in(folder: Path) -> list[str]:
    """The names of the class folders; refuses pictures that lie beside them."""
    found = _entries(folder)
    for one in found:
        if not one.is_dir():
            raise DatasetError(f"{one}: is in no class folder; move it into one, or out of {folder.name}/")
    return [one.name for one in found]


def _entries(folder: Path) -> list[Path]:
    """What is in a folder in order of names, without what is hidden, of the system, or a note."""
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        raise DatasetError(f"{folder}: cannot be read ({error.strerror or error})") from error
    return [
        one
        for one in found
        if not one.name.startswith(".") and one.name.lower() not in SYSTEM
        if one.suffix.lower() not in NOTES or one.is_dir()
    ]


def labelled_files(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """Every picture in the class folders of ``folder`` with its class; at least one of each that is there.

    ``test/`` may lack classes. Raises :class:`DatasetError` naming what would be left out otherwise.
    """
    files: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        place = folder / name
        if folder.name != "train" and not place.exists():
            continue
        found = _entries(place)
        for one in found:
            if one.is_dir():
                raise DatasetError(
                    f"{one}: a folder in a class folder; move its pictures up into {name}/, or remove it"
                )
            if one.suffix.lower() not in IMAGE_SUFFIXES:
                kinds = ", ".join(sorted(IMAGE_SUFFIXES))
                raise DatasetError(
                    f"{one}: not a picture of a kind that is read ({kinds}); convert it, to .png say, or remove it"
                )
        if not found:
            raise DatasetError(f"{place}: no pictures; put some there, or remove the folder")
        files += [(one, label) for one in found]
    if not files:
        raise DatasetError(f"{folder}: no pictures in class folders ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def _read_folder(folder: Path, size: int | None, channels: int) -> Raw:
    classes = class_names(folder)
    images: list[list[Array]] = []
    labels: list[Array] = []
    first: tuple[Path, Array] | None = None
    for split in ("train", "test"):
        files = labelled_files(folder / split, classes)
        images.append([_read_image(file, size, channels) for file, _ in files])
        labels.append(np.array([label for _, label in files], dtype=np.int64))
        for (file, _), image in zip(files, images[-1], strict=True):
            one, its = first = first or (file, image)
            if image.shape != its.shape:
                raise DatasetError(
                    f"{one} is {its.shape[2]}x{its.shape[1]} and {file} is {image.shape[2]}x{image.shape[1]}; "
                    'all pictures must have one size, or write "?size=32" to resize them'
                )
    source = f"image folder {folder.name}" + (f", resized to {size}x{size}" if size else "")
    return Raw(np.stack(images[0]), labels[0], np.stack(images[1]), labels[1], source, len(classes))


def _read_image(file: Path, size: int | None, channels: int) -> Array:
    """uint8 ``[C, H, W]``."""
    from PIL import Image

    image = open_picture(file, "RGB" if channels == 3 else "L")
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.uint8)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1) if channels == 3 else pixels[None])


def open_picture(file: Path, mode: Literal["RGB", "L"]) -> Picture:
    """The picture in ``file`` in colour or grey of 8 bits, upright. Raises :class:`DatasetError` naming the file.

    Grey of 12 or 16 bits is scaled, 65535 to 255. Transparency is ignored: the colours are those stored.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            # The second picture of an MPO is the camera's preview.
            frames = getattr(opened, "n_frames", 1)
            if frames > 1 and opened.format != "MPO":
                raise DatasetError(f"{file}: holds {frames} pictures; save each in a file of its own")
            opened.load()
            upright = ImageOps.exif_transpose(opened)
            deep = upright.mode.startswith(("I", "F"))
            return (_eight_bits(file, opened, upright) if deep else upright).convert(mode)
    except (DatasetError, MemoryError):
        raise
    except Exception as error:  # damaged files make Pillow raise all sorts of things
        raise DatasetError(f"{file}: not a readable picture ({error})") from error


def _eight_bits(file: Path, opened: Any, picture: Picture) -> Picture:
    """Grey of 12 or 16 bits as 8 bits. Refuses numbers for which the value of white is unknown."""
    from PIL import Image

    tags = getattr(opened, "tag_v2", {})  # of a TIFF
    bits = int(tags.get(258, (16,))[0])
    sixteen = picture.mode.startswith("I;16") or (picture.mode == "I" and opened.format in ("PNG", "PPM"))
    if not sixteen or bits not in (12, 16):
        what = "floats" if picture.mode == "F" else f"whole numbers of mode {picture.mode}"
        raise DatasetError(
            f"{file}: its pixels are {what}, of which no white is known; save it with 8 bits, or 16 (65535 is white)"
        )
    white = 2**bits - 1
    pixels = np.asarray(picture).astype(np.float64) * (255 / white)
    if tags.get(262) == 0:  # white is zero
        pixels = 255 - pixels
    return Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8))
