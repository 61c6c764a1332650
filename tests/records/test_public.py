"""What is published of a run follows from its plan, its releases and public data: nothing else is beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import cli, data, report, suite
from harness.dp.noise import Gaussian
from harness.dp.sampler import Poisson
from harness.provenance import measure
from harness.records import description, public, store
from harness.records.files import dumps
from harness.records.record import FAILED
from harness.running import run
from harness.running.seeds import Seeds
from harness.verify.exchange import bundle as pack
from harness.verify.exchange import trust
from tests.support import ROOT

SCHEMA = jsonschema.Draft202012Validator(json.loads((ROOT / "docs" / "record.schema.json").read_text()))
OLD = sorted((ROOT / "results").glob("*/*/record.json"))
SUITE = """
[suite]
name = "worlds"
question = "What comes beside the weights?"
seeds = 1
[privacy]
epsilon = 3.0
delta = 1e-5
relation = "add-or-remove"
accountant = "rdp"
[train]
batch = 48
steps = 6
[[task]]
dataset = "digits"
model = "{model}"
evaluate = "{split}"
[[method]]
name = "{method}"
{more}
[[device]]
device = "cpu"
engine = "auto"
"""
CASES = {
    "a threshold that follows norms": ("adaptive", "mlp?hidden=8", ""),
    "two stages, one judged by private labels": (
        "dp-rotation", "mlp?hidden=8", 'then = {method = "dp-adam", trains = "head", steps = 4}',
    ),
    "a validation part": ("dp-sgd", "mlp?hidden=8", ""),
}  # fmt: skip


def cell(case: str) -> Any:
    method, model, more = CASES[case]
    text = SUITE.format(method=method, model=model, more=more, split="test")
    if "validation" in case:
        text = text.replace('"test"', '"validation"')
    return suite.parse(text, "worlds.toml").cells()[0]


def in_floats(patch: pytest.MonkeyPatch) -> None:
    """Pixels as floats, which may be anything."""
    load = run._load

    def loaded(*arguments: Any) -> data.Dataset:
        found = load(*arguments)
        return replace(found, x_train=found.x_train / 255, x_test=found.x_test / 255)

    patch.setattr(run, "_load", loaded)


def other_world(patch: pytest.MonkeyPatch, one: Any) -> None:
    """All that is private is another: examples, labels, held-out examples, who is in a batch, time and memory.

    The last batch is empty. One example is beyond what a network can compute with, and so is one that is held out.
    """
    load, draw, peak = run._load, Poisson.draw, measure.peak_memory_mib

    def far(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.full_like(x[:1], 3e38), x[1:]])

    def loaded(*arguments: Any) -> data.Dataset:
        found = load(*arguments)
        told = {"x_train": far(found.x_train * 7 + 1), "y_train": found.y_train.flip(0)}
        if one.task["evaluate"] == "validation":
            told |= {"x_test": far(found.x_test), "y_test": found.y_test.flip(0)}
        return replace(found, **told)

    def drawn(self: Poisson, n: int, batch: int, step: int, seed: int) -> torch.Tensor:
        return draw(self, n, batch, step, seed)[: 0 if step in (3, 5) else 7 + step]

    patch.setattr(run, "_load", loaded)
    patch.setattr(Poisson, "draw", drawn)
    patch.setattr(measure, "peak_memory_mib", lambda device: peak(device) + 1000)


def execute(one: Any, folder: Path, elsewhere: bool) -> store.Record:
    """A run of which nothing but noise is released, as it is in results/."""
    add = Gaussian.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Gaussian, "add",
            lambda self, release, rng: add(self, release._replace(value=release.value.zeros_like()), rng),
        )  # fmt: skip
        in_floats(patch)
        if elsewhere:
            other_world(patch, one)
        record = run.execute(one, folder, "worlds")
    record["started"] = "2026-01-02T03:04:05+00:00"  # its day is told
    store.write_record(folder, record)
    return record


def published(results: Path, reports: Path, charts: bool) -> dict[str, Any]:
    """All that goes out of a results folder where nobody asks for more; the report where `charts` are to be drawn."""
    bundle = results.with_suffix(".zip")
    assert pack.pack(results, bundle).left_out == []
    (finished,) = description.Finished.load(results, None, private=False)
    records = store.load(results)
    placed = [{**one, "path": str(Path(one["path"]).relative_to(results))} for one in records]
    folder = report.build("worlds", "", placed, reports, results=results).folder if charts else None
    return {
        "pack": bundle.read_bytes(),
        "MLflow": (
            finished.data,
            description.tags(finished),
            description.final_metrics(finished.record),
            finished.points(),
        ),
        "report": {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*.*")} if folder else "",
    }


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from leaves(one)
    else:
        yield value


@pytest.mark.usefixtures("equal_noise")
@pytest.mark.parametrize("case", CASES)
def test_runs_that_differ_in_what_is_private_publish_the_same_to_the_bit(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EPSBENCH_CACHE", str(tmp_path / "cache"))
    one = cell(case)
    records, told = [], []
    for world in ("here", "elsewhere"):
        folder = tmp_path / world / "results" / "worlds" / one.id
        folder.mkdir(parents=True)
        records.append(execute(one, folder, world == "elsewhere"))
        told.append(published(tmp_path / world / "results", tmp_path / world / "reports", "threshold" in case))
    assert [record["status"] for record in records] == ["ok", "ok"]
    a, b = (public.diagnostics(record) for record in records)
    stages = [[stage["diagnostics"] for stage in record.get("stages", [record])] for record in records]
    assert a["peak_memory_mib"] != b["peak_memory_mib"] and a["wall_seconds"] != b["wall_seconds"]
    assert all(x["train_loss"] != y["train_loss"] for x, y in zip(*stages, strict=True))
    assert records[0]["weights_sha256"] == records[1]["weights_sha256"]
    for what in told[0]:
        assert told[0][what] == told[1][what], what
    assert told[0]["MLflow"][3] and "epsilon" in told[0]["MLflow"][3][0].values  # something is told


def test_no_number_that_is_published_is_the_size_of_a_batch(tmp_path: Path) -> None:
    """`measured.microbatch` was that of the last one."""
    for number in range(9):
        one = replace(cell("a threshold that follows norms"), seed=number)
        folder = tmp_path / "worlds" / one.id
        record = execute(one, folder, elsewhere=False)
        n, schedule = one.task["n_train"], one.schedule
        drawn = {name: record["randomness"][name] for name in ("attempt", "code", "setting")}
        seed = Seeds(one, **drawn).sampling
        last = len(Poisson().draw(n, schedule["batch"], schedule["steps"] - 1, seed))
        assert record["diagnostics"]["microbatch"] == last
        if last not in (48, n):  # numbers that a record has for other reasons
            break
    told = {**public.view(record), "environment": None}
    trace = public.trace(record, (folder / "trace.jsonl").read_bytes()) or b""
    assert last not in list(leaves(told)) and record["device"]["microbatch"] is None
    assert trace and all(json.loads(line).keys() == {"step", "accuracy", "epsilon"} for line in trace.splitlines())


def test_older_records_are_read_and_lose_what_is_private_wherever_it_was(tmp_path: Path) -> None:
    names = {
        "examples_per_second", "train_seconds", "wall_seconds", "peak_memory_mib", "load_average",
        "microbatch", "train_loss", "clipped_fraction", "non_finite",
    }  # fmt: skip
    for path in OLD[:: max(1, len(OLD) // 40)]:
        record = store.read(path)
        view = public.view(record)
        assert public.view(view) == view
        assert store.parse_at(path, store.encode(view, path.parent.name))[1] == ""
        assert [error.message for error in SCHEMA.iter_errors(store.written(view))] == []
        assert public.diagnostics(view) == {} and not names & view["measured"].keys()
        assert not any(names & stage.keys() for stage in view.get("stages", ()))
        assert public.diagnostics(record)["wall_seconds"] == record["measured"]["wall_seconds"]
        if record["status"] == "ok" and 1 not in public.privately_judged(record):
            assert view["metrics"] == record["metrics"]


def test_a_bundle_without_diagnostics_is_taken_in_and_is_the_same_as_one_with_them(tmp_path: Path) -> None:
    path = next(p for p in OLD if p.parts[-3] == "fashion-methods" and store.read(p)["status"] == "ok")
    full, there = tmp_path / "full", path.parent.parent.name + "/" + path.parent.name
    (full / there).mkdir(parents=True)
    for name in ("record.json", "trace.jsonl"):
        (full / there / name).write_bytes(path.with_name(name).read_bytes())
    argument = ["pack", str(full), "-o"]
    assert cli.main([*argument, str(tmp_path / "some.zip")]) == cli.OK
    assert cli.main([*argument, str(tmp_path / "all.zip"), public.SWITCH]) == cli.OK
    into = tmp_path / "into"
    assert pack.merge([tmp_path / "some.zip"], into).added == [there]
    found = (into / there / "record.json").read_bytes()
    assert json.loads(found)["diagnostics"] == {} and trust.examine(json.loads(found)).refused == ""
    assert b"loss" not in (into / there / "trace.jsonl").read_bytes()
    assert pack.merge([tmp_path / "all.zip"], into).same == [there] == pack.merge([into], full).same
    assert (into / there / "record.json").read_bytes() == found
    assert pack.merge([tmp_path / "all.zip"], tmp_path / "whole").added == [there]
    assert (tmp_path / "whole" / there / "record.json").read_bytes() == path.read_bytes()
    changed = json.loads(path.read_bytes())
    changed["metrics"]["accuracy"] += 0.01
    (full / there / "record.json").write_bytes(dumps(changed).encode())
    assert pack.merge([full], into).conflicts


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from((*FAILED, "skipped")), WORDS, st.integers(1, 8), WORDS)
def test_who_fails_tells_neither_why_nor_how_far_it_came(status: str, why: str, steps: int, other: str) -> None:
    """What a process printed last, at how much memory it was killed, and at which step an audit ended it."""
    record = store.read(OLD[0])
    record["status"] = status
    ends = []
    for reason, count in ((why, steps), (other, steps + 1)):
        made = json.loads(json.dumps(record)) | {"reason": reason, "finished": f"2026-01-02T00:00:0{count}+00:00"}
        made["privacy"] |= {"ledger": [[{"type": "NoOpDpEvent"}, count]], "epsilon": count / 9, "spent": {"pld": count}}
        made["measured"]["wall_seconds"] = count
        made["privacy"]["noise_multiplier"] = 1.0  # where it was skipped, it was by an engine at work
        ends.append(public.view(made))
        assert public.trace(made, b'{"step": 1, "accuracy": 0.5}\n' * count) is None
    assert ends[0] == ends[1]
