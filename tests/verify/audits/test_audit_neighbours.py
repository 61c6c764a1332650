"""Audits by a pair of neighbours: what the observer expects is exact, true claims stand, planted faults are caught."""

import dataclasses
import inspect

import pytest
import torch

from harness import cli, registry
from harness.dp import (
    Fixed,
    Flat,
    Gaussian,
    InfoNCE,
    Method,
    Pairs,
    Poisson,
    Quantile,
    Relation,
    Rotations,
    Views,
    Whole,
)
from harness.records import audits as stored
from harness.running.train import Schedule
from harness.verify.audits import command, pair
from harness.verify.audits.canary import Refused
from harness.verify.audits.candidates import candidates, reach, strongest
from harness.verify.audits.command import audit
from harness.verify.audits.pair import Neighbour, Neighbours, PairObserver, PairSetting, overheard, squared_mean
from harness.verify.faults.engines import ClippedBeforeTemperature
from harness.verify.faults.parts import Less
from tests.support.faults.engines import OneForWhole
from tests.support.faults.noises import OneOfSeveral
from tests.support.faults.rules import WholeCounts

STILL = InfoNCE(0.1, pad=0, flip=False, jitter=0.0)  # both views are the image: nothing is averaged over
COUNTED = {"by": "flat", "budget": 0.8}  # most of the budget goes to the counts


def own(spec: str) -> Method:
    entry, options = registry.lookup("method", spec)
    return registry.load(entry)(**options)


def audited(method: Method, **options):
    return pair.audit(method, PairSetting(**{"epsilon": 8.0, "repeat": 400, **options}), strongest)


def first(method: Method, task, rate: float) -> Neighbours:
    """A pair that nobody looked for."""
    return next(candidates(method.sampler.relation, task))


# --- the observer ---


def small(method: Method, **options) -> tuple[Neighbours, PairObserver]:
    task = PairSetting(examples=4).trained()
    x, y = torch.cat([3 * task.x[3:], task.x[:3]]), task.y
    two = Neighbours(x, y, task.body, **options)
    return two, PairObserver(method, two, 2.0, 4, 0)


def heard(method: Method, observer: PairObserver, present: bool, seed: int = 0, steps: int = 1):
    two = observer.pair
    return overheard(method, Neighbour(two, present), two.body, 2.0, Schedule(steps, 4, steps), seed)[0]


def test_what_the_observer_expects_is_the_targets_clipped_gradient_and_the_sum_of_the_others():
    method = Method(clip=Flat(0.5))
    two, observer = small(method)
    gradients = []
    for i in range(4):
        loss = method.loss.per_example(two.body(two.x[i : i + 1]), two.y[i : i + 1]).sum()
        g = torch.cat([t.flatten() for t in torch.autograd.grad(loss, list(two.body.parameters()))])
        gradients.append((g * min(1.0, 0.5 / float(g.norm()))).double())
    (step,) = heard(method, observer, True)
    expected = observer.expected(step)
    assert expected.moved.allclose(gradients[0] / (2 * 0.5), atol=1e-6)  # over sigma times sensitivity
    assert expected.base.allclose(sum(gradients[1:]) / (2 * 0.5), atol=1e-6)
    assert expected.reach == pytest.approx(float(gradients[0].norm()) / 0.5, rel=1e-5) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("sampler", [Poisson(), Fixed()], ids=["add-or-remove", "replace-one"])
def test_readings_are_standard_normal_about_what_the_coin_says(sampler):
    """So that the likelihood ratio is the one of the claim; 150 readings, 4 standard errors."""
    method = Method(sampler=sampler)
    replaced = sampler.relation is Relation.REPLACE_ONE
    other = {"x_other": torch.zeros(1, 1, 8, 8), "y_other": torch.tensor([1])} if replaced else {}
    _, observer = small(method, **other)
    for present in (True, False):
        steps = [heard(method, observer, present, seed)[0] for seed in range(150)]
        values = torch.tensor([observer.reading(step).value for step in steps])
        length = observer.reading(steps[0]).length
        centre = length if present else -length if replaced else 0.0
        assert abs(float(values.mean()) - centre) < 4 / 150**0.5 and 0.6 < float(values.var()) < 1.5


def test_batches_and_views_are_the_observers_own():
    """Those of a run are secret: an audit that knew them would refute methods that claim to be amplified by them."""
    method = Method(loss=Views(pad=1))
    _, observer = small(method)
    assert len(observer.drawn(0)) == pair.SHARED and len(observer.drawn(1)) == pair.DRAWS
    steps = heard(method, observer, True, 5, steps=2)
    again = PairObserver(method, observer.pair, 2.0, 4, 0)
    for mine, other in zip(observer.drawn(1), again.drawn(1), strict=True):
        assert mine.present.x.equal(other.present.x)  # a function of its own seed
    assert not any("seed" in name for name in inspect.signature(observer.expected).parameters)
    assert len({drawn.present.x.sum().item() for drawn in again.drawn(1)[:3]}) == 3
    assert observer.expected(steps[1]).reach <= 1


def test_a_mean_of_views_is_not_taken_for_longer_than_it_is():
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(500, 8, 1000, generator=rng, dtype=torch.float64)
    estimates = torch.tensor([squared_mean(draws) for draws in noise + 0.1])  # of 1000 * 0.1^2; naively 135
    assert abs(float(estimates.mean()) - 10) < 1.0


