"""Epsilon against golden values, and the ledger that it is computed from."""

import json
import math

import pytest
from dp_accounting import (
    ComposedDpEvent,
    GaussianDpEvent,
    NonPrivateDpEvent,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    SampledWithoutReplacementDpEvent,
    SelfComposedDpEvent,
    UnsupportedDpEvent,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from harness.dp import Fixed, Flat, Full, Ledger, Method, NoNoise, Poisson, Relation, Shuffle
from harness.dp.account import epsilon, epsilons, ranking
from harness.dp.calibrate import calibrate

ADD, REPLACE = Relation.ADD_OR_REMOVE, Relation.REPLACE_ONE


def poisson(q: float, sigma: float, steps: int) -> Ledger:
    return Ledger([(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), steps)])


# Published settings; epsilon at delta 1e-5 by RDP (as the papers computed it) and by PLD.
PUBLISHED = {
    "De et al. 2204.13650, WRN-16-4, epsilon 1": (4096 / 50000, 10, 875, 0.988, 0.903),
    "TAN 2210.03403, epsilon 8": (4096 / 50000, 3, 2500, 7.098, 6.579),
    "DP-SAT 2306.05651, CIFAR-10, epsilon 3": (1 / 25, 1.8408, 750, 2.996, 2.744),
    "DP-SAT, Fashion-MNIST, epsilon 2": (1 / 30, 2.6367, 1200, 1.995, 1.828),
    "DP-SAT, MNIST, epsilon 1": (1 / 30, 4.8047, 1200, 0.994, 0.908),
}


@pytest.mark.parametrize("setting", PUBLISHED)
def test_published_settings(setting):
    q, sigma, steps, rdp, pld = PUBLISHED[setting]
    bounds = epsilons(poisson(q, sigma, steps), 1e-5, ADD)
    assert bounds == {"rdp": pytest.approx(rdp, abs=5e-4), "pld": pytest.approx(pld, abs=5e-4)}
    assert ranking(bounds) == "pld"


@pytest.mark.parametrize(
    ("n", "batch", "epochs", "target", "sigma"),
    [(50000, 256, 20, 1, 1.400), (60000, 2048, 30, 3, 1.614)],
)
def test_calibration_meets_the_golden_multipliers_and_is_tight(n, batch, epochs, target, sigma, tmp_path):
    steps = epochs * n // batch
    found = calibrate(Method(), n, batch, steps, target, 1e-5, cache=tmp_path)
    assert found == pytest.approx(sigma, abs=1e-3)
    spent = epsilon(Method().plan(found, n, batch, steps), 1e-5, ADD, "pld")
    assert 0.99 * target <= spent <= target
    assert calibrate(Method(), n, batch, steps, target, 1e-5, cache=tmp_path) == found
    assert len(list(tmp_path.iterdir())) == 1


# One Gaussian release, no sampling: sigma by the analytic formula of Balle and Wang 2018 (arXiv:1805.06530).
@pytest.mark.parametrize(("target", "sigma"), [(0.5, 8.058), (2, 2.231), (8, 0.653)])
def test_a_single_gaussian_is_calibrated_as_the_analytic_formula_says(target, sigma):
    found = calibrate(Method(sampler=Full()), 1000, 1000, 1, target, 1e-6)
    assert found == pytest.approx(sigma, abs=1e-3)
    spent = norm.cdf(0.5 / found - target * found) - math.exp(target) * norm.cdf(
        -0.5 / found - target * found
    )
    assert spent <= 1.001e-6


def test_the_multiplier_is_relative_to_the_sensitivity_under_the_stated_relation():
    """A release carries 2C under replace-one already, so no accountant may double it again."""
    ledger = Ledger([(GaussianDpEvent(2.0), 3)])
    for accountant in ("pld", "rdp"):
        assert epsilon(ledger, 1e-5, ADD, accountant) == epsilon(ledger, 1e-5, REPLACE, accountant)
    assert Flat(0.5).sensitivity(None, ADD) == 0.5
    assert Flat(0.5).sensitivity(None, REPLACE) == 1.0


def test_an_event_that_an_accountant_does_not_know_is_infinite_never_dropped():
    known = (PoissonSampledDpEvent(0.1, GaussianDpEvent(2.0)), 10)
    for event in (UnsupportedDpEvent(), NonPrivateDpEvent()):
        assert epsilons(Ledger([known, (event, 1)]), 1e-5, ADD) == {"pld": math.inf, "rdp": math.inf}
    without = Ledger([(SampledWithoutReplacementDpEvent(1000, 10, GaussianDpEvent(1.0)), 10)])
    assert epsilons(without, 1e-5, ADD) == {"pld": math.inf, "rdp": math.inf}
    bounds = epsilons(without, 1e-5, REPLACE)
    assert bounds["pld"] == math.inf and math.isfinite(bounds["rdp"]) and ranking(bounds) == "rdp"
    assert epsilons(poisson(0.1, 2.0, 10), 1e-5, REPLACE) == {"pld": math.inf, "rdp": math.inf}
    assert epsilons(Method(noise=NoNoise()).plan(0.0, 100, 10, 5), 1e-5, ADD)["pld"] == math.inf


def test_shuffling_is_not_amplified_and_bills_each_epoch_once():
    shuffled = Method(sampler=Shuffle()).plan(2.0, 1000, 100, 30)  # three epochs of ten steps
    assert len(shuffled) == 30
    assert shuffled.composed() == [(GaussianDpEvent(2.0), 3), (NoOpDpEvent(), 27)]
    sampled = Method(sampler=Poisson()).plan(2.0, 1000, 100, 30)
    assert epsilon(shuffled, 1e-5, REPLACE, "pld") > 2 * epsilon(sampled, 1e-5, ADD, "pld")


@given(st.sampled_from([Poisson(), Fixed(), Full(), Shuffle()]), st.floats(0.5, 20), st.integers(1, 60))
@settings(max_examples=25, deadline=None)
def test_ledgers_survive_json(sampler, sigma, steps):
    ledger = Method(sampler=sampler).plan(sigma, 500, 50, steps)
    assert len(ledger) == steps
    assert Ledger.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger


def test_a_ledger_names_only_events():
    nested = Ledger([(ComposedDpEvent([SelfComposedDpEvent(GaussianDpEvent(1.0), 2), NoOpDpEvent()]), 4)])
    assert Ledger.from_json(json.loads(json.dumps(nested.to_json()))) == nested
    for event in ({"type": "calibrate_dp_mechanism"}, {"type": "os"}, {}):
        with pytest.raises(ValueError, match="dp_accounting does not have"):
            Ledger.from_json([[event, 1]])
