"""What a search on private data costs, against dp_accounting, and how a suite and a record say it."""

import json
import math

import jsonschema
import pytest
from dp_accounting import (
    ComposedDpEvent,
    GaussianDpEvent,
    PoissonSampledDpEvent,
    SampledWithoutReplacementDpEvent,
    SelfComposedDpEvent,
)
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.dp import Ledger, Method, Relation
from harness.dp.account import epsilons, ranking
from harness.dp.account.tuning import DISTRIBUTIONS, Tuning, charge, tuned
from harness.running.run import execute
from harness.suite import SuiteError, parse
from tests.support import ROOT

ADD, REPLACE = Relation.ADD_OR_REMOVE, Relation.REPLACE_ONE
STEP = PoissonSampledDpEvent(0.02, GaussianDpEvent(1.5))
LEDGER = Ledger([(STEP, 200)])
RANDOM = [name for name in DISTRIBUTIONS if name != "fixed"]


def spent(tuning: Tuning, ledger: Ledger = LEDGER, relation: Relation = ADD) -> float:
    return float(charge(ledger, tuning, 1e-5, relation)["epsilon"])


@pytest.mark.parametrize(("distribution", "shape"), [("poisson", math.inf), ("geometric", 1), ("logarithmic", 0)])
def test_a_random_number_of_tries_is_repeat_and_select(distribution, shape):
    search = RepeatAndSelectDpEvent(SelfComposedDpEvent(STEP, 200), 8, shape)
    best = RdpAccountant().compose(search).get_epsilon(1e-5)
    again = RdpAccountant().compose(ComposedDpEvent([search, SelfComposedDpEvent(STEP, 200)])).get_epsilon(1e-5)
    found = charge(LEDGER, Tuning(8, distribution, retrained=False), 1e-5, ADD)
    assert found == {"epsilon": pytest.approx(best, rel=1e-9), "accountant": "rdp"}
    assert best < again == pytest.approx(spent(Tuning(8, distribution)), rel=1e-9)


def test_repeat_and_select_beats_composition_and_holds_for_replaced_examples():
    assert spent(Tuning(100, "poisson", retrained=False)) < spent(Tuning(100, retrained=False))
    fixed_size = Ledger([(SampledWithoutReplacementDpEvent(1000, 20, GaussianDpEvent(3.0)), 50)])
    found = charge(fixed_size, Tuning(4, "geometric"), 1e-5, REPLACE)
    assert found["accountant"] == "rdp" and found["epsilon"] > epsilons(fixed_size, 1e-5, REPLACE)["rdp"]


@pytest.mark.parametrize("retrained", [True, False])
def test_a_fixed_number_of_tries_is_composition(retrained):
    runs = 5 + retrained
    assert tuned(LEDGER, Tuning(5, "fixed", retrained)) == Ledger([(STEP, 200 * runs)])
    longer = epsilons(Method().plan(1.5, 1000, 20, 200 * runs), 1e-5, ADD)
    assert charge(LEDGER, Tuning(5, "fixed", retrained), 1e-5, ADD) == {
        "epsilon": longer["pld"], "accountant": "pld",
    }  # fmt: skip
    assert spent(Tuning(1, retrained=False)) == epsilons(LEDGER, 1e-5, ADD)["pld"]


@given(st.sampled_from(DISTRIBUTIONS), st.booleans(), st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=15, deadline=None)
def test_tuning_is_never_free_and_more_tries_cost_more(distribution, retrained, few, more):
    few, more = sorted((few, more))
    alone = epsilons(LEDGER, 1e-5, ADD)
    less, most = (spent(Tuning(tries, distribution, retrained)) for tries in (few, more))
    assert alone[ranking(alone)] * (1 - 1e-9) <= less <= most * (1 + 1e-9)


@pytest.mark.parametrize("tries", [0.5, 0, math.nan, math.inf])
def test_tries_are_at_least_one(tries):
    for distribution in DISTRIBUTIONS:
        with pytest.raises(ValueError, match="not 1 or more"):
            Tuning(tries, distribution)


def test_what_is_no_search():
    with pytest.raises(ValueError, match="whole"):
        Tuning(2.5)
    with pytest.raises(ValueError, match="none of fixed"):
        Tuning(2, "binomial")
    assert Tuning(2.5, "poisson").tries == 2.5


# Suites and records -----------------------------------------------------------------------------------------

SUITE = """
[suite]
name = "searched"
question = "What does the search cost?"

[privacy]
epsilon = 3
delta = 1e-5

[train]
batch = 64
steps = 5

[[task]]
dataset = "digits"
model = "logistic"

[[method]]
name = "dp-sgd"

[[method]]
name = "non-private"
"""
SEARCH = '\n[tuning]\ndata = "the training data"\nprotocol = "rates, at random"\n'


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ("private = true", 'private = true needs "tries"'),
        ("tries = 3", "write private = true"),
        ('distribution = "poisson"', "write private = true"),
        ("retrained = false", "write private = true"),
        ("private = true\ntries = 2.5", "a fixed number is a whole one"),
        ("private = true\ntries = 0", "greater than or equal to 1"),
        ('private = true\ntries = 2\ndistribution = "poison"', 'Did you mean "poisson"?'),
        ("private = true\ntires = 2", 'Did you mean "tries"?'),
    ],
)
def test_a_search_that_makes_no_sense_is_refused_with_its_line(keys, says):
    with pytest.raises(SuiteError) as error:
        parse(SUITE + SEARCH + keys)
    last = (SUITE + SEARCH).count("\n") + len(keys.splitlines())
    assert says in str(error.value)
    assert any(problem.line in (last, last - 1) for problem in error.value.problems)


def test_only_a_private_search_is_part_of_what_a_private_run_is():
    plain = parse(SUITE).cells()
    told = parse(SUITE + SEARCH).cells()
    charged = parse(SUITE + SEARCH + "private = true\ntries = 3").cells()
    more = parse(SUITE + SEARCH + "private = true\ntries = 4").cells()
    assert [c.id for c in plain] == [c.id for c in told]
    assert [c.private for c in plain] == [True, False]
    assert [a.id == b.id for a, b in zip(plain, charged, strict=True)] == [False, True]
    assert charged[0].id != more[0].id
    assert charged[0].privacy["tuning"] == {"tries": 3.0, "distribution": "fixed", "retrained": True}


def test_a_record_says_what_the_search_cost(tmp_path):
    text = SUITE + SEARCH + 'private = true\ntries = 6\ndistribution = "poisson"'
    private, free = (execute(cell, tmp_path / cell.id, "searched") for cell in parse(text).cells())
    schema = json.loads((ROOT / "docs/record.schema.json").read_text())
    for record in (private, free):
        for room in ("privacy", "cell"):
            terms = {"$defs": schema["$defs"], "$ref": f"#/$defs/{room.capitalize()}"}
            jsonschema.Draft202012Validator(terms).validate(record[room])
    told = private["privacy"]["epsilon_with_tuning"]
    ledger = Ledger.from_json(private["privacy"]["ledger"])
    assert told == charge(ledger, Tuning(6, "poisson"), 1e-5, ADD) | {
        "tries": 6, "distribution": "poisson", "retrained": True,
    }  # fmt: skip
    assert told["epsilon"] > private["privacy"]["epsilon"]
    assert set(private["privacy"]["accounting"]) == {"rdp", "gdp"}
    assert "epsilon_with_tuning" not in free["privacy"] and "accounting" not in free["privacy"]
