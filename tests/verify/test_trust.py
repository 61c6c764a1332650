"""Records from elsewhere: what follows from a cell is computed again, and nothing sent outranks what is here."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import cli
from harness.dp.account import Ledger, epsilons
from harness.dp.release import Relation
from harness.records import origin, store
from harness.records.cell import Cell
from harness.verify.exchange import bundle as pack
from harness.verify.exchange import trust
from tests.support import ROOT

RECORDS = sorted(ROOT.glob("results/*/*/record.json"))


def read(path: Path) -> store.Record:
    return json.loads(path.read_bytes())  # type: ignore[no-any-return]


# By a CPU, whose masks nobody can search.
DRAWN = {"attempt": 1, "code": "a" * 12, "dropout_bits": 64}


def genuine() -> store.Record:
    """A record of one stage with privacy, by a method that is made here as it was then."""
    for path in RECORDS:
        record = read(path)
        if record["suite"] == "fashion-methods" and record["cell"]["method"]["name"] == "dp-sgd":
            return record
    raise AssertionError("no such record")


def staged() -> store.Record:
    """A record of two stages on the same data."""
    return next(r for r in map(read, RECORDS) if "then" in r["cell"] and "task" not in r["cell"]["then"])


def named(record: store.Record) -> store.Record:
    """With the id and the group that its cell now has."""
    cell = Cell.from_canonical(record["cell"], suite=record["suite"])
    return record | {"id": cell.id, "group": cell.group}


def respent(record: store.Record, ledger: Ledger) -> None:
    """Enter a ledger with all that honestly follows from it."""
    privacy = record["privacy"]
    bounds = epsilons(ledger, privacy["delta"], Relation(privacy["relation"]))
    recorded = {name: bounds[name] if bounds[name] < float("inf") else None for name in privacy["spent"]}
    privacy |= {
        "ledger": ledger.to_json(),
        "spent": recorded,
        "planned": recorded,
        "epsilon": recorded[privacy["accountant"]],
    }


@pytest.mark.parametrize("one", [genuine, staged])
def test_a_genuine_record_is_believed(one: Callable[[], store.Record]) -> None:
    assert trust.examine(one()) == trust.Examined()


def test_the_cell_of_every_record_is_read_as_it_was_written() -> None:
    assert RECORDS
    for path in RECORDS:
        record = read(path)
        cell = store.cell_of(record)
        assert (cell.id, cell.group, cell.canonical()) == (record["id"], record["group"], record["cell"]), path
        assert store.mismatch(record) == ""


def test_every_record_of_this_repository_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By RDP alone, which is quick; by every accountant it takes a minute."""
    by_rdp, close = trust.epsilon, trust._close
    monkeypatch.setattr(
        trust, "epsilon", lambda ledger, *terms: by_rdp(ledger, *terms) if terms[-1] == "rdp" else math.inf
    )
    monkeypatch.setattr(trust, "_close", lambda name, *of: close(name, *of) if name.endswith(".rdp") else None)
    monkeypatch.setattr(trust, "explain", lambda *terms: {})
    expected = ("has another engine here", "is not here", "cannot be computed again here")
    for path in RECORDS:
        verdict = trust.examine(read(path))
        assert not verdict.refused, path
        assert all(any(text in one for text in expected) for one in verdict.unknown), path


def _ledger(record: store.Record, **changes: Any) -> None:
    for event, _ in record["privacy"]["ledger"]:
        for name, value in changes.items():
            (event if name in event else event["event"])[name] = value


def _epsilons(record: store.Record, value: float) -> None:
    for name in ("planned", "spent"):
        record["privacy"][name] = {one: v and value for one, v in record["privacy"][name].items()}
    record["privacy"]["epsilon"] = value


def _quiet(record: store.Record) -> None:
    """Less noise than the target asks for, and honest about all the rest."""
    record["privacy"]["noise_multiplier"] *= 0.8
    _ledger(record, noise_multiplier=record["privacy"]["noise_multiplier"])
    respent(record, Ledger.from_json(record["privacy"]["ledger"]))


