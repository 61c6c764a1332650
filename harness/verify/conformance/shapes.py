"""Checks with other engines, models and batches than those of the small problem.

A suite's `[[device]]`, or `auto`, may put another engine in the place of a method's own. An engine that computes norms
layer by layer has a rule for each kind of layer, and each may be wrong by itself. A batch that an engine takes in
pieces has a last piece.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from harness.dp.engines.auto import CANDIDATES
from harness.dp.engines.engine import PerExample, Unserved
from harness.dp.engines.loop import Loop
from harness.dp.loss import Batch
from harness.dp.release import Release
from harness.running.train import start
from harness.verify.conformance.neighbours import compared, moved, neighbours
from harness.verify.conformance.subject import STEPS, Inapplicable, SmallProblem, Subject, Toy, Violation

CLASSES = 3
FEW = 6  # examples, of which each is left out once
SCALES = (1.0, 1e4)  # of inputs: norms below the bound and far above it
SIZES = (65, 129, 300)  # of batches; more than the small problem has, and no multiples of a power of two
DROPPING, PLACES = 8, (0, 3, 7)  # examples beside random layers, of which one is not a number


def other_engines(s: Subject) -> None:
    """so it is with every engine that a suite or auto may take instead"""
    s.noises()
    if not isinstance(s.method.engine, PerExample):
        raise Inapplicable(f"{type(s.method.engine).__name__} bounds in a way of its own, and is never replaced")
    for other in replacing(s):
        label = getattr(other.method.engine, "label", type(other.method.engine).__name__)
        for scale in SCALES:
            x, y = scale * other.data.x[:FEW], other.data.y[:FEW]
            try:
                neighbours(other, x, y, f"with the engine {label}, inputs times {scale:g}")
                compared(other, other.prepared(x, y), f" with the engine {label}")
            except Unserved:  # a run is skipped then, and says why
                break


def replacing(s: Subject) -> Iterator[Subject]:
    """The method with each engine that may replace its own and accepts it."""
    m = s.method
    for engine in (Loop(), *CANDIDATES.values()):
        if type(engine) is type(m.engine) and engine == m.engine:
            continue
        if engine.accepts(m.loss, m.clip, s.model) is None:
            yield dataclasses.replace(s, method=dataclasses.replace(m, engine=engine))


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


def steady_draws(s: Subject) -> None:
    """nor does an example that is not finite move what dropout draws for the others"""
    s.noises()
    width = s.data.x[0].numel()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        layers = nn.Flatten(), nn.Linear(width, 32), nn.Dropout(0.5), nn.Linear(32, 3)
        dropping = dataclasses.replace(s, model=nn.Sequential(*layers).double())
    if reason := s.method.engine.accepts(s.method.loss, s.method.clip, dropping.model):
        raise Inapplicable(f"the engine takes no such model: {reason}")
    batch = s.prepared(s.data.x[:DROPPING], s.data.y[:DROPPING])

    def released(given: Batch) -> dict[str, Release]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(17)
            return dropping.releases(given)

    try:
        whole = released(batch)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise Inapplicable(f"the engine takes no dropout: {error}") from error
    for place in PLACES:
        x = batch.x.clone()
        x[place] = math.nan  # which takes out its own contribution, and nothing else
        moved(whole, released(Batch(x, batch.y)), f"dropout, and example {place} not a number")


# The models -----------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Layers, or parameters, by name, and what `forward` makes of them and of a batch."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.made = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.made(self, x)


def _twice(tied: bool) -> nn.Module:
    """A layer that is used twice, or two layers with one weight between them."""
    inner = nn.Linear(8, 8)
    again = nn.Linear(8, 8) if tied else inner
    again.weight = inner.weight
    return Net(
        lambda m, x: m.head(m.again(torch.tanh(m.inner(x)))), inner=inner, again=again, head=nn.Linear(8, CLASSES)
    )


def _tokens() -> nn.Module:
    """Tokens that repeat within an example, one of them padding; their embedding is normalised with gains."""

    def forward(m: Any, x: Tensor) -> Tensor:
        tokens = (2 * x).round().long().remainder(5)
        return m.head(m.norm(m.embedding(tokens)).mean(-2))

    layers = {"embedding": nn.Embedding(5, 6, padding_idx=0), "norm": nn.LayerNorm(6)}
    return Net(forward, **layers, head=nn.Linear(6, CLASSES, bias=False))


def _recurrent(kind: Callable[..., nn.Module]) -> nn.Module:
    """A recurrent layer over positions; its matrices are used at each."""
    layer = kind(4, 5, batch_first=True)
    return Net(lambda m, x: m.head(m.layer(x)[0][:, -1]), layer=layer, head=nn.Linear(5, CLASSES))


def _positions() -> nn.Module:
    """The same layer at every position, where gradients add up."""
    return Net(lambda m, x: m.head(torch.tanh(m.inner(x)).mean(1)), inner=nn.Linear(4, 6), head=nn.Linear(6, CLASSES))


def _gains() -> nn.Module:
    """Parameters of its own, that belong to no layer."""
    own = {"gain": nn.Parameter(torch.ones(8)), "shift": nn.Parameter(torch.zeros(CLASSES))}
    return Net(lambda m, x: m.head(x * m.gain) + m.shift, **own, head=nn.Linear(8, CLASSES, bias=False))


def _attentive() -> nn.Module:
    """Attention over positions."""
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    return Net(
        lambda m, x: m.head(m.attention(x, x, x, need_weights=False)[0].mean(1)),
        attention=attention, head=nn.Linear(4, CLASSES),
    )  # fmt: skip


def _hooked() -> nn.Module:
    """A hook that brings each example's gradient to one length on its way back: that of twice a loss is the same."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.inner(x).tanh()
        if h.requires_grad:
            h.register_hook(lambda g: g / (g.norm(dim=-1, keepdim=True) + 1e-30))
        return m.head(h)

    return Net(forward, inner=nn.Linear(8, 6), head=nn.Linear(6, CLASSES))


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
        ("a layer that is used twice", lambda: _twice(tied=False), (8,)),
        ("two layers with one weight", lambda: _twice(tied=True), (8,)),
        ("an embedding of tokens", _tokens, (7,)),
        ("grouped and dilated convolutions without bias", _convolutions, (1, 6, 6)),
        ("a convolution of signals and a slope", _signals, (2, 7)),
        ("a net in part frozen", _frozen, (8,)),
        ("a layer at every position", _positions, (5, 4)),
        ("an LSTM", lambda: _recurrent(nn.LSTM), (5, 4)),
        ("a GRU", lambda: _recurrent(nn.GRU), (5, 4)),
        ("attention", _attentive, (5, 4)),
        ("parameters outside layers", _gains, (8,)),
        ("gradients that a hook changes", _hooked, (8,)),
    )
)
