"""Epsilon against golden values, and the ledger that it is computed from."""

import copy
import json
import logging
import math

import jsonschema
import mpmath
import numpy as np
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
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants.analysis import prv
from scipy import fft
from scipy.optimize import brentq
from scipy.stats import norm

from harness.dp import Fixed, Flat, Full, Ledger, Method, NoNoise, Poisson, Relation, Shuffle
from harness.dp.account import ACCOUNTANTS, arrays, epsilon, epsilons, explain, quiet, ranking
from harness.dp.account.accountants import ROUNDING, Pld, Rdp
from harness.dp.calibrate import calibrate
from harness.records import store
from harness.records.files import StoreError
from tests.support import ROOT

ADD, REPLACE = Relation.ADD_OR_REMOVE, Relation.REPLACE_ONE
NONE = dict.fromkeys(ACCOUNTANTS, math.inf)


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
    assert bounds["rdp"] == pytest.approx(rdp, abs=5e-4) and bounds["pld"] == pytest.approx(pld, abs=5e-4)
    assert 0 < bounds["prv"] - bounds["pld"] < 0.02 and bounds["gdp"] == math.inf
    assert ranking(bounds) == "pld"


@pytest.mark.parametrize(
    ("n", "batch", "epochs", "target", "sigma"), [(50000, 256, 20, 1, 1.400), (60000, 2048, 30, 3, 1.614)]
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
    spent = norm.cdf(0.5 / found - target * found) - math.exp(target) * norm.cdf(-0.5 / found - target * found)
    assert spent <= 1.001e-6


def test_the_multiplier_is_relative_to_the_sensitivity_under_the_stated_relation():
    """A release carries 2C under replace-one already, so no accountant may double it again."""
    ledger = Ledger([(GaussianDpEvent(2.0), 3)])
    for accountant in ACCOUNTANTS:
        assert epsilon(ledger, 1e-5, ADD, accountant) == epsilon(ledger, 1e-5, REPLACE, accountant) < 4.1
    assert Flat(0.5).sensitivity(None, ADD) == 0.5
    assert Flat(0.5).sensitivity(None, REPLACE) == 1.0


def test_an_event_that_an_accountant_does_not_know_is_infinite_never_dropped():
    known = (PoissonSampledDpEvent(0.1, GaussianDpEvent(2.0)), 10)
    for event in (UnsupportedDpEvent(), NonPrivateDpEvent()):
        mixed = Ledger([known, (event, 1)])
        assert epsilons(mixed, 1e-5, ADD) == NONE and set(explain(mixed, 1e-5, ADD)) == set(ACCOUNTANTS)
    without = Ledger([(SampledWithoutReplacementDpEvent(1000, 10, GaussianDpEvent(1.0)), 10)])
    assert epsilons(without, 1e-5, ADD) == NONE
    bounds = epsilons(without, 1e-5, REPLACE)
    assert [name for name in ACCOUNTANTS if math.isfinite(bounds[name])] == ["rdp"] == [ranking(bounds)]
    assert epsilons(poisson(0.1, 2.0, 10), 1e-5, REPLACE) == NONE
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
    # A name of something else in dp_accounting is no event: nothing is called, and it costs infinity.
    for event in ({"type": "calibrate_dp_mechanism"}, {"type": "os"}, {}):
        ledger = Ledger.from_json([[event, 1]])
        assert ledger.to_json() == [[event, 1]]
        assert epsilon(ledger, 1e-5, Relation.ADD_OR_REMOVE, "pld") == math.inf


# Side by side ---------------------------------------------------------------------------------------------


@given(st.floats(0.7, 8), st.floats(0.002, 0.4), st.integers(1, 300), st.floats(-7, -3))
@settings(max_examples=12, deadline=None)
def test_accountants_agree_within_their_theories(sigma, q, steps, exponent):
    """RDP is looser than PLD by its conversion; PRV's upper end is above what is true by at most twice its error."""
    bounds = epsilons(poisson(q, sigma, steps), 10**exponent, ADD)
    assert bounds["pld"] <= bounds["rdp"] * (1 + 1e-4) + 1e-4
    assert bounds["pld"] - 1e-3 <= bounds["prv"] <= 1.001 * bounds["pld"] + 0.021


def balle_wang(precision, epsilon):
    """Delta of a Gaussian of multiplier precision^(-1/2), with 40 digits: arXiv:1805.06530, theorem 8."""
    sigma, epsilon = 1 / mpmath.sqrt(precision), mpmath.mpf(epsilon)
    low, high = (mpmath.ncdf(sign / (2 * sigma) - epsilon * sigma) for sign in (-1, 1))
    return high - mpmath.exp(epsilon) * low


@given(st.lists(st.tuples(st.floats(2, 40), st.integers(1, 20)), min_size=1, max_size=3), st.floats(-7, -3))
@settings(max_examples=12, deadline=None)
def test_plain_gaussians_are_accounted_exactly_and_pld_is_as_tight(entries, exponent):
    ledger = Ledger([(GaussianDpEvent(sigma), count) for sigma, count in entries] + [(NoOpDpEvent(), 3)])
    delta = 10**exponent
    exact = epsilon(ledger, delta, REPLACE, "gdp")
    with mpmath.workdps(40):
        attained = float(balle_wang(sum(n / mpmath.mpf(sigma) ** 2 for sigma, n in entries), exact))
    assert attained == pytest.approx(delta, rel=1e-6) if exact else attained <= delta
    assert epsilon(ledger, delta, REPLACE, "pld") == pytest.approx(exact, rel=1e-3, abs=1e-5)


# The same formula's multipliers at delta 1e-6, computed apart from this project.
@pytest.mark.parametrize(("target", "sigma"), [(0.5, 8.058), (1, 4.225), (4, 1.194), (8, 0.653), (10, 0.541)])
def test_multipliers_of_one_gaussian(target, sigma):
    def excess(s):
        return epsilon(Ledger([(GaussianDpEvent(s), 1)]), 1e-6, ADD, "gdp") - target

    assert brentq(excess, 0.9 * sigma, 1.1 * sigma) == pytest.approx(sigma, abs=5e-4)


def test_a_million_steps_cost_as_many_computations_as_there_are_distinct_events(monkeypatch):
    """And the epsilon of steps in another order, or composed beforehand, is the same."""
    often, once = (PoissonSampledDpEvent(5e-4, GaussianDpEvent(s)) for s in (1.0, 2.0))
    turns = Ledger([(often, 400_000), (once, 200_000), (often, 400_000)])
    assert len(turns) == 1_000_000 and len(turns.entries) == 3 and len(turns.composed()) == 2
    calls = {"pld": 0, "rdp": 0}

    def counted(room, name, accountant):
        function = getattr(room, name)

        def counting(*args, **kwargs):
            calls[accountant] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(room, name, counting)

    counted(arrays, "gaussian_pld", "pld")
    counted(arrays, "sampled_rdp", "rdp")
    found = {name: epsilon(turns, 1e-5, ADD, name) for name in calls}
    assert calls == {"pld": 2, "rdp": 2}
    other = Ledger([(once, 200_000), (often, 800_000)])
    nested = Ledger([(SelfComposedDpEvent(ComposedDpEvent([often] * 4 + [once]), 1000), 200)])
    for ledger in (other, nested):
        again = {name: epsilon(ledger, 1e-5, ADD, name) for name in calls}
        assert again == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize(
    "q, sigma, steps",
    [(0.01, 0.8, 1001), (0.001, 2.0, 20_000), (0.2, 15.0, 5_000), (1.0, 90.0, 2_000), (0.02, 40.0, 3), (0.9, 1.0, 2)],
)
def test_losses_are_those_of_the_library_to_the_last_bit(q, sigma, steps):
    """They are computed on arrays, and without the integer (number of losses)^steps, which the library computes."""
    event = ComposedDpEvent(
        [
            SelfComposedDpEvent(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), steps),
            SelfComposedDpEvent(GaussianDpEvent(60.0), 3),
        ]
    )
    library, ours = PLDAccountant().compose(event), Pld(ADD).compose(event)
    for exponent in (-9, -6, -1):
        hidden = ROUNDING * (steps + 1)
        assert ours.get_epsilon(10.0**exponent) == library.get_epsilon(10.0**exponent - hidden)


