"""Methods for a last layer: how far their releases move, what they cost, and what they solve."""

import copy
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm
from torch import nn

from harness import models, registry
from harness.bench import last_layer as bench
from harness.dp import (
    SGD,
    Batch,
    BookKeeping,
    CrossEntropy,
    Flat,
    Full,
    Gaussian,
    LeastSquares,
    Loop,
    Method,
    Moments,
    NoNoise,
    Preconditioned,
    Relation,
    Sigmoid,
    Squares,
    Tree,
    Unclipped,
    Views,
    WithGram,
)
from harness.dp.account import epsilon
from harness.dp.calibrate import calibrate
from harness.dp.optimizer.symmetric import packed, projected, unpacked
from harness.dp.random import Stream
from harness.registry import parts
from harness.running.train import Schedule, Streams, start, step, train
from harness.verify import conformance as checks

DELTA = 1e-6
TRANSFER = ("one-step-last-layer", "dp-fc", "dp-ls")


def method(name, **options):
    return registry.load(registry.resolve("method", name))(**options)


def head(width, classes, bias=True):
    return models.build(f"linear-head?bias={str(bias).lower()}", (width,), classes, 0).double()


def released(m, model, batch, relation=Relation.ADD_OR_REMOVE, number=0, w=None):
    w = start(m, model, 1).w if w is None else w
    return m.engine.bounded(m.loss, m.clip, model, w, batch, None, 1.5, relation, number).releases


def moved(ours, theirs):
    """How far each release lies from its like, in units of its sensitivity."""
    assert ours.keys() == theirs.keys()
    assert all(ours[name][1:] == theirs[name][1:] for name in ours)
    return {name: float((r.value - theirs[name].value).norm()) / r.sensitivity for name, r in ours.items()}


# --- sensitivity ---


@st.composite
def neighbourhoods(draw):
    """Features [B, D] of norms from far below the radius to far above, perhaps one not finite, and a replacement."""
    width, classes, count = draw(st.integers(1, 4)), draw(st.integers(2, 3)), draw(st.integers(1, 5))
    numbers = st.floats(-1, 1, allow_subnormal=False)
    rows = draw(st.lists(st.lists(numbers, min_size=width, max_size=width), min_size=count + 1, max_size=count + 1))
    x = torch.tensor(rows, dtype=torch.float64)
    x *= torch.tensor(draw(st.lists(st.sampled_from((1e-9, 1.0, 1e9)), min_size=count + 1, max_size=count + 1)))[
        :, None
    ]
    if draw(st.booleans()):
        x[draw(st.integers(0, count)), 0] = draw(st.sampled_from((math.inf, -math.inf, math.nan)))
    y = torch.tensor(draw(st.lists(st.integers(0, classes - 1), min_size=count + 1, max_size=count + 1)))
    return x, y, classes, draw(st.booleans()), draw(st.sampled_from((0.3, 1.0, 20.0)))


@settings(max_examples=48)
@given(neighbourhoods(), st.sampled_from(("dp-fc", "dp-ls")))
def test_no_neighbour_moves_a_release_by_more_than_its_sensitivity(neighbourhood, name):
    x, y, classes, bias, radius = neighbourhood
    m, model = method(name, radius=radius), head(x.shape[1], classes, bias)
    whole, fewer, other = Batch(x[:-1], y[:-1]), Batch(x[1:-1], y[1:-1]), Batch(x[1:], y[1:])
    ours = released(m, model, whole)
    assert set(ours) == {"grad", "gram"} | ({"class_gram"} if name == "dp-ls" else set())
    assert all(r.value.flat.isfinite().all() for r in ours.values())
    assert max(moved(ours, released(m, model, fewer)).values()) <= 1 + 1e-9
    replaced = [released(m, model, batch, Relation.REPLACE_ONE) for batch in (whole, other)]
    assert max(moved(*replaced).values()) <= 1 + 1e-9


@pytest.mark.parametrize("first", [True, False])
def test_one_row_more_moves_a_sum_of_many_by_no_more_in_float32(first):
    """A float32 sum of 30,000 squares moves by more, since a row more shifts where it is rounded."""
    g = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.rand(30_000, 16, generator=g) + 1, dim=1)
    y = torch.zeros(len(x), dtype=torch.long)
    batches = (x[1:], x) if first else (x[:-1], x)
    model, m = head(16, 2, bias=False).float(), method("dp-ls")
    ours, theirs = (released(m, model, Batch(part, y[: len(part)])) for part in batches)
    for name, r in ours.items():
        change = (r.value.flat - theirs[name].value.flat).double().norm()
        assert float(change) <= r.sensitivity * (1 + 1e-6), name


