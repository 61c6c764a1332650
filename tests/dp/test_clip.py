"""Clipping rules against their papers, and against neighbours chosen to break their bounds; views of an image."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from harness.dp import (
    PSAC,
    PSASC,
    SGD,
    Auto,
    Automatic,
    Batch,
    BookKeeping,
    CrossEntropy,
    Flat,
    Gaussian,
    Ghost,
    GroupWise,
    Loop,
    Loss,
    Method,
    Quantile,
    Refined,
    Relation,
    Release,
    Tree,
    Views,
    Vmap,
)
from harness.dp.calibrate import calibrate
from harness.dp.clip.grouped import SCALES, partition
from harness.dp.engines.engine import trainable
from harness.dp.native import kernels
from harness.dp.random import Stream
from harness.dp.tree import Layout
from harness.running.train import evaluate, read_checkpoint, write_checkpoint
from harness.verify import conformance as checks
from tests.support.zoo import ZOO

ADD, REPLACE = Relation.ADD_OR_REMOVE, Relation.REPLACE_ONE
ENGINES = [BookKeeping(), Ghost(), Vmap(), Loop()]
GROUPED = [GroupWise(0.5, "parameter", how, (0.3, 2.0)) for how in SCALES]
RULES = [
    Flat(0.5), Automatic(2.0), Automatic(2.0, form="vanilla"), PSAC(2.0), PSAC(0.5, 0.01), PSASC(2.0, s=0.3),
    Refined(0.5, share=0.5), Quantile(0.5, "flat", count_noise=9.0), *GROUPED,
    *(Quantile(0.5, "parameter", how, (0.3, 2.0)) for how in SCALES),
]  # fmt: skip


class Given(nn.Module):
    """A model whose per-example gradients are its inputs [B, T, 6] summed over T: four coordinates, and two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 1, bias=False), nn.Linear(2, 1, bias=False)

    def forward(self, x):
        return self.a(x[..., :4]).sum(1) + self.b(x[..., 4:]).sum(1)


class Sum(Loss):
    def per_example(self, outputs, y):
        return outputs.sum(1)


def given_model(dtype=torch.float64):
    torch.manual_seed(0)
    model = Given().to(dtype)
    return model, Tree.of(trainable(model))


def bounded(engine, rule, x, relation=ADD, y=None, model=None, w=None, loss=None, sigma=1.0):
    if model is None:
        model, w = given_model(x.dtype)
        loss, y = Sum(), torch.zeros(len(x), dtype=torch.long)
    return engine.bounded(loss, rule, model, w, Batch(x, y), rule.init(w.layout), sigma, relation)


def layout(**sizes: int) -> Layout:
    return Layout(tuple(sizes), tuple(torch.Size((size,)) for size in sizes.values()))


# --- weights ---

PAIR = layout(a=4, b=2)
norm_values = st.floats(0, 1e30) | st.sampled_from([0.0, 1e-30, 1e-12, math.inf, math.nan])


@pytest.mark.parametrize("rule", RULES, ids=repr)
@given(st.lists(st.tuples(norm_values, norm_values), min_size=1, max_size=6))
@settings(max_examples=24, deadline=None)
def test_weighted_norms_stay_within_the_sensitivity(rule, rows):
    state, of = rule.init(PAIR), rule.groups(PAIR)
    groups = 1 + max(of.values())
    norms = torch.tensor(rows, dtype=torch.float64)[:, :groups]
    scale = rule.scale(PAIR, state) or dict.fromkeys(of, 1.0)
    units = norms.new_tensor([scale[name] for name in ("a", "b")][:groups])
    weights = rule.weights(norms, state)
    finite = norms.isfinite()
    assert (weights[~finite] == 0).all() and (weights >= 0).all()
    moved = (weights * norms.nan_to_num(0, 0, 0) / units).square().sum(1).sqrt()
    assert (moved <= rule.sensitivity(state, ADD) * (1 + 1e-12)).all()
    assert rule.sensitivity(state, REPLACE) == 2 * rule.sensitivity(state, ADD)