@pytest.mark.parametrize(("q", "sigma", "steps"), [(1e-3, 3.0, 1_000_000), (0.01, 1.0, 100_000), (0.01, 0.6, 10_000)])
@pytest.mark.parametrize("delta", [1e-10, 1e-12, 1e-14])
def test_what_the_fourier_transform_rounds_is_charged(q, sigma, steps, delta):
    """Beside losses that are tilted, so that the tail is where the transform has its digits."""
    ledger, hidden = poisson(q, sigma, steps), ROUNDING * steps
    assert _tilted(q, sigma, steps, epsilon(ledger, delta + hidden, ADD, "pld")) <= delta + hidden / 20
    assert epsilon(ledger, hidden, ADD, "pld") == math.inf
    assert "rounding may hide" in explain(ledger, hidden, ADD)["pld"]


@pytest.mark.parametrize("delta", [1e-5, 1e-10, 1e-15])
def test_a_single_release_is_charged_no_rounding(delta):
    """However many plain Gaussians in a row: they are one."""
    for count in (1, 400):
        ledger = Ledger([(GaussianDpEvent(8.0 * math.sqrt(count)), count)])
        exact = epsilon(ledger, delta, ADD, "gdp")
        assert exact <= epsilon(ledger, delta, ADD, "pld") <= exact * 1.001


