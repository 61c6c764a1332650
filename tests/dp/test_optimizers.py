"""Optimizers against their papers' algorithms and torch's own, and schedules at points computed by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.dp import LAMB, SGD, Adam, EverySecond, Scheduled, Tree

SHAPES = {"a.weight": (4, 3), "a.bias": (4,), "b.weight": (2, 4), "zero": (5,), "one": ()}


def tree(seed: int) -> Tree:
    rng = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=rng, dtype=torch.float64) for name, shape in SHAPES.items()}
    return Tree.of(tensors | {"zero": torch.zeros(5, dtype=torch.float64)})


def gradients(steps: int) -> list[Tree]:
    rng = torch.Generator().manual_seed(9)
    size = tree(0).layout.numel
    return [tree(0).with_flat(torch.randn(size, generator=rng, dtype=torch.float64)) for _ in range(steps)]


def trajectory(optimizer, steps: int) -> list[Tree]:
    w = tree(0)
    state, path = optimizer.init(w, steps), [w]
    for g in gradients(steps):
        w, state = optimizer.update(g, state, w)
        path.append(w)
    return path


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lamb_equals_algorithm_2_of_its_paper(decay):
    """You et al. 2020 (arXiv:1904.00962), phi the identity, written out tensor by tensor."""
    lr, beta1, beta2, eps = 0.02, 0.9, 0.99, 1e-6
    ours = trajectory(LAMB(lr, beta1, beta2, eps, decay), 8)
    weights = {name: t.clone() for name, t in tree(0).items()}
    m = {name: torch.zeros_like(t) for name, t in weights.items()}
    v = {name: torch.zeros_like(t) for name, t in weights.items()}
    for t, grads in enumerate(gradients(8), 1):
        for name, x in weights.items():
            m[name] = beta1 * m[name] + (1 - beta1) * grads[name]
            v[name] = beta2 * v[name] + (1 - beta2) * grads[name] ** 2
            r = m[name] / (1 - beta1**t) / ((v[name] / (1 - beta2**t)).sqrt() + eps)
            u = r + decay * x
            ratio = float(x.norm() / u.norm()) if float(x.norm()) > 0 and float(u.norm()) > 0 else 1.0
            weights[name] = x - lr * ratio * u
            assert torch.allclose(ours[t][name], weights[name], rtol=0, atol=1e-12)


def test_lamb_moves_each_tensor_in_proportion_to_its_length_and_lets_zeros_go():
    first, second = trajectory(LAMB(0.02), 1)
    for name, old in first.items():
        moved = float((second[name] - old).norm())
        assert moved == pytest.approx(0.02 * (float(old.norm()) or math.sqrt(old.numel())), rel=1e-5)
    still = first.with_flat(torch.zeros_like(first.flat))  # no gradient: no direction, and no 0 / 0
    new, _ = LAMB(0.02).update(still, LAMB().init(first, 1), first)
    assert torch.equal(new.flat, first.flat)


def test_a_schedule_at_points_computed_by_hand():
    cosine = Scheduled(SGD(), "cosine", floor=0.2)
    assert [cosine.factor(t, 4) for t in range(5)] == pytest.approx(
        [1.0, 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2, 0.6, 0.2 + 0.8 * (1 - math.sqrt(0.5)) / 2, 0.2]
    )
    step = Scheduled(SGD(), "step", drop=0.1, at=(0.5, 0.75))
    assert [step.factor(t, 8) for t in range(8)] == pytest.approx([1.0] * 4 + [0.1] * 2 + [0.01] * 2)
    assert (
        Scheduled(SGD(), "step", at=(0.1,)).factor(3, 30) == 0.1
    )  # although 0.1 * 30 is more than 3 in floating point
    warm = Scheduled(SGD(), "constant", warmup=0.3)
    assert [warm.factor(t, 10) for t in range(6)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    both = Scheduled(SGD(), "cosine", warmup=0.5)
    assert [both.factor(t, 4) for t in range(5)] == pytest.approx([1 / 3, 2 / 3, 1.0, 0.5, 0.0])
    whole = Scheduled(SGD(), "cosine", warmup=1.0)
    assert [whole.factor(t, 2) for t in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0])


@given(
    decay=st.sampled_from(["constant", "cosine", "step"]), warmup=st.floats(0, 1), floor=st.floats(0, 1),
    drop=st.floats(0, 1), steps=st.integers(1, 60),
)  # fmt: skip
def test_a_schedule_rises_once_and_falls_once(decay, warmup, floor, drop, steps):
    scheduled = Scheduled(SGD(), decay, warmup, floor, drop, at=(0.5, 0.9) if warmup < 0.5 else ())
    factors = [scheduled.factor(t, steps) for t in range(steps)]
    rising = round(warmup * steps)
    assert all(0 <= f <= 1 for f in factors)
    assert factors[:rising] == sorted(factors[:rising])
    assert factors[rising:] == sorted(factors[rising:], reverse=True)
    if decay != "step" and rising < steps:
        assert factors[rising] == 1.0
    if decay == "cosine":
        assert scheduled.factor(steps, steps) == pytest.approx(floor) or rising == steps
        assert min(factors[rising:], default=floor) >= floor - 1e-12


def test_a_scheduled_optimizer_is_torchs_under_the_same_schedule():
    for ours, theirs in (
        (SGD(0.3, 0.9, weight_decay=0.01), lambda p: torch.optim.SGD(p, 0.3, 0.9, weight_decay=0.01)),
        (SGD(0.3, 0.9, nesterov=True), lambda p: torch.optim.SGD(p, 0.3, 0.9, nesterov=True)),
        (Adam(0.05, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1)),
    ):
        schedule = Scheduled(ours, "cosine", warmup=0.25, floor=0.1)
        leaf = tree(0).flat.clone().requires_grad_()
        optimizer = theirs([leaf])
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t, s=schedule: s.factor(t, 12))
        for t, (g, w) in enumerate(zip(gradients(12), trajectory(schedule, 12)[1:], strict=True)):
            leaf.grad = g.flat.clone()
            optimizer.step()
            rates.step()
            assert torch.allclose(w.flat, leaf.detach(), rtol=0, atol=1e-12), t


@pytest.mark.parametrize("inner", [SGD(0.3, 0.9), Adam(0.1), LAMB(0.02)], ids=["sgd", "adam", "lamb"])
def test_a_constant_schedule_is_the_optimizer_itself_and_every_second_is_half_of_it(inner):
    plain = trajectory(inner, 8)
    for a, b in zip(trajectory(Scheduled(inner, "constant"), 8), plain, strict=True):
        assert torch.equal(a.flat, b.flat)
    halved = trajectory(EverySecond(inner), 8)
    w = tree(0)
    state = inner.init(w, 4)
    for t, g in enumerate(gradients(8)):
        if t % 2:
            w, state = inner.update(g, state, w)
        assert torch.equal(halved[t + 1].flat, w.flat)


def test_the_schedule_of_every_second_spans_its_moves():
    """Of 8 queries 4 move, so a schedule inside has 4 steps."""
    path = trajectory(EverySecond(Scheduled(SGD(1.0), "cosine")), 8)
    lengths = [float((b - a).norm() / g.norm()) for g, a, b in zip(gradients(8), path[:-1], path[1:], strict=True)]
    factors = [Scheduled(SGD(), "cosine").factor(t, 4) for t in range(4)]
    assert lengths[::2] == [0.0] * 4 and lengths[1::2] == pytest.approx(factors)


def test_optimizers_say_what_is_wrong_with_their_settings():
    for build, wrong in (
        (lambda: Scheduled(EverySecond()), "EverySecond has no learning rate to schedule"),
        (lambda: Scheduled(Scheduled()), "Scheduled has no learning rate"),
        (lambda: Scheduled(decay="linear"), 'not "linear"'),
        (lambda: Scheduled(warmup=1.5), "warmup must lie in"),
        (lambda: Scheduled(floor=-0.1), "floor must lie in"),
        (lambda: Scheduled(drop=-0.1), "drop must lie in"),
        (lambda: Scheduled(at=(0.5, 2.0)), "at must lie in"),
        (lambda: LAMB(lr=-1.0), "lr must not be negative"),
    ):
        with pytest.raises(ValueError, match=wrong):
            build()