def weight(rule, norm):
    return float(rule.weights(torch.tensor([[norm]], dtype=torch.float64), None))


def test_the_weights_are_those_of_the_papers():
    """AUTO-V R / x and AUTO-S R / (x + gamma) (arXiv:2206.07136), DP-PSAC C / (x + r / (x + r)) (arXiv:2212.00328),
    DP-PSASC C / (s x + r / (x + r)) (arXiv:2411.03059), by hand."""
    for rule, norm, want in (
        (Automatic(2.0, 0.5), 1.5, 1.0),
        (Automatic(2.0, 0.5), 0.0, 4.0),
        (Automatic(2.0, form="vanilla"), 4.0, 0.5),
        (Automatic(2.0, form="vanilla"), 1e-3, 2000.0),
        (PSAC(3.0, 0.1), 0.4, 5.0),
        (PSAC(3.0, 0.1), 0.0, 3.0),
        (PSASC(3.0, 0.1, s=0.5), 0.4, 7.5),
        (PSASC(3.0, 0.1, s=0.5), 0.0, 3.0),
    ):
        assert weight(rule, norm) == pytest.approx(want, rel=1e-12), (rule, norm)
    # The denominator x + r / (x + r) is least at x = sqrt(r) - r, where it is 2 sqrt(r) - r.
    peak = math.sqrt(0.01) - 0.01
    assert weight(PSAC(1.0, 0.01), peak) == pytest.approx(1 / (2 * 0.1 - 0.01))
    assert weight(PSAC(1.0, 0.01), peak) > max(weight(PSAC(1.0, 0.01), peak + d) for d in (-0.05, 0.05))


def test_psasc_grows_towards_its_supremum_and_is_psac_at_s_equal_to_one():
    norms = torch.logspace(-6, 9, 200, dtype=torch.float64)[:, None]
    rule = PSASC(2.0, 0.1, s=0.4)
    contribution = (rule.weights(norms, None) * norms).squeeze(1)
    assert (contribution.diff() > -1e-15).all() and (contribution[norms[:, 0] < 1e3].diff() > 0).all()
    assert 0.999999 * 5.0 < float(contribution[-1]) <= 5.0 == rule.sensitivity(None, ADD)
    assert torch.equal(PSASC(2.0, 0.1, s=1.0).weights(norms, None), PSAC(2.0, 0.1).weights(norms, None))


def test_rules_refuse_impossible_values():
    for bad in (
        lambda: Automatic(gamma=0.0),
        lambda: Automatic(form="other"),
        lambda: PSAC(r=-1.0),
        lambda: PSASC(s=1.5),
        lambda: PSASC(s=0.0),
        lambda: Refined(share=0.0),
        lambda: Refined(share=1.5),
        lambda: GroupWise(thresholds=(1.0, 0.0)),
        lambda: GroupWise(allocation="other"),
        lambda: Quantile(quantile=1.0),
        lambda: Quantile(budget=0.0),
        lambda: Quantile(rate=-0.1),
        lambda: Quantile(count_noise=math.inf),
        lambda: Views(views=0),
        lambda: Views(pad=-1),
    ):
        with pytest.raises(ValueError, match=r"must|no negative"):
            bad()
    with pytest.raises(ValueError, match="3 thresholds for the 2 groups"):
        GroupWise(by="parameter", thresholds=(1.0, 2.0, 3.0)).init(PAIR)


# --- neighbours ---


