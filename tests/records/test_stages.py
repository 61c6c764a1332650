"""A second stage: one ledger, one noise multiplier, and nothing lost in between."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors import safe_open

from harness import models, suite
from harness.dp import Full, Gaussian, Method
from harness.dp.account import Ledger, epsilon
from harness.dp.calibrate import calibrate_stages
from harness.dp.method import Stage, plan
from harness.dp.release import Relation
from harness.provenance import measure
from harness.records import stages
from harness.records.cell import Cell
from harness.running import run
from harness.running.plan import stages_of
from harness.running.seeds import Seeds
from harness.running.train import LogPoint, start, train
from tests.support import ROOT

SCHEMA = json.loads((ROOT / "docs" / "record.schema.json").read_text())
SUITE = """
[suite]
name = "stages"
question = "What does a second stage do?"
[privacy]
epsilon = 3.0
delta = 1e-5
[train]
batch = 128
steps = 20
[[task]]
dataset = "digits"
model = "mlp?hidden=16"
[[method]]
name = "dp-sgd"
momentum = 0.0
clip = 0.5
then = {then}
"""
HEAD = '{ method = "dp-adam?lr=0.02&clip=2.0", steps = 30 }'
ALL = '{ method = "dp-adam?lr=0.02", steps = 30, trains = "all" }'
PUBLIC = '{ method = "non-private?lr=0.1", steps = 30, dataset = "%s" }'


def cells(then: str, text: str = SUITE) -> list[Cell]:
    return suite.parse(text.replace("{then}", then), "stages.toml").cells()


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> str:
    """Public data of the same shape: the digits' negatives."""
    import numpy as np

    from harness import data

    digits = data.load("digits")
    file = tmp_path_factory.mktemp("data") / "negatives.npz"
    arrays = {
        "x_train": 16 - digits.x_train.numpy(), "y_train": digits.y_train.numpy(),
        "x_test": 16 - digits.x_test.numpy(), "y_test": digits.y_test.numpy(),
    }  # fmt: skip
    np.savez(file, **arrays)
    return f"npz:{file}"


def lasting(record: dict) -> dict:
    """What a kill and a second session must not change."""
    kept = ("status", "metrics", "privacy", "weights_sha256", "stages")
    copy = json.loads(json.dumps({key: record.get(key) for key in kept}))
    for stage in copy["stages"]:
        timed = stage["diagnostics"]
        assert timed.pop("train_seconds") > 0 and timed.pop("examples_per_second")["median"] > 0
    return copy


def trace(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]


