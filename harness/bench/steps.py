"""The step that is timed: forward, backward, clip, sum, SGD update; no noise, no data loading."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from harness import models
from harness.bench.plan import Workload
from harness.dp.clip import Clip, Flat
from harness.dp.engines.engine import Engine, PerExample, trainable
from harness.dp.engines.loop import Loop
from harness.dp.loss import Batch, CrossEntropy
from harness.dp.method import Method
from harness.dp.native.memory import keep_freed_memory
from harness.dp.optimizer import SGD
from harness.dp.random import Stream
from harness.dp.release import Bounded, Relation
from harness.dp.tree import Tree
from harness.running.train import Streams, event_of, start, step

LOSS, CLIP, RATE = CrossEntropy(), Flat(1.0), 1e-3
FEW = 8  # examples on which an engine is compared with the loop in float64
Step = Callable[[], Tensor | None]


def build(workload: Workload, size: int, dtype: torch.dtype, device: str) -> tuple[nn.Module, Batch]:
    """The model of a workload, and `size` random examples: always the same ones."""
    keep_freed_memory()  # a plain step alone gains by it as well
    rng = torch.Generator().manual_seed(0)
    shape = (size, *workload.shape)
    if workload.tokens is None:
        x = torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)
    else:
        x = torch.randint(workload.tokens, shape, generator=rng)
    y = torch.randint(workload.classes, (size,), generator=rng)
    named = (workload.model, workload.shape, workload.classes)
    model = models.build(*named, seed=0, tokens=workload.tokens).to(device, dtype)
    return model, Batch(x.to(device), y.to(device))


def clipped(engine: PerExample, clip: Clip, model: nn.Module, w: Tree, batch: Batch) -> Bounded:
    """One call of an engine."""
    return engine.bounded(LOSS, clip, model, w, batch, None, 1.0, Relation.ADD_OR_REMOVE)


class PrivateStep:
    """The step with an engine; a call returns the clipped sum, flat. `worked`: who did it, on how many at once."""

    def __init__(self, engine: PerExample, model: nn.Module, batch: Batch) -> None:
        self.engine, self.model, self.batch, self.w = engine, model, batch, Tree.of(trainable(model))
        self.worked: dict[str, Any] = {}

    def __call__(self) -> Tensor:
        done = clipped(self.engine, CLIP, self.model, self.w, self.batch)
        total = done.releases["grad"].value.flat
        self.w.flat.add_(total, alpha=-RATE / len(self.batch))
        self.worked = {"engine": done.observed.engine, "microbatch": done.observed.microbatch}
        return total


# Baselines ------------------------------------------------------------------------------------------------


def plain(model: nn.Module, batch: Batch) -> Step:
    """The step without privacy, as PyTorch's users write it."""
    sgd = torch.optim.SGD(trainable(model).values(), lr=RATE)

    def one() -> None:
        sgd.zero_grad()
        LOSS.per_example(model(batch.x), batch.y).mean().backward()
        sgd.step()

    return one


def channels_last(model: nn.Module, batch: Batch) -> Step:
    """The plain step on channels-last tensors."""
    model = model.to(memory_format=torch.channels_last)
    return plain(model, Batch(batch.x.contiguous(memory_format=torch.channels_last), batch.y))


def compiled(model: nn.Module, batch: Batch) -> Step:
    """The plain step with the model behind `torch.compile`."""
    model.compile()
    return plain(model, batch)


BASELINES: dict[str, Callable[[nn.Module, Batch], Step]] = {
    "plain": plain,
    "plain-channels-last": channels_last,
    "plain-compiled": compiled,
}


def baselines(model: nn.Module, with_compiled: bool) -> Iterator[str]:
    """The baselines that mean something for a model."""
    yield "plain"
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        yield "plain-channels-last"
    if with_compiled:
        yield "plain-compiled"


def stepper(name: str, engine: PerExample | None, model: nn.Module, batch: Batch) -> Step:
    """A baseline's step, or that of an engine, on a copy of the model: some engines leave traces on theirs."""
    own = copy.deepcopy(model)
    return BASELINES[name](own, batch) if engine is None else PrivateStep(engine, own, batch)


# Checks ---------------------------------------------------------------------------------------------------


def distance(total: Tensor, truth: Tensor) -> float:
    """Relative distance of two flat sums, computed in float64."""
    a, b = total.double(), truth.double()
    return float((a - b).square().sum().sqrt() / b.square().sum().sqrt())


def error(engine: PerExample, workload: Workload, device: str) -> float:
    """Relative distance of an engine's clipped sum from the loop's in float64.

    On a few examples, half of which the clipping norm shortens. NaN where the engine's sum is.
    """
    model, batch = build(workload, FEW, torch.float64, device)
    w = Tree.of(trainable(model))
    norms = clipped(Loop(), CLIP, model, w, batch).observed.norms
    assert norms is not None
    clip = Flat(float(norms.median()))
    sums = [clipped(e, clip, copy.deepcopy(model), w, batch).releases["grad"].value.flat for e in (engine, Loop())]
    return distance(*sums)


# The rest of a private step -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ready(Engine):
    """Hands back a release made beforehand."""

    release: Bounded | None = None

    def bounded(self, *args: Any, **kwargs: Any) -> Bounded:
        assert self.release is not None
        return self.release


def outside(engine: PerExample, model: nn.Module, batch: Batch) -> Callable[[], None]:
    """A whole private step whose engine has nothing to do: what is left is noise, optimizer and ledger."""
    method = Method(engine=engine, clip=CLIP, optimizer=SGD(RATE, 0.9))
    p = start(method, model, 1)
    method = replace(method, engine=Ready(clipped(engine, CLIP, model, p.w, batch)))

    def one() -> None:
        rng = Streams(Stream(1, "noise", p.step), Stream(1, "path", p.step))
        done = step(method, model, p.w, batch, p.parts, 1.0, len(batch), rng)
        p.w, p.parts, p.step = done.w, done.parts, p.step + 1
        p.ledger.add(event_of(method, done.sigmas, 50_000, len(batch), p.step))

    return one


# What an engine would do --------------------------------------------------------------------------------


def explained(workload: Workload, batch: int, device: str) -> list[list[str]]:
    """A row for each parameter, below a header: the way to its norm, and the estimated cost of every way."""
    from harness.dp.engines.taped.explain import explain

    model, examples = build(workload, batch, torch.float32, device)
    rows = explain(LOSS, model, Tree.of(trainable(model)), examples)
    return [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)] if rows else [["no parameters"]]


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(one)}" for key, one in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)
