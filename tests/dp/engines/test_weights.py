"""The weights of a run are in the model itself: whoever reads a parameter, by whatever way, reads those of the run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harness.dp import Batch, CrossEntropy, Feedback, Flat, Plain, Relation, Tree, Unclipped
from harness.dp.engines.engine import Engine, trainable
from harness.dp.engines.pairs import Pairs
from harness.dp.engines.whole import Whole
from harness.dp.loss import Loss
from harness.dp.loss.contrast import InfoNCE
from harness.running.train import evaluate, evaluating


class Net(nn.Module):
    """Two layers, the first computed by `way`."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.b, self.way = nn.Linear(6, 5), nn.Linear(5, 3), way
        w, bias = self.a.weight, self.a.bias
        self.held, self.closure = [w], lambda x: F.linear(x, w, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if self.way == "checkpoint":
            return self.b(checkpoint(lambda z: F.gelu(self.a(z)), x, use_reentrant=False))
        if self.way == "closure":
            return self.b(F.gelu(self.closure(x)))
        if self.way == "list":
            return self.b(F.gelu(F.linear(x, self.held[0], self.a.bias)))
        return self.b(F.gelu(self.a(x)))


def net(way: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Net(way)


def moved(model: nn.Module) -> Tree:
    """Weights of a run that has gone on for some time."""
    g = torch.Generator().manual_seed(2)
    w = Tree.of(trainable(model))
    return w.with_flat(w.flat + 0.3 * torch.randn(w.flat.shape, generator=g))


def gradient(engine: Engine, clip: object, loss: Loss, way: str, shape: tuple[int, ...]) -> Tensor:
    g = torch.Generator().manual_seed(3)
    batch = Batch(torch.randn(4, *shape, generator=g), torch.tensor([0, 1, 2, 0]))
    model = net(way)
    found = engine.bounded(loss, clip, model, moved(model), batch, None, 1.0, Relation.ADD_OR_REMOVE)
    return found.releases["grad"].value.flat


ENGINES: list[tuple[Engine, object, Loss, tuple[int, ...]]] = [
    (Plain(), Unclipped(), CrossEntropy(), (6,)),
    (Whole(), Flat(0.1), CrossEntropy(), (6,)),
    (Pairs(), Flat(0.1), InfoNCE(pad=0), (2, 1, 2, 3)),
]


@pytest.mark.parametrize("way", ["checkpoint", "closure", "list"])
@pytest.mark.parametrize("case", ENGINES, ids=lambda case: type(case[0]).__name__)
def test_engines_differentiate_at_the_weights_of_the_run(
    case: tuple[Engine, object, Loss, tuple[int, ...]], way: str
) -> None:
    engine, clip, loss, shape = case
    expected = gradient(engine, clip, loss, "layer", shape)
    try:
        found = gradient(engine, clip, loss, way, shape)
    except ValueError as refused:  # a plan may not see such a layer; then it must say so
        assert (engine == Pairs() and way != "checkpoint") or "loop" in str(refused)
        return
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_feedback_refuses_what_it_cannot_cut() -> None:
    with pytest.raises(ValueError, match="leave activation checkpointing out"):
        gradient(Feedback(), Unclipped(), CrossEntropy(), "checkpoint", (6,))


class Lora(nn.Module):
    """Folds its two trained factors into a frozen weight in evaluation mode, and out again in training."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 3).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.zeros(2, 6)), nn.Parameter(torch.zeros(3, 2))
        self.register_buffer("calls", torch.zeros(()))
        self.folded = False

    def train(self, mode: bool = True) -> nn.Module:
        if mode == self.folded:
            self.base.weight.data += (-1 if mode else 1) * (self.b @ self.a).detach()
            self.folded = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.base(x) + (0 if self.folded else x @ self.a.T @ self.b.T)


class Rows:
    """Six examples, to be judged on."""

    n_train = n_test = 6

    def batch(self, indices: Tensor, split: str = "test") -> tuple[Tensor, Tensor]:
        x = torch.randn(6, 6, generator=torch.Generator().manual_seed(4))
        return x[indices], torch.tensor([0, 1, 2, 2, 1, 0])[indices]


def test_layers_folded_for_evaluation_are_those_of_the_run_and_leave_no_trace() -> None:
    torch.manual_seed(0)
    model = Lora().train()
    w = moved(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x, y = Rows().batch(torch.arange(6))
    expected = model.base(x) + x @ w["a"].T @ w["b"].T
    with evaluating(model, w):
        outputs = model(x)
    torch.testing.assert_close(outputs, expected)
    found = evaluate(model, w, CrossEntropy(), Rows())
    assert found["loss"] == pytest.approx(float(F.cross_entropy(expected, y)))
    assert model.training and not model.folded
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    model.base.eval()  # a frozen part stays in the mode that it was in
    evaluate(model, w, CrossEntropy(), Rows())
    assert model.training and not model.base.training


@pytest.mark.parametrize("shape", ["column", "mean", "square"])
@pytest.mark.parametrize("engine", [Plain(), Whole(), Feedback()], ids=lambda e: type(e).__name__)
def test_losses_of_another_shape_are_refused(engine: Engine, shape: str) -> None:
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "column": lambda t: t[:, None], "mean": lambda t: t.mean(), "square": lambda t: t[:, None] - t,
    }  # fmt: skip

    class Other(CrossEntropy):
        def per_example(self, outputs: Tensor, y: Tensor) -> Tensor:
            return ways[shape](super().per_example(outputs, y))

    clip = Flat(1.0) if engine == Whole() else Unclipped()
    with pytest.raises(ValueError, match=r'reduction="none"'):
        gradient(engine, clip, Other(), "layer", (6,))