def adversaries(positions: int) -> dict[str, torch.Tensor]:
    """Gradients [T, 6] that bounds are got wrong on: summed over positions, 0, huge, one coordinate, not finite."""
    spread, axis = torch.ones(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)[2]
    rows = {
        "zero": 0 * spread, "huge": 1e30 * spread, "opposite": -1e30 * spread, "tiny": 1e-30 * spread,
        "one coordinate": 1e30 * axis, "one group": 1e30 * torch.eye(6, dtype=torch.float64)[5],
        "ordinary": 0.4 * spread, "not a number": math.nan * axis, "infinite": torch.full_like(axis, math.inf),
    }  # fmt: skip
    few = {name: row.expand(positions, 6).clone() for name, row in rows.items()}
    if positions > 1:  # two large positions that cancel but for a little
        few["cancelling"] = torch.stack([1e6 * spread, 1e-3 * axis - 1e6 * spread])
    return few


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("positions", [1, 2])
def test_no_neighbour_moves_a_release_beyond_its_sensitivity(positions, engine, rule):
    rest = torch.randn(3, positions, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for relation in Relation:
        base = bounded(engine, rule, rest, relation)
        found = {}
        for name, row in adversaries(positions).items():
            found[name] = bounded(engine, rule, torch.cat([rest, row[None]]), relation)
            bad = name in ("not a number", "infinite")
            assert int(found[name].observed.non_finite) == bad
            if bad:
                for key, r in found[name].releases.items():
                    assert torch.allclose(r.value.flat, base.releases[key].value.flat, rtol=1e-12), (name, key)
        neighbours = (
            [(one, base) for one in found.values()]
            if relation is not REPLACE
            else [(one, other) for one in found.values() for other in found.values()]
        )
        assert set(base.releases) == set(rule.split(1.0))
        for key, declared in base.releases.items():
            moved = []
            for one, other in neighbours:
                ours, theirs = one.releases[key], other.releases[key]
                assert ours[1:] == theirs[1:] == declared[1:]
                moved.append(float(declared.in_units(ours.value - theirs.value).norm()) / declared.sensitivity)
            assert max(moved) <= 1 + 1e-9, (relation, key)
            assert max(moved) >= 0.99, (relation, key)  # the bound is reached: these neighbours can tell


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: type(e).__name__)
def test_a_weight_that_float32_cannot_hold_lets_nothing_through(engine):
    """1e-45 is 1.4e-45 in float32, so that a gradient of 1e36 would contribute 1.4 times 1e-9, were that a bound."""
    for clip in (1e-6, 1.3e-5, 3e-4):
        for rule in (Flat(clip), GroupWise(clip, "parameter", "equal"), PSAC(clip), Automatic(clip)):
            for norm in (1e30, 1e34, 7e35, 1e36, 1e37):
                x = torch.full((1, 1, 6), norm / math.sqrt(6))
                release = bounded(engine, rule, x).releases["grad"]
                units = release.in_units(release.value.with_flat(release.value.flat.double()))
                assert float(units.norm()) <= release.sensitivity * (1 + 1e-5), (rule, norm)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: type(e).__name__)
def test_a_norm_that_vanishes_in_float32_is_not_weighed_up(engine, monkeypatch):
    """Without kernels, squares of 1e-25 are zero in float32, and R / x would be R over nothing."""
    monkeypatch.setattr(kernels, "_typed", lambda: None)
    for value in (1e-15, 1e-19, 1e-22, 1e-25, 1e-30):
        release = bounded(engine, Automatic(form="vanilla"), torch.full((1, 1, 6), value)).releases["grad"]
        assert float(release.value.norm()) <= 1 + 1e-5, value


# --- groups ---


