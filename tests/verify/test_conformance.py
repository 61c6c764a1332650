"""Every registered method, ours and those of installed packages, passes the checks; planted faults do not."""

import dataclasses
import math
import os

import numpy as np
import pytest
import torch
from scipy import stats

from harness import registry
from harness.dp import (
    Automatic,
    Feedback,
    Fixed,
    Flat,
    Full,
    Gaussian,
    GroupWise,
    Loop,
    Method,
    Moments,
    Quantile,
    Shuffle,
    Unclipped,
    Views,
)
from harness.registry.options import Parameter
from harness.verify import conformance as checks
from harness.verify.conformance import adversary, evidence, identity
from harness.verify.conformance.options import others
from tests.support.conforming import failed
from tests.support.faults.others import Drift
from tests.support.faults.rules import Counted
from tests.support.faults.wider import WIDER

REPEAT = int(os.environ.get("EPSBENCH_REPEAT", "2"))  # 200 to bound the rate of false alarms


@pytest.mark.parametrize("name", sorted(registry.index("method")))
def test_method_conforms(name):
    (one,) = checks.named(name)
    assert failed(one.method, (one.name, one.file)) == []


def _label(value):
    if not isinstance(value, Method):
        return value.__name__
    plain = Method()
    changed = (getattr(value, f.name) for f in dataclasses.fields(value))
    return "-".join(
        type(part).__name__
        for part, f in zip(changed, dataclasses.fields(value), strict=True)
        if part != getattr(plain, f.name)
    )


@pytest.mark.parametrize(("fault", "caught"), WIDER, ids=_label)
def test_a_planted_fault_is_caught(fault, caught):
    with pytest.raises(checks.Violation):
        caught(checks.subject(fault))


SOUND = [  # what no registered method has, each part of it once
    Method(clip=Automatic(0.5, form="vanilla"), engine=Loop()),
    Method(clip=Counted(), loss=Views(views=2, pad=1), sampler=Fixed()),
    Method(clip=GroupWise(allocation="equal"), sampler=Fixed()),
    Method(clip=Quantile(by="parameter", allocation="dimension", rate=0.5), sampler=Shuffle()),
    Method(clip=Quantile(by="shards:2", allocation="optimal", count_noise=3.0)),
]


@pytest.mark.parametrize("method", SOUND, ids=_label)
def test_a_sound_method_passes(method):
    slow = (checks.equals_loop, checks.calibrated, checks.resumed, checks.adversarial)
    assert failed(method, leave=slow) == []


def test_a_verdict_says_which_check_failed(monkeypatch):
    some = (checks.described, checks.billed, checks.still, checks.twins, checks.empty_step)
    monkeypatch.setattr(checks, "CHECKS", some)
    lines = checks.examine(Method(path=Drift()))
    assert [line.name for line in lines if not line.ok] == ["a learning rate of 0 leaves the weights where they are"]


# --- problems, and what does not apply ---


def test_the_problem_is_the_first_that_the_engine_accepts():
    assert checks.subject(Method()).data.x.ndim == 4
    assert checks.subject(Method(engine=Moments(), clip=Unclipped(), sampler=Full())).data.x.ndim == 2
    with pytest.raises(checks.Violation, match="Unclipped"):
        checks.subject(Method(engine=Feedback(), clip=Flat()))


def test_what_does_not_apply_says_why():
    line = checks.verdict(checks.replaced, checks.subject(Method()))
    assert line.ok and "add-or-remove" in line.detail


# --- the search ---


def test_the_search_climbs():
    s = checks.subject(Method(clip=Flat(100.0)))  # no gradient is that long: the ratio is its norm
    search = adversary.Search(s, s.method.sampler.relation)
    begun = adversary.Start()
    at = adversary.started(s, begun, torch.Generator().manual_seed(77))
    before = search.ratio(at)
    seen = []
    climb = search.ratio
    search.ratio = lambda pair: seen.append(climb(pair)) or seen[-1]
    search.rng = torch.Generator().manual_seed(77)
    search.ascend(begun)
    assert search.worst is None and seen[0] == before and max(seen) > 2 * before > 0


# --- ids ---

METHOD = '''
from harness.dp import Flat, Method
from harness.registry import method

@method("{name}", paper="-", family="clipping")
def rule() -> Method:
    """A rule."""
    return Method(clip=Flat({clip}))
'''


def test_an_id_that_depends_on_the_hash_seed_is_caught(tmp_path):
    file = tmp_path / "rules.py"
    file.write_text(METHOD.format(name="checked-hashed", clip="1 + hash('a') % 10**6"))
    registry.add_file(file)
    (one,) = checks.named(str(file))
    s = dataclasses.replace(checks.subject(one.method), identity=(one.name, one.file))
    with pytest.raises(checks.Violation, match="another process"):
        checks.identified(s)
    assert identity.elsewhere(one.file)["dp-sgd"] == identity.cell("dp-sgd", checks.named("dp-sgd")[0].method).id


# --- options ---

