"""Models and losses with a fault that public code had, and the instrument that refuses each before it is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.dp import Batch, BookKeeping, CrossEntropy, Flat, Ghost, Relation, Tree, Vmap
from harness.dp.clip import Clip
from harness.dp.engines.engine import Engine, trainable
from harness.dp.loss import Loss
from harness.models import check

FEATURES, CLASSES = 6, 3


class Net(nn.Module):
    """Two layers, and between them what `inner` makes of the hidden units."""

    def __init__(self, inner: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.inner = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES), inner

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x.flatten(1))).tanh())


def once_large(h: Tensor) -> Tensor:
    """Statistics of the batch, where it has 32 examples."""
    return (h - h.mean(0)) / (h.std(0) + 1e-5) if len(h) >= 32 else h


def rescued(h: Tensor) -> Tensor:
    """All scaled down where the largest would overflow."""
    top = h.detach().abs().max()
    return torch.where(top > 1e4, h * (1e4 / top), h)


class Mixed(torch.autograd.Function):
    """The identity, whose rule for vmap adds up gradients along the batch."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return Back.apply(g)

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor) -> tuple[Tensor, int]:
        return Mixed.apply(x), dims[0]


class Back(torch.autograd.Function):
    """What `Mixed` gives back."""

    @staticmethod
    def forward(g: Tensor) -> Tensor:
        return g.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, dims: Any, g: Tensor) -> tuple[Tensor, int]:
        return g.roll(1, dims[0]), dims[0]


class Kept(nn.Module):
    """Multiplies by a transpose that it made once, and which stays that of the first weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, FEATURES))
        self.transposed = self.weight.t()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.transposed


class ColumnLosses(CrossEntropy):
    """Losses [B, 1], which broadcast against weights [B]."""

    def per_example(self, outputs: Tensor, y: Tensor) -> Tensor:
        return super().per_example(outputs, y)[:, None]


class Frequencies(CrossEntropy):
    """Weighs a class by how often the batch has it."""

    def per_example(self, outputs: Tensor, y: Tensor) -> Tensor:
        counts = torch.bincount(y, minlength=CLASSES).to(outputs)
        return super().per_example(outputs, y) / counts[y]


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """A model with weights that are the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return make()


def gate(make: Callable[[], nn.Module]) -> Callable[[], None]:
    """The check of models before a run."""
    return lambda: check(seeded(make), (FEATURES,), CLASSES)


def step(engine: Engine, make: Callable[[], nn.Module], loss: Loss | None = None) -> Callable[[], None]:
    """The first step of an engine, which tries a model before it uses it."""

    def run() -> None:
        model, rng = seeded(make), torch.Generator().manual_seed(6)
        batch = Batch(torch.randn(12, FEATURES, generator=rng), torch.arange(12) % CLASSES)
        w, rule = Tree.of(trainable(model)), Flat(0.1)
        given: tuple[Clip, nn.Module, Tree, Batch] = (rule, model, w, batch)
        engine.bounded(loss or CrossEntropy(), *given, None, 1.0, Relation.ADD_OR_REMOVE)

    return run


@dataclass(frozen=True)
class Refusal:
    """A fault, where it was found, the instrument that refuses it, and how: by ValueError with these words."""

    name: str
    origin: str
    instrument: str
    refuse: Callable[[], None]
    words: str


MODELS, TRIAL, LOSSES = "the check of models", "the trial of an engine", "the shape of losses"
ANOTHER = "another one of a batch"
REFUSED = (
    Refusal(
        "statistics of the batch from 32 examples on", "layers that wait until they are reliable",
        MODELS, gate(lambda: Net(once_large)), ANOTHER,
    ),
    Refusal(
        "all scaled down by the batch's largest", "code against overflow", MODELS, gate(lambda: Net(rescued)), ANOTHER
    ),
    Refusal("weights of the first step", "a transpose kept as an attribute", MODELS, gate(Kept), "made of"),
    Refusal(
        "a rule for vmap that moves gradients to other examples", "custom functions",
        TRIAL, step(Vmap(), lambda: Net(Mixed.apply)), "vmap rule",
    ),
    Refusal(
        "losses [B, 1] against weights [B]", "losses of users",
        LOSSES, step(Ghost(), lambda: Net(torch.tanh), ColumnLosses()), "of shape",
    ),
    Refusal(
        "classes weighed by the batch's frequencies", "losses of users",
        TRIAL, step(BookKeeping(), lambda: Net(torch.tanh), Frequencies()), "couples the examples",
    ),
)  # fmt: skip