@pytest.mark.parametrize("allocation", SCALES)
def test_the_noise_of_each_group_is_as_the_allocation_says(allocation):
    """Standard deviations of He et al.'s allocations (arXiv:2212.01539), and of the two that complete them."""
    sizes, thresholds, sigma = (40_000, 10_000), (0.5, 2.0), 1.5
    c = torch.tensor(thresholds, dtype=torch.float64)
    d = torch.tensor(sizes, dtype=torch.float64)
    want = {
        "global": sigma * c.square().sum().sqrt().expand(2),
        "equal": sigma * c * math.sqrt(2),
        "dimension": sigma * c / d.sqrt() * d.sum().sqrt(),
        "optimal": sigma * (c / d.sqrt()).sqrt() * (c * d.sqrt()).sum().sqrt(),
    }
    total = {how: float((d * deviation.square()).sum()) for how, deviation in want.items()}
    assert total["optimal"] == pytest.approx(sigma**2 * float((c * d.sqrt()).sum()) ** 2)
    assert min(total, key=total.__getitem__) == "optimal"

    rule, shape = (GroupWise(by="parameter", allocation=allocation, thresholds=thresholds), layout(a=40_000, b=10_000))
    state = rule.init(shape)
    release = Release(
        Tree(shape, torch.zeros(50_000, dtype=torch.float64)), rule.sensitivity(state, ADD), sigma,
        rule.scale(shape, state),
    )  # fmt: skip
    noise = Gaussian().add(release, Stream(1, "noise", 0))
    for name, size, deviation in zip(("a", "b"), sizes, want[allocation].tolist(), strict=True):
        unit = (release.scale or dict.fromkeys(shape.names, 1.0))[name]
        assert sigma * release.sensitivity * unit == pytest.approx(deviation, rel=1e-12)
        assert float(noise[name].square().mean().sqrt()) == pytest.approx(deviation, rel=5 / math.sqrt(2 * size))
    assert float(torch.corrcoef(torch.stack([noise["a"][:10_000], noise["b"]]))[0, 1]) == pytest.approx(0, abs=0.05)


@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.integers(1, 10**6)), min_size=1, max_size=6))
@settings(max_examples=24, deadline=None)
def test_no_allocation_has_less_noise_in_all_than_the_optimal_one(groups):
    shape = layout(**{str(i): size for i, (_, size) in enumerate(groups)})
    total = {}
    for how in SCALES:
        rule = GroupWise(by="parameter", allocation=how, thresholds=tuple(c for c, _ in groups))
        state = rule.init(shape)
        scale = rule.scale(shape, state) or dict.fromkeys(shape.names, 1.0)
        deviations = [rule.sensitivity(state, ADD) * scale[name] for name in shape.names]
        total[how] = sum(size * s**2 for size, s in zip(shape.sizes, deviations, strict=True))
    assert total["optimal"] == pytest.approx(sum(c * math.sqrt(d) for c, d in groups) ** 2, rel=1e-9)
    assert all(total["optimal"] <= other * (1 + 1e-9) for other in total.values())


def test_a_scale_that_is_no_unit_gets_no_noise_drawn_for_it():
    value = Tree.of({"a": torch.zeros(2), "b": torch.zeros(2)})
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="positive, finite scales"):
            Gaussian().add(Release(value, 1.0, 1.0, {"a": 1.0, "b": scale}), Stream(0, "noise", 0))


NAMES = (
    "token", "stem.weight", "stem.bias", "blocks.0.q.weight", "blocks.0.q.bias", "blocks.0.up.weight",
    "blocks.1.q.weight", "head.0.weight",
)  # fmt: skip


@pytest.mark.parametrize(
    ("by", "want"),
    [
        ("flat", [0] * 8),
        ("parameter", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("layer", [0, 1, 1, 2, 2, 3, 4, 5]),
        ("block", [0, 1, 1, 2, 2, 2, 3, 4]),
        ("shards:1", [0] * 8),
        ("shards:2", [0, 0, 0, 1, 1, 1, 1, 1]),
        ("shards:100", [0, 1, 1, 2, 2, 3, 4, 5]),
        ("blocks.*; *", [0, 0, 0, 1, 1, 1, 0, 0]),
        ("*.bias; blocks.0.*, head.*; *", None),
    ],
)
def test_partitions(by, want):
    groups = partition(by, layout(**dict.fromkeys(NAMES, 10)))
    if by == "blocks.*; *":  # numbered by first appearance: the rest comes first
        want = [0, 0, 0, 1, 1, 1, 1, 0]
    if want is None:
        want = [0, 0, 1, 2, 1, 2, 0, 2]
    assert [groups[name] for name in NAMES] == want


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=12), st.integers(1, 12))
@settings(max_examples=24, deadline=None)
def test_shards_are_runs_of_layers_of_about_equal_size(sizes, count):
    shape = layout(**{f"{i}.weight": size for i, size in enumerate(sizes)})
    groups = list(partition(f"shards:{count}", shape).values())
    assert groups == sorted(groups) and set(groups) == set(range(groups[-1] + 1)) and groups[-1] < count
    for shard in set(groups):  # a layer is never split, so a shard is off by less than one layer
        held = sum(size for size, group in zip(sizes, groups, strict=True) if group == shard)
        assert held <= sum(sizes) / count + max(sizes)