def _tilted(q, sigma, steps, epsilon):
    """Delta of sampled Gaussians, an example removed: losses rounded to a grid with their mean kept."""
    interval = min(5e-4, q / sigma / 10)
    edges = np.arange(-14 * sigma, 1 + 14 * sigma, sigma / 4000)
    middle = (edges[1:] + edges[:-1]) / 2

    def cells(mu):
        z = (edges - mu) / sigma
        return np.where(z[:-1] > 0, -np.diff(norm.sf(z)), np.diff(norm.cdf(z)))

    losses = np.logaddexp(math.log1p(-q), math.log(q) + (2 * middle - 1) / (2 * sigma**2)) / interval
    mass, low = (1 - q) * cells(0) + q * cells(1), np.floor(losses).astype(int)
    part, first = losses - low, low.min()
    places = np.arange(low.max() - first + 2)
    probs = np.bincount(low - first, mass * (1 - part), len(places))
    probs += np.bincount(low - first + 1, mass * part, len(places))

    def tilted(order):
        logs = np.log(np.maximum(probs, 1e-300)) + order * interval * places
        top = logs.max()
        return np.exp(logs - top), top

    def excess(order):
        weights, _ = tilted(order)
        return (weights @ places / weights.sum() + first) * interval * steps - epsilon

    order = brentq(excess, 0.0, 200.0)
    weights, top = tilted(order)
    total = weights.sum()
    mean = weights @ places / total
    spread = math.sqrt(weights @ (places - mean) ** 2 / total * steps)
    size = fft.next_fast_len(int(max(len(places), 30 * spread + 100)))
    start = int(mean * steps) - size // 2
    composed = np.roll(np.real(fft.ifft(fft.fft(weights / total, size) ** steps)), -(start % size))
    reached = start + np.arange(size)
    above = (reached + first * steps) * interval - epsilon
    back = np.exp(steps * (math.log(total) + top) - order * interval * reached[above > 0])
    return float((np.maximum(composed[above > 0], 0) * back * -np.expm1(-above[above > 0])).sum())


