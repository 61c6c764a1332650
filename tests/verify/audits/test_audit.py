"""Audits: the bounds are those of the papers, true claims stand, and planted faults are caught."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy.stats import norm

from harness import cli, registry
from harness.dp import SGD, Method, Relation
from harness.records import audits as stored
from harness.records.files import StoreError
from harness.verify.audits import command as audits
from harness.verify.audits import verdict
from harness.verify.audits.bounds import (
    Mistakes,
    Profile,
    Rates,
    by_tradeoff,
    guessed,
    mistakes,
    one_run,
    p_value,
    upper,
)
from harness.verify.audits.canary import SIDED, AuditTask, Planted, plant
from harness.verify.audits.command import CanarySetting, audit
from harness.verify.faults.parts import Less

SMALL = CanarySetting(canaries=500, repeat=4)


def own(spec: str) -> Method:
    entry, options = registry.lookup("method", spec)
    return registry.load(entry)(**options)


# --- true claims ---


@pytest.mark.parametrize("spec", ["dp-sgd", "automatic", "group-wise", "dp-sat"])
def test_own_methods_are_not_refuted_and_the_audit_has_power(spec):
    reached = []
    for seed in (0, 1):
        found = audit(own(spec), dataclasses.replace(SMALL, seed=seed))
        assert not found.refuted and found.planted["mean_reach"] > 0.9
        reached.append(found.bounds["trade-off"]["epsilon"] / found.claimed)
    # An audit that says nothing catches nothing. What one says varies by its seed, from a tenth to two thirds.
    assert max(reached) > 0.3


# --- planted faults ---


def test_half_the_noise_is_refuted():
    """Other faults are in the gallery, each with the audit that refutes it."""
    assert audit(Method(optimizer=SGD(0.1), noise=Less(0.5)), SMALL).refuted


# --- the canaries ---


def test_a_canary_is_alone_in_its_coordinates_and_as_long_as_the_rule_allows():
    task, coins = AuditTask.named("canaries", 3), torch.tensor([True, False, True])
    method = own("dp-sgd?clip=0.3")
    planted, reach = plant(method, task, coins)
    assert reach == pytest.approx(1, abs=1e-5)
    x, _ = planted.batch(torch.arange(planted.n_train))
    assert planted.n_train == len(task.x) + 3 and len(x) == len(task.x) + 2  # the slot of the second stays empty
    own_features = x[:, -3:]
    assert (own_features[: len(task.x)] == 0).all() and (own_features != 0).sum() == 2
    replaced = Planted(task, coins, Relation.REPLACE_ONE).batch(torch.arange(planted.n_train))[0]
    assert len(replaced) == planted.n_train and (replaced[-3:, -3:].sum(1) > 0).tolist() == coins.tolist()


def test_what_an_engine_releases_besides_gradients_is_heard():
    method = own("dp-ls")
    planted, reach = plant(method, AuditTask.named("canaries", 3), torch.ones(300, dtype=torch.bool))
    # a feature of norm 1, moved in three releases of multiplier sqrt(3) each, fills the joint bound
    assert planted.chained and planted.count == SIDED and len(planted.sides) == 2
    assert reach == pytest.approx(1, abs=1e-6)
    for side in planted.sides.values():
        assert side.values.shape[0] == SIDED and side.values.square().sum(1).sqrt().allclose(torch.ones(SIDED).double())
        assert len(side.at.unique()) == side.at.numel()  # each canary has places of its own
    found = audit(method, CanarySetting(epsilon=8, canaries=100, repeat=4, steps=1, rate=1))
    assert not found.refuted and found.audited > 1 and found.planted["mean_reach"] > 0.9


# --- the bounds ---


def test_the_bound_from_guesses_is_that_of_jax_privacy():
    theirs = pytest.importorskip("jax_privacy.auditing")
    for m, r, v, delta in ((1000, 100, 95, 1e-5), (1000, 1000, 700, 1e-6), (64, 40, 22, 1e-5)):
        for epsilon in (0.0, 0.5, 2.0):
            expected = theirs._one_run_p_value(m, r, v, epsilon, delta)
            assert p_value(m, r, v, epsilon, delta) == pytest.approx(float(expected), rel=1e-9)
    # Every one of 100 guesses right, without delta: rate^100 = level.
    rate = 0.05**0.01
    assert one_run(100, 100, 100, 0.0, 0.05) == pytest.approx(np.log(rate / (1 - rate)), abs=1e-3)


def test_confidence_limits_and_the_trade_off_of_one_gaussian():
    assert float(upper(0, 60, 0.05)) == pytest.approx(1 - 0.05 ** (1 / 60))
    plan = lambda sigma: Method().plan(sigma, 100, 100, 1)  # noqa: E731 (q = 1: one Gaussian of this multiplier)
    fpr = np.array([0.05])
    for mu, caught in ((0.9, False), (1.1, True)):  # the best test of sigma = 1 has the errors of mu = 1
        rates = Rates(fpr, norm.cdf(norm.isf(fpr) - mu))
        assert Profile(plan(1.0), Relation.ADD_OR_REMOVE).refuted(rates) is caught
        price = lambda s: Profile(plan(s), Relation.ADD_OR_REMOVE).epsilon(1e-5)  # noqa: E731
        found = by_tradeoff(plan, Relation.ADD_OR_REMOVE, 1.0, np.inf, rates, 1e-5, price)
        assert found == pytest.approx(Profile(plan(1 / mu), Relation.ADD_OR_REMOVE).epsilon(1e-5), rel=0.02)


def test_a_true_claim_is_refuted_as_rarely_as_the_level_says():
    profile, rng = Profile(Method().plan(1.0, 100, 100, 1), Relation.ADD_OR_REMOVE), np.random.default_rng(0)
    # What is proved of a Gaussian, mu = 1, at epsilon = 0: its total variation, 2 Phi(1/2) - 1.
    edge = norm.cdf(-0.5)
    assert not profile.refuted(Mistakes(np.array([edge + 1e-4])))
    assert profile.refuted(Mistakes(np.array([edge - 1e-2])))

    def refuted(mu: float) -> float:
        count = 0
        for _ in range(400):
            inside = rng.random(1000) < 0.5
            sample = audits.Sample({"y": rng.normal(size=1000) + mu * inside}, inside)
            count += profile.refuted(mistakes(sample, "y", np.array([mu / 2]), 0.1))
        return count / 400

    assert 0.04 < refuted(1.0) < 0.14  # the level is used, and kept: 0.1, four standard errors of 0.015
    assert refuted(1.3) > 0.9


def test_blind_guesses_bound_nothing():
    rng = np.random.default_rng(0)
    sample = audits.Sample({"noise": rng.normal(size=2000)}, rng.random(2000) < 0.5)
    assert guessed(*sample.split(0.25, 0), 1e-5, 0.01)[0] < 0.2


# --- the command ---


def test_the_command_prints_records_and_never_repeats(tmp_path, capsys):
    request = ["dp-sgd", "--canaries", "500", "--repeat", "1", "--results", str(tmp_path)]
    assert cli.main(["audit", *request]) == 0
    (file,) = (tmp_path / "audits").iterdir()
    before = file.read_bytes()
    (found,) = stored.load(tmp_path / "audits")
    assert file.name == f"{found['id']}.json" and json.loads(before)["id"] == found["id"]
    # the claim is that of runs: their accountant, on its own grid
    assert 2.99 < found["epsilon_claimed"] <= 3 and found["accountant"] == "pld"
    assert 0 <= found["epsilon_audited"] <= found["epsilon_claimed"] and found["flagged"] is False
    assert set(found["instruments"]) == set(verdict.INSTRUMENTS)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[:3] == ["method", "target", "claimed"] and "not refuted" in printed[1]
    assert cli.main(["audit", *request]) == 0 and "recorded before" in capsys.readouterr().out
    assert list((tmp_path / "audits").iterdir()) == [file] and file.read_bytes() == before


def test_what_cannot_be_audited_is_a_result_with_its_reason(tmp_path, capsys):
    assert cli.main(["audit", "non-private", "--results", str(tmp_path)]) == 0
    (found,) = stored.load(tmp_path / "audits")
    assert found["epsilon_audited"] is None and "without noise" in found["reason"]
    assert "without noise" in capsys.readouterr().out


# --- the files ---


@pytest.fixture
def one(tmp_path):
    setting = CanarySetting(canaries=3)
    entry, _ = registry.lookup("method", "dp-sgd")
    made = audits.outline(audits.AuditedMethod.of("dp-sgd", entry), setting, setting.trained())
    return made | {
        "epsilon_claimed": 1.0, "epsilon_audited": 2.0, "flagged": True, "code": {"hash": "0" * 12}, "device": {},
        "environment": {}, "started": "2026-01-01T00:00:00+00:00", "wall_seconds": 1.0,
    }  # fmt: skip


def test_audits_are_written_once_and_damaged_ones_are_named(tmp_path, one):
    first, second = stored.write(tmp_path, one), stored.write(tmp_path, one | {"wall_seconds": 2.0})
    assert (first.name, second.name) == (f"{one['id']}.json", f"{one['id']}.2.json")
    assert [a["wall_seconds"] for a in stored.latest(stored.load(tmp_path))] == [2.0]
    first.write_bytes(first.read_bytes()[:-20])
    (tmp_path / "notes.txt").write_text("not an audit")
    found = stored.load(tmp_path)
    assert [a["path"] for a in found] == [str(second)]
    assert {broken.path for broken in found.broken} == {first, tmp_path / "notes.txt"}
    assert stored.load(tmp_path / "none") == []


@pytest.mark.parametrize(
    "change",
    [
        {"flagged": False},
        {"epsilon_audited": None, "flagged": False},
        {"seed": 1},
        {"task": {}},
        {"started": "now"},
        {"delta": "1e-5"},
        {"kind": "run"},
    ],
    ids=str,
)
def test_what_is_no_valid_audit_is_not_written(tmp_path, one, change):
    with pytest.raises(StoreError):
        stored.write(tmp_path, one | change)
    assert list(tmp_path.iterdir()) == []


def test_a_label_does_not_change_the_id_and_a_setting_does(one):
    assert stored.identity(one | {"label": "another", "task": one["task"] | {"name": "other"}}) == one["id"]
    for key, value in {"seed": 7, "epsilon_target": 8.0, "canaries": 9, "level": 0.5}.items():
        assert stored.identity(one | {key: value}) != one["id"]