@pytest.mark.parametrize(
    ("by", "says"),
    [
        ("blocks.*; head.*", '"token" is in none'),
        ("layers", '"token" is in none'),
        ("shards:0", "number of shards"),
        ("shards:few", "number of shards"),
        ("shards", "number of shards"),
    ],
)
def test_a_parameter_without_a_group_is_an_error(by, says):
    with pytest.raises(ValueError, match=says):
        partition(by, layout(**dict.fromkeys(NAMES, 1)))


# --- adaptive thresholds ---


@pytest.mark.parametrize(("groups", "deviation"), [(16, 20.0), (50, 35.355), (200, 70.711)])
def test_a_hundredth_of_the_budget_gives_counts_this_much_noise(groups, deviation):
    """He et al. (arXiv:2212.01539): sigma_b = sigma / 2 * sqrt(K / r), sigma_g = sigma / sqrt(1 - r)."""
    shape = layout(**{str(i): 1 for i in range(groups)})
    rule = Quantile(by="parameter", budget=0.01)
    norms = torch.ones(3, groups, dtype=torch.float64)
    counts = rule.side(norms, rule.init(shape), ADD, 1.0)["counts"]
    assert counts.sigma * counts.sensitivity == pytest.approx(deviation, abs=1e-3)
    assert rule.split(1.0)["grad"] == pytest.approx(1.00504, abs=1e-5)


@pytest.mark.parametrize(("sigma", "grad"), [(5.0, 5.164), (10.0, 11.547)])
def test_noise_of_given_size_on_counts_leaves_the_gradient_this_multiplier(sigma, grad):
    """Andrew et al. (arXiv:1905.03871): z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2), sigma_b = 10."""
    rule = Quantile(by="parameter", count_noise=10.0)
    assert rule.split(sigma)["grad"] == pytest.approx(grad, abs=1e-3)
    for groups, relation, deviation in ((1, ADD, 10.0), (4, ADD, 20.0), (1, REPLACE, 20.0)):
        shape = layout(**{str(i): 1 for i in range(groups)})
        norms = torch.ones(3, groups, dtype=torch.float64)
        counts = rule.side(norms, rule.init(shape), relation, sigma)["counts"]
        assert counts.sigma * counts.sensitivity == pytest.approx(deviation)


@given(st.floats(0.01, 100), st.floats(1e-4, 0.5) | st.none(), st.floats(1.0001, 100))
@settings(max_examples=40, deadline=None)
def test_the_split_is_worth_the_joint_multiplier(sigma, budget, above):
    rule = Quantile(count_noise=above * sigma / 2) if budget is None else Quantile(budget=budget)
    event = Gaussian().event(rule.split(sigma).values())
    assert event.noise_multiplier == pytest.approx(sigma, rel=1e-9)


def test_noise_that_is_too_small_for_the_counts_is_an_error_that_says_what_to_write():
    rule = Quantile(count_noise=1.0)
    for sigma in (2.0, 5.0):
        with pytest.raises(ValueError, match="Write a count_noise above"):
            rule.split(sigma)


