"""Which random numbers a run draws, and that two cells of one id are never taken for each other."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness import cli, suite
from harness.dp import SGD, Auto, BookKeeping, Full, Gaussian, Ghost, Loop, Method, Release, Tree
from harness.dp.engines.engine import PerExample
from harness.dp.random import Stream
from harness.dp.release import Observed
from harness.records import draw, store
from harness.records.cell import Cell
from harness.records.files import StoreError
from harness.report import board
from harness.report.model import runs as read
from harness.report.model.words import recipe
from harness.running import child, jobs, launch
from harness.running import run as running
from harness.running.seeds import Seeds
from harness.running.train import Schedule, Streams, start, train
from harness.verify.exchange import bundle as pack
from tests.support import ROOT
from tests.support.records import merge

SUITE = """
[suite]
name = "draws"
question = "Whose noise is this?"
seeds = 1
[privacy]
epsilon = 3.0
delta = 1e-5
relation = "add-or-remove"
accountant = "rdp"
[train]
batch = 64
steps = 12
[[task]]
dataset = "digits"
model = "mlp?hidden=8"
[[method]]
name = "dp-sgd"
"""


def cell() -> Cell:
    return suite.parse(SUITE, "draws.toml").cells()[0]


def weights(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch, save_seconds: float = 20.0) -> dict[str, Any]:
    monkeypatch.setattr(running, "code_of", lambda cell: {"hash": code, "files": {}})
    return running.execute(cell(), folder, "draws", save_seconds=save_seconds)


def test_two_attempts_share_no_noise_and_a_repeated_one_has_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By other code or in another attempt: other noise. The same cell, attempt and code: the same bits, anywhere."""
    id, a, b = cell().id, "a" * 12, "b" * 12
    first = weights(tmp_path / "x" / id, a, monkeypatch)
    assert first["randomness"] == {
        "attempt": 1,
        "code": a,
        "setting": first["randomness"]["setting"],
        "dropout_bits": 256,
    }
    again = weights(tmp_path / "y" / id, a, monkeypatch)
    second = weights(tmp_path / "x" / f"{id}.2", a, monkeypatch)
    other = weights(tmp_path / "z" / id, b, monkeypatch)
    found = [one["weights_sha256"] for one in (first, again, second, other)]
    assert found[0] == found[1] and len(set(found)) == 3
    setting = second["randomness"]["setting"]
    assert second["randomness"] == {"attempt": 2, "code": a, "setting": setting, "dropout_bits": 256}
    # What repeats it is the attempt that it was, in a folder where it has no record yet.
    (run,) = read.read([second])
    words = recipe(run, "draws.toml")[-1].split()
    assert words[words.index("--attempt") + 1] == "2" and "--attempt" not in recipe(read.read([first])[0], "a.toml")[-1]
    (job,) = jobs.select([cell()], tmp_path / "again", "draws", attempt=2).todo
    assert job.folder.name == f"{id}.2"
    assert weights(job.folder, a, monkeypatch)["weights_sha256"] == found[2]
    # Initial weights are paired over all of them, and follow no data.
    others = dataclasses.replace(cell(), task={**cell().task, "digest": "0" * 16})
    assert Seeds(others, attempt=1, code=a).init == Seeds(cell(), attempt=1, code=a).init
    seeds = [Seeds(cell(), attempt=n, code=code, setting=s) for n in (1, 2) for code in (a, b) for s in (a, setting)]
    assert len({one.init for one in seeds}) == 1 and len({one.noise for one in seeds}) == 8