def test_the_sensitivities_are_attained():
    model, m, eye = head(2, 2, bias=False), method("dp-ls", radius=3.0), 7 * torch.eye(2, dtype=torch.float64)

    def of(feature, label, relation=Relation.REPLACE_ONE):
        return released(m, model, Batch(feature[None], torch.tensor([label])), relation)

    none = released(m, model, Batch(eye[:0], torch.tensor([], dtype=torch.long)))
    alone = moved(of(eye[0], 0, Relation.ADD_OR_REMOVE), none)
    assert alone == pytest.approx({"grad": 1, "gram": 1, "class_gram": 1})
    opposite = moved(of(eye[0], 0), of(-eye[0], 0))
    assert opposite == pytest.approx({"grad": 1, "gram": 0, "class_gram": 0})
    across = moved(of(eye[0], 0), of(eye[1], 0))
    assert across == pytest.approx({"grad": 0.5**0.5, "gram": 1, "class_gram": 1})
    relabelled = moved(of(eye[0], 0), of(eye[0], 1))
    assert relabelled == pytest.approx({"grad": 0.5**0.5, "gram": 0, "class_gram": 1})


@pytest.mark.parametrize("bias", [True, False])
def test_the_first_gradient_is_as_long_as_the_one_step_method_assumes(bias):
    """sqrt(1 - 1/K) |[f; 1]| for softmax at zero, exactly: no unit feature is clipped, and the bound is attained."""
    m, model = method("one-step-last-layer", classes=7, bias=bias), head(5, 7, bias)
    x = nn.functional.normalize(torch.randn(20, 5, dtype=torch.float64))
    batch, w = Batch(x, torch.arange(20) % 7), start(m, model, 1).w
    observed = Loop().bounded(m.loss, m.clip, model, w, batch, None, 1.0, Relation.ADD_OR_REMOVE).observed
    assert not observed.clipped
    assert torch.allclose(observed.norms, torch.tensor(m.clip.clip).double(), rtol=2e-6)


# --- what is released ---