def test_calibration_knows_the_ceiling_of_a_rule(tmp_path):
    """Just below it there is a multiplier; above it an error says what to write, whatever the cache holds."""
    problem = (1000, 100, 20, 0.3, 1e-5)
    needed = calibrate(Method(), *problem, cache=tmp_path)
    for noise in (0.998 * needed / 2, 0.05):  # the second would take PLD minutes
        with pytest.raises(ValueError, match=f"write a count_noise above {needed / 2:.4g}"):
            calibrate(Method(clip=Quantile(count_noise=noise)), *problem, cache=tmp_path)
    found = calibrate(Method(clip=Quantile(count_noise=1.002 * needed / 2)), *problem, cache=tmp_path)
    assert found == pytest.approx(needed, rel=3e-4)


def test_the_counts_are_of_norms_below_the_threshold_less_half_the_batch():
    """One within a twentieth of it counts in part, so that no rounding of a norm moves a count by one."""
    rule = Quantile(by="parameter", thresholds=(1.0, 10.0))
    norms = torch.tensor([[1.0, 11.0], [0.0, 0.0], [2.0, 10.0], [math.nan, 1.0], [1.0, math.inf]])
    counts = rule.side(norms, rule.init(PAIR), ADD, 1.0)["counts"].value
    assert counts.flat.tolist() == [0.0, 0.0]  # 1 and 1 of 3, and one half: the last two are no gradients
    near = rule.side(torch.tensor([[1.025, 9.75]]), rule.init(PAIR), ADD, 1.0)["counts"].value
    assert near.flat.tolist() == pytest.approx([-0.25, 0.25])


def test_thresholds_settle_on_the_quantile_of_the_norms():
    rng = torch.Generator().manual_seed(2)
    norms = torch.randn(2000, 2, generator=rng, dtype=torch.float64).exp() * torch.tensor([1.0, 50.0])
    for quantile in (0.2, 0.5, 0.9):
        rule = Quantile(1.0, "parameter", thresholds=(1e-3, 1e3), quantile=quantile, rate=0.3)
        state = rule.init(PAIR)
        for step in range(250):
            public = Gaussian().add(rule.side(norms, state, ADD, 0.2)["counts"], Stream(3, "noise", step))
            state = rule.update(state, {"counts": public / len(norms)})
        below = (norms <= torch.tensor(state["thresholds"])).double().mean(0)
        assert below.tolist() == pytest.approx([quantile] * 2, abs=0.02)


def test_an_update_is_the_papers():
    """C * exp(-eta (b - gamma)), b = noisy count / m + 1/2, here cut to [0, 1]."""
    rule = Quantile(by="parameter", thresholds=(1.0, 2.0), quantile=0.6, rate=0.5)
    counts = Tree.of({"counts": torch.tensor([0.3, -7.0], dtype=torch.float64)})  # divided by m already
    state = rule.update(rule.init(PAIR), {"counts": counts})
    assert state["thresholds"] == pytest.approx((math.exp(-0.5 * 0.2), 2 * math.exp(0.5 * 0.6)), rel=1e-12)
    assert state["sizes"] == (4, 2)


def adaptive_subject():
    rule = Quantile(1.0, "layer", "optimal", rate=0.5)
    return checks.Subject(Method(clip=rule), checks.toy_model(), checks.Toy())


def test_thresholds_move_and_survive_a_checkpoint(tmp_path):
    s = adaptive_subject()
    p = s.reached[-1]
    assert p.parts.clip["thresholds"] != s.reached[0].parts.clip["thresholds"]
    write_checkpoint(tmp_path / "c", p)
    again, clip = read_checkpoint(tmp_path / "c"), s.method.clip
    assert list(again.parts.clip["thresholds"]) == list(p.parts.clip["thresholds"])
    assert clip.sensitivity(again.parts.clip, ADD) == clip.sensitivity(p.parts.clip, ADD)
    assert clip.scale(p.w.layout, again.parts.clip) == clip.scale(p.w.layout, p.parts.clip)


# --- AUTO-S ---