@given(st.floats(1e-6, 0.999), st.floats(0.2, 30))
@settings(max_examples=15, deadline=None)
def test_divergences_are_those_of_the_library(q, sigma):
    event = PoissonSampledDpEvent(q, GaussianDpEvent(sigma))
    with quiet():
        library, ours = RdpAccountant().compose(event), Rdp(ADD).compose(event)
    # Both sum probabilities to one, of which what is left where q is small has few digits.
    assert ours.rdp == pytest.approx(library.rdp, rel=1e-9, abs=1e-13)


# Reasons --------------------------------------------------------------------------------------------------


def test_what_an_accountant_cannot_say_it_explains():
    sampled = poisson(0.1, 3.0, 20)
    assert explain(sampled, 1e-5, ADD) == {
        "rdp": f"order {_binding(sampled, 1e-5):g} binds",
        "gdp": "PoissonSampledDpEvent: only plain Gaussians are exact",
    }
    assert explain(sampled, 1e-5, REPLACE)["pld"] == "PoissonSampledDpEvent: Poisson sampling needs add-or-remove"
    plain = Ledger([(GaussianDpEvent(3.0), 2)])
    assert set(explain(plain, 1e-5, REPLACE)) == {"rdp"}
    bare = Ledger([(GaussianDpEvent(3.0), 2), (NonPrivateDpEvent(), 1)])
    assert explain(bare, 1e-5, ADD)["pld"] == "a value is released without noise"
    assert explain(bare, 1e-5, ADD)["rdp"] == "no order has a finite divergence"


def _binding(ledger, delta):
    return RdpAccountant().compose(ledger.total()).get_epsilon_and_optimal_order(delta)[1]


def test_orders_that_overflow_are_recorded_and_not_logged(caplog):
    ledger = poisson(0.05, 0.45, 5)
    with caplog.at_level(logging.DEBUG):
        note = explain(ledger, 1e-5, ADD)["rdp"]
    assert not caplog.records
    account = RdpAccountant().compose(ledger.total())
    lost = account.orders[np.isinf(account.rdp)]
    assert len(lost) > 1
    assert note == (
        f"order {_binding(ledger, 1e-5):g} binds; without a finite divergence: {lost.min():g} to {lost.max():g}"
    )


def test_prv_that_fails_or_would_take_minutes_says_so(monkeypatch):
    long = poisson(5e-4, 1.0, 1_000_000)
    assert epsilon(long, 1e-5, ADD, "prv") == math.inf
    assert "grid points" in explain(long, 1e-5, ADD)["prv"]

    def fails(*args):
        raise RuntimeError("Discrete mean differs significantly from continuous mean.")

    monkeypatch.setattr(prv, "discretize", fails)
    ledger = poisson(0.125, 3.0, 21)
    assert epsilon(ledger, 1e-5, ADD, "prv") == math.inf
    assert explain(ledger, 1e-5, ADD)["prv"] == "Discrete mean differs significantly from continuous mean."


# Records --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["relation", "sampling"])
def test_an_epsilon_without_its_terms_is_no_record(key):
    """Adjacency and sampling: neither the schema nor the store takes a record without them."""
    schema = jsonschema.Draft202012Validator(json.loads((ROOT / "docs/record.schema.json").read_text()))
    files = (ROOT / "results" / "fashion-methods").glob("*/record.json")
    good = next(r for r in (json.loads(f.read_text()) for f in files) if r["status"] == "ok")
    assert schema.is_valid(good) and store.encode(good, good["id"])
    absent, unknown = copy.deepcopy(good), copy.deepcopy(good)
    del absent["privacy"][key]
    unknown["privacy"][key] = None
    for record in (absent, unknown):
        assert not schema.is_valid(record)
        with pytest.raises(StoreError, match=f"privacy.{key}"):
            store.encode(record, record["id"])
