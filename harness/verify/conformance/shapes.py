"""Checks with other models and other batches than those of the small problem.

An engine that computes norms layer by layer has a rule for each kind of layer, and each may be wrong by itself. A
batch that an engine takes in pieces has a last piece.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from harness.dp.loss import Batch
from harness.dp.release import Release
from harness.running.train import start
from harness.verify.conformance.neighbours import compared, neighbours
from harness.verify.conformance.subject import STEPS, Inapplicable, SmallProblem, Subject, Toy, Violation

CLASSES = 3
SIZES = (65, 129, 300)  # of batches; more than the small problem has, and no multiples of a power of two


def other_models(s: Subject) -> None:
    """so it is for other layers: shared, frozen, without bias, recurrent, grouped, of tokens, over positions"""
    s.noises()
    seen = 0
    for problem in MODELS:
        other = dataclasses.replace(s, model=problem.model(), data=Toy(shape=problem.shape))
        if not _served(other):
            continue
        seen += 1
        for inputs, weights in ((1.0, 1.0), (10.0, 4.0)):  # norms below the bound and above it
            p = start(other.method, other.model, STEPS)
            p = dataclasses.replace(p, w=p.w * weights)
            x, y = inputs * other.data.x[:4], other.data.y[:4]
            compared(other, other.prepared(x, y), f" of {problem.name}", at=p)
        neighbours(other, x, y, f"in {problem.name}", at=p, only=(0, 1))
    if not seen:
        raise Inapplicable("the engine or the loss takes none of them")


def other_sizes(s: Subject) -> None:
    """so it is for batches of 65 to 300: they release the sum of what their parts do"""
    s.noises()
    m = s.method
    rng = torch.Generator().manual_seed(8)
    x = s.data.x.repeat(7, *[1] * (s.data.x.ndim - 1))[: max(SIZES)]
    x = x + 0.3 * torch.randn(x.shape, generator=rng, dtype=x.dtype)
    y = s.data.y.repeat(7)[: max(SIZES)]
    for size in SIZES[: 1 if m.loss.coupled else None]:
        batch = s.prepared(x[:size], y[:size])
        whole = s.releases(batch)
        if not m.loss.coupled:
            pieces = zip(batch.x.split(20), batch.y.split(20), strict=True)
            _additive(whole, [s.releases(Batch(*piece)) for piece in pieces], size)
        neighbours(s, x[:size], y[:size], f"a batch of {size}", only=(0, size - 1))


def _additive(whole: dict[str, Release], parts: list[dict[str, Release]], size: int) -> None:
    for name, r in whole.items():
        total = parts[0][name].value
        for part in parts[1:]:
            total = total + part[name].value
        off = float((r.value - total).norm() / (total.norm() + 1e-12))
        if not off <= 1e-6:
            raise Violation(
                f'the release "{name}" of {size} examples differs by {off:.1e} relative from the sum of those of 20'
                " at a time: weigh examples alike, however a batch is cut",
                evidence=f"{off:.2g} relative",
            )


def _served(s: Subject) -> bool:
    """Whether the engine and the loss take a model; an engine that cannot, says so in its own way."""
    if s.method.engine.accepts(s.method.loss, s.method.clip, s.model):
        return False
    try:
        s.releases(s.prepared(s.data.x[:2], s.data.y[:2]))
    except (ValueError, RuntimeError, NotImplementedError, TypeError):
        return False
    return True


# The models -----------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """A layer that is used twice, or two layers with one weight between them."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8) if tied else self.inner
        self.again.weight = self.inner.weight
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(torch.tanh(self.inner(x))))


class Tokens(nn.Module):
    """Tokens that repeat within an example, one of them padding; their embedding is normalised with gains."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 6, padding_idx=0)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (2 * x).round().long().remainder(5)
        return self.head(self.norm(self.embedding(tokens)).mean(-2))


class RecurrentNet(nn.Module):
    """A recurrent layer over positions; its matrices are used at each."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.layer, self.head = kind(4, 5, batch_first=True), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class Positions(nn.Module):
    """The same layer at every position, where gradients add up."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x)).mean(1))


class Gains(nn.Module):
    """Parameters of its own, that belong to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(CLASSES))
        self.head = nn.Linear(8, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x * self.gain) + self.shift


class Attentive(nn.Module):
    """Attention over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Hooked(nn.Module):
    """A hook that brings each example's gradient to one length on its way back: that of twice a loss is the same."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(8, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x).tanh()
        if h.requires_grad:
            h.register_hook(lambda g: g / (g.norm(dim=-1, keepdim=True) + 1e-30))
        return self.head(h)


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=2, dilation=2, bias=False),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, stride=2, groups=2, padding=1),
        nn.InstanceNorm2d(4, affine=True),
        nn.Flatten(),
        nn.Linear(36, CLASSES, bias=False),
    )


def _frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    model[0].weight.requires_grad_(False)
    for p in model[2].parameters():
        p.requires_grad_(False)
    return model


def _signals() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.PReLU(), nn.Flatten(), nn.Linear(28, CLASSES))


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def model() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(12)
            return make().double()

    return model


MODELS = tuple(
    SmallProblem(name, _seeded(make), shape)
    for name, make, shape in (
        ("a layer that is used twice", lambda: Twice(tied=False), (8,)),
        ("two layers with one weight", lambda: Twice(tied=True), (8,)),
        ("an embedding of tokens", Tokens, (7,)),
        ("grouped and dilated convolutions without bias", _convolutions, (1, 6, 6)),
        ("a convolution of signals and a slope", _signals, (2, 7)),
        ("a net in part frozen", _frozen, (8,)),
        ("a layer at every position", Positions, (5, 4)),
        ("an LSTM", lambda: RecurrentNet(nn.LSTM), (5, 4)),
        ("a GRU", lambda: RecurrentNet(nn.GRU), (5, 4)),
        ("attention", Attentive, (5, 4)),
        ("parameters outside layers", Gains, (8,)),
        ("gradients that a hook changes", Hooked, (8,)),
    )
)
