"""No example contributes more than its bound, whatever its size: inputs and weights from 1e-38 to 1e38, in float32."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.dp import (
    PSAC,
    PSASC,
    Automatic,
    Batch,
    BookKeeping,
    CrossEntropy,
    Feedback,
    Flat,
    Ghost,
    GroupWise,
    Loop,
    Quantile,
    Refined,
    Relation,
    Tree,
    Unclipped,
    Vmap,
)
from harness.dp.clip import Clip
from harness.dp.engines.audit import unaudited
from harness.dp.engines.engine import Engine, trainable
from harness.dp.engines.pairs import Pairs
from harness.dp.engines.whole import Whole
from harness.dp.loss import Loss
from harness.dp.loss.contrast import InfoNCE
from harness.dp.native import kernels

ADD = Relation.ADD_OR_REMOVE
SLACK = 1 + 1e-6
RULES: list[Callable[[float], Clip]] = [
    Flat, Refined, lambda c: GroupWise(c, by="parameter"), lambda c: Quantile(c, by="parameter"), PSAC,
    lambda c: PSASC(c, r=1e-30), Automatic, lambda c: Automatic(c, gamma=1e-30),
    lambda c: Automatic(c, form="vanilla"),
]  # fmt: skip
CLIPS = (1e-6, 1e-3, 1.0, 5e5)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x)[0][:, -1])


class Long(nn.Module):
    """Linear layers over many positions, whose norms come from Gram matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(24, 40), nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh()).mean(1)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(2, 2, bias=False), (2,)),
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (6,)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.Flatten(), nn.Linear(512, 3)), (16, 4, 4),
    ),
    "wide": (lambda: nn.Sequential(nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(256, 3)), (64, 4, 4)),
    "positions": (Long, (2, 24)),
    "recurrent": (Recurrent, (3, 4)),
}  # fmt: skip
ENGINES = [Loop(), Vmap(), BookKeeping(), BookKeeping(channels_last=True), Ghost()]


def contributed(engine: Engine, rule: Clip, model: nn.Module, w: Tree, batch: Batch, loss: Loss) -> float:
    """How long an example's contribution is, in units of its bound."""
    state = rule.init(w.layout)
    found = engine.bounded(loss, rule, model, w, batch, state, 1.0, ADD).releases["grad"]
    value = found.in_units(found.value.with_flat(found.value.flat.double()))
    assert value.flat.isfinite().all()
    return float(value.norm()) / found.sensitivity