def test_what_decides_sums_to_the_bit_decides_the_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a cell that differ in device, microbatch, libraries, noise multiplier or engine share none."""
    one = cell()
    here = running.setting(one, "cpu", 1)
    others = {running.setting(one, "cpu", 2), running.setting(one.on("cpu", microbatch=7), "cpu", 1)}
    others.add(running.setting(one.on("cpu", engine="loop"), "cpu", 1))
    monkeypatch.setattr(running.numpy, "__version__", "0")
    assert len({here, running.setting(one, "cpu", 1), *others}) == 5
    released = []
    for engine, sigma in ((BookKeeping(), 1.0), (BookKeeping(), 1.1), (Loop(), 1.0), (Chosen(), 1.0), (Other(), 1.0)):
        model, method = nn.Linear(2, 2), Method(engine=engine, sampler=Full(), optimizer=SGD(1.0))
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        still = SimpleNamespace(n_train=4, batch=lambda indices: (torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)))
        end = train(
            method, model, still, sigma, Schedule(1, 4, 1), Seeds(one, attempt=1, code=""), start(method, model, 1)
        )
        released.append(end.w.flat[:4] / sigma)
    assert len({tuple(w.tolist()) for w in released}) == 5


def test_releases_that_differ_in_a_bit_share_no_noise() -> None:
    """Not even where nothing that is recorded differs: a library's switch, say, or a file that no hash covers."""
    seed, seen = Stream(7, "noise", 3), Observed(torch.zeros(0), None, torch.zeros(()), torch.zeros(()), engine="loop")
    first = Release(Tree.of({"a": torch.zeros(50), "b": torch.ones(50)}), 1.0, 2.0)
    moved = first.value.flat.clone()
    moved[60] = moved[60].nextafter(torch.tensor(2.0))
    others = {
        "value": first._replace(value=first.value.with_flat(moved)),
        "names": first._replace(value=Tree.of({"a": torch.zeros(50), "c": torch.ones(50)})),
        "sensitivity": first._replace(sensitivity=math.nextafter(1.0, 2.0)),
        "sigma": first._replace(sigma=math.nextafter(2.0, 3.0)),
        "scale": first._replace(scale={"a": 1.0, "b": 1.0}),
        "dtype": first._replace(dtype=torch.float64),
    }

    def noise(release: Release, name: str = "grad", seen: Observed = seen) -> Tensor:
        return Gaussian().add(release, Streams(seed, seed).own(name, release, seen)).flat - release.value.flat

    found = [noise(first), noise(first, "other"), noise(first, seen=dataclasses.replace(seen, engine="vmap"))]
    found += [noise(release) for release in others.values()]
    assert torch.equal(noise(first._replace(value=first.value.with_flat(first.value.flat.clone()))), found[0])
    for one, other in itertools.combinations(found, 2):
        # Independent normal numbers of deviation 2, a hundred: their correlation is within 6 / sqrt(100).
        assert abs(float((one * other).mean()) / 4) < 0.6


class Chosen(Auto):
    """As if the first had been the fastest here, and `Other` elsewhere."""

    role = "Auto"

    def chosen(self, *arguments: Any) -> PerExample:
        return BookKeeping()


class Other(Chosen):
    def chosen(self, *arguments: Any) -> PerExample:
        return Ghost()


class Stop(Exception):
    pass


def test_a_run_goes_on_with_what_it_began_with_or_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same code ends in the same bits, in a later attempt's folder too; other code forgets what was begun."""
    id, a, b = cell().id, "a" * 12, "b" * 12
    whole = {code: weights(tmp_path / code / id, code, monkeypatch)["weights_sha256"] for code in (a, b)}
    write = running.write_checkpoint

    def write_and_die(*args: Any) -> None:
        write(*args)
        raise Stop

    def cut(folder: Path) -> None:
        with monkeypatch.context() as inner:
            inner.setattr(running, "write_checkpoint", write_and_die)
            with pytest.raises(Stop):
                weights(folder, a, monkeypatch, save_seconds=0.0)
        begun = draw.begun(folder)
        assert begun is not None and begun.cell == cell().digest
        assert (begun.attempt, begun.code) == (1, a)
        for file in (folder / "checkpoint").iterdir():
            assert file.stat().st_mode & 0o077 == 0, file

    cut(tmp_path / "same" / id)
    resumed = weights(tmp_path / "same" / id, a, monkeypatch)
    assert resumed["measured"]["sessions"] == 2 and resumed["weights_sha256"] == whole[a]

    cut(tmp_path / "taken" / id)  # as the launcher gives a cut-short run's checkpoint to its next attempt
    (tmp_path / "taken" / id).rename(tmp_path / "taken" / f"{id}.2")
    resumed = weights(tmp_path / "taken" / f"{id}.2", a, monkeypatch)
    assert resumed["measured"]["sessions"] == 2 and resumed["weights_sha256"] == whole[a]
    assert (resumed["randomness"]["attempt"], resumed["randomness"]["code"]) == (1, a)

    def stop(*args: Any, **options: Any) -> None:
        raise Stop

    early = tmp_path / "early" / id
    with monkeypatch.context() as inner:
        # Before there is a checkpoint: that there is none must not show in what its next session draws.
        inner.setattr(running, "train", stop)
        with pytest.raises(Stop):
            weights(early, a, monkeypatch)
    early.rename(tmp_path / "early" / f"{id}.2")
    resumed = weights(tmp_path / "early" / f"{id}.2", a, monkeypatch)
    assert resumed["measured"]["sessions"] == 2 and resumed["weights_sha256"] == whole[a]
    assert resumed["randomness"]["attempt"] == 1

    cut(tmp_path / "changed" / id)
    anew = weights(tmp_path / "changed" / id, b, monkeypatch)
    assert anew["measured"]["sessions"] == 1 and anew["weights_sha256"] == whole[b]

    cut(tmp_path / "silent" / id)  # a checkpoint that does not say what it drew
    (tmp_path / "silent" / id / "checkpoint" / draw.NOTE).unlink()
    assert weights(tmp_path / "silent" / id, a, monkeypatch)["measured"]["sessions"] == 1