def _fainter(record: store.Record) -> None:
    """Less noise by a share that accountants' digits might explain, and epsilons of the noise that there should be."""
    record["privacy"]["noise_multiplier"] *= 0.9996
    _ledger(record, noise_multiplier=record["privacy"]["noise_multiplier"])


def _noisier(record: store.Record) -> None:
    """A noise multiplier that was never calibrated, to show off a small epsilon; honest about all that follows."""
    record["privacy"]["noise_multiplier"] *= 50
    _ledger(record, noise_multiplier=record["privacy"]["noise_multiplier"])
    respent(record, Ledger.from_json(record["privacy"]["ledger"]))


def _published(record: store.Record) -> None:
    """A second stage on the private data that is passed off as one on public data, and so spends nothing."""
    record["cell"]["then"]["task"] = record["cell"]["task"]
    record |= named(record)


def _shorter(record: store.Record) -> None:
    record["privacy"]["ledger"][-1][1] -= 1
    respent(record, Ledger.from_json(record["privacy"]["ledger"]))


def _set(where: str, value: Any) -> Callable[[store.Record], None]:
    def change(record: store.Record) -> None:
        *path, last = where.split(".")
        inner: Any = record
        for key in path:
            inner = inner[int(key)] if isinstance(inner, list) else inner[key]
        inner[last] = value

    return change


def _with(record: store.Record, part: str) -> store.Record:
    cell = record["cell"]
    return record | {"cell": cell | {part: cell[part] | {"x": 1}}}