def test_the_clipping_norm_of_auto_s_is_a_factor_of_the_learning_rate():
    """Bu et al.: under SGD with momentum, R is lr * R, with the weight decay divided by it."""
    ends = [
        checks.Subject(
            Method(clip=Automatic(r), optimizer=SGD(lr, 0.9, weight_decay=decay)), checks.toy_model(), checks.Toy()
        )
        .reached[-1]
        .w.flat
        for r, lr, decay in ((3.0, 0.1, 0.06), (1.0, 0.3, 0.02), (1.0, 0.1, 0.02))
    ]
    assert torch.allclose(ends[0], ends[1], rtol=1e-9)
    assert not torch.allclose(ends[0], ends[2], rtol=1e-2)


# --- two norms ---


@pytest.mark.parametrize("clip", [0.4, 1.5])
def test_refined_clipping_is_what_its_definition_says(clip):
    """Cut off at share * max(norm, C), then weighed by min(1, C / norm): gradients longer and shorter than C."""
    model = ZOO["mlp"].model()
    x, y = ZOO["mlp"].batch(6)
    w, rule = Tree.of(trainable(model)), Refined(clip, share=0.15)
    total, norms, cut = torch.zeros_like(w.flat), [], []
    for i in range(6):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        g = torch.cat([t.flatten() for t in torch.autograd.grad(loss, list(model.parameters()))])
        norms.append(float(g.norm()))
        most = 0.15 * max(norms[-1], clip)
        cut.append(bool((g.abs() > most).any()))
        total += torch.where(g.abs() > most, most * g.sign(), g) * min(1.0, clip / norms[-1])
    assert any(cut) and (max(norms) > clip if clip < 1 else min(norms) < clip)
    for engine in (*ENGINES, Auto(), Vmap(microbatch=2), BookKeeping(microbatch=4)):
        out = bounded(engine, rule, x, y=y, model=model, w=w, loss=CrossEntropy())
        assert torch.allclose(out.releases["grad"].value.flat, total, rtol=1e-9, atol=1e-14), engine


@given(
    st.lists(st.floats(-1e30, 1e30) | st.floats(-2, 2), min_size=6, max_size=6),
    st.floats(1e-3, 1e3),
    st.floats(0.01, 1.0),
)
@settings(max_examples=24, deadline=None)
def test_refined_contributions_keep_both_bounds(row, clip, share):
    x = torch.tensor(row, dtype=torch.float64).view(1, 1, 6)
    ours = [bounded(engine, Refined(clip, share), x).releases["grad"].value.flat for engine in (Vmap(), Loop())]
    assert torch.allclose(*ours, rtol=1e-12, atol=0)
    assert float(ours[0].norm()) <= clip * (1 + 1e-12)
    assert float(ours[0].abs().max()) <= share * clip * (1 + 1e-12)


# --- views ---


def images(count, size=6):
    """Images whose pixels all differ, so that a crop tells where it comes from."""
    return 1.0 + torch.arange(count * 2 * size * size, dtype=torch.float64).view(count, 2, size, size)


def test_views_are_crops_of_the_padded_image_and_their_mirror_images():
    x, pad = images(30), 2
    loss = Views(views=8, pad=pad)
    batch = loss.prepare(Batch(x, torch.arange(30)), Stream(1, "views", 0))
    assert batch.x.shape == (30, 8, 2, 6, 6) and torch.equal(batch.y, torch.arange(30))
    padded = F.pad(x, (pad,) * 4)
    seen = []
    for i in range(30):
        crops = {
            (down, right, mirrored): padded[i, :, down : down + 6, right : right + 6].flip([2] if mirrored else [])
            for down in range(5)
            for right in range(5)
            for mirrored in (False, True)
        }
        for view in batch.x[i]:
            places = [place for place, crop in crops.items() if torch.equal(crop, view)]
            assert len(places) == 1
            seen += places
    counts = [[place[axis] for place in seen].count(value) for axis in (0, 1) for value in range(5)]
    assert all(abs(count - 48) < 5 * math.sqrt(48) for count in counts)
    assert abs([place[2] for place in seen].count(True) - 120) < 5 * math.sqrt(60)
    for mirrored in (False, True):  # of 25 pairs of offsets, about 120 independent draws leave out none or one
        assert len({place[:2] for place in seen if place[2] is mirrored}) > 20
    other = loss.prepare(Batch(x, torch.arange(30)), Stream(1, "views", 1))
    assert not torch.equal(other.x, batch.x)