def pair() -> tuple[Cell, Cell]:
    """Two cells with one id, as a search of some minutes finds them."""
    file = next(
        file for file in sorted(ROOT.glob("results/fashion/*/record.json")) if file.parent.name == "25f4369fbb2d"
    )
    found = []
    for lr in (1.60385475, 4.41856865):
        canonical = copy.deepcopy(json.loads(file.read_bytes())["cell"])
        canonical["method"]["parameters"]["lr"] = canonical["method"]["parts"]["optimizer"]["lr"] = lr
        found.append(Cell.from_canonical(canonical, suite="fashion"))
    return found[0], found[1]


def record_of(cell: Cell) -> store.Record:
    record = json.loads((ROOT / "results/fashion/25f4369fbb2d/record.json").read_bytes())
    return record | {"id": cell.id, "group": cell.group, "cell": cell.canonical()}


def put(results: Path, cell: Cell, attempt: int = 1) -> Path:
    return store.write_record(store.Folder(results, "fashion", cell.id).attempt(attempt), record_of(cell))


def test_two_cells_of_one_id_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They share a name and no random number; wherever one is asked for and the other is there, that is said."""
    one, two = pair()
    assert one.id == two.id and one.digest != two.digest
    seeds = [Seeds(x, attempt=1, code="a") for x in (one, two)]
    assert len({getattr(s, role) for s in seeds for role in ("noise", "sampling", "path")}) == 6

    here, there = tmp_path / "here", tmp_path / "there"
    put(here, one)
    put(there, two)
    assert [len(getattr(jobs.select([one], here, "fashion"), name)) for name in ("done", "conflicts")] == [1, 0]
    asked = jobs.select([two], here, "fashion", retry=True, rerun_stale=True)
    assert not asked.todo and not asked.done and "another cell with the same id" in asked.conflicts[0].reason
    asked = jobs.select([one, two], tmp_path / "empty", "fashion")
    assert [job.cell.digest for job in asked.todo] == [one.digest]
    assert "is the folder of two runs" in asked.conflicts[0].reason

    result = merge([there], here)
    assert not result.added and "another cell with the same id" in result.conflicts[0].reason
    store.write_record(store.Folder(there, "fashion", one.id).attempt(3), record_of(two))
    result = merge([there], here)  # under another number neither
    assert not result.added and len(result.conflicts) == 2

    mixed = tmp_path / "mixed"
    put(mixed, one)
    put(mixed, two, 2)
    assert len(store.current(store.load(mixed))) == 2  # no attempts at one run
    with pytest.raises(StoreError, match="two cells with the same id"):
        pack.pack(mixed, tmp_path / "mixed.zip")
    assert cli.main(["show", one.id[:6], "--results", str(mixed)]) == 2
    assert "two cells with the same id" in capsys.readouterr().err

    rows = board("fashion", "?", [record_of(x) | {"group": one.group, "path": "a/b/c"} for x in (one, two)]).rows
    assert len(rows) == 2  # a group's digits may be shared as well

    half = tmp_path / "half" / "fashion" / one.id
    half.mkdir(parents=True)
    draw.begin(half, one, "a" * 12)
    asked = jobs.select([two], tmp_path / "half", "fashion")
    assert not asked.todo and "half-done run of another cell" in asked.conflicts[0].reason
    with pytest.raises(draw.OtherCell, match="half-done run of another cell"):
        draw.begin(half, two, "a" * 12)
    assert draw.begun(half) is not None  # and it is kept
    assert not merge([there], tmp_path / "half").added


def test_a_crash_in_training_tells_nothing_of_private_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception may quote a label or a norm: its text stays in error.txt, which is for its owner alone."""

    def step(*args: Any, **options: Any) -> None:
        raise RuntimeError("Target 13 is out of bounds, norm 3.14159")

    monkeypatch.setattr("harness.running.train.step", step)
    private = cell()
    free = suite.parse(SUITE.replace('"dp-sgd"', '"non-private"'), "draws.toml").cells()[0]
    for one in (private, free):
        folder = tmp_path / "draws" / one.id
        folder.mkdir(parents=True)
        task = {"cell": one.to_json(), "suite": "draws", "jobs": 1, "target": launch.TARGET, "code": None}
        found = child._execute(task, folder)
        assert found["status"] == "crashed" and "RuntimeError" in found["reason"]
        assert ("3.14159" in json.dumps(found)) == (one is free)
        assert "3.14159" in (folder / "error.txt").read_text()
        assert (folder / "error.txt").stat().st_mode & 0o077 == 0
