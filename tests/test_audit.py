"""Audits: the bounds are those of the papers, true claims stand, and planted faults are caught."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from dp_accounting import PoissonSampledDpEvent
from scipy.stats import norm

from harness import registry
from harness.dp import SGD, Flat, Gaussian, Method, Relation, Shuffle
from harness.dp.random import Stream
from harness.verify import audit as audits
from harness.verify.audit import Setting, audit
from harness.verify.audit_bounds import Profile, Rates, by_tradeoff, guessed, one_run, p_value, upper
from harness.verify.canary import Planted, Task, plant

SMALL = Setting(canaries=500, repeat=4)


def own(spec: str) -> Method:
    entry, options = registry.lookup("method", spec)
    return registry.load(entry)(**options)


# --- true claims ---


@pytest.mark.parametrize("spec", ["dp-sgd", "automatic", "group-wise", "dp-sat"])
def test_own_methods_are_not_refuted_and_the_audit_has_power(spec):
    found = audit(own(spec), SMALL)
    assert not found.refuted and found.planted["mean_reach"] > 0.9
    assert (
        found.bounds["trade-off"]["epsilon"] > 0.3 * found.claimed
    )  # an audit that says nothing catches nothing


# --- planted faults ---


@dataclasses.dataclass(frozen=True)
class Half(Gaussian):
    """Half the noise."""

    def add(self, release, rng):
        return super().add(release._replace(sigma=release.sigma / 2), rng)


@dataclasses.dataclass(frozen=True)
class TooLow(Flat):
    """Declares half of its sensitivity."""

    def sensitivity(self, state, relation):
        return super().sensitivity(state, relation) / 2


@dataclasses.dataclass(frozen=True)
class Stale(Gaussian):
    """One key for all steps: the same noise every time."""

    def add(self, release, rng):
        return super().add(release, Stream(7, "noise", 0))


@dataclasses.dataclass(frozen=True)
class Averaged(Gaussian):
    """Noise for a sum divided by the size of a batch, as if it went on a mean."""

    def add(self, release, rng):
        return super().add(release._replace(sigma=release.sigma / 16), rng)


@dataclasses.dataclass(frozen=True)
class Disguised(Shuffle):
    """Shuffled batches billed as Poisson."""

    @property
    def relation(self):
        return Relation.ADD_OR_REMOVE

    def wrap(self, event, n, batch, step):
        return PoissonSampledDpEvent(batch / n, event)


@pytest.mark.parametrize(
    ("change", "sigma"),
    [
        ({"noise": Half()}, None),
        ({"clip": TooLow()}, None),
        ({"noise": Stale()}, None),
        ({"noise": Averaged()}, None),
        ({"sampler": Disguised()}, 0.25),
    ],
    ids=lambda value: next(iter(value.values())).__class__.__name__ if isinstance(value, dict) else "",
)
def test_planted_faults_are_refuted(change, sigma):
    # One epoch where the sampler is at fault: an example that Poisson sampling leaves out a third of the time is
    # there for certain once. Little noise shows it.
    steps = 4 if "sampler" in change else 16
    setting = dataclasses.replace(SMALL, steps=steps)
    found = audit(Method(optimizer=SGD(0.1), **change), setting, sigma)
    assert found.refuted and found.audited > found.claimed


# --- the canaries ---


def test_a_canary_is_alone_in_its_coordinates_and_as_long_as_the_rule_allows():
    task, coins = Task.named("canaries", 3), torch.tensor([True, False, True])
    method = own("dp-sgd?clip=0.3")
    planted, reach = plant(method, task, coins)
    assert reach == pytest.approx(1, abs=1e-5)
    x, _ = planted.batch(torch.arange(planted.n_train))
    assert (
        planted.n_train == len(task.x) + 3 and len(x) == len(task.x) + 2
    )  # the slot of the second stays empty
    own_features = x[:, -3:]
    assert (own_features[: len(task.x)] == 0).all() and (own_features != 0).sum() == 2
    replaced = Planted(task, coins, Relation.REPLACE_ONE).batch(torch.arange(planted.n_train))[0]
    assert len(replaced) == planted.n_train and (replaced[-3:, -3:].sum(1) > 0).tolist() == coins.tolist()


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
        found = by_tradeoff(plan, Relation.ADD_OR_REMOVE, 1.0, np.inf, rates, 1e-5)
        assert found == pytest.approx(Profile(plan(1 / mu), Relation.ADD_OR_REMOVE).epsilon(1e-5), rel=0.02)


def test_blind_guesses_bound_nothing():
    rng = np.random.default_rng(0)
    sample = audits.Sample({"noise": rng.normal(size=2000)}, rng.random(2000) < 0.5)
    assert guessed(*sample.split(0.25, 0), 1e-5, 0.01)[0] < 0.2


# --- the command ---


def test_the_command_prints_records_and_never_repeats(tmp_path, capsys):
    request = ["dp-sgd", "--canaries", "200", "--repeat", "1", "--steps", "4", "--results", str(tmp_path)]
    assert audits.main(request) == 0
    (file,) = (tmp_path / "audits").iterdir()
    before = file.read_bytes()
    found = json.loads(before)
    assert file.name == f"dp-sgd-eps3-{found['id']}.json"
    assert (
        0 <= found["audited"]["epsilon"] <= found["claimed"]["epsilon"] <= 3
        and not found["audited"]["refuted"]
    )
    assert "dp-sgd: claimed 2.999 (pld" in capsys.readouterr().out
    assert audits.main(request) == 0 and "recorded before" in capsys.readouterr().out
    assert list((tmp_path / "audits").iterdir()) == [file] and file.read_bytes() == before
    assert audits.main(["non-private", "--results", str(tmp_path)]) == 2