def toy(count=40, width=4, classes=3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % classes
    x = 0.3 * torch.randn(count, width, generator=rng, dtype=torch.float64)
    x[:, :classes] += 0.5 * nn.functional.one_hot(y, classes)
    return Batch(x, y)


@pytest.mark.parametrize("bias", [True, False])
def test_moments_are_the_derivatives_of_their_loss_at_zero(bias):
    batch, model, m = toy(), head(4, 3, bias), method("dp-ls", radius=10.0, alpha=0.7)
    found, w = released(m, model, batch), start(m, model, 1).w

    def loss(flat):
        return m.loss.of(lambda x: torch.func.functional_call(model, w.with_flat(flat).views, (x,)), batch).sum()

    grad = torch.func.grad(loss)(w.flat)
    assert torch.allclose(found["grad"].value.flat, grad)
    hessian = torch.func.hessian(loss)(w.flat)
    columns = [i * 4 + j for i in (1,) for j in range(4)] + ([12 + 1] if bias else [])  # of class 1
    ours = unpacked(found["class_gram"].value["class_gram"][1]) + 0.7 * unpacked(found["gram"].value.flat)
    assert torch.allclose(ours, hessian[columns][:, columns])


def test_a_gram_matrix_comes_once_beside_the_gradient_of_another_engine():
    batch, model, m = toy(), head(4, 3), method("dp-fc", clip=0.5, radius=0.4)
    w = start(m, model, 1).w + 0.1
    first, later = (released(m, model, batch, number=t, w=w) for t in (0, 1))
    plain = released(dataclasses.replace(m, engine=BookKeeping()), model, batch, w=w)["grad"]
    assert set(later) == {"grad"} and set(first) == {"grad", "gram"}
    for found in (first, later):
        assert torch.equal(found["grad"].value.flat, plain.value.flat) and found["grad"][1:] == plain[1:]
    f = batch.x * (0.4 / batch.x.norm(dim=1, keepdim=True)).clamp(max=1)
    f = torch.cat([f, torch.ones(len(f), 1)], 1)
    assert torch.allclose(unpacked(first["gram"].value.flat), f.T @ f)


def test_moments_report_losses_and_counts_of_the_examples_they_saw():
    (x, y), model, m = toy(), head(4, 3), method("dp-ls", radius=0.4)
    x[3, 1] = math.nan
    w = start(m, model, 1).w + 0.1
    seen = m.engine.bounded(m.loss, m.clip, model, w, Batch(x, y), None, 1.0, Relation.ADD_OR_REMOVE).observed
    losses = m.loss.per_example(torch.func.functional_call(model, w.views, (x,)), y)
    assert torch.allclose(seen.losses, losses, equal_nan=True)
    assert int(seen.non_finite) == 1 and int(seen.clipped) == int((x.norm(dim=1) > 0.4).sum())


def test_sigmoid_cross_entropy_is_pytorchs_with_a_fixed_bias():
    outputs, y = 8 * torch.randn(30, 4, dtype=torch.float64), torch.arange(30) % 4
    ours = Sigmoid(-3.0).per_example(outputs, y)
    targets = nn.functional.one_hot(y, 4).double()
    theirs = nn.functional.binary_cross_entropy_with_logits(outputs - 3, targets, reduction="none").sum(1)
    assert torch.allclose(ours, theirs)


def test_pieces_of_a_batch_add_up_to_it():
    batch, model, m = toy(), head(4, 3), method("dp-ls", radius=0.4)
    small = dataclasses.replace(m, engine=Moments(0.4, microbatch=3))
    assert max(moved(released(m, model, batch), released(small, model, batch)).values()) < 1e-12


@pytest.mark.parametrize("name", ["dp-fc", "dp-ls"])
def test_an_empty_batch_releases_zeros_of_the_same_layout(name):
    batch, model, m = toy(), head(4, 3), method(name)
    empty = released(m, model, Batch(batch.x[:0], batch.y[:0]))
    for key, full in released(m, model, batch).items():
        assert empty[key].value.layout == full.value.layout and not empty[key].value.flat.any()
        assert empty[key].sensitivity == full.sensitivity


@given(st.integers(1, 6), st.integers(0, 99))
def test_a_packed_matrix_keeps_its_length_and_its_entries(side, seed):
    square = torch.randn(side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    square = square + square.T
    assert float(packed(square).norm()) == pytest.approx(float(square.norm()))
    assert torch.allclose(unpacked(packed(square)), square)
    nearest = projected(square)
    assert torch.linalg.eigvalsh(nearest).min() > -1e-9
    assert float(((nearest - square) @ nearest).norm()) < 1e-9  # what is taken off is orthogonal to what stays


def test_what_cannot_be_served_is_refused_with_the_reason():
    small, loss = head(4, 3), CrossEntropy()
    for engine, clip in ((Moments(), Unclipped()), (WithGram(), Flat())):
        assert engine.accepts(loss, clip, small) is None
        for more in (
            checks.toy_model(),
            nn.Sequential(nn.ReLU(), nn.Linear(4, 3)),
            nn.Linear(4, 3).requires_grad_(False),
        ):
            assert "one linear layer" in engine.accepts(loss, clip, more)
        assert "4 rows" in engine.accepts(Views(), clip, small)
    assert "Unclipped()" in Moments().accepts(loss, Flat(), small)
    with torch.device("meta"):
        large = nn.Linear(1280, 1000)
        assert "million numbers" in Moments().accepts(loss, Unclipped(), large)
        assert Moments().accepts(loss, Unclipped(), nn.Linear(1280, 100)) is None
    for optimizer, lacks in ((Preconditioned(), "WithGram"), (LeastSquares(), "Moments")):
        w = start(Method(), small, 1).w
        with pytest.raises(ValueError, match=lacks):
            optimizer.update(w, optimizer.init(w, 1), w)
    with pytest.raises(ValueError, match="linear head"):
        Preconditioned().update(Tree.of({"a": torch.zeros(2, 2, 2)}), {"values": w.flat, "vectors": w.flat}, w)


# --- accounting ---


@pytest.mark.parametrize(("target", "sigma"), [(4, 1.194), (8, 0.653), (10, 0.541)])
@pytest.mark.parametrize("name", ["one-step-last-layer", "dp-ls"])
def test_one_full_step_is_one_gaussian(name, target, sigma):
    """The analytic Gaussian mechanism's multipliers (Balle and Wang, arXiv:1805.06083) at delta = 1e-6."""
    found = calibrate(method(name), 1_281_167, 1_281_167, 1, target, DELTA)
    assert found == pytest.approx(sigma, abs=1e-3)


def analytic(mu):
    """Epsilon at DELTA of Gaussian differential privacy mu (Balle and Wang, theorem 8; arXiv:1905.02383)."""

    def delta(eps):
        return norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu)

    return brentq(lambda eps: delta(eps) - DELTA, 1e-6, 200)


class Data(SimpleNamespace):
    def batch(self, indices, split="train"):
        return self.x[indices], self.y[indices]


def trained(m, model, batch, steps, sigma=2.0):
    data = Data(x=batch.x, y=batch.y, n_train=len(batch), n_test=len(batch))
    seeds = SimpleNamespace(sampling=1, noise=2, path=3)
    return train(m, model, data, sigma, Schedule(steps, 10, steps), seeds, start(m, model, steps))


@pytest.mark.parametrize("gram_noise", [1.0, 0.5])
def test_the_gram_matrix_is_billed_once(gram_noise):
    sigma, steps = 6.0, 9
    m = method("dp-fc", gram_noise=gram_noise)
    plan = m.plan(sigma, 40, 10, steps)
    assert trained(m, head(4, 3), toy(), steps, sigma).ledger == plan
    first = (sigma**-2 + (gram_noise * sigma) ** -2) ** -0.5
    assert [count for _, count in plan] == [1, steps - 1]
    assert plan.entries[0][0].noise_multiplier == pytest.approx(first)
    assert plan.entries[1][0] == GaussianDpEvent(sigma)
    mu = math.sqrt(1 / (gram_noise * sigma) ** 2 + steps / sigma**2)
    assert epsilon(plan, DELTA, Relation.ADD_OR_REMOVE, "pld") == pytest.approx(analytic(mu), rel=1e-2)


def test_three_moments_cost_as_much_as_one_gaussian():
    m, sigma = method("dp-ls"), 1.3
    multipliers = [r.sigma for r in released(m, head(4, 3), toy()).values()]
    assert multipliers == [pytest.approx(1.5 * 3**0.5)] * 3
    assert m.plan(sigma, 40, 40, 1).entries[0][0].noise_multiplier == pytest.approx(sigma)


@dataclasses.dataclass(frozen=True)
class OneRowForAllClasses(Gaussian):
    """Draws noise for one class, and adds it to every class."""

    def add(self, release, rng):
        rows = [t.shape[0] if t.ndim == 2 else 1 for _, t in release.value.items()]
        noise = [
            rng.normal(t.numel() // count, torch.float64).repeat(count)
            for count, (_, t) in zip(rows, release.value.items(), strict=True)
        ]
        return release.value.with_flat(release.value.flat + release.sigma * release.sensitivity * torch.cat(noise))


@dataclasses.dataclass(frozen=True)
class OneKeyForAllReleases(Gaussian):
    """Draws every release of a step from the beginning of one stream."""

    def add(self, release, rng):
        return super().add(release, copy.copy(rng))


@pytest.mark.parametrize("name", ["dp-fc", "dp-ls"])
def test_noise_is_independent_across_classes_releases_and_steps(name):
    def subject(m):
        return checks.Subject(m, head(3, 3), checks.Toy(shape=(3,)))

    m = method(name)
    checks.noised(subject(m))
    checks.independent(subject(m))
    for fault in (OneRowForAllClasses(), OneKeyForAllReleases()):
        with pytest.raises(checks.Violation, match="correlated"):
            checks.independent(subject(dataclasses.replace(m, noise=fault)))


# --- what is solved ---


@pytest.mark.parametrize("bias", [True, False])
def test_least_squares_is_the_closed_form(bias):
    """(sum_{y=l} f f^T + alpha sum f f^T + n reg I) theta_l = sum_{y=l} f, by NumPy."""
    batch, alpha, reg = toy(), 0.7, 1e-2
    m, model = method("dp-ls", radius=10.0, alpha=alpha, reg=reg), head(4, 3, bias)
    once, often = (trained(m, model, batch, steps, sigma=1e-10).w for steps in (1, 3))
    f, y = batch.x.numpy(), batch.y.numpy()
    if bias:
        f = np.concatenate([f, np.ones((len(f), 1))], 1)
    for label in range(3):
        own = f[y == label]
        left = own.T @ own + alpha * f.T @ f + len(f) * reg * np.eye(f.shape[1])
        theta = np.linalg.solve(left, own.sum(0))
        for w in (once, often):
            found = np.append(w["1.weight"][label].numpy(), w["1.bias"][label].numpy() if bias else [])
            assert found == pytest.approx(theta, rel=1e-6, abs=1e-8)


def test_moments_of_several_steps_are_averaged():
    m, model, batch = method("dp-ls"), head(4, 3), toy()
    seen, state = [], m.optimizer.init(start(m, model, 1).w, 3)
    for t in range(3):
        public = {name: m.noise.add(r, Stream(t, name, t)) / 40 for name, r in released(m, model, batch).items()}
        seen.append(dict(public))
        g = public.pop("grad")
        w, state = m.optimizer.update(g, m.optimizer.receive(state, public, {}), g)
    mean = {name: sum((one[name] for one in seen[1:]), seen[0][name]) / 3 for name in seen[0]}
    g = mean.pop("grad")
    alone = m.optimizer.init(g, 1)
    again, _ = m.optimizer.update(g, m.optimizer.receive(alone, mean, {}), g)
    assert torch.allclose(w.flat, again.flat)


def ill_conditioned():
    rng = torch.Generator().manual_seed(5)
    x = torch.randn(60, 5, generator=rng, dtype=torch.float64) * torch.logspace(0, -2, 5, dtype=torch.float64)
    return Batch(x, (x @ torch.logspace(0, 2, 5, dtype=torch.float64) > 0).long())


def test_preconditioning_solves_what_gradient_descent_does_not():
    """On features of very different lengths, in ten steps, against the best of many learning rates."""
    batch, model, loss = ill_conditioned(), head(5, 2), Squares(0.5)

    def reached(engine, optimizer):
        m = Method(loss=loss, engine=engine, clip=Flat(1e6), noise=NoNoise(), sampler=Full(), optimizer=optimizer)
        w = trained(m, model, batch, 10).w
        return float(loss.of(lambda x: torch.func.functional_call(model, w.views, (x,)), batch).mean())

    steps = [reached(BookKeeping(), SGD(lr)) for lr in (0.1, 0.3, 0.5, 0.7, 1.0)]
    ours = reached(WithGram(radius=1e6), Preconditioned(lr=1.0, reg=1e-9))
    best = trained(method("dp-ls", radius=1e6, alpha=0.5, reg=1e-12), model, batch, 1, sigma=1e-20).w
    least = float(loss.of(lambda x: torch.func.functional_call(model, best.views, (x,)), batch).mean())
    assert ours - least < 0.02 * (min(steps) - least)


def test_a_preconditioned_step_is_a_solve():
    rng = torch.Generator().manual_seed(3)
    noisy = torch.randn(5, 5, generator=rng, dtype=torch.float64)
    noisy = noisy + noisy.T  # as released: not positive semi-definite
    w = Tree.of(dict(head(4, 3).named_parameters()))
    g = w.with_flat(torch.randn(w.layout.numel, generator=rng, dtype=torch.float64))
    optimizer = Preconditioned(lr=0.3, reg=0.2)
    state = optimizer.receive(None, {"gram": Tree.of({"gram": packed(noisy)})}, {})
    new, after = optimizer.update(g, state, w)
    assert optimizer.receive(after, {}, {}) is after
    rows = torch.cat([g["1.weight"], g["1.bias"][:, None]], 1)
    system = projected(noisy) + 0.2 * torch.eye(5)
    expected = -0.3 * torch.linalg.solve(system, rows.T).T
    assert torch.allclose(torch.cat([new["1.weight"], new["1.bias"][:, None]], 1), expected)


@pytest.mark.parametrize("name", [*TRANSFER, "dp-sgd", "dp-adam", "dp-lamb"])
def test_methods_learn_from_the_whole_data_at_once(name):
    m = method(name) if name in TRANSFER else parts.combine(method(name), {"sampler": "full"})
    batch, model = toy(300), head(4, 3)
    end = trained(m, model, batch, 20, sigma=0.3)
    assert end.ledger == m.plan(0.3, 300, 10, 20)
    assert all(isinstance(event, GaussianDpEvent) for event, _ in end.ledger)  # and none is amplified
    outputs = torch.func.functional_call(model, end.w.views, (batch.x,))
    assert float((outputs.argmax(1) == batch.y).double().mean()) > 0.6


# --- the benchmark ---


def test_the_benchmarked_step_is_the_one_of_training(tmp_path):
    file = tmp_path / "features"
    bench.write_features(file, 300, 6)
    x, y = bench.mapped(file, 300, 6), torch.arange(300) % 4
    assert torch.allclose(x.norm(dim=1), torch.ones(300))
    m = method("one-step-last-layer", classes=4)
    cost = bench.one_step(m, x, y, 4)
    assert (cost.rows, cost.microbatch) == (300, 300) and cost.seconds > 0 and cost.worked > 0
    limits = bench.Floor(1e9, 1e10)
    assert limits.seconds(1000, 500, 100) == pytest.approx((0.1, 4e-4))
    lines = bench.report([cost], limits, 6, 4).splitlines()
    assert len(lines) == 3 and lines[2].startswith("| 300 |")
    model = models.build("linear-head", (6,), 4, 0)
    begun, streams = start(m, model, 1), Streams(Stream(1, "noise", 0), Stream(1, "path", 0))
    ends = [
        step(m, model, begun.w, Batch(rows, y), begun.parts, 1.0, 300, copy.deepcopy(streams)).w.flat
        for rows in (x, x.clone())
    ]
    assert torch.equal(*ends)