FORGED: dict[str, tuple[Callable[[], store.Record], Callable[[store.Record], object], str]] = {
    "a key of the schedule": (genuine, lambda r: r.update(named(_with(r, "schedule"))), "cell.schedule.x is"),
    "a key of the task": (genuine, lambda r: r.update(named(_with(r, "task"))), "cell.task.x is"),
    "no sensitivity": (genuine, _set("privacy.sensitivity.grad", None), "privacy.sensitivity.grad is null"),
    "too much sensitivity": (genuine, _set("privacy.sensitivity.grad", 1e9), "privacy.sensitivity.grad is 1"),
    "epsilon alone": (genuine, _set("privacy.epsilon", 0.001), "privacy.epsilon is 0.001"),
    "every epsilon": (genuine, lambda r: _epsilons(r, 0.001), "privacy.planned.pld is 0.001"),
    "one accountant": (genuine, _set("privacy.spent.rdp", 0.5), "privacy.spent.rdp is 0.5"),
    "planned": (genuine, _set("privacy.planned.rdp", 0.5), "privacy.planned"),
    "the accountant that ranks": (genuine, _set("privacy.accountant", "rdp"), "privacy.accountant"),
    "an accountant of their own": (genuine, _set("privacy.spent.mine", 0.1), "which are not accountants here"),
    "sigma": (genuine, _set("privacy.noise_multiplier", 1e-3), "privacy.ledger is"),
    "no sigma": (genuine, _set("privacy.noise_multiplier", None), "privacy.noise_multiplier is null"),
    "less noise than the target": (genuine, _quiet, "its noise multiplier is too small"),
    "the ledger's noise": (genuine, lambda r: _ledger(r, noise_multiplier=1e6), "privacy.ledger is"),
    "the ledger's rate": (genuine, lambda r: _ledger(r, sampling_probability=1e-4), "privacy.ledger is"),
    "a step less": (genuine, _shorter, "privacy.ledger is"),
    "an empty ledger": (genuine, _set("privacy.ledger", []), "privacy.ledger is"),
    "nothing spent": (genuine, _set("privacy.spent", {}), "privacy."),
    "delta": (genuine, _set("privacy.delta", 1e-3), "privacy.delta is 0.001"),
    "relation": (genuine, _set("privacy.relation", "replace-one"), "privacy.relation is"),
    "unit": (genuine, _set("privacy.unit", "user"), "privacy.unit is"),
    "sampling": (genuine, _set("privacy.sampling", "Poisson, q = 0.001"), "privacy.sampling is"),
    "public data": (genuine, _set("privacy.public_data", "all of it"), "privacy.public_data is"),
    "a claim": (genuine, _set("privacy.claimed", {"epsilon": 0.1, "failed": []}), "its method claims nothing"),
    "a free search": (
        genuine, _set("privacy.epsilon_with_tuning", {"epsilon": 1.0, "accountant": "pld"}), "charges no search"
    ),
    "group": (genuine, _set("group", "0" * 12), "its group '000000000000' is not that of its cell"),
    "id": (genuine, _set("id", "0" * 12), "its id '000000000000' is not that of its cell"),
    "a second stage": (genuine, _set("cell.then", copy.deepcopy(staged()["cell"]["then"])), "its id"),
    "a field that no run has": (genuine, _set("cell.privacy.bonus", 1), "its id"),
    "a place that no cell has": (genuine, _set("cell.extra", 1), "something that no run has: extra"),
    "a little less noise": (genuine, lambda r: _fainter(r), "privacy.planned"),
    "a part that no method has": (
        genuine, lambda r: (_set("cell.method.with", {"engine": "Loop"})(r), r.update(named(r))),
        "cell.method.with has a part that no method has: engine",
    ),
    "accuracy": (genuine, _set("metrics.accuracy", 1.01), "metrics.accuracy is 1.01"),
    "fewer examples": (
        genuine, lambda r: r.update(named(r | {"cell": r["cell"] | {"task": r["cell"]["task"] | {"n_train": 10**6}}})),
        "cell.task.n_train is 1000000",
    ),
    "other data": (
        genuine,
        lambda r: r.update(named(r | {"cell": r["cell"] | {"task": r["cell"]["task"] | {"digest": "0" * 16}}})),
        "cell.task.digest is",
    ),
    "a looser target": (
        genuine,
        lambda r: r.update(named(r | {"cell": r["cell"] | {"privacy": r["cell"]["privacy"] | {"epsilon": 0.1}}})),
        "its noise multiplier is too small",
    ),
    "more noise than the target asks for": (genuine, lambda r: _noisier(r), "is not the one that is calibrated"),
    "sensitivity": (genuine, _set("privacy.sensitivity.grad", 1e-6), "privacy.sensitivity.grad is 1e-06"),
    "another unit": (
        genuine, lambda r: (_set("cell.privacy.unit", "user")(r), _set("privacy.unit", "user")(r), r.update(named(r))),
        'cell.privacy.unit is "user"',
    ),
    "judged on training data": (
        genuine, lambda r: (_set("cell.task.evaluate", "train")(r), r.update(named(r))), 'cell.task.evaluate is "train"'
    ),
    "examples": (genuine, _set("metrics.examples", 5), "metrics.examples is 5"),
    "another model's name": (
        genuine, _set("cell.task.model", "logistic"), "cell.task.architecture.name is"
    ),
    "the private data as public": (staged, lambda r: _published(r), "which is the private data and not public"),
    "a stage's sensitivity": (
        staged, lambda r: r["stages"][0].update(sensitivity={"grad": 1e-9}), "stages.1.sensitivity"
    ),
    "an epsilon where none is finite": (
        genuine, lambda r: [r["privacy"][n].update(gdp=0.01) for n in ("planned", "spent")], "ledger gives inf"
    ),
    "a stage's epsilon": (staged, _set("stages.0.epsilon", 0.1), "stages.1.epsilon is 0.1"),
    "a stage's steps": (staged, _set("stages.1.steps", 1), "stages.2.steps is 1"),
    "private judges": (genuine, _set("privacy.privately_judged", [1]), "privacy.privately_judged is [1]"),
    "guessed masks": (genuine, _set("randomness", DRAWN), "randomness.dropout_bits is 64"),
    "another release": (genuine, _set("privacy.sensitivity.counts", 1.0), "the names in privacy.sensitivity"),
    "a public stage": (staged, _set("stages.1.public", True), "stages.2.public is true"),
    "no second stage": (staged, lambda r: r["cell"].pop("then"), "its id"),
    "no stages": (staged, lambda r: r.pop("stages"), "stages are not one for each"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_what_is_forged_is_refused_by_name(name: str) -> None:
    make, forge, reason = FORGED[name]
    record = make()
    forge(record)
    refused = trust.examine(record).refused
    assert reason in refused


@pytest.mark.parametrize(("dtype", "tf32"), [("float32", "yes"), ("float64", True)])
def test_a_switch_that_no_device_has_is_refused(dtype: str, tf32: object) -> None:
    record = genuine()
    record["cell"]["numerics"] = {"dtype": dtype, "tf32": tf32}
    assert "cell.numerics.tf32 is" in trust.examine(named(record)).refused


def test_a_ledger_that_nobody_can_compute_is_their_word() -> None:
    """A method that is not known here, parts that are not those of today: not refused, and said."""
    for change, recorded in (
        (_set("privacy.sensitivity_note", "times 0"), "stands in privacy.sensitivity_note cannot be"),
        (_set("privacy.accounting", {"pld": "exact, by a proof"}), "stands in privacy.accounting cannot be"),
        (_set("cell.method.name", "no-such-method"), "its method cannot be built here"),
        (_set("cell.method.parts.clip.clip", 0.123), "its method has another clip here"),
        # BatchNorm mixes its examples, which a run is refused for and this record does not show.
        (_set("cell.task.model", "timm:resnet18"), 'its model "timm:resnet18" is of another library'),
        (_set("cell.task.model", "no-such-model"), 'its model "no-such-model" is of another library'),
    ):
        record = genuine()
        change(record)
        verdict = trust.examine(named(record))
        assert not verdict.refused and any(recorded in one for one in verdict.unknown)
        _epsilons(record, 0.001)  # and still its epsilons are those of its ledger
        assert "and its ledger gives" in trust.examine(named(record)).refused


def put(results: Path, record: store.Record, attempt: int = 1) -> Path:
    return store.write_record(store.Folder(results, record["suite"], record["id"]).attempt(attempt), record)


def test_a_bundle_is_examined_and_never_outranks_what_is_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A genuine second attempt comes in behind ours, a forged one not at all; what each side says stays apart."""
    here, there, evil = tmp_path / "here", tmp_path / "there", tmp_path / "evil"
    put(here, genuine())
    better = genuine()
    better["metrics"]["accuracy"] = 0.999
    put(there, better, 2)
    forged = genuine()
    _epsilons(forged, 0.001)
    put(evil, forged, 3)
    pack.pack(there, tmp_path / "there.zip")
    pack.pack(evil, tmp_path / "evil.zip")
    where = f"{better['suite']}/{better['id']}"

    result = pack.merge([tmp_path / "there.zip"], here)
    assert result.added == [f"{where}.2"] and not result.refused
    result = pack.merge([tmp_path / "evil.zip"], here)
    assert not result.added and "privacy.planned.pld is 0.001" in result.refused[0].reason
    found = store.load(here)
    assert ["origin" in record for record in found] == [False, True]
    (counts,) = store.current(found)
    assert store.attempt_of(counts) == 1 and counts["metrics"] == genuine()["metrics"]

    # Where nothing was made here, what came first counts.
    other = tmp_path / "other"
    pack.merge([tmp_path / "there.zip"], other)
    late = genuine()
    late["metrics"]["accuracy"] = 1.0
    put(tmp_path / "late", late, 7)
    pack.merge([tmp_path / "late"], other)
    (counts,) = store.current(store.load(other))
    assert store.attempt_of(counts) == 2
    capsys.readouterr()
    assert cli.main(["show", better["id"], "--results", str(other)]) == 0
    text = capsys.readouterr().out
    assert "merged from there.zip, SHA-256" in text and "its accuracy and its times are its sender's word" in text

    # What was looked at is what counts: a record that is changed afterwards is not taken in.
    path = other / f"{where}.2" / "record.json"
    path.write_text(path.read_text().replace('"accuracy": 0.999', '"accuracy": 0.998'))
    (broken,) = store.load(other).broken
    assert "was changed after it was merged from there.zip" in broken.reason
    # A damaged note makes no record ours.
    (here / f"{where}.2" / origin.FILE).write_text("{")
    assert store.attempt_of(store.current(store.load(here))[0]) == 1
