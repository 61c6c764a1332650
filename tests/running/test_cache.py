"""Caches: what is kept between runs makes them faster, and nothing that becomes of it makes them different."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from harness import data
from harness.dp import Method, cache, native
from harness.dp.calibrate import calibrate


def foreign(file: Path) -> None:
    """The file becomes another user's, or one that anybody can write where only that can be had."""
    if os.geteuid() == 0:
        os.chown(file, 12345, 12345)
    else:
        file.chmod(0o666)


def loop(file: Path) -> None:
    """A link that leads to itself in the place of a file."""
    file.unlink()
    file.symlink_to(file)


def folder(file: Path) -> None:
    """A folder in the place of a file."""
    file.unlink()
    file.mkdir()


SPOILT: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "not text": lambda file: file.write_bytes(b"\xff\xfe\x00"),
    "of another shape": lambda file: file.write_text("[1, 2]"),
    "deep": lambda file: file.write_text("[" * 100_000),
    "a link to itself": loop,
    "a folder": folder,
}


def edited(**changes: object) -> Callable[[Path], object]:
    """Change values of a file of JSON, which another user might have."""
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | changes))


WRONG = {
    "a multiplier of nothing": edited(noise_multiplier=1e-9),
    "not finite": edited(noise_multiplier=float("nan")),
    "text": edited(noise_multiplier="2.0"),
    "of another plan": edited(key="0" * 64, noise_multiplier=7.0),
}


@pytest.mark.parametrize("how", [*SPOILT, *WRONG])
def test_a_spoilt_calibration_is_made_again(tmp_path: Path, how: str) -> None:
    wanted = calibrate(Method(), 1000, 100, 20, 4.0, 1e-4, "rdp", cache=tmp_path)
    (file,) = tmp_path.glob("*.json")
    (SPOILT | WRONG)[how](file)
    assert calibrate(Method(), 1000, 100, 20, 4.0, 1e-4, "rdp", cache=tmp_path) == wanted


def test_what_another_user_wrote_is_not_believed(tmp_path: Path) -> None:
    wanted = calibrate(Method(), 1000, 100, 20, 4.0, 1e-4, "rdp", cache=tmp_path)
    (file,) = tmp_path.glob("*.json")
    edited(noise_multiplier=0.3)(file)  # sixteen times the promised epsilon
    foreign(file)
    assert calibrate(Method(), 1000, 100, 20, 4.0, 1e-4, "rdp", cache=tmp_path) == wanted
    assert cache.load(file)["noise_multiplier"] == wanted  # and it is this user's from now on


@pytest.mark.parametrize("how", SPOILT)
def test_spoilt_facts_and_arrays_of_data_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setenv("EPSBENCH_CACHE", str(tmp_path))
    wanted = data.load("mnist1d?n=100")
    for file in list((tmp_path / "datasets").iterdir()):
        SPOILT[how](file)
    assert data.describe("mnist1d?n=100")["digest"] == data.load("mnist1d?n=100").digest == wanted.digest


@pytest.mark.parametrize("place", ["a file", "below a file", "unknown home", "no home"])
def test_without_a_place_for_caches_everything_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "file").write_text("not a folder")
    where = {"a file": "file", "below a file": "file/cache", "unknown home": "~nobody-of-this-name/cache"}
    monkeypatch.chdir(tmp_path)
    if place == "no home":
        monkeypatch.delenv("EPSBENCH_CACHE", raising=False)
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    else:
        monkeypatch.setenv("EPSBENCH_CACHE", where[place])
    folder = cache.root() / "calibration"
    first = calibrate(Method(), 1000, 100, 20, 4.0, 1e-4, "rdp", cache=folder)
    assert calibrate(Method(), 1000, 100, 20, 4.0, 1e-4, "rdp", cache=folder) == first
    assert data.load("mnist1d?n=100").n_train == data.describe("mnist1d?n=100")["n_train"] == 80
    assert data.places().root.name == "data"


def test_features_do_without_a_writable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (6, 1, 8, 8), dtype=np.uint8), np.arange(6) % 2
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    monkeypatch.setenv("EPSBENCH_CACHE", str(tmp_path / "cache"))
    spec = f"features:npz:{tmp_path / 'a.npz'}?backbone=scattering"
    wanted = data.load(spec)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EPSBENCH_CACHE", str(tmp_path / "file"))
    assert data.load(spec).x_train.equal(wanted.x_train)


def test_compiled_code_of_others_is_never_run(tmp_path: Path) -> None:
    """Only what this user alone could have written counts: by itself, by its folder and by all above it."""
    shelf = tmp_path / "cache" / "native"
    shelf.mkdir(parents=True, mode=0o755)
    file = shelf / "x.so"
    file.write_bytes(b"code")
    file.chmod(0o600)
    assert cache.trusted(file)
    for spoilt, mode in ((file, 0o620), (file, 0o602), (shelf, 0o775), (shelf.parent, 0o777)):
        before = spoilt.stat().st_mode
        spoilt.chmod(mode)
        assert not cache.trusted(file), (spoilt, oct(mode))
        spoilt.chmod(before)
    assert cache.trusted(file)
    (shelf / "link.so").symlink_to(file)
    assert not cache.trusted(shelf / "link.so") and not cache.trusted(shelf / "absent.so")
    if os.geteuid() == 0:
        foreign(shelf)
        assert not cache.trusted(file)


def test_kernels_are_built_where_the_cache_may_be_anybodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted library is replaced, not loaded; in a folder that stays open to all, one is built for the process."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "one.c").write_text("int one(void) { return 1; }\n")  # the kernels take seconds to compile
    monkeypatch.setattr(native, "SOURCES", sources)

    def loaded(folder: Path) -> str:
        monkeypatch.setenv("EPSBENCH_CACHE", str(folder))
        library, said = native._build.__wrapped__()
        if library is None:
            pytest.skip(said)
        assert library.one() == 1
        return library._name

    mine = tmp_path / "mine"
    first = loaded(mine)
    assert Path(first).parent == mine / "native"
    made = Path(first).stat().st_ino
    assert loaded(mine) == first and Path(first).stat().st_ino == made  # not built again
    Path(first).unlink()
    Path(first).write_bytes(b"planted")
    Path(first).chmod(0o666)
    assert loaded(mine) == first and Path(first).read_bytes()[1:4] == b"ELF"
    mine.chmod(0o777)
    assert not Path(loaded(mine)).is_relative_to(mine)