def test_views_without_padding_and_mirrors_are_the_image():
    x = images(3)
    batch = Views(views=2, pad=0, flip=False).prepare(Batch(x, torch.arange(3)), Stream(1, "views", 0))
    assert torch.equal(batch.x, x[:, None].expand(-1, 2, -1, -1, -1))
    with pytest.raises(ValueError, match="views are made of images"):
        Views().prepare(Batch(torch.zeros(2, 5), torch.zeros(2)), Stream(1, "views", 0))


@pytest.mark.parametrize("views", [1, 3])
def test_the_mean_of_the_views_gradients_is_clipped_once(views):
    model, loss, rule = checks.toy_model(), Views(views=views, pad=2), Flat(0.7)
    data = checks.Toy()
    w = Tree.of(trainable(model))
    batch = loss.prepare(Batch(data.x[:5], data.y[:5]), Stream(4, "views", 0))

    def gradient(x, y):
        loss = F.cross_entropy(model(x), y.expand(len(x)))
        return torch.cat([t.flatten() for t in torch.autograd.grad(loss, list(model.parameters()))])

    def clipped(g):
        return g * min(1.0, 0.7 / float(g.norm()))

    assert batch.x.shape == ((5, 3, 1, 6, 6) if views > 1 else (5, 1, 6, 6))
    rows = list(zip(batch.x.view(5, views, 1, 6, 6), batch.y, strict=True))
    once = sum(clipped(gradient(x, y)) for x, y in rows)
    each = sum(clipped(gradient(view[None], y)) / views for x, y in rows for view in x)
    assert torch.allclose(once, each) == (views == 1)
    for engine in (*ENGINES, Auto(), Vmap(microbatch=2), BookKeeping(microbatch=1), Ghost(microbatch=3)):
        out = bounded(engine, rule, batch.x, y=batch.y, model=model, w=w, loss=loss)
        assert torch.allclose(out.releases["grad"].value.flat, once, rtol=1e-9, atol=1e-13), engine
        assert out.observed.losses.shape == (5,) and len(out.observed.norms) == 5
        empty = loss.prepare(Batch(data.x[:0], data.y[:0]), Stream(4, "views", 0))
        assert empty.x.shape == (0, *batch.x.shape[1:])
        none = bounded(engine, rule, empty.x, y=empty.y, model=model, w=w, loss=loss)
        assert not none.releases["grad"].value.flat.any()


def test_evaluation_sees_no_views():
    model, data = checks.toy_model(), checks.Toy()
    w = Tree.of(trainable(model))
    assert evaluate(model, w, Views(pad=3), data) == evaluate(model, w, CrossEntropy(), data)


def test_training_draws_other_views_each_step_and_the_same_ones_again():
    seen = []

    class Watched(Vmap):
        def bounded(self, loss, clip, model, w, batch, *rest):
            seen.append(batch.x)
            return super().bounded(loss, clip, model, w, batch, *rest)

    s = checks.Subject(Method(loss=Views(views=2, pad=1), engine=Watched()), checks.toy_model(), checks.Toy())
    first, second = s.run().w, s.run().w
    assert torch.equal(first.flat, second.flat)
    assert all(x.shape[1:] == (2, 1, 6, 6) for x in seen)
    other = replace(s, method=replace(s.method, loss=Views(views=2, pad=0, flip=False)))
    assert not torch.equal(other.run().w.flat, first.flat)