RULE = '''
from dataclasses import dataclass
from harness.dp import Flat, Method
from harness.registry import method

@dataclass(frozen=True)
class Constant(Flat):
    """Right at a norm of 1."""
    layers: bool = False

    def groups(self, layout):
        return {{name: i if self.layers else 0 for i, name in enumerate(layout.names)}}

    def sensitivity(self, state, relation):
        return relation.moves * {claimed}

@method("checked-{name}", paper="-", family="clipping")
def rule({options}, lr: float = 0.1) -> Method:
    """A rule."""
    return Method(clip=Constant({given}))
'''


@pytest.mark.parametrize(
    ("name", "claimed", "options", "given", "fault"),
    [
        ("constant", "1.0", "clip: float = 1.0", "clip", "with clip = 3"),
        ("layers", "self.clip", "layers: bool = False", "1.0, layers", "with layers = True"),
        ("honest", "self.clip", "clip: float = 1.0", "clip", None),
    ],
)
def test_a_fault_at_other_options_is_caught(tmp_path, name, claimed, options, given, fault):
    file = tmp_path / f"{name}.py"
    file.write_text(RULE.format(name=name, claimed=claimed, options=options, given=given))
    (one,) = checks.named(str(file))
    line = checks.verdict(
        checks.other_options, dataclasses.replace(checks.subject(one.method), identity=(one.name, one.file))
    )
    assert line.ok if fault is None else not line.ok and line.detail.startswith(fault)


def test_other_values_of_an_option():
    def of(kind, default):
        return others(Parameter(kind, default))

    assert of("float", 0.5) == [1.5, 0.5 / 3] and of("int", 4) == [12, 1] and of("float", 0.0) == [1]
    assert of("bool", False) == [True] and of("str", "a") == []
    assert of("Literal['a', 'b', 'c']", "b") == ["a", "c"]
    assert of("float | None", 2.0) == [6.0, 2 / 3, None] and of("float | None", None) == [1]


# --- false alarms ---


def test_statistical_checks_raise_no_false_alarm():
    (one,) = checks.named("adaptive")
    assert [line for line in checks.rehearsed(one.method, REPEAT) if not line.ok] == []


def test_p_values_are_those_of_scipy_or_above():
    rng = np.random.default_rng(1)
    z = torch.from_numpy(rng.normal(size=500))
    assert evidence.normal(2.5) == pytest.approx(2 * stats.norm.sf(2.5))
    assert evidence.normal(torch.tensor([0.3, -3.0]), 2) == pytest.approx(4 * stats.norm.sf(3.0))
    assert evidence.chi_square(700.0, 500) == pytest.approx(2 * stats.chi2.sf(700, 500))
    assert evidence.chi_square(torch.tensor([500.0, 350.0]), 500, 2) == pytest.approx(4 * stats.chi2.cdf(350, 500))
    exact = stats.kstest(z.numpy() * 1.2, "norm")
    assert exact.pvalue <= evidence.kolmogorov(z * 1.2) == pytest.approx(2 * math.exp(-1000 * exact.statistic**2))
    tail = stats.binom.sf(149, 1000, 0.1)
    assert tail <= evidence.bernstein(50.0, 90.0, 0.9) < 1e-4
    counted = evidence.binomial(149, 1000, 0.1), evidence.binomial(60, 1000, 0.1)
    assert counted == pytest.approx((2 * stats.binom.sf(148, 1000, 0.1), 2 * stats.binom.cdf(60, 1000, 0.1)))
    assert evidence.binomial(0, 1000, 0.1) == pytest.approx(2 * 0.9**1000)
    assert evidence.bernstein(math.nan, 1.0, 1.0) == evidence.normal(math.nan) == 0.0


def test_a_statistical_check_alarms_below_one_in_a_million():
    evidence.alarm(1.01e-7, 10, "kept")
    with pytest.raises(checks.Violation) as raised:
        evidence.alarm(0.99e-7, 10, "raised")
    assert raised.value.evidence == "p = 1e-07"


def test_p_values_of_sound_noise_are_uniform():
    """What is called a p-value is one: over 200 draws of noise, a tenth of them at most lies below a tenth."""
    draws = [torch.randn(400, generator=torch.Generator().manual_seed(seed)) for seed in range(200)]
    for test in (
        lambda z: evidence.kolmogorov(z),
        lambda z: evidence.chi_square(z.square().sum(), len(z)),
        lambda z: evidence.normal(z.sum() / len(z) ** 0.5),
        lambda z: evidence.bernstein(z.sign().sum(), len(z), 1.0),
    ):
        below = sum(test(z) < 0.1 for z in draws)
        assert stats.binom.sf(below - 1, len(draws), 0.1) > 1e-4


# --- errors ---


@dataclasses.dataclass(frozen=True)
class Broken(Gaussian):
    """Has no event."""

    def event(self, sigmas):
        raise KeyError("sigma")


def test_an_error_in_a_part_is_a_verdict():
    line = checks.verdict(checks.noise_billed, checks.subject(Method(noise=Broken())))
    assert not line.ok and line.detail.startswith("KeyError: 'sigma'; raised in event, test_conformance.py:")
