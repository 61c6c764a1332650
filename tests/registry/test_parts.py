"""Noise, samplers, optimizers, paths and clipping rules, each against its law."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.dp import EMA, SGD, Adam, Fixed, Flat, Full, Gaussian, Poisson, Relation, Release, Shuffle, Tree, Unclipped
from harness.dp.random import Stream

ADD = Relation.ADD_OR_REMOVE


def tree(**tensors: torch.Tensor) -> Tree:
    return Tree.of(tensors)


def test_a_tree_is_a_vector_space_on_one_buffer():
    w = tree(a=torch.arange(6.0).view(2, 3), b=torch.tensor([7.0]))
    assert w.flat.tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert torch.equal((2 * w - w / 2 + -w)["a"], 0.5 * w["a"])
    assert w.unit().norm() == pytest.approx(1.0)
    assert w.zeros_like().unit().flat.abs().sum() == 0
    with pytest.raises(ValueError, match="different layouts"):
        w + tree(a=torch.zeros(7))
    with pytest.raises(ValueError, match="one dtype"):
        tree(a=torch.zeros(1), b=torch.zeros(1, dtype=torch.float64))


def test_norms_do_not_read_low_at_a_million_elements():
    flat = torch.randn(3_000_000, generator=torch.Generator().manual_seed(0))
    assert float(tree(a=flat).norm()) == pytest.approx(float(flat.double().norm()), rel=1e-7)


def test_gaussian_noise_has_its_standard_deviation_and_is_independent():
    """Across coordinates, tensors, releases of a step, and steps; the seed alone decides the draw."""
    zero = tree(a=torch.zeros(200, 100), b=torch.zeros(20_000))
    release = Release(zero, sensitivity=0.5, sigma=4.0)

    def draw(step: int) -> list[Tree]:
        rng = Stream(7, "noise", step)
        return [Gaussian().add(release, rng) for _ in range(2)]

    samples = [t for step in (0, 1) for release in draw(step) for t in (release["a"].flatten(), release["b"])]
    for sample in samples:
        assert float(sample.std()) == pytest.approx(2.0, rel=0.03)  # 6 standard errors of 20,000 draws
        assert abs(float(sample.mean())) < 6 * 2.0 / math.sqrt(20_000)
    correlation = torch.corrcoef(torch.stack(samples)) - torch.eye(len(samples))
    assert float(correlation.abs().max()) < 6 / math.sqrt(20_000)
    assert torch.equal(draw(0)[0].flat, draw(0)[0].flat)


def test_noise_refuses_what_has_no_bound():
    with pytest.raises(ValueError, match="finite sensitivity"):
        Gaussian().add(Release(tree(a=torch.zeros(1)), math.inf, 1.0), Stream(0, "noise", 0))


def test_poisson_includes_each_example_independently_at_its_rate():
    n, batch, steps = 400, 40, 3000
    hits = torch.zeros(steps, n)
    for step in range(steps):
        hits[step, Poisson().draw(n, batch, step, seed=3)] = 1
    q = batch / n
    rates = hits.mean(0)
    assert float((rates - q).abs().max()) < 5 * math.sqrt(q * (1 - q) / steps)
    assert float(hits.sum(1).var()) == pytest.approx(n * q * (1 - q), rel=0.15)
    pairs = torch.corrcoef(hits[:, :50].T) - torch.eye(50)
    assert float(pairs.abs().max()) < 5.5 / math.sqrt(steps)
    assert torch.equal(Poisson().draw(n, batch, 5, 3), Poisson().draw(n, batch, 5, 3))


def test_poisson_draws_empty_batches_and_keeps_them():
    sizes = [len(Poisson().draw(10, 1, step, seed=0)) for step in range(400)]
    assert sizes.count(0) == pytest.approx(400 * 0.9**10, abs=40)


def test_the_other_samplers_draw_what_they_say():
    assert len(set(Fixed().draw(100, 30, 4, 0).tolist())) == 30
    assert not torch.equal(Fixed().draw(100, 30, 4, 0), Fixed().draw(100, 30, 5, 0))
    assert Full().draw(5, 2, 9, 0).tolist() == [0, 1, 2, 3, 4]
    assert Full().denominator(5, 2) == 5 and Poisson().denominator(5, 2) == 2
    epoch = torch.cat([Shuffle().draw(10, 3, step, 1) for step in range(3)])
    assert len(set(epoch.tolist())) == 9  # the tenth is dropped
    assert not torch.equal(Shuffle().draw(10, 3, 0, 1), Shuffle().draw(10, 3, 3, 1))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (SGD(0.3), lambda p: torch.optim.SGD(p, 0.3)),
        (SGD(0.3, 0.9, weight_decay=0.1), lambda p: torch.optim.SGD(p, 0.3, momentum=0.9, weight_decay=0.1)),
        (SGD(0.3, 0.8, nesterov=True), lambda p: torch.optim.SGD(p, 0.3, momentum=0.8, nesterov=True)),
        (Adam(0.01), lambda p: torch.optim.Adam(p, 0.01)),
        (Adam(0.01, 0.8, 0.9, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 0.01, (0.8, 0.9), weight_decay=0.1)),
    ],
)
def test_optimizers_are_those_of_torch(ours, theirs):
    rng = torch.Generator().manual_seed(1)
    w = tree(a=torch.randn(5, generator=rng, dtype=torch.float64))
    parameter = torch.nn.Parameter(w.flat.clone())
    reference, state = theirs([parameter]), ours.init(w, 6)
    for _ in range(6):
        g = torch.randn(5, generator=rng, dtype=torch.float64)
        w, state = ours.update(tree(a=g), state, w)
        parameter.grad = g
        reference.step()
    assert torch.allclose(w.flat, parameter, rtol=1e-12)


def test_ema_keeps_the_average_and_trains_the_weights():
    w = tree(a=torch.zeros(1))
    path = EMA(0.5)
    state = path.init(w)
    for value in (1.0, 2.0):
        new = tree(a=torch.tensor([value]))
        assert path.probe(new, state) is new
        state = path.after(w, new, new, state)
    first = 1 - 2 / 11  # decay (1 + 1) / (10 + 1) at t = 1, then (1 + 2) / (10 + 2)
    assert float(path.kept(new, state)["a"]) == pytest.approx(first * 3 / 12 + 2 * 9 / 12)


@given(st.lists(st.floats(0) | st.just(math.nan), min_size=1, max_size=8), st.floats(1e-3, 1e3))
@settings(max_examples=40, deadline=None)
def test_flat_clipping_bounds_every_contribution(norms, clip):
    column = torch.tensor(norms, dtype=torch.float64)[:, None]
    weights = Flat(clip).weights(column, None)
    finite = column.isfinite()
    assert (weights[~finite] == 0).all()
    assert (weights[finite] * column[finite] <= clip * (1 + 1e-12)).all()
    inside = finite & (column <= clip)
    assert (weights[inside] >= 1 - 1e-15).all()
    assert torch.equal(Unclipped().weights(column, None), finite.double())


def test_parts_refuse_impossible_values():
    for bad in (lambda: Flat(0.0), lambda: Flat(math.inf), lambda: SGD(-1), lambda: SGD(0.1, 1.0), lambda: EMA(1.0)):
        with pytest.raises(ValueError, match=r"must|needs"):
            bad()
    with pytest.raises(ValueError, match="nesterov needs"):
        SGD(0.1, nesterov=True)
