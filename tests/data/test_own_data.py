"""A user's own data: what is read is what was meant, or refused by name; a run trains on what it was planned on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness import data, suite
from harness.data import DatasetError, DatasetMismatch
from harness.data.own import open_picture
from harness.running import run


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPSBENCH_CACHE", str(tmp_path / "cache"))


# Pictures -------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (8, 6), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (8, 6, 3), dtype=np.uint8)
DEEP = (GREY.astype(np.uint16) << 8) + RNG.integers(0, 256, GREY.shape, dtype=np.uint16)
SCALED = np.rint(DEEP / 65535 * 255).astype(np.uint8)


def picture(array: np.ndarray, mode: str | None = None) -> Image.Image:
    made = Image.fromarray(array)
    return made if mode is None else made.convert(mode)


def with_alpha(mode: str) -> Image.Image:
    made = picture(GREY if mode == "LA" else COLOUR, mode)
    made.putalpha(Image.fromarray(RNG.integers(0, 256, GREY.shape, dtype=np.uint8)))
    return made


def turned() -> dict[str, object]:
    exif = Image.Exif()
    exif[0x112] = 6  # the camera was held upright: turn by 90 degrees
    return {"exif": exif}


READ: dict[str, tuple[Image.Image, str, dict[str, object], np.ndarray]] = {
    "grey of 16 bits": (picture(DEEP), "png", {}, SCALED),
    "grey of 16 bits, TIFF": (picture(DEEP), "tif", {}, SCALED),
    "grey of 16 bits, PGM": (picture(DEEP), "pgm", {}, SCALED),
    "white is zero": (picture(DEEP), "tif", {"tiffinfo": {262: 0}}, np.rint(255 - DEEP / 257).astype(np.uint8)),
    "grey and alpha": (with_alpha("LA"), "png", {}, GREY),
    "two values": (picture(np.where(GREY > 99, 255, 0).astype(np.uint8)).convert("1"), "png", {},
                   np.where(GREY > 99, 255, 0).astype(np.uint8)),
    "palette of greys": (picture(GREY).convert("P"), "png", {"transparency": 3}, GREY),
    "colour and alpha": (with_alpha("RGBA"), "png", {}, COLOUR),
    "upper case": (picture(COLOUR), "PNG", {}, COLOUR),
    "turned": (picture(COLOUR), "png", turned(), np.rot90(COLOUR, -1)),
}  # fmt: skip


@pytest.mark.parametrize("kind", READ)
def test_pictures_of_every_kind_have_the_values_that_were_meant(tmp_path: Path, kind: str) -> None:
    made, suffix, options, wanted = READ[kind]
    made.save(tmp_path / f"a.{suffix}", **options)
    found = open_picture(tmp_path / f"a.{suffix}", "RGB" if wanted.ndim == 3 else "L")
    assert np.array_equal(np.asarray(found), wanted)
    if wanted.ndim == 2:  # grey as colour is three times the same
        as_colour = np.asarray(open_picture(tmp_path / f"a.{suffix}", "RGB"))
        assert np.array_equal(as_colour, np.repeat(wanted[..., None], 3, 2))


def test_print_colours_are_those_on_the_screen(tmp_path: Path) -> None:
    flat = np.full((8, 8, 3), (200, 120, 40), np.uint8)
    picture(flat, "CMYK").save(tmp_path / "a.jpg", quality=98)
    found = np.asarray(open_picture(tmp_path / "a.jpg", "RGB")).astype(int)
    assert np.abs(found - flat).max() <= 6


def folder(root: Path, n: int = 3) -> Path:
    """train/ and test/ with classes a (dark) and b (bright)."""
    for part in ("train", "test"):
        for label, name in enumerate("ab"):
            place = root / part / name
            place.mkdir(parents=True)
            for i in range(n):
                pixels = RNG.integers(0, 100, (6, 6, 3), dtype=np.uint8) + np.uint8(150 * label)
                Image.fromarray(pixels).save(place / f"{i}.png")
    return root


def saved(name: str, array: np.ndarray, **options: object) -> Callable[[Path], object]:
    return lambda root: Image.fromarray(array).save(root / "train" / "a" / name, **options)


def nested(root: Path) -> None:
    (root / "train/a/more").mkdir()
    shutil.copy(root / "train/a/0.png", root / "train/a/more/0.png")


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "floats": (saved("f.tif", RNG.random((6, 6), dtype=np.float32)), r"f\.tif: its pixels are floats.*8 bits"),
    "32 bits": (saved("i.tif", RNG.integers(0, 10**9, (6, 6), dtype=np.int32)), r"i\.tif: its pixels are whole"),
    "gif": (saved("x.gif", COLOUR), r"x\.gif: not a picture of a kind that is read.*convert it"),
    "another kind": (lambda root: (root / "test/b/y.avif").write_bytes(b"?"), r"y\.avif: not a picture"),
    "animated": (
        saved("m.webp", COLOUR, save_all=True, append_images=[Image.fromarray(COLOUR[::-1])]),
        r"m\.webp: holds 2 pictures",
    ),
    "pages": (
        saved("m.tiff", COLOUR, save_all=True, append_images=[Image.fromarray(COLOUR[::-1])]),
        r"m\.tiff: holds 2 pictures",
    ),
    "nested": (nested, r"more: a folder in a class folder; move its pictures up"),
    "in no class": (lambda root: shutil.copy(root / "train/a/0.png", root / "train/0.png"), r"0\.png: is in no class"),
    "empty class": (lambda root: (root / "train/c").mkdir(), r"train/c: no pictures; put some there, or remove"),
    "empty test class": (lambda root: [p.unlink() for p in (root / "test/b").iterdir()], r"test/b: no pictures"),
    "cut": (lambda root: os.truncate(root / "train/a/1.png", 60), r"a/1\.png: not a readable picture"),
    "a link to nowhere": (lambda root: (root / "train/a/n.png").symlink_to("gone.png"), r"n\.png: not a readable"),
    "a link to itself": (lambda root: (root / "train/a/n.png").symlink_to("n.png"), r"n\.png: not a readable"),
    "a link upwards": (lambda root: (root / "train/a/up").symlink_to(root), r"up: a folder in a class folder"),
    "a class without a folder": (lambda root: (root / "test/c").mkdir(), r"test/c: train/ has no class"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_be_left_out_or_misread_is_refused_by_name(tmp_path: Path, what: str) -> None:
    root = folder(tmp_path / "pictures")
    change, message = REFUSED[what]
    change(root)
    for _ in range(2):  # also where something is in the cache
        with pytest.raises(DatasetError, match=message):
            data.load(f"imagefolder:{root}")
    with pytest.raises(DatasetError):
        data.describe(f"imagefolder:{root}")


def test_what_is_documented_as_passed_over_changes_nothing(tmp_path: Path) -> None:
    root = folder(tmp_path / "pictures")
    before = data.load(f"imagefolder:{root}")
    for name in ("train/.ipynb_checkpoints", "test/.git", "train/__MACOSX", "train/a/.cache"):
        (root / name).mkdir()
    for name in ("train/a/._0.png", "train/a/Thumbs.db", "test/.DS_Store", "train/b/readme.txt", "train/labels.csv"):
        (root / name).write_bytes(b"\x00junk")
    after = data.load(f"imagefolder:{root}")
    assert after.digest == before.digest == data.describe(f"imagefolder:{root}")["digest"] and after.classes == 2


def test_the_stamp_sees_through_links_and_every_folder(tmp_path: Path) -> None:
    """Subsets are made of links: what they lead to is the data, and other data has another digest at once."""
    store, linked = folder(tmp_path / "store"), tmp_path / "linked"
    for part in ("train", "test"):
        (linked / part).mkdir(parents=True)
        for name in "ab":
            (linked / part / name).symlink_to(store / part / name)
    spec = f"imagefolder:{linked}"
    first = data.describe(spec)["digest"]
    assert first == data.load(spec).digest == data.load(f"imagefolder:{store}").digest
    features = f"features:{spec}?backbone=scattering&size=8"
    of_first = data.describe(features)["digest"]
    Image.fromarray(COLOUR[:6]).save(store / "train/a/0.png")
    second = data.describe(spec)["digest"]
    assert second == data.load(spec).digest != first and data.describe(features)["digest"] != of_first
    (store / "train/c").mkdir()
    (linked / "train/c").symlink_to(store / "train/c")
    with pytest.raises(DatasetError, match="train/c: no pictures"):
        data.describe(spec)["digest"]


# Arrays ---------------------------------------------------------------------------------------------------


def archive(path: Path, x: np.ndarray, y: np.ndarray | None = None, **more: np.ndarray) -> str:
    y = np.arange(len(x)) % 2 if y is None else y
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y, **more)
    return f"npz:{path}"


@pytest.mark.parametrize(
    ("shape", "dtype", "plain"),
    [
        ((9, 3, 4, 4), "uint8", None),
        ((9, 3, 8, 1), "uint8", None),
        ((9, 8, 8, 13), "uint8", None),
        ((9, 3, 8, 5), "uint8", "nchw"),
        ((9, 8, 5, 3), "uint8", "nhwc"),
        ((9, 1, 6, 4), "float32", None),
        ((9, 8, 8, 3), "float32", None),
        ((9, 3, 8, 8), "float32", "nchw"),
        ((9, 2, 5, 7), "float64", "nchw"),
    ],
)
def test_channels_are_never_guessed(tmp_path: Path, shape: tuple[int, ...], dtype: str, plain: str | None) -> None:
    x = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    spec = archive(tmp_path / "a.npz", x)
    as_is, turned = (shape[1:], (shape[3], *shape[1:3]))
    assert data.load(f"{spec}?layout=nchw").input_shape == as_is
    last = data.load(f"{spec}?layout=nhwc")
    assert last.input_shape == turned and last.digest == data.describe(f"{spec}?layout=nhwc")["digest"]
    if plain is None:
        with pytest.raises(DatasetError, match=r"x_train has shape .*\?layout=nchw.*\?layout=nhwc"):
            data.load(spec)
    else:
        assert data.load(spec).input_shape == (as_is if plain == "nchw" else turned)


X = RNG.random((20, 3)) + 1
Y = np.arange(20) % 2
PLACED = np.arange(60).reshape(20, 3) == 7  # at [2, 1]


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X * 1e300, Y, r"x_train\[0, 0\] is .*e\+300: too large for float32; scale"),
        (np.where(PLACED, 1e39, X), Y, r"x_train\[2, 1\] is 1e\+39: too large"),
        (np.where(PLACED, -np.inf, X), Y, r"x_train\[2, 1\] is infinity"),
        (np.where(PLACED, np.nan, X), Y, r"x_train\[2, 1\] is NaN"),
        (X * 1e-60, Y, r"x_train\[0, 0\] is .*e-60: too small for float32"),
        (X, Y + 1, r"y_train holds the labels 1 to 2; labels start at 0: write y - 1"),
        (X, Y * 10**9, r"y_train\[1\] holds the label 1000000000, and no example has the label 1"),
        (X, Y * 5, r"y_train\[1\] holds the label 5, and no example has the label 1"),
        (X, Y.astype(np.uint64) + np.uint64(2**63), r"y_train\[0\] holds the label 9223372036854775808"),
        (X, Y - 1, r"y_train\[0\] holds the label -1; labels start at 0"),
        (X, np.eye(2)[Y], r".*write y\.argmax\(1\)"),
        (X, Y.astype(bool), r"y_train is bool; labels are whole numbers"),
        (X, Y.astype(float), r"y_train is float64; labels are whole numbers"),
        (X, np.array(["cat", "dog"])[Y], r"y_train is <U3; labels are whole numbers"),
        (X[:, :0], Y, r"x_train has shape \[20, 0\]"),
        ((X * 1000).astype(np.int16), Y, r"x_train is int16"),
        (X + 1j, Y, r"x_train is complex128"),
    ],
)  # fmt: skip
def test_numbers_that_would_become_others_are_refused(
    tmp_path: Path, x: np.ndarray, y: np.ndarray, message: str
) -> None:
    with pytest.raises(DatasetError, match=rf"bad\.npz: {message}"):
        data.load(archive(tmp_path / "bad.npz", x, y))
    with pytest.raises(DatasetError, match="layout=nchw is for four axes"):
        data.load(archive(tmp_path / "bad.npz", x, y) + "?layout=nchw")


def test_named_classes_may_lack_examples(tmp_path: Path) -> None:
    spec = archive(tmp_path / "a.npz", X, Y * 2 + 1, classes=np.array(list("abcd")))
    assert data.load(spec).classes == 4 and data.load(spec).y_train.unique().tolist() == [1, 3]


def test_a_file_that_may_not_be_read_or_is_cut_is_named(tmp_path: Path) -> None:
    spec = archive(tmp_path / "a.npz", X)
    whole = (tmp_path / "a.npz").read_bytes()
    for end in range(0, len(whole), 97):
        (tmp_path / "a.npz").write_bytes(whole[:end])
        with pytest.raises(DatasetError, match=r"a\.npz"):
            data.load(spec)
    (tmp_path / "a.npz").unlink()
    (tmp_path / "a.npz").mkdir()
    with pytest.raises(DatasetError, match=r"a\.npz: cannot be read"):
        data.load(spec)


# A run and its data ---------------------------------------------------------------------------------------

SUITE = """\
[suite]
name = "s"
question = "?"
[privacy]
epsilon = 8.0
delta = 1e-3
[train]
batch = 5
steps = 2
[[task]]
dataset = "{}"
model = "logistic"
evaluate = "{}"
[[method]]
name = "non-private"
"""


@pytest.mark.parametrize("evaluate", ["test", "validation"])
def test_a_run_trains_on_the_data_that_it_was_planned_on(tmp_path: Path, evaluate: str) -> None:
    spec = archive(tmp_path / "a.npz", X)
    before = (tmp_path / "a.npz").stat()
    [cell] = suite.parse(SUITE.format(spec, evaluate)).cells()
    assert run.execute(cell, tmp_path / "one", "s")["status"] == "ok"
    changed = X.copy()
    changed[3, 1] += 1e-3
    archive(tmp_path / "a.npz", changed)
    os.utime(tmp_path / "a.npz", ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DatasetMismatch, match=rf"npz:a .*{cell.task['digest']}.*plans the suite anew"):
        run.execute(cell, tmp_path / "two", "s")
    [again] = suite.parse(SUITE.format(spec, evaluate)).cells()
    assert again.id != cell.id and run.execute(again, tmp_path / "three", "s")["status"] == "ok"


def test_a_digest_that_is_kept_is_not_believed_by_a_run(tmp_path: Path) -> None:
    """Whatever a cache says of a file, the digest of what is trained on is worked out from it."""
    spec = archive(tmp_path / "a.npz", X)
    right = data.describe(spec)["digest"]
    (kept,) = (tmp_path / "cache" / "datasets").glob("*.json")
    kept.write_text(kept.read_text().replace(right, "0" * 16))
    [cell] = suite.parse(SUITE.format(spec, "test")).cells()
    assert cell.task["digest"] == "0" * 16
    with pytest.raises(DatasetMismatch, match=right):
        run.execute(cell, tmp_path / "run", "s")
    assert data.describe(spec)["digest"] == right  # so that planning again helps
