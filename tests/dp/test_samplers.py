"""Samplers with a cycle, and one that cuts batches off: who is drawn, how often, and what it is charged."""

import pytest
import torch
from dp_accounting import GaussianDpEvent, NoOpDpEvent, PoissonSampledDpEvent

from harness.dp import (
    Banded,
    BandedInverse,
    Cyclic,
    CyclicPoisson,
    Ledger,
    Method,
    Relation,
    Shuffle,
    TreeAggregation,
    TruncatedPoisson,
)
from harness.dp.account import epsilon
from harness.dp.sampler import Poisson

EVENT = GaussianDpEvent(1.3)


def test_cyclic_uses_each_example_once_a_cycle_in_the_same_step_of_it():
    sampler, n, batch = Cyclic(), 103, 10
    cycle = sampler.separation(n, batch)
    assert cycle == 10
    first = [sampler.draw(n, batch, t, 7) for t in range(cycle)]
    assert sorted(torch.cat(first).tolist()) == list(range(n))
    assert {len(one) for one in first} == {10, 11}
    for t, one in enumerate(first):
        assert torch.equal(sampler.draw(n, batch, t + 3 * cycle, 7), one)
    assert not torch.equal(sampler.draw(n, batch, 0, 8), first[0])
    events = [sampler.wrap(EVENT, n, batch, t) for t in range(25)]
    assert [t for t, event in enumerate(events) if event == EVENT] == [0, 10, 20]
    assert all(event == NoOpDpEvent() for t, event in enumerate(events) if t % 10)


def test_cyclic_poisson_draws_from_its_group_at_the_rate_that_is_charged():
    sampler, n, batch, cycles = CyclicPoisson(4), 200, 10, 300
    counts = torch.zeros(n, 4)
    for t in range(4 * cycles):
        counts[sampler.draw(n, batch, t, 5), t % 4] += 1
    # An example is drawn in one step of a cycle alone.
    assert ((counts > 0).sum(1) <= 1).all()
    q = 4 * batch / n
    assert counts.sum() / (n * cycles) == pytest.approx(q, abs=5 * (q / (n * cycles)) ** 0.5)
    assert (counts.sum(1) / cycles - q).abs().max() < 6 * (q * (1 - q) / cycles) ** 0.5
    assert sampler.wrap(EVENT, n, batch, 8) == PoissonSampledDpEvent(q, EVENT)
    assert sampler.wrap(EVENT, n, batch, 9) == NoOpDpEvent()
    assert "groups = 20 or less" in str(CyclicPoisson(21).unfit(n, batch))


def test_the_cyclic_charge_is_that_of_jax_privacy():
    analysis = pytest.importorskip("jax_privacy.accounting.analysis", reason="uv pip install -e '.[peers]'")
    accountants = pytest.importorskip("jax_privacy.accounting.accountants")
    n, batch, steps, sigma = 4000, 100, 200, 1.5
    params = analysis.DpParams(
        noise_multipliers=sigma, num_samples=n, delta=1e-5, batch_size=batch, cycle_length=8
    )  # fmt: skip
    theirs = analysis.DpsgdTrainingAccountant(accountants.PldAccountantConfig()).compute_epsilon(steps, params)
    plan = Method(noise=Banded(8), sampler=CyclicPoisson(8)).plan(sigma, n, batch, steps)
    assert epsilon(plan, 1e-5, Relation.ADD_OR_REMOVE, "pld") == pytest.approx(theirs, rel=1e-3)


def test_truncated_batches_are_cut_off_and_cost_more():
    sampler, n, batch = TruncatedPoisson(1.1), 1000, 50
    drawn = [sampler.draw(n, batch, t, 3) for t in range(200)]
    plain = [Poisson().draw(n, batch, t, 3) for t in range(200)]
    assert max(map(len, drawn)) == sampler.most(n, batch) == 55 < max(map(len, plain))
    for few, all_ in zip(drawn, plain, strict=True):
        assert set(few.tolist()) <= set(all_.tolist()) and (len(all_) > 55 or torch.equal(few, all_))
    spent = [
        epsilon(Ledger([(one.wrap(EVENT, n, batch, 0), 20)]), 1e-5, Relation.ADD_OR_REMOVE, "pld")
        for one in (Poisson(), TruncatedPoisson(3.0), TruncatedPoisson(1.1))
    ]
    assert spent[0] == pytest.approx(spent[1], rel=1e-3)
    assert spent[1] < spent[2]


@pytest.mark.parametrize(
    ("noise", "sampler", "said"),
    [
        (Banded(8), Poisson(), "8 steps apart or more, and Poisson sampling of 10 of 100 keeps them 1 apart"),
        (Banded(8), CyclicPoisson(4), "keeps them 4 apart: write a separation of 4 or less"),
        (Banded(11), Cyclic(), "11 steps apart or more, and Cyclic sampling of 10 of 100 keeps them 10 apart"),
        (BandedInverse(4), CyclicPoisson(4), "take a sampler that claims no amplification"),
        (TreeAggregation(), Shuffle(), "Shuffle does not say"),
        (Banded(8), CyclicPoisson(8), None), (Banded(10), Cyclic(), None), (BandedInverse(4), Cyclic(), None),
        (TreeAggregation(), CyclicPoisson(4), None), (TreeAggregation(), Cyclic(), None),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(noise, sampler, said):
    found = Method(noise=noise, sampler=sampler).unfit(100, 10, 50)
    assert found is None if said is None else said in found


def test_an_event_that_nobody_knows_costs_infinity_and_stays_what_it_was():
    entries = [[{"type": "NewDpEvent", "rate": 0.5}, 3], [{"type": "GaussianDpEvent", "noise_multiplier": 1.0}, 1]]
    ledger = Ledger.from_json(entries)
    assert ledger.to_json() == entries
    for name in ("pld", "rdp", "prv", "gdp"):
        assert epsilon(ledger, 1e-5, Relation.ADD_OR_REMOVE, name) == float("inf")