# --- true claims ---


@pytest.mark.parametrize(
    ("method", "options", "least"),
    [
        (own("dp-sgd"), {}, 2.0),
        (own("dp-sgd"), {"rate": 0.5, "steps": 2, "examples": 1, "repeat": 400}, 1.0),
        (own("dp-rotation"), {}, 2.0),
        (own("logit-dp"), {"examples": 3, "repeat": 40}, 0.0),
        (Method(loss=STILL, engine=Pairs(2), clip=Flat(0.1)), {"examples": 3, "repeat": 200}, 0.0),
        (Method(loss=STILL, engine=Whole()), {"examples": 3}, 0.3),
        (Method(clip=Quantile(0.1, **COUNTED)), {}, 2.0),
    ],
    ids=["dp-sgd", "sampled", "dp-rotation", "logit-dp", "capped", "naive", "counts"],
)
def test_true_claims_stand_and_the_audit_has_power(method, options, least):
    found = audited(method, **options)
    assert not found.refuted and found.planted["reach"] <= 1 + 1e-6
    assert found.audited >= least  # an audit that says nothing catches nothing


# --- planted faults ---


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (Method(loss=Rotations(), noise=Less(0.5)), {}),
        (Method(clip=Quantile(0.1, **COUNTED), noise=OneOfSeveral()), {}),
        (Method(clip=WholeCounts(0.1, **COUNTED)), {}),
        (Method(loss=STILL, engine=ClippedBeforeTemperature(2), clip=Flat(0.1)), {"examples": 3}),
        (Method(loss=STILL, engine=OneForWhole()), {"examples": 3, "repeat": 800}),
    ],
    ids=["half the noise", "count not charged", "count moves twice", "temperature", "C for 2C"],
)
def test_planted_faults_are_refuted(method, options):
    found = audited(method, **options)
    assert found.refuted and found.audited > found.claimed


def test_gradient_canaries_do_not_hear_counts():
    """Which is what this instrument is for."""
    faulty = Method(clip=WholeCounts(0.1, **COUNTED))
    assert not audit(faulty, command.CanarySetting(epsilon=8, canaries=200, repeat=4)).refuted


# --- the pair ---


def test_the_pair_is_chosen_for_its_reach():
    task = PairSetting(examples=3).trained()
    assert reach(own("dp-sgd"), strongest(own("dp-sgd"), task, 1.0), 1.0) == pytest.approx(1, rel=1e-5)
    method = Method(loss=STILL, engine=Whole())
    plain = Neighbours(task.x, task.y, task.body)
    assert reach(method, strongest(method, task, 1.0), 1.0) > 1.05 * reach(method, plain, 1.0)


# --- the command ---


def test_the_parts_say_which_instrument_serves(tmp_path, capsys):
    request = ["--repeat", "300", "--examples", "2", "--epsilon", "8", "--results", str(tmp_path)]
    for spec, instrument in (
        ("dp-sgd", "gradient canaries"), ("dp-rotation", "neighbours"), ("logit-dp", "neighbours"),
        ("contrastive", "gradient canaries"),
    ):  # fmt: skip
        entry, _ = registry.lookup("method", spec)
        method = registry.load(entry)()
        assert command.takes_canaries(method, command.CanarySetting().trained()) is (instrument != "neighbours")
    assert cli.main(["audit", "dp-rotation", "contrastive", *request]) == 0
    found = {a["method"]: a for a in stored.load(tmp_path / "audits")}
    assert found["dp-rotation"]["instrument"] == "neighbours" and found["dp-rotation"]["epsilon_audited"] > 0
    assert found["dp-rotation"]["canaries"] == 1 and found["dp-rotation"]["trials"] == 300
    assert set(found["dp-rotation"]["instruments"]) == {"error rates", "trade-off"}
    assert "without noise" in found["contrastive"]["reason"]
    assert cli.main(["audit", "dp-sgd", "--neighbours", *request]) == 0
    assert {a["instrument"] for a in stored.load(tmp_path / "audits") if a["method"] == "dp-sgd"} == {"neighbours"}
    asked = ["dp-rotation", "--canaries", "5", *request]  # canaries were asked for by name
    assert cli.main(["audit", *asked]) == 0 and "not auditable" in capsys.readouterr().out
    for wrong in (["--canaries", "5"], ["--membership"]):
        with pytest.raises(SystemExit):
            cli.main(["audit", "dp-sgd", "--neighbours", *wrong])


def test_too_few_runs_are_refused_and_so_is_a_ledger_that_is_not_the_plan():
    with pytest.raises(Refused, match="coins are too few"):
        pair.audit(own("dp-sgd"), PairSetting(epsilon=8.0, repeat=3), first)

    @dataclasses.dataclass(frozen=True)
    class Amended(Gaussian):
        def event(self, sigmas):
            CALLS.append(1)
            return Gaussian().event([1.0 + len(CALLS)])

    CALLS: list[int] = []
    with pytest.raises(Refused, match="the run charged"):
        pair.audit(Method(noise=Amended()), PairSetting(repeat=64), first, 1.0)
