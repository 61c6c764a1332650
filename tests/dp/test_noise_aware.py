"""Optimizers that know the noise on what they are given, and filters."""

import pytest
import torch

from harness.dp import SGD, Adam, AdamBC, Gaussian, LowPass, Method, Release, Tree
from harness.dp.random import Stream


def stepped(optimizer, gradients, deviation=0.0):
    w = Tree.of({"a": torch.zeros(len(gradients[0]), dtype=torch.float64)})
    state, path = optimizer.init(w, len(gradients)), []
    for g in gradients:
        state = optimizer.receive(state, {}, {"grad": {"a": deviation}})
        w, state = optimizer.update(Tree.of({"a": g}), state, w)
        path.append(w.flat)
    return torch.stack(path), state


def test_adambc_is_adam_without_noise():
    gradients = list(torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    ours, _ = stepped(AdamBC(lr=0.1, floor=1e-30), gradients)
    theirs, _ = stepped(Adam(lr=0.1, eps=0.0), gradients)
    assert torch.allclose(ours, theirs, rtol=1e-9)


def test_adambc_takes_the_variance_of_the_noise_out():
    """Gradients of one size with noise on them: Adam's second moment is that of both, AdamBC's that of the gradient."""
    rng = torch.Generator().manual_seed(0)
    gradients = [0.3 + 2.0 * torch.randn(4000, generator=rng, dtype=torch.float64) for _ in range(400)]
    _, state = stepped(AdamBC(lr=0.0, beta2=0.99, floor=1e-12), gradients, 2.0)
    second = state["v"].flat.mean() / (1 - 0.99**400)
    assert float(second) == pytest.approx(0.09 + 4.0, rel=0.01)
    assert float(second - state["average"]["a"] / (1 - 0.99**400)) == pytest.approx(0.09, abs=0.02)


def test_the_deviation_that_optimizers_are_given_is_that_of_the_noise():
    tree = Tree.of({"a": torch.zeros(50_000), "b": torch.zeros(50_000)})
    release, noise = Release(tree, 0.5, 3.0, {"a": 1.0, "b": 4.0}), Gaussian()
    public = noise.add(release, Stream(1, "test", 0))
    said = noise.deviation(release)
    assert {name: float(t.std()) for name, t in public.items()} == pytest.approx(said, rel=0.02)


def test_a_low_pass_keeps_what_is_constant_and_damps_what_changes_sign():
    constant = [torch.ones(1, dtype=torch.float64)] * 30
    path, _ = stepped(LowPass(SGD(lr=1.0)), constant)
    assert torch.allclose(path.flatten().diff(), torch.tensor(-1.0, dtype=torch.float64))
    signs = [torch.tensor([(-1.0) ** t], dtype=torch.float64) for t in range(60)]
    path, _ = stepped(LowPass(SGD(lr=1.0)), signs)
    # |b / (1 - 0.9 z)| at z = -1.
    assert float(path.flatten().diff()[-1].abs()) == pytest.approx(0.1 / 1.9, rel=0.02)
    with pytest.raises(ValueError, match="must hold numbers"):
        LowPass(forward=(1.0, -1.0))


def test_suites_may_name_them():
    from harness.registry.parts import combine

    made = combine(Method(), {"filter": "low-pass?feedback=-0.5&forward=0.5", "noise": "banded?bands=3"})
    assert made.optimizer == LowPass(SGD(), (-0.5,), (0.5,)) and made.noise.bands == 3
