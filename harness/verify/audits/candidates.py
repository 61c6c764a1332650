"""Chooses the pair of neighbours, among simple ones, whose difference comes nearest to the declared sensitivity.

Data sets and target are the adversary's to choose, since a guarantee holds for all of them. They are chosen before any
run, by the method's own engine, so that no run depends on the choice.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from harness.dp.method import Method
from harness.dp.release import Relation
from harness.running.train import start
from harness.verify.audits.canary import AuditTask, Refused
from harness.verify.audits.pair import Heard, Neighbours, PairObserver

FEW = (1, 3)  # examples beside the target that are tried, and all
NEARBY = 0.01  # by how much copies of one example differ, of its size
LOUD = 1e3  # how much larger an outlier is
BETTER = 1.02  # what a later candidate must bring: the first ones are small and fast
DRAWS = 8  # batches and views that a candidate is judged by
CLIMB = 60  # random moves of the best


def strongest(method: Method, task: AuditTask, rate: float) -> Neighbours:
    """The pair of the largest reach. Raises Refused where the engine takes none, or no target moves a release.

    A reach of 1 is no reason to stop: where a declared sensitivity is too small, more can be found.
    """
    if refused := method.engine.accepts(method.loss, method.clip, task.body):
        raise Refused(refused)
    best: tuple[float, Neighbours] | None = None
    reason = ""
    model = copy.deepcopy(task.body).train()  # one for all: an engine tries a model once, and that takes longest
    for pair in candidates(method.sampler.relation, task):
        try:
            there = reach(method, pair, rate, model)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            reason = str(error)
            continue
        if best is None or there > BETTER * best[0]:
            best = there, pair
    if best is None:
        raise Refused(reason)
    if not best[0] > 0:
        raise Refused("no target that was tried moves a release")
    return climbed(method, *best, rate, model)


def reach(method: Method, pair: Neighbours, rate: float, model: nn.Module | None = None) -> float:
    """How far a pair lies apart in the releases of a first step, over how far it may.

    `model` is a copy of the pair's, by default a new one.
    """
    batch = max(1, round(rate * pair.n_train))
    observer = PairObserver(method, pair, min(1.0, method.clip.ceiling / 2), batch, 0, DRAWS)
    if model is not None:
        observer.model = model
    p = start(method, observer.model, 1)
    at = Heard(method.path.probe(p.w, p.parts.path), p.parts.clip, 0)
    at.releases = observer.raw(observer.drawn(0)[0].present, at)
    return observer.expected(at).reach


def climbed(method: Method, best: float, pair: Neighbours, rate: float, model: nn.Module) -> Neighbours:
    """The pair after a random ascent of its reach: by patterns that crops and flips hardly change, and by any."""
    rng, size = torch.Generator().manual_seed(0), 1.0
    for number in range(CLIMB):
        move = patterned if number % 2 else jittered
        x = move(pair.x, size, rng)
        other = None if pair.x_other is None else move(pair.x_other, size, rng)
        ahead = dataclasses.replace(pair, x=x, x_other=other, story={**pair.story, "climbed": True})
        there = reach(method, ahead, rate, model)
        if there > best:
            best, pair = there, ahead
        else:
            size = max(0.05, 0.95 * size)
    return pair


def jittered(x: Tensor, size: float, rng: torch.Generator) -> Tensor:
    """Each of the examples [B, ...], plus noise of a size relative to the mean of theirs."""
    return x + size * x.abs().mean() * torch.randn(x.shape, generator=rng).to(x)


def patterned(x: Tensor, size: float, rng: torch.Generator) -> Tensor:
    """Each of the examples [B, ...], plus random multiples of the two patterns."""
    shape = (2, len(x), *[1] * (x.ndim - 1))
    a, b = size * torch.randn(shape, generator=rng).to(x)
    return x + a * torch.ones_like(x) + b * ramp(x)


def ramp(x: Tensor) -> Tensor:
    """From -1 to 1 along the rows of images, or the last dimension of vectors; of the shape of `x` [B, ...]."""
    along = max(1, x.ndim - 2)
    shape = [n if i == along else 1 for i, n in enumerate(x.shape)]
    return torch.linspace(-1, 1, x.shape[along]).to(x).view(shape).expand_as(x)


# Candidates -----------------------------------------------------------------------------------------------


def crowds(task: AuditTask) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Named examples beside the target: a few of the task, or as many near copies of its first, or of a ramp."""
    for count in sorted({min(few, len(task.x)) for few in (*FEW, len(task.x))}):
        yield "examples", task.x[:count], task.y[:count]
        noise = torch.randn(task.x[:count].shape, generator=torch.Generator().manual_seed(count)).to(task.x)
        for name, one in (("near copies", task.x[:1]), ("near copies of a ramp", ramp(task.x[:1]))):
            size = one.square().mean().sqrt()
            yield name, one + NEARBY * size * noise, task.y[:1].expand(count)


def targets(task: AuditTask) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Examples [1, ...] with a label [1], each with a name: outliers, patterns, and what contradicts the others."""
    first, last = task.x[:1], task.x[-1:]
    inputs = {
        "an outlier": LOUD * last, "its negative": -LOUD * last, "an example": last, "the first, negated": -first,
        "flat": torch.ones_like(first), "flat, on a ramp": torch.ones_like(first) + 3 * ramp(first),
        "nothing": torch.zeros_like(first),
    }  # fmt: skip
    for name, x in inputs.items():
        for label in (int(task.y[0]), (int(task.y[0]) + 1) % task.classes):
            yield f"{name}, label {label}", x, task.y.new_tensor([label])


def candidates(relation: Relation, task: AuditTask) -> Iterator[Neighbours]:
    """Data sets with each target, and without it; or with its negative in its place, under either label."""
    for others, x_others, y_others in crowds(task):
        for name, x, y in targets(task):
            story = {"others": others, "target": name}
            pair = Neighbours(torch.cat([x, x_others]), torch.cat([y, y_others]), task.body, story=story)
            if relation is not Relation.REPLACE_ONE:
                yield pair
                continue
            for label in {int(y), (int(y) + 1) % task.classes}:
                yield dataclasses.replace(pair, x_other=-x, y_other=torch.full_like(y, label))
