"""Logit-DP: the clipped sum over pairs, its sensitivity, and the controls it is compared with."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SampledWithoutReplacementDpEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from harness import registry
from harness.dp import (
    Batch,
    CrossEntropy,
    Flat,
    GroupWise,
    InfoNCE,
    Method,
    Pairs,
    Quantile,
    Relation,
    Release,
    Rotations,
    Tree,
    Unclipped,
    Whole,
)
from harness.dp.engines.engine import Unserved, trainable
from harness.dp.engines.jacobians import Factors, energies, forward, jacobians
from harness.dp.engines.pairs import add_factors, pair_squares, safe_norms, sensitivity
from harness.dp.loss.contrast import probe, unit
from harness.dp.random import Stream
from harness.running.train import Schedule, start, train

ADD, REPLACE = Relation.ADD_OR_REMOVE, Relation.REPLACE_ONE
TEMPERATURES = (1.0, 0.5, 0.2, 0.1)


def released(x: Tensor, model: nn.Module, clip: Any, tau: float = 0.5, relation: Relation = ADD, **pairs: Any) -> Any:
    """The release "grad" of pairs of views [n, 2, ...]."""
    batch, w, loss = Batch(x, torch.zeros(len(x))), Tree.of(trainable(model)), InfoNCE(tau)
    return Pairs(**pairs).bounded(loss, clip, model, w, batch, None, 1.0, relation)


def flat(found: Any) -> Tensor:
    value: Tensor = found.releases["grad"].value.flat
    return value


# --- the sum, against the double loop ---


class Tied(nn.Module):
    """One weight in two layers and, by hand, a third time."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(torch.tanh(self.b(torch.tanh(self.a(x))) @ self.a.weight))
        return out


class Twice(nn.Module):
    """A layer called twice, a parameter of no layer, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 5), nn.Linear(5, 3)
        self.scale, self.idle = nn.Parameter(torch.rand(5) + 0.5), nn.Parameter(torch.rand(2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.outer(self.inner(torch.tanh(self.inner(x) * self.scale)))
        return out


class Words(nn.Module):
    """An embedding of words, attention and a mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(7, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x)
        out: Tensor = self.out(torch.tanh(self.norm(h + self.mix(h, h, h, need_weights=False)[0]))).mean(1)
        return out


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5, bias=False), nn.Tanh(), nn.Linear(5, 2))
    model.get_parameter("2.weight").requires_grad_(False)
    return model


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.Conv2d(4, 6, 2, groups=2, dilation=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(6, 3, 4),
        nn.Flatten(),
    )


def lines() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 3, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 1))


ZOO = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (6,)),
    "tied": (Tied, (6,)),
    "twice": (Twice, (5,)),
    "frozen": (frozen, (6,)),
    "images": (images, (2, 8, 8)),
    "one wide": (lines, (2, 9)),
    "positions": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (5, 3)),
    "words": (Words, (4,)),
}