def ran(then: str, folder: Path) -> tuple[dict, Path]:
    """A run that saves at every log point, and its folder."""
    (cell,) = cells(then)
    record = run.execute(cell, folder, "stages", save_seconds=0.0)
    assert record["status"] == "ok", record["reason"]
    return record, folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[dict, Path]:
    """A run of two private stages, and its folder."""
    return ran(HEAD, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> tuple[dict, Path]:
    """The same where the second stage trains everything."""
    return ran(ALL, tmp_path_factory.mktemp("tuned"))


@pytest.fixture(scope="module")
def free(tmp_path_factory, other) -> tuple[dict, Path]:
    """The same where the second stage is on public data."""
    return ran(PUBLIC % other, tmp_path_factory.mktemp("free"))


def test_each_stage_tells_of_itself_alone(whole):
    record, folder = whole
    (cell,) = cells(HEAD)
    session = run._Session(cell, folder, 1e9)
    sigma, model = record["privacy"]["noise_multiplier"], session.model
    assert len(record["stages"]) == 2
    for told, leg in zip(record["stages"], session.legs, strict=True):  # trained here as if no other stage were
        p = start(leg.method, model, leg.schedule.steps)
        alone = train(leg.method, model, leg.data, sigma, leg.schedule, leg.seeds, p)
        made = run.diagnostics(leg.method, alone) | {
            "sensitivity": alone.sensitivity, "engine": alone.engine, "microbatch": alone.microbatch,
        }  # fmt: skip
        every = told | told["diagnostics"]
        assert {name: every[name] for name in made} == made
        for name, value in run.kept(leg, alone).items():
            model.get_parameter(name).data.copy_(value)
        model = models.Headed(model, session.data.input_shape, session.data.classes, frozen=True)
    first, second = record["stages"]
    assert first["diagnostics"]["clipped_fraction"] != second["diagnostics"]["clipped_fraction"] and first[
        "sensitivity"
    ] == {"grad": 0.5}
    assert [one["trains"] for one in record["stages"]] == ["all", "head"]
    assert first["epochs"] == 128 * 20 / cell.task["n_train"]


def test_the_stages_add_up_to_the_run_and_are_those_of_its_trace(whole):
    record, folder = whole
    first, second = record["stages"]
    points = trace(folder)
    assert [one["stage"] for one in points] == [1] * 20 + [2] * 30  # a line for each step here
    early, late = first["diagnostics"], second["diagnostics"]
    for told, number in ((early, 1), (late, 2)):
        rates = [one["examples_per_second"] for one in points if one["stage"] == number]
        assert rates[:3] == [None] * 3 and None not in rates[3:]  # which warm up
        assert told["examples_per_second"] == pytest.approx(measure.quartiles(rates[3:]))
        seen = [one["clipped_fraction"] for one in points if one["stage"] == number]
        assert min(seen) <= told["clipped_fraction"] <= max(seen)
        assert told["train_loss"] == [one["loss"] for one in points if one["stage"] == number][-1]
    measured, privacy = record["diagnostics"], record["privacy"]
    assert measured["train_seconds"] == pytest.approx(
        first["diagnostics"]["train_seconds"] + second["diagnostics"]["train_seconds"]
    )
    assert points[19]["seconds"] == pytest.approx(first["diagnostics"]["train_seconds"], abs=6e-4)
    assert (
        measured["examples_per_second"]
        == first["diagnostics"]["examples_per_second"]
        != second["diagnostics"]["examples_per_second"]
    )
    assert privacy["sensitivity"] is None and "train_loss" not in measured
    assert privacy["sampling"] == first["sampling"] == second["sampling"]
    (cell,) = cells(HEAD)
    half = plan(stages_of(cell)[:1], privacy["noise_multiplier"], cell.task["n_train"])
    assert first["epsilon"] == epsilon(half, 1e-5, Relation(first["relation"]), first["accountant"])


def test_two_distributions_are_both_named(tmp_path):
    (cell,) = cells(HEAD.replace("steps = 30", "steps = 30, batch = 91"))
    record = run._Session(cell, tmp_path, 1e9).blank("stages", datetime.now(UTC))
    both = [f"Poisson, q = {batch / cell.task['n_train']:.6g}" for batch in (128, 91)]
    assert [stage["sampling"] for stage in record["stages"]] == both
    assert record["privacy"]["sampling"] == f"{both[0]} (stage 1); {both[1]} (stage 2)"
    assert "sensitivity" not in record["stages"][0], "nothing has come of it"


def test_a_run_that_diverges_in_the_second_stage_says_what_came_of_the_first(whole, tmp_path):
    (cell,) = cells(HEAD.replace("0.02", "1e39"))
    record = run.execute(cell, tmp_path, "stages")
    assert record["status"] == "diverged"
    first, second = record["stages"]
    spent = record["privacy"]["epsilon"]
    assert 0 < first["epsilon"] < second["epsilon"] == spent < record["privacy"]["planned"]["pld"]
    assert first["epsilon"] == whole[0]["stages"][0]["epsilon"] and first["diagnostics"]["train_loss"] is not None
    assert second["sensitivity"] == {"grad": 2.0} != first["sensitivity"]


def test_an_earlier_record_says_of_each_stage_what_is_known(whole):
    record = json.loads(json.dumps(whole[0]))
    today = stages.stage_facts(record)
    assert [one["batch"] for one in today] == [128, 128] and None not in today[0]["sensitivity"].values()
    first, second = record["stages"]
    record["privacy"]["sensitivity"] = second["sensitivity"]
    record["diagnostics"] = {
        "train_loss": second["diagnostics"]["train_loss"],
        "clipped_fraction": 0.9,
        "non_finite": 0,
    }
    record["measured"]["microbatch"] = second["diagnostics"]["microbatch"]
    record["stages"] = [
        {key: one[key] for key in ("method", "steps", "data", "public", "spent", "accountant", "epsilon")}
        for one in (first, second)
    ]
    assert list(jsonschema.Draft202012Validator(SCHEMA).iter_errors(record)) == []
    old = stages.stage_facts(record)
    known = [{key for key in now if one[key] is not None} for one, now in zip(old, today, strict=True)]
    asked = {"method", "parameters", "parts", "trains", "data", "public", "batch", "steps", "epochs", "relation"}
    spent = {"spent", "accountant", "epsilon"}
    # Only what was the first stage's, and only what was the second's; speeds and fractions were of both.
    assert known[0] == asked | spent | {"sampling"}
    assert known[1] == asked | spent | {"sampling", "sensitivity", "engine", "microbatch", "train_loss"}
    for one, now in zip(old, today, strict=True):
        same = {key for key in now if one[key] is not None} - {"engine", "microbatch"}
        assert {key: one[key] for key in same} == {key: now[key] for key in same}
    record["cell"]["then"]["schedule"]["batch"] = 64
    assert stages.stage_facts(record)[1]["sampling"] is None, "it had another law, which nobody noted"
    del record["cell"]["then"]
    assert stages.stage_facts(record) == []


@pytest.mark.parametrize(("then", "which"), [(HEAD, "whole"), (ALL, "tuned")], ids=["head", "all"])
def test_both_stages_are_one_release_and_one_ledger(then, which, request):
    (cell,) = cells(then)
    record, _ = request.getfixturevalue(which)
    privacy = record["privacy"]
    assert len(Ledger.from_json(privacy["ledger"])) == 50
    assert 2.97 < privacy["epsilon"] <= 3.0 and privacy["planned"] == privacy["spent"]
    first, second = record["stages"]
    assert 0 < first["epsilon"] < second["epsilon"] == privacy["epsilon"]
    less = plan(stages_of(cell)[:1], privacy["noise_multiplier"] / 1.05, cell.task["n_train"])
    assert epsilon(less, 1e-5, Relation.ADD_OR_REMOVE, "pld") < 3.0  # the second stage is paid for
    errors = [e.message for e in jsonschema.Draft202012Validator(SCHEMA).iter_errors(json.loads(json.dumps(record)))]
    assert errors == []


def test_a_head_is_trained_and_the_network_under_it_is_left_alone(whole, tuned):
    for (_, folder), moved in ((whole, False), (tuned, True)):
        with safe_open(folder / "checkpoint" / "stage-0.safetensors", framework="pt") as stored:
            names = json.loads(stored.metadata()["progress"])["w"]["names"]
        with safe_open(folder / "checkpoint" / "checkpoint.safetensors", framework="pt") as stored:
            after = json.loads(stored.metadata()["progress"])["w"]["names"]
        body = [f"body.{name}" for name in names]
        assert set(after) == {"head.weight", "head.bias", *(body if moved else ())}


@pytest.mark.parametrize("public", [False, True])
def test_a_run_killed_in_either_stage_ends_in_the_same_bits(public, tmp_path, monkeypatch, other, free, whole):
    (cell,) = cells(PUBLIC % other if public else HEAD)
    once, place = free if public else whole

    class Killed(Exception):
        pass

    log = run._Session.log
    seen = 0
    deadly = iter((7, 8, 30, 31, 43))

    def dying(self: run._Session, point: LogPoint) -> None:
        nonlocal seen, at
        log(self, point)
        seen += 1
        if seen == at:
            raise Killed

    monkeypatch.setattr(run._Session, "log", dying)
    record, kills = None, 0
    while record is None:
        at = next(deadly, -1)
        try:
            record = run.execute(cell, tmp_path / "killed", "stages", save_seconds=0.0)
        except Killed:
            kills += 1
    assert kills >= 4 and record["measured"]["sessions"] > 2
    assert lasting(record) == lasting(once)
    traces = [trace(folder) for folder in (place, tmp_path / "killed")]
    steps = [[(point["stage"], point["step"]) for point in points] for points in traces]
    assert steps[0] == steps[1] == [(1 if step <= 20 else 2, step) for step in range(1, 51)]
    first, second = record["stages"]
    assert traces[1][19]["seconds"] == pytest.approx(first["diagnostics"]["train_seconds"], abs=6e-4)
    total = first["diagnostics"]["train_seconds"] + second["diagnostics"]["train_seconds"]
    assert total == pytest.approx(record["diagnostics"]["train_seconds"])


def test_a_stage_on_public_data_costs_nothing_and_is_named(free):
    record, _ = free
    privacy = record["privacy"]
    assert len(Ledger.from_json(privacy["ledger"])) == 20 and 2.97 < privacy["epsilon"] <= 3.0
    assert "images and labels of npz:" in privacy["public_data"]
    first, second = record["stages"]
    assert [first["public"], second["public"]] == [False, True]
    assert second["relation"] is second["sensitivity"] is None and second["spent"] == first["spent"]
    assert privacy["sampling"] == first["sampling"] and "stage" not in privacy["sampling"]
    assert record["metrics"]["accuracy"] > 0.3  # of the negatives, by a head on what was learnt from the digits


def test_stages_draw_different_noise():
    (cell,) = cells(HEAD)
    first, second = (Seeds(cell, stage, attempt=1, code="a") for stage in (0, 1))
    assert first.init == second.init
    drawn = {getattr(s, role) for s in (first, second) for role in ("sampling", "noise", "path")}
    assert len(drawn) == 6


def test_what_would_void_the_privacy_is_refused(other):
    for then, wrong in (
        ('{ method = "non-private", steps = 5 }', "would train on the private data without noise"),
        (PUBLIC.replace("non-private?lr=0.1", "dp-sgd") % other, "adds noise to public data"),
        ('{ method = "non-private", steps = 5, dataset = "digits" }', "is the private data of task"),
        (PUBLIC % "features:digits?backbone=scattering", "is the private data of task"),
        ('{ method = "dp-sgd?lr=-1", steps = 5 }', "lr must not be negative"),
        ('{ method = "dp-sgdd", steps = 5 }', 'Did you mean "dp-sgd"'),
        ('{ method = "dp-sgd" }', "needs one of epochs and steps"),
        ('{ method = "dp-sgd", steps = 5, batch = 5000 }', "batch 5000 is more than its"),
        ('"dp-sgd"', '"then" should be a table'),
    ):
        with pytest.raises(suite.SuiteError) as raised:
            cells(then)
        assert wrong in str(raised.value), raised.value
        assert all(problem.line >= 16 for problem in raised.value.problems)
    late = SUITE.replace('name = "dp-sgd"', 'name = "non-private"').replace("clip = 0.5\n", "")
    with pytest.raises(suite.SuiteError, match="cannot make private what non-private has learnt"):
        cells(HEAD, late.replace("momentum = 0.0\n", ""))


def test_a_second_stage_is_another_run():
    ids = {cells(then)[0].id for then in (HEAD, ALL, HEAD.replace("30", "31"), HEAD.replace("0.02", "0.03"))}
    plain = SUITE.replace("then = {then}\n", "")
    assert len(ids | {cells("", plain)[0].id}) == 5
    (cell,) = cells(HEAD)
    assert Cell.from_json(cell.to_json()) == cell and cell.label == "dp-sgd, then dp-adam"


def test_a_method_has_its_own_schedule():
    text = SUITE.replace("then = {then}", 'train = { batch = "full", epochs = 3 }')
    (cell,) = cells("", text)
    assert cell.schedule == {"batch": cell.task["n_train"], "steps": 3}
    with pytest.raises(suite.SuiteError, match="less than one step of 128"):
        cells("", SUITE.replace("then = {then}", "train = { epochs = 0.01 }"))


def test_the_plan_of_two_stages_is_their_composition():
    both = [Stage(Method(sampler=Full()), 10, 3), Stage(Method(sampler=Full()), 10, 1)]
    assert plan(both, 2.0, 10) == Method(sampler=Full()).plan(2.0, 10, 10, 4)
    sigma = calibrate_stages(both, 10, 3.0, 1e-5)
    assert epsilon(plan(both, sigma, 10), 1e-5, Full().relation, "pld") == pytest.approx(3.0, rel=1e-3)
    assert type(Method().noise) is Gaussian


def test_a_head_starts_at_zero_on_an_evaluated_body():
    body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5), torch.nn.Dropout(0.5))
    headed = models.Headed(body, (3, 4), 7, frozen=True)
    assert headed(torch.randn(2, 3, 4)).shape == (2, 7) and not headed(torch.randn(2, 3, 4)).any()
    assert {name for name, p in headed.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
    assert not headed.train().body.training and models.Headed(body, (3, 4), 7, frozen=False).train().body.training
