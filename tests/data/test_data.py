"""Data sets: one order and one digest from any source, public statistics, and errors that say what to do."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from harness import data, registry
from harness.data import DatasetError, DatasetMismatch, DatasetMissing, vision
from harness.data.arrays import IDX_FILES, read_idx_folder, read_npz
from harness.data.canonical import canonical, row_hashes
from harness.data.embedded import mnist1d_signals

# Changing any of these changes the identity of every run on that data.
DIGESTS = {
    "mnist-5k": "f432180d4cd1d77e",
    "mnist1d": "3ad45c6aef57ec2f",
    "digits": "fb2c01f04e7e727f",
    "fashion-mnist": "38da93abb8656246",
    "cifar10": "18fe8053fed154c9",
}
EMBEDDED = ("mnist-5k", "mnist1d", "digits")
FILES = ("mnist", "fashion-mnist", "cifar10", "cifar100", "svhn")
RELABELLED = ("cifar100-coarse",)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPSBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root with nothing in it, and nothing elsewhere either."""
    root = tmp_path / "root"
    root.mkdir()
    monkeypatch.setenv("EPSBENCH_DATA", str(root))
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path / "share"))
    monkeypatch.delenv("EPSBENCH_DOWNLOAD", raising=False)
    return root


def arrays(n: int = 40, seed: int = 0) -> dict[str, np.ndarray]:
    """Small pictures, channels last, with equal rows among them."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (n, 6, 5, 3), dtype=np.uint8)
    y = rng.integers(0, 4, n)
    y[0] = 3
    x[1], y[1] = x[0], y[0]
    return {"x_train": x[:30], "y_train": y[:30, None], "x_test": x[30:], "y_test": y[30:]}


def save(path: Path, **content: np.ndarray) -> str:
    np.savez(path, **content)
    return f"npz:{path}"


def same(a: data.Dataset, b: data.Dataset) -> bool:
    parts = ("x_train", "y_train", "x_test", "y_test")
    return a.digest == b.digest and all(
        torch.equal(getattr(a, p), getattr(b, p)) and getattr(a, p).stride() == getattr(b, p).stride() for p in parts
    )


# Known content --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIGESTS)
def test_known_data_has_its_digest_and_constants(name: str) -> None:
    absent = data.missing(name)
    if absent is not None:
        pytest.skip(f"{name} is not here; {absent.remedies[0]}")
    d = data.load(name)
    facts = data.describe(name)
    assert d.digest == data.describe(name)["digest"] == DIGESTS[name]
    assert (d.n_train, d.n_test, d.input_shape, d.classes) == tuple(
        facts[key] for key in ("n_train", "n_test", "input_shape", "classes")
    )
    assert d.x_train.dtype == (torch.float32 if name == "mnist1d" else torch.uint8)
    assert d.x_train.is_contiguous() and d.y_train.dtype == torch.int64
    # The constants are published ones, so they are near the data's but never computed from it.
    x, _ = d.batch(slice(0, 2000))
    assert d.mean == facts["mean"] and (name == "digits" or abs(float(x.mean())) < 0.05)
    assert same(d, data.load(name))  # from the cache, where there is one


@pytest.mark.parametrize(("name", "share"), [("mnist-5k", (400, 100)), ("digits", None)])
def test_embedded_splits_are_stratified_and_disjoint(name: str, share: tuple[int, int] | None) -> None:
    d = data.load(name)
    train, test = d.y_train.bincount(), d.y_test.bincount()
    if share:
        assert train.tolist() == [share[0]] * 10 and test.tolist() == [share[1]] * 10
    assert torch.equal(train, (0.8 * (train + test)).long())
    hashes = [row_hashes(x.numpy(), y.numpy()) for x, y in ((d.x_train, d.y_train), (d.x_test, d.y_test))]
    assert not set(hashes[0]) & set(hashes[1])
    assert [h == sorted(h) for h in hashes] == [True, True]


def test_mnist1d_is_the_package_s_data_before_centring() -> None:
    from mnist1d.data import get_dataset_args, make_dataset

    settings = get_dataset_args()
    settings.num_samples = 200
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    x, y = mnist1d_signals(200, 42)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    theirs = make_dataset(settings)
    centred = (x - x.mean()) / x.std()
    np.testing.assert_allclose(centred[:160], theirs["x"], atol=1e-12)
    assert np.array_equal(y[:160], theirs["y"]) and np.array_equal(y[160:], theirs["y_test"])

    d = data.load("mnist1d?n=200")
    assert (d.n_train, d.n_test, d.name, d.input_shape) == (160, 40, "mnist1d?n=200", (1, 40))
    grid = d.x_train.double() * 2**14
    assert torch.equal(grid, grid.round())
    np.testing.assert_allclose(np.sort(d.x_train.numpy().ravel()), np.sort(x[:160].ravel()), atol=2**-15 + 1e-9)


def test_damaged_cache_is_made_again(tmp_path: Path) -> None:
    first = data.load("mnist1d?n=100")
    (kept,) = (tmp_path / "cache" / "datasets").glob("*.npz")
    kept.write_bytes(kept.read_bytes()[:1000])
    assert same(first, data.load("mnist1d?n=100"))
    other = dict(np.load(kept))
    other["x_train"][0] += 1
    np.savez(kept, **other)
    assert same(first, data.load("mnist1d?n=100"))


def test_names_and_digests_do_not_need_torch() -> None:
    code = (
        "import sys, harness.data as d\n"
        "assert d.describe('mnist-5k')['digest'] and d.describe('cifar10')['n_train'] == 50000\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# One order, one digest ------------------------------------------------------------------------------------


def test_order_and_layout_of_the_file_do_not_matter(tmp_path: Path) -> None:
    content = arrays()
    d = data.load(save(tmp_path / "a.npz", **content))
    order = np.random.default_rng(1).permutation(30)
    content["x_train"] = content["x_train"][order].transpose(0, 3, 1, 2)
    content["y_train"] = content["y_train"][order, 0].astype(np.uint8)
    content["x_test"] = content["x_test"][::-1].transpose(0, 3, 1, 2)
    content["y_test"] = content["y_test"][::-1]
    assert same(d, data.load(save(tmp_path / "b.npz", **content)))
    assert d.input_shape == (3, 6, 5) and d.classes == 4 and d.name == "npz:a"


@pytest.mark.parametrize("change", ["pixel", "label", "split", "mean", "classes"])
def test_digest_covers_what_a_model_sees(tmp_path: Path, change: str) -> None:
    content = arrays()
    digest = data.load(save(tmp_path / "a.npz", **content)).digest
    if change == "pixel":
        content["x_test"][3, 0, 0, 0] ^= 1
    elif change == "label":
        content["y_train"][3] = (content["y_train"][3] + 1) % 4
    elif change == "split":
        content["x_train"], content["y_train"] = content["x_train"][1:], content["y_train"][1:]
    elif change == "classes":
        content["classes"] = np.array(list("abcde"))
    spec = save(tmp_path / "a.npz", **content) + ("?mean=0.4" if change == "mean" else "")
    assert data.load(spec).digest != digest


def test_real_sources_agree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    absent = data.missing("cifar10")
    if absent is not None:
        pytest.skip(f"cifar10 is not here; {absent.remedies[0]}")
    d = data.load("cifar10")
    # What torchvision gives: channels last, in its own order, found in its own folder.
    parts = [
        (x.flip(0).permute(0, 2, 3, 1).numpy(), y.flip(0).numpy())
        for x, y in ((d.x_train, d.y_train), (d.x_test, d.y_test))
    ]
    monkeypatch.setattr(vision, "_parts", lambda *_, **__: parts)
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert same(d, data.load("cifar10", tmp_path))


def test_idx_files_equal_the_npz(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    content = [rng.integers(0, 10, s, dtype=np.uint8) for s in ((9, 4, 4), 9, (3, 4, 4), 3)]
    files = []
    for i, (name, array) in enumerate(zip(IDX_FILES, content, strict=True)):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        packed = i % 2 == 0
        files.append(tmp_path / (name + ".gz" if packed else name))
        raw = header + array.tobytes()
        files[-1].write_bytes(gzip.compress(raw) if packed else raw)
    keys = ("x_train", "y_train", "x_test", "y_test")
    save(tmp_path / "a.npz", **dict(zip(keys, content, strict=True)), classes=np.arange(10))
    a, b = read_idx_folder(tuple(files), ""), read_npz(tmp_path / "a.npz")
    assert canonical(a, (0.5,), (0.5,))[1] == canonical(b, (0.5,), (0.5,))[1]
    files[0].write_bytes(files[0].read_bytes()[:-9])
    with pytest.raises(DatasetError, match=r"train-images.*damaged"):
        read_idx_folder(tuple(files), "")


def test_a_named_file_with_other_content_is_refused(nowhere: Path) -> None:
    save(nowhere / "cifar10.npz", **arrays())
    with pytest.raises(DatasetMismatch, match=r"(?s)cifar10.*n_train is 30, not 50000.*cifar10\.npz.*npz:PATH"):
        data.load("cifar10")


# Use ------------------------------------------------------------------------------------------------------


def test_batch_normalises_and_may_be_empty(tmp_path: Path) -> None:
    spec = save(tmp_path / "a.npz", **arrays()) + "?mean=0.1,0.2,0.3&std=0.5"
    d = data.load(spec).to("cpu", torch.float64)
    x, y = d.batch(torch.tensor([4, 4, 0]))
    mean = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64).view(3, 1, 1)
    torch.testing.assert_close(x, (d.x_train[[4, 4, 0]].double() / 255 - mean) / 0.5, rtol=1e-12, atol=1e-12)
    assert torch.equal(y, d.y_train[[4, 4, 0]]) and x.dtype == torch.float64
    x, y = d.batch(torch.tensor([], dtype=torch.long), "test")
    assert x.shape == (0, 3, 6, 5) and y.shape == (0,)


def test_features_are_used_as_they_are(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((20, 7))
    y = np.arange(20) % 3
    d = data.load(save(tmp_path / "f.npz", x_train=x[:15], y_train=y[:15], x_test=x[15:], y_test=y[15:]))
    assert d.mean == (0.0,) and d.std == (1.0,) and torch.equal(d.batch(slice(None))[0], d.x_train)
    spec = f"npz:{tmp_path / 'f.npz'}?mean={','.join('1234567')}&std=2"
    z = data.load(spec)
    torch.testing.assert_close(z.batch(slice(0, 1))[0], (z.x_train[:1] - torch.arange(1.0, 8.0)) / 2)


def test_validation_split_holds_train_only() -> None:
    d = data.load("mnist-5k")
    v = d.validation_split()
    assert (v.n_train, v.n_test) == (3200, 800) == (data.validation_size(4000), 800)
    assert torch.equal(torch.cat([v.x_train, v.x_test]), d.x_train)
    assert v.name == "mnist-5k:validation" and v.digest != d.digest


def test_image_folder(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for label, name in enumerate(("ant", "bee")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(0, 128, (8, 8, 3), dtype=np.uint8) + np.uint8(128 * label)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    d = data.load(f"imagefolder:{tmp_path}")
    assert d.x_train.shape == (6, 3, 8, 8) and d.classes == 2
    assert torch.equal(d.x_train.flatten(1).amin(1) >= 128, d.y_train == 1)
    small = data.load(f"imagefolder:{tmp_path}?size=4&channels=1")
    assert small.x_test.shape == (6, 1, 4, 4) and small.name.endswith("?channels=1&size=4")
    Image.fromarray(pixels[:5]).save(tmp_path / "test" / "bee" / "odd.png")
    with pytest.raises(DatasetError, match=r"odd\.png is 8x5.*\?size=32"):
        data.load(f"imagefolder:{tmp_path}")


def test_facts_of_a_file_are_remembered_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = save(tmp_path / "a.npz", **arrays())
    facts = data.describe(spec)
    assert facts["digest"] == data.load(spec).digest and facts["input_shape"] == (3, 6, 5)

    def unread(path: Path, layout: str | None) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr("harness.data.own.read_npz", unread)
    assert data.describe(spec) == facts
    save(tmp_path / "a.npz", **arrays(seed=1, n=41))
    with pytest.raises(AssertionError, match="read again"):
        data.describe(spec)


# Errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_missing_data_names_places_and_commands(nowhere: Path, name: str) -> None:
    with pytest.raises(DatasetMissing) as caught:
        data.load(name)
    text = str(caught.value)
    assert str(nowhere / f"{name}.npz") in text and "EPSBENCH_DOWNLOAD=1" in text and "EPSBENCH_DATA" in text
    assert len(caught.value.looked) >= 2
    if name == "fashion-mnist":
        assert "apt-get install dataset-fashion-mnist" in text
        assert str(nowhere.parent / "share" / "datasets" / "fashion-mnist") in text
    assert isinstance(data.missing(name), DatasetMissing)
    if name in DIGESTS:  # a run can be named where it cannot be run
        assert data.describe(name)["digest"] == DIGESTS[name]


def test_downloads_only_when_asked(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def offline(class_name: str, root: data.Places, download: bool) -> None:
        calls.append((class_name, download))
        raise OSError("no network")

    monkeypatch.setattr(vision, "_parts", offline)
    with pytest.raises(DatasetMissing):
        data.load("svhn")
    assert not calls
    monkeypatch.setenv("EPSBENCH_DOWNLOAD", "1")
    assert data.missing("svhn") is None
    with pytest.raises(DatasetMissing, match="no network"):
        data.load("svhn")
    assert calls == [("SVHN", True)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mnist5k", 'Did you mean "mnist-5k"'),
        ("mnist1d?m=100", 'no parameter "m"'),
        ("mnist1d?n=many", "whole number"),
        ("mnist1d?n=101", "multiple of 10"),
        ("digits?n=5", 'no parameter "n"'),
        ("npz:a.npz?men=0.5", 'Did you mean "mean"'),
        ("npz:a.npz?std=0", "above 0"),
        ("npz:a.npz?mean=0.5;0.5", "one per channel"),
        ("npz:absent.npz", "absent.npz"),
        ("imagefolder:absent", "train/ and test/"),
        ("imagefolder:a?channels=2", "3 \\(colour\\) or 1"),
    ],
)
def test_mistyped_specs_say_what_to_write(nowhere: Path, spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.load(spec)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("y_test", None, "no array y_test"),
        ("y_train", np.zeros(30), "float64; labels are whole numbers"),
        ("y_train", np.zeros(7, dtype=int), r"\[7\] for 30 examples"),
        ("y_train", -np.ones(30, dtype=int), "labels start at 0"),
        ("x_train", np.zeros((30, 6, 5, 3), dtype=np.int64), "int64; save images as uint8"),
        ("x_train", np.full((30, 3, 6, 5), np.nan), "NaN"),
        ("x_train", np.zeros((30, 9, 5, 3), dtype=np.uint8), "must be alike"),
        ("x_train", np.array([None] * 30), "no objects"),
        ("classes", np.array(["only one"]), "names only 1"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, key: str, value: np.ndarray | None, message: str) -> None:
    content = {**arrays(), key: value}
    if value is None:
        del content[key]
    spec = save(tmp_path / "bad.npz", **content)
    with pytest.raises(DatasetError, match=f"(?s)bad.npz.*{message}"):
        data.load(spec)


def test_any_file_is_an_error_not_a_traceback(tmp_path: Path) -> None:
    for content in (b"", b"PK\x03\x04 cut", b"not an archive at all"):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(DatasetError, match=r"x\.npz"):
            data.load(f"npz:{tmp_path / 'x.npz'}")


def test_every_data_set_is_indexed() -> None:
    assert set(registry.index("dataset")) == {*EMBEDDED, *FILES, *RELABELLED, "npz", "imagefolder", "features"}
    assert not registry.broken("dataset")