def member(name: str, n: int = 5, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A model of the zoo, and pairs of views for it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        build, shape = ZOO[name]
        model = build().to(dtype)
        x = torch.randint(7, (n, 2, *shape)) if name == "words" else torch.randn(n, 2, *shape).to(dtype)
    return model, x


def one_by_one(model: nn.Module, x: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """The gradients [n, n, P] of all Z_ij, each by its own backward pass, and Z."""
    leaves = {name: t.detach().requires_grad_() for name, t in Tree.of(trainable(model)).items()}
    units = unit(functional_call(model, leaves, (x.flatten(0, 1),)))
    z, given = units[0::2] @ units[1::2].T / tau, list(leaves.values())

    def one(value: Tensor) -> Tensor:
        g = torch.autograd.grad(value, given, retain_graph=True, allow_unused=True, materialize_grads=True)
        return torch.cat([t.reshape(-1) for t in g])

    return torch.stack([torch.stack([one(value) for value in row]) for row in z]), z.detach()


def recombined(z: Tensor, g: Tensor) -> Tensor:
    """sum_ij (softmax_j(Z_ij) - [i = j]) g_ij of Z [n, n] and g [n, n, P]."""
    return torch.einsum("ij,ijp->p", z.softmax(1) - torch.eye(len(z), dtype=z.dtype), g)


def measured(model: nn.Module, w: Tree, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms of pairs and rows, at temperature 0.5."""
    done = forward(model, w, rows)
    return pair_squares(jacobians(done, model, w, rows), done.units.detach(), 0.5)


@pytest.mark.parametrize("name", ZOO)
def test_equals_the_double_loop(name: str) -> None:
    model, x = member(name)
    g, z = one_by_one(model, x, 0.5)
    norms = g.norm(dim=2)
    w = Tree.of(trainable(model))
    squares, energy = measured(model, w, x.flatten(0, 1))
    read, terms = safe_norms(squares, energy, 5), energy[0::2, None] + energy[None, 1::2]
    assert (read >= norms * (1 - 1e-12)).all()  # low is a breach; high, where terms cancel, is a loss
    assert (read.square() <= norms.square() * (1 + 1e-9) + 1e-13 * terms).all()
    scale = float(norms.median()) + 2e-6
    middle = float(norms.flatten().sort().values[len(norms) ** 2 // 2]) + 2e-6
    for bound in (min(1e5 * scale, 1e6), middle * (1 + 1e-12), middle * (1 - 1e-12), 0.6 * middle):
        clipped = g * (bound / norms.clamp(min=1e-300)).clamp(max=1)[:, :, None]
        expected = recombined(z, clipped)
        found = flat(released(x, model, Flat(bound)))
        assert (found - expected).norm() <= 1e-9 * (expected.norm() + bound * (scale < 1e-8))


def test_without_clipping_it_is_the_gradient_of_the_loss() -> None:
    model, x = member("images")
    loss, batch = InfoNCE(0.3), Batch(x, torch.zeros(5))
    grads = torch.autograd.grad(loss.of(model, batch).sum(), list(model.parameters()))
    torch.testing.assert_close(
        flat(released(x, model, Unclipped(), 0.3)), torch.cat([g.reshape(-1) for g in grads]), rtol=1e-9, atol=1e-12
    )
    observed = released(x, model, Unclipped(), 0.3).observed
    torch.testing.assert_close(observed.losses, loss.of(model, batch).detach())
    units = unit(model(x.flatten(0, 1))).detach()
    z = (units[0::2] @ units[1::2].T / 0.3).exp()
    torch.testing.assert_close(observed.losses, -(z.diagonal() / z.sum(1)).log())


@pytest.mark.parametrize("name", ["mlp", "images", "positions"])
def test_float32_norms_do_not_read_low(name: str) -> None:
    """Views that differ by little: the two halves of a pair's gradient cancel, and float32 keeps little of the rest."""
    model, x = member(name)
    x = x[:1].expand_as(x) + torch.logspace(-1, -6, 10, dtype=torch.float64).view(5, 2, *[1] * (x.ndim - 2)) * x
    true = one_by_one(model, x, 0.5)[0].norm(dim=2)
    single, rows = model.float(), x.float().flatten(0, 1)
    w = Tree.of(trainable(single))
    read = safe_norms(*measured(single, w, rows), 5)
    again = one_by_one(single.double(), x.float().double(), 0.5)[0].norm(dim=2)
    assert (read >= again * (1 - 1e-6)).all()
    assert (read <= true * 1.01 + 1e-4 * true.max()).all()


@pytest.mark.parametrize("apart", [1e-3, 1e-6, 1e-9, 0.0])
def test_norms_from_products_do_not_read_low(apart: float) -> None:
    """f a^T - f a^T (1 + apart): the squared norm is apart^2 of its terms, of which float64 keeps sixteen digits."""
    rng = torch.Generator().manual_seed(1)
    for _ in range(20):
        f, a = (torch.randn(9, generator=rng, dtype=torch.float64) for _ in range(2))
        piece = Factors(torch.stack([a, -a * (1 + apart)]), f.expand(2, 9)[:, :, None])
        squares = torch.zeros(1, 1, dtype=torch.float64)
        add_factors(squares, piece, torch.ones(2, 1, dtype=torch.float64))
        read = float(safe_norms(squares, energies(piece), 1))
        true = float((a - a * (1 + apart)).norm() * f.norm())
        assert true <= read <= true * (1 + 1e-6) + 1e-6 * float(a.norm() * f.norm())


# --- how far one example moves it ---


class Scene:
    """Arbitrary logits in [-s, s] and gradients of norm at most 1: n examples, and one more that comes or changes."""

    def __init__(self, n: int, tau: float, seed: int, extreme: bool) -> None:
        rng = torch.Generator().manual_seed(seed)

        def numbers(*shape: int) -> Tensor:
            return 2 * torch.rand(*shape, generator=rng, dtype=torch.float64) - 1

        self.z, self.g = numbers(n + 1, n + 1) / tau, numbers(n + 1, n + 1, 3)
        if extreme:  # corners: logits at the ends of their range, gradients along one line
            self.z, self.g = self.z.sign() / tau, self.g.sign() * torch.eye(3, dtype=torch.float64)[0]
        self.g /= self.g.norm(dim=2, keepdim=True).clamp(min=1)

    def of(self, chosen: list[int]) -> Tensor:
        at = torch.tensor(chosen, dtype=torch.long)
        return recombined(self.z[at][:, at], self.g[at][:, at])


@settings(max_examples=120)
@given(st.integers(1, 12), st.sampled_from(TEMPERATURES), st.integers(0, 2**32), st.booleans())
def test_no_example_moves_the_sum_further(n: int, tau: float, seed: int, extreme: bool) -> None:
    scene = Scene(n, tau, seed, extreme)
    others = list(range(n - 1))
    here, gone, other = scene.of([*others, n - 1]), scene.of(others), scene.of([*others, n])
    slack = 1 + 1e-9
    assert (here - gone).norm() <= sensitivity(1.0, tau, ADD, n) * slack
    assert (here - gone).norm() <= sensitivity(1.0, tau, ADD) * slack
    assert (here - other).norm() <= sensitivity(1.0, tau, REPLACE, n) * slack
    assert (here - other).norm() <= sensitivity(1.0, tau, REPLACE) * slack


def worst(n: int, tau: float) -> Scene:
    """Examples 0 to n-2, and example n-1 that moves their sum as far as can be, or n that does so the other way."""
    scene = Scene(n, tau, 0, True)
    s, line = 1 / tau, torch.eye(3, dtype=torch.float64)[0]
    scene.z, scene.g = torch.full_like(scene.z, -s), -line.expand_as(scene.g).clone()
    for last, sign in ((n - 1, 1.0), (n, -1.0)):
        scene.z[: n - 1, last], scene.z[last, : n - 1] = s, s
        scene.g[: n - 1, last], scene.g[last, : n - 1], scene.g[last, last] = (sign * line, sign * line, -sign * line)
    return scene


@pytest.mark.parametrize("tau", TEMPERATURES)
@pytest.mark.parametrize("n", [2, 3, 12, 60])
def test_the_bound_is_attained(n: int, tau: float) -> None:
    scene, others = worst(n, tau), list(range(n - 1))
    here, gone, other = scene.of([*others, n - 1]), scene.of(others), scene.of([*others, n])
    assert float((here - gone).norm()) == pytest.approx(sensitivity(1.0, tau, ADD, n), rel=1e-9)
    assert float((here - other).norm()) == pytest.approx(sensitivity(1.0, tau, REPLACE, n), rel=1e-9)


def test_sensitivities_have_the_values_of_the_formula() -> None:
    """By hand at n = 1000, temperature 1 (e^2 = 7.389): 2 (1 + 999 * 7.389 / (7.389 + 999)), to 1e-4."""
    assert sensitivity(1.0, 1.0, ADD, 1000) == pytest.approx(16.6694, abs=2e-3)
    assert sensitivity(1.0, 1.0, REPLACE, 1000) == pytest.approx(18.6694, abs=2e-3)
    assert sensitivity(3.0, 1.0, ADD) == pytest.approx(6 * (1 + math.e**2))
    assert sensitivity(3.0, 1.0, REPLACE) == pytest.approx(6 * (2 + math.e**2))
    assert sensitivity(1.0, 1e-4, ADD) == math.inf
    assert sensitivity(1.0, 1e-4, ADD, 50) == pytest.approx(100, rel=0.03)
    for relation in Relation:
        sizes = [sensitivity(1.0, 0.5, relation, n) for n in range(1, 400)]
        assert sizes == sorted(sizes) and sizes[-1] < sensitivity(1.0, 0.5, relation)
        assert sizes[0] > 0


def placed(n: int, last: tuple[float, float] | None) -> tuple[nn.Module, Tensor]:
    """A model of two inputs and two outputs, the identity, and views at angles where one example does its worst.

    First views lie at 1e-6 from the origin, so that their gradients by the bias are huge and point up or down as the
    other view lies to the left or to the right; logits are within 1e-5 of the ends of their range. `last` are the
    angles of the last example's two views.
    """
    model = nn.Linear(2, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
        model.bias.zero_()
    angles = [(0.0, math.pi + STEP)] * (n - 1) + ([] if last is None else [last])
    at = torch.tensor(angles, dtype=torch.float64)
    return model, torch.stack([at.cos(), at.sin()], 2) * torch.tensor([1e-6, 1.0], dtype=torch.float64)[:, None]


STEP = 1e-3
UP, DOWN = (math.pi + 2 * STEP, STEP), (math.pi - 2 * STEP, -STEP)


@pytest.mark.parametrize("tau", [1.0, 0.5, 0.2])
@pytest.mark.parametrize("n", [2, 5, 30])
@pytest.mark.parametrize("bound", [1.0, 0.01])
def test_the_engine_attains_its_sensitivity(n: int, tau: float, bound: float) -> None:
    """So a factor that the sensitivity lacked, the temperature's above all, would show as a sum that moves too far."""
    (model, up), (_, down), (_, gone) = placed(n, UP), placed(n, DOWN), placed(n, None)
    up_, down_ = (released(x, model, Flat(bound), tau, REPLACE) for x in (up, down))
    moved, allowed = float((flat(up_) - flat(down_)).norm()), up_.releases["grad"].sensitivity
    assert 0.99 * allowed < moved <= allowed * (1 + 1e-6)
    here, gone_ = (flat(released(x, model, Flat(bound), tau)) for x in (up, gone))
    allowed = sensitivity(bound, tau, ADD, n)
    assert 0.99 * allowed < float((here - gone_).norm()) <= allowed * (1 + 1e-6)
    assert released(up, model, Flat(bound), tau).releases["grad"].sensitivity == sensitivity(bound, tau, ADD)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["mlp", "images", "tied"]),
    st.sampled_from(TEMPERATURES),
    st.sampled_from([1e-3, 1.0]),
    st.sampled_from([0.0, 1e-3, 1.0, 1e4]),
    st.integers(0, 5),
)
def test_neighbours(name: str, tau: float, bound: float, spread: float, chosen: int) -> None:
    model, x = member(name, 7)
    x[:6] = x[:1] + spread * x[:6]
    keep = torch.arange(6) != chosen
    swapped = x[:6].clone()
    swapped[chosen] = -x[6]
    here = released(x[:6], model, Flat(bound), tau)
    for other in (x[:6][keep], x[:6]):
        there = released(other, model, Flat(bound), tau)
        assert there.releases["grad"].sensitivity == here.releases["grad"].sensitivity
    gone = flat(released(x[:6][keep], model, Flat(bound), tau))
    assert (flat(here) - gone).norm() <= sensitivity(bound, tau, ADD, 6) * (1 + 1e-6)
    replaced = released(swapped, model, Flat(bound), tau, REPLACE)
    moved = (flat(here) - flat(replaced)).norm()
    assert moved <= replaced.releases["grad"].sensitivity * (1 + 1e-6)


@pytest.mark.parametrize("place", range(6))
def test_a_cap_makes_an_addition_a_replacement(place: int) -> None:
    model, x = placed(5, UP)
    x = torch.cat([x, placed(1, DOWN)[1]])
    joined = torch.cat([x[:place], placed(1, UP)[1], x[place:]])
    ours, theirs = (released(rows, model, Flat(1.0), 0.2, cap=5) for rows in (x, joined))
    allowed = ours.releases["grad"].sensitivity
    assert allowed == theirs.releases["grad"].sensitivity == sensitivity(1.0, 0.2, REPLACE, 5)
    assert (flat(ours) - flat(theirs)).norm() <= allowed * (1 + 1e-6)
    assert torch.equal(flat(ours), flat(released(x[:5], model, Flat(1.0), 0.2)))


def test_a_cap_is_needed_where_a_batch_may_grow() -> None:
    """The last of five is pushed out for its opposite: more than an addition to five would do."""
    model, x = placed(5, DOWN)
    joined = torch.cat([x[:4], placed(1, UP)[1], x[4:]])
    ours, theirs = (flat(released(rows, model, Flat(1.0), 0.5, cap=5)) for rows in (x, joined))
    assert (ours - theirs).norm() > 1.05 * sensitivity(1.0, 0.5, ADD, 5)


# --- edges ---


def test_no_example_and_one_example_give_zero() -> None:
    model, x = member("images")
    for n in (0, 1):
        for relation in Relation:
            found = released(x[:n], model, Flat(1.0), relation=relation)
            assert not flat(found).any() and 0 < found.releases["grad"].sensitivity < math.inf
    loss, w = InfoNCE(), Tree.of(trainable(model))
    found = Whole().bounded(loss, Flat(1.0), model, w, Batch(x[:0], torch.zeros(0)), None, 1.0, ADD)
    assert not flat(found).any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_example_that_is_not_finite_is_as_if_absent(value: float, view: int, dtype: torch.dtype) -> None:
    model, x = member("mlp", 5, dtype)
    x[2, view, 0] = value
    found = released(x, model, Flat(0.1))
    assert torch.equal(flat(found), flat(released(x[[0, 1, 3, 4]], model, Flat(0.1))))
    assert flat(found).any() and int(found.observed.non_finite) == 1


def test_an_example_whose_gradient_is_huge_is_as_if_absent() -> None:
    """An ordinary embedding, and a gradient of 1e20 by the first weight: in float32 its square would overflow."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        first, x = nn.Linear(2, 3), torch.randn(5, 2, 2)
        model = nn.Sequential(first, nn.Tanh(), nn.Linear(3, 2))
        first.weight[:, 0], x[0, :, 0] = 1e-20, 1e20
    found = released(x, model, Flat(0.1))
    assert torch.equal(flat(found), flat(released(x[1:], model, Flat(0.1))))
    assert flat(found).any() and int(found.observed.non_finite) == 1


# --- what it refuses ---


def test_refusals() -> None:
    model = images()
    loss = InfoNCE()
    for engine in (Pairs(), Whole()):
        assert engine.accepts(loss, Flat(1.0), model) is None
        assert "group" in str(engine.accepts(loss, GroupWise(), model))
        assert engine.accepts(loss, Quantile(1.0, by="flat", quantile=0.5, rate=0.2, count_noise=20.0), model)
    assert "InfoNCE" in str(Pairs().accepts(CrossEntropy(), Flat(1.0), model))
    assert "0.262 times" in str(Pairs().note(InfoNCE(1.0), Flat(1.0), 32, ADD))
    with pytest.raises(ValueError, match="temperature"):
        InfoNCE(0.0)
    with pytest.raises(ValueError, match="cap"):
        Pairs(1)


def test_models_that_draw_random_numbers_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    with pytest.raises(Unserved, match="draws random numbers"):
        released(torch.randn(4, 2, 3).double(), model, Flat(1.0))


class Mixing(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


def test_rows_that_depend_on_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="mixes examples"):
        released(torch.randn(4, 2, 3).double(), Mixing(3, 2).double(), Flat(1.0))


# --- the methods, and the faults of public code ---


def method(name: str, **options: Any) -> Method:
    made: Method = registry.load(registry.resolve("method", name))(**options)
    return made


def test_fixed_batches_are_not_billed_as_poisson() -> None:
    model, x = member("mlp")
    poisson, fixed = (method("logit-dp", sampling=sampling) for sampling in ("poisson", "fixed"))
    assert poisson.event(2.0, 1000, 50, 0) == PoissonSampledDpEvent(0.05, GaussianDpEvent(2.0))
    assert fixed.event(2.0, 1000, 50, 0) == SampledWithoutReplacementDpEvent(1000, 50, GaussianDpEvent(2.0))
    assert {len(fixed.sampler.draw(1000, 50, step, 1)) for step in range(5)} == {50}
    assert len({len(poisson.sampler.draw(1000, 50, step, 1)) for step in range(5)}) > 1
    for m, expected in ((poisson, sensitivity(1.0, 1.0, ADD)), (fixed, sensitivity(1.0, 1.0, REPLACE, 5))):
        found = released(x, model, m.clip, 1.0, m.sampler.relation)
        assert found.releases["grad"].sensitivity == expected


def test_naive_clipping_moves_by_twice_its_norm() -> None:
    (model, up), (_, down) = placed(6, UP), placed(6, DOWN)
    found = []
    for x, relation in ((up, ADD), (down, REPLACE)):
        w, batch = Tree.of(trainable(model)), Batch(x, torch.zeros(6))
        one = Whole().bounded(InfoNCE(1.0), Flat(0.1), model, w, batch, None, 1.0, relation)
        assert one.releases["grad"].sensitivity == pytest.approx(0.2)
        assert float(one.releases["grad"].value.norm()) <= 0.1 * (1 + 1e-6)
        found.append(flat(one))
    assert (found[0] - found[1]).norm() > 0.19


class Pictures:
    """Small images of three kinds, each a gradient of brightness of its own."""

    n_train, n_test = 96, 48

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(5)
        ramp = torch.linspace(-1, 1, 8)
        kinds = torch.stack([ramp.expand(8, 8), ramp.expand(8, 8).T, ramp.outer(ramp)])
        self.y = torch.arange(144) % 3
        self.x = kinds[self.y][:, None] + 0.1 * torch.randn(144, 1, 8, 8, generator=rng)

    def batch(self, indices: Tensor, split: str = "train") -> tuple[Tensor, Tensor]:
        at = indices + (self.n_train if split == "test" else 0)
        return self.x[at], self.y[at]


def trained(m: Method, seed: int = 3, sigma: float = 1.0, steps: int = 4) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 6))
    seeds: Any = SimpleNamespace(sampling=1, noise=seed, path=2)
    p = train(m, model, Pictures(), sigma, Schedule(steps, 24, 2), seeds, start(m, model, steps))
    return model, p


@pytest.mark.parametrize("name", ["contrastive", "contrastive-naive", "dp-rotation", "logit-dp"])
def test_methods_train_and_are_probed(name: str) -> None:
    m = method(name)
    model, p = trained(m)
    assert p.w.flat.isfinite().all() and not torch.equal(p.w.flat, Tree.of(trainable(model)).flat)
    assert torch.equal(p.w.flat, trained(m)[1].w.flat)
    assert p.ledger == m.plan(1.0, 96, 24, 4)
    with torch.no_grad():
        scores = m.loss.scores(model, Pictures(), torch.device("cpu"))
        assert scores == m.loss.scores(model, Pictures(), torch.device("cpu"))
    assert scores["accuracy"] > 0.9 and math.isfinite(scores["loss"])


def test_the_noise_of_one_tensor_tells_nothing_of_another() -> None:
    """One key for all tensors gives tensors of one shape the same noise, and others the same beginning."""
    m = method("logit-dp")
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30), nn.Linear(30, 40)).double()
    zero = released(torch.zeros(0, 2, 30).double(), model, m.clip, 1.0).releases["grad"]
    noised = [m.noise.add(zero, Stream(1, "noise", step)) for step in (0, 1)]
    drawn = [t.reshape(-1)[:900] for tree in noised for name, t in tree.items() if "weight" in name]
    together = torch.corrcoef(torch.stack(drawn)) - torch.eye(6, dtype=torch.float64)
    assert together.abs().max() < 6 / math.sqrt(900)
    spread = torch.stack(drawn).std() / (zero.sigma * zero.sensitivity)
    assert float(spread) == pytest.approx(1, abs=0.05)


# --- the losses ---


def test_views_and_rotations() -> None:
    x = torch.randn(5, 1, 6, 6)
    pair = InfoNCE(pad=1).prepare(Batch(x, torch.zeros(5)), Stream(1, "views", 0))
    assert pair.x.shape == (5, 2, 1, 6, 6) and not torch.equal(pair.x[:, 0], pair.x[:, 1])
    same = InfoNCE(pad=0, flip=False, jitter=0.0).prepare(Batch(x, torch.zeros(5)), Stream(1, "views", 0))
    assert torch.equal(same.x, x[:, None].expand_as(same.x))
    assert InfoNCE().prepare(Batch(x[:0], torch.zeros(0)), Stream(1, "views", 0)).x.shape == (0, 2, 1, 6, 6)
    turned = Rotations().prepare(Batch(x, torch.zeros(5)), Stream(1, "views", 0))
    assert torch.equal(turned.x[:, 3].rot90(1, (2, 3)), x)
    outputs = torch.randn(20, 7)
    losses = Rotations().of(lambda rows: outputs, turned)
    expected = -outputs[:, :4].log_softmax(1)[torch.arange(20), torch.arange(20) % 4].view(5, 4).mean(1)
    torch.testing.assert_close(losses, expected)
    for loss in (InfoNCE(), Rotations()):
        with pytest.raises(ValueError, match="images"):
            loss.prepare(Batch(torch.zeros(3, 4), torch.zeros(3)), Stream(1, "views", 0))
    outputs[:, 3] = 0
    torch.testing.assert_close(
        Rotations().of(lambda rows: outputs[:, :3], turned), Rotations().of(lambda rows: outputs, turned)
    )
    with pytest.raises(ValueError, match="three outputs"):
        Rotations().of(nn.Sequential(nn.Flatten(), nn.Linear(36, 2)), turned)


def test_the_probe_reads_what_is_linear_in_an_embedding_and_nothing_else() -> None:
    data: Any = Pictures()
    assert probe(nn.Flatten(), data, torch.device("cpu")) > 0.95
    noise = torch.randn(200, 3)
    blind = probe(lambda x: noise[: len(x)] * 1e3, data, torch.device("cpu"))
    assert blind < 0.6
    assert math.isnan(probe(lambda x: x.flatten(1) / 0, data, torch.device("cpu")))


class Hooked(nn.Module):
    """A network whose gradients are changed on their way back."""

    def __init__(self, change) -> None:
        super().__init__()
        self.a, self.b, self.change = nn.Linear(12, 8), nn.Linear(8, 4), change

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x.flatten(1)).tanh()
        if h.requires_grad and self.change:
            h.register_hook(self.change)
        return self.b(h)


@pytest.mark.parametrize(
    "change",
    [
        lambda g: 0.1 * g / (g.norm(dim=1, keepdim=True) + 1e-30), lambda g: g.clamp(-1e-3, 1e-3), torch.sign,
        torch.abs, torch.relu, lambda g: g.where(g.abs() > 1e-5, 0),
    ],
    ids=["normalised", "clamped", "sign", "absolute", "positive", "cut"],
)  # fmt: skip
def test_gradients_changed_on_their_way_are_measured_as_they_are_summed(change) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, 2, 1, 3, 4), torch.zeros(4, dtype=torch.long)
    model = Hooked(change)
    w = Tree.of(trainable(model))
    for bound in (1e-6, 0.01, 1.0):

        def summed(chosen: list[int], bound: float = bound) -> Release:
            batch = Batch(x[chosen], y[chosen])
            given = InfoNCE(1.0), Flat(bound), model, w, batch, None, 1.0, Relation.ADD_OR_REMOVE
            return Pairs().bounded(*given).releases["grad"]

        whole = summed([0, 1, 2, 3])
        assert whole.value.flat.any()
        for gone in range(4):
            rest = summed([i for i in range(4) if i != gone])
            assert float((whole.value - rest.value).norm()) <= whole.sensitivity * (1 + 1e-6)


def test_what_inputs_make_of_rounding_is_within_the_bound() -> None:
    """The way back cancels in the middle layer: its weights add up to zero. Another pass would round otherwise, and
    inputs of 1e20 that the model does not use make that 600,000 times the bound."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 1, bias=False), nn.Linear(1, 3), nn.Linear(3, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 0.0]]))
        model[2].weight.fill_(1.0)
        model[2].bias.copy_(torch.tensor([0.3, -0.7, 0.9]))
        model[3].weight.copy_(torch.tensor([[0.25, 0.5, -0.75], [0.375, -0.125, -0.25]]))
        model[3].bias.copy_(torch.tensor([0.2, 0.1]))
    w = Tree.of(trainable(model))
    for seed in range(20):
        torch.manual_seed(seed)
        x = torch.randn(2, 2, 1, 1, 2) * 0.5
        x[..., 1] = 1e20 * (1 + torch.rand(2, 2, 1, 1))
        batch = Batch(x, torch.zeros(2, dtype=torch.long))
        given = InfoNCE(), Flat(1.0), model, w, batch, None, 1.0, Relation.ADD_OR_REMOVE
        found = Pairs().bounded(*given).releases["grad"]
        # One of two examples leaves a batch of one, which gives zero.
        assert float(found.value.norm()) <= found.sensitivity


class Places(nn.Module):
    """An embedding that is a mean over positions: of one channel by a frozen layer, of the other by a trained one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen, self.trained = nn.Conv1d(1, 3, 1), nn.Conv1d(1, 3, 1, bias=False)
        self.frozen.requires_grad_(False)
        nn.init.zeros_(self.trained.weight)

    def forward(self, x: Tensor) -> Tensor:
        return (self.frozen(x[:, 1:]) + self.trained(x[:, :1])).mean(2)


@pytest.mark.parametrize(("large", "bound"), [(1e4, 1e-6), (1e10, 1.0)])
def test_positions_that_cancel_are_measured_as_they_are_added(large: float, bound: float) -> None:
    """Of (G, s, s, -G) float32 reads nothing, where s is below half a unit of G's last place."""
    model = Places()
    torch.manual_seed(1)
    x = (3 * torch.randn(2, 2, 2, 1)).repeat(1, 1, 1, 4)
    x[:, :, 0] = torch.tensor([large, 2.4e-8 * large, 2.4e-8 * large, -large])
    other = x.clone()
    other[1] = x[1].flip(0) * torch.tensor([1.0, -1.0])[:, None]
    y, w = torch.zeros(2, dtype=torch.long), Tree.of(trainable(model))
    here, there = (
        Pairs().bounded(InfoNCE(0.5), Flat(bound), model, w, Batch(one, y), None, 1.0, REPLACE).releases["grad"]
        for one in (x, other)
    )
    assert here.sensitivity >= float((here.value - there.value).norm()) > 0