def sized(name: str) -> list[tuple[Tensor, Tree]]:
    """Inputs and weights of all sizes, with weights by which outputs stay tame, too."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make()
    x, w = torch.randn(1, *shape), Tree.of(trainable(model))
    first = w.names[0]
    cases = []
    for e in (-38, -22, -15, 0, 15, 30, 37):
        for f in (-38, 0, 37):
            cases.append((x * 10.0**e, w * 10.0**f))
        for gap in (5.0, 16.0):  # outputs so far apart: what is left of a sure one's gradient is small
            tamed = w.clone()
            tamed[first].mul_(gap * 10.0 ** max(-e, -37))
            cases.append((x * 10.0**e, tamed))
    return cases


@pytest.mark.parametrize("native", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("name", MODELS)
def test_no_contribution_is_longer_than_its_bound(name: str, native: bool, monkeypatch) -> None:
    if not native:
        monkeypatch.setattr(kernels, "_typed", lambda: None)
    torch.manual_seed(0)
    model, loss = MODELS[name][0](), CrossEntropy()
    worst: dict[str, tuple[float, object]] = {}
    for engine in ENGINES:
        for i, (x, w) in enumerate(sized(name)):
            for j in (2 * i, 2 * i + 1):
                rule = RULES[j % len(RULES)](CLIPS[j // len(RULES) % len(CLIPS)])
                ratio = contributed(engine, rule, model, w, Batch(x, torch.tensor([i % 2])), loss)
                found = ratio, (repr(rule), i)
                worst[repr(engine)] = max(worst.get(repr(engine), found), found, key=lambda one: one[0])
    assert all(ratio <= SLACK for ratio, _ in worst.values()), worst
    assert all(ratio >= 0.99 for ratio, _ in worst.values()), worst


@pytest.mark.parametrize("native", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize(
    ("engine", "rule", "loss", "shape"),
    [
        (Whole(), Flat, CrossEntropy(), (6,)), (Feedback(1e-3, 1e-3), None, CrossEntropy(), (6,)),
        (Feedback(1e5, 1e-6), None, CrossEntropy(), (6,)), (Pairs(), Flat, InfoNCE(1.0), (2, 6)),
    ],
    ids=["whole", "feedback", "feedback, uneven", "pairs"],
)  # fmt: skip
def test_other_engines_keep_their_bounds(engine, rule, loss, shape, native, monkeypatch) -> None:
    if not native:
        monkeypatch.setattr(kernels, "_typed", lambda: None)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    start, x = Tree.of(trainable(model)), torch.randn(2, *shape)
    for e, f in itertools.product((-38, -30, -15, 0, 15, 30, 37), repeat=2):
        w = start.clone()
        w["0.weight"].mul_(10.0**f)
        for clip in CLIPS:
            given = Unclipped() if rule is None else rule(clip)
            batch = Batch(x * 10.0**e, torch.tensor([0, 1]))
            found = engine.bounded(loss, given, model, w, batch, None, 1.0, ADD).releases["grad"]
            assert found.value.flat.isfinite().all(), (e, f, clip)
            most = found.sensitivity * (2 if rule is None else 1)  # two examples
            assert float(found.value.flat.double().norm()) <= most * SLACK, (e, f, clip)


@pytest.mark.parametrize("rule", RULES)
def test_clipping_norms_beyond_float32_are_refused_with_the_number_to_write(rule) -> None:
    for clip, says in ((1e-7, "write 1e-06 or more"), (1e30, r"write 1e\+06 or less")):
        with pytest.raises(ValueError, match=says):
            rule(clip)
    with pytest.raises(ValueError, match="write 1e-06 or more"):
        GroupWise(1.0, thresholds=(1.0, 1e-9))


def test_adaptive_thresholds_stay_within_reach() -> None:
    rule = Quantile(1.0, rate=5000.0)
    state: Any = {"thresholds": (1.0, 1e-6, 1e6), "sizes": (1, 1, 1)}
    for counts in ((-0.5, -0.5, -0.5), (0.5, 0.5, 0.5)):
        thresholds = rule.update(state, {"counts": Tree.of({"counts": torch.tensor(counts)})})["thresholds"]
        assert all(1e-6 <= one <= 1e6 for one in thresholds)


@pytest.mark.parametrize("engine", [Ghost(), BookKeeping()], ids=lambda e: type(e).__name__)
def test_what_cancels_on_its_way_back_keeps_its_bound(engine):
    """The way back rounds the gradient to zero. Another would leave rounding that the input makes large."""
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0]]))
        model[0].bias.zero_()
        model[1].weight.fill_(1.0)
        model[1].bias.copy_(torch.tensor([0.1, 0.7, -0.4]))
    w, moved = Tree.of(trainable(model)), []
    with unaudited(model):
        for i in range(100):
            batch = Batch(torch.tensor([[1.0 + 0.01 * i, 1e12]]), torch.tensor([0]))
            given = (CrossEntropy(), Flat(1.0), model, w, batch, None, 1.0, Relation.ADD_OR_REMOVE)
            moved.append(float(engine.bounded(*given).releases["grad"].value.flat.double().norm()))
    assert max(moved) <= 1 + 1e-5


@pytest.mark.parametrize("native", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("rule", [Flat(1.0), Automatic(1.0, form="vanilla")], ids=lambda r: type(r).__name__)
def test_what_float32_cannot_add_up_in_a_convolution_is_added_in_float64(rule, native, monkeypatch) -> None:
    """Where no gradient arrives, pixels may be of any size; where it does, too small for float32's products."""
    if not native:
        monkeypatch.setattr(kernels, "_typed", lambda: None)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3, bias=False), Corner())
    w, x = Tree.of(trainable(model)), torch.randn(1, 64, 4, 4)
    for inside, outside in ((1e-36, 1.0), (1e-38, 1e30), (1e-30, 1e37), (1e-7, 1e37), (1e-4, 1e37), (1e30, 1e-30)):
        far = x * outside
        far[:, :, :3, :3] = x[:, :, :3, :3] * inside
        for scale in (1e-20, 1e-8, 1.0):
            model[1].scale = scale
            for engine in (BookKeeping(), Ghost()):
                ratio = contributed(engine, rule, model, w, Batch(far, torch.tensor([0])), CrossEntropy())
                assert ratio <= SLACK, (inside, outside, scale, engine)


class Corner(nn.Module):
    """Logits from one pixel of each of three channels."""

    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x[:, :3, 0, 0]
