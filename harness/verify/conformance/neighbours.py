"""Checks of sensitivity: no example moves a release further than is declared."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from harness.dp.engines.engine import PerExample
from harness.dp.engines.loop import Loop
from harness.dp.loss import Batch
from harness.dp.release import Relation, Release
from harness.dp.tree import Tree
from harness.running.train import Progress
from harness.verify.conformance.subject import SIGMA, Contrast, Inapplicable, Subject, Toy, Violation

STEPS_ON = (9, 10, 99, 100, 1000, 10_000, 100_000)  # numbers handed to the engine


def equals_loop(s: Subject) -> None:
    """the engine's releases are those of the naive loop, or sums of what single examples release"""
    if s.method.loss.coupled:
        name = type(s.method.loss).__name__
        raise Inapplicable(f"{name} couples the examples of a batch: no example has a contribution of its own")
    compared(s, s.prepared(s.data.x, s.data.y))


def compared(s: Subject, batch: Batch, of: str = "", at: Progress | None = None) -> None:
    """Judge the releases of a prepared batch by those of its examples; by none, where the loss couples them."""
    if s.method.loss.coupled:
        return
    ours, theirs = s.releases(batch, at=at), _oracle(s, batch, at)
    if list(ours) != list(theirs):
        raise Violation(f"the engine releases {list(ours)}, the naive loop {list(theirs)}")
    for name, value in theirs.items():
        off = float((ours[name].value - value).norm() / (value.norm() + 1e-12))
        if not off <= 1e-6:
            raise Violation(
                f'the engine\'s release "{name}"{of} differs by {off:.1e} relative from what is due, example by'
                " example: make it a sum of one bounded contribution for each example",
                evidence=f"{off:.2g} relative",
            )


def _oracle(s: Subject, batch: Batch, at: Progress | None) -> dict[str, Tree]:
    """What the engine must release: one backward pass for each example, or the sum of its releases of single ones."""
    m = s.method
    if isinstance(m.engine, PerExample):
        loop = dataclasses.replace(m, engine=Loop())
        return {name: r.value for name, r in s.releases(batch, loop, at).items()}
    total: dict[str, Tree] = {}
    for x, y in zip(batch.x.split(1), batch.y.split(1), strict=True):
        for name, r in s.releases(Batch(x, y), at=at).items():
            total[name] = total[name] + r.value if name in total else r.value
    return total


def within_sensitivity(s: Subject) -> None:
    """no example moves a release by more than its declared sensitivity"""
    s.noises()
    for x, y, story in neighbourhoods(s.data):
        neighbours(s, x, y, story)


def within_sensitivity_later(s: Subject) -> None:
    """nor does it after some steps of training"""
    s.noises()
    for p in s.reached[1::2]:
        scaled(s, 6, f"after {p.step} steps, ", at=p)


def within_sensitivity_much_later(s: Subject) -> None:
    """nor does it at any step up to the 100,000th, and a release has the multiplier that its step plans"""
    s.noises()
    # Aged by empty batches, which are legal steps and cost next to nothing: all that counts steps counts them.
    oldest = s.aged[-1]
    for p in [*s.aged, *(dataclasses.replace(oldest, step=step) for step in STEPS_ON)]:
        scaled(s, 3, f"at step {p.step}, ", at=p)
        _planned(s, p)


def _planned(s: Subject, p: Progress) -> None:
    """Judge the multipliers of a step's releases."""
    releases = s.releases(s.prepared(s.data.x[:3], s.data.y[:3]), at=p)
    plan = s.method.engine.split(s.method.clip, SIGMA, p.step)
    done = {name: r.sigma for name, r in releases.items()}
    if done.keys() != plan.keys() or not all(math.isclose(done[name], plan[name]) for name in plan):
        raise Violation(
            f"at step {p.step} the releases have the multipliers {done}, the plan says {plan}: Engine.split must name"
            " what every step releases",
            evidence="the releases are not the plan's",
        )


def within_sensitivity_float32(s: Subject) -> None:
    """nor does it in float32"""
    s.noises()
    single = s.single()
    for x, y, story in neighbourhoods(single.data):
        neighbours(single, x, y, f"float32, {story}", slack=1e-4)


def within_sensitivity_sequence(s: Subject) -> None:
    """nor does it in a sequence model whose gradients nearly cancel"""
    s.noises()
    m, model = s.method, Contrast()
    reason = m.engine.accepts(m.loss, m.clip, model)
    if reason:
        raise Inapplicable(f"the engine takes no such model: {reason}")
    contrast = dataclasses.replace(s, model=model)
    try:
        contrast.prepared(torch.zeros(1, 2, 64), torch.zeros(1, dtype=torch.long))
    except ValueError as error:
        raise Inapplicable(f"the loss takes no sequences: {error}") from error
    for positions in (2, 5):
        rng = torch.Generator().manual_seed(positions)
        x = 1e4 * torch.randn(32, positions, 64, generator=rng)
        x[:, 1] = x[:, 0] + 3 * torch.randn(32, 64, generator=rng)
        # One by one: in a sum, an example that is not clipped hides behind the others.
        for i in range(len(x)):
            story = f"{positions} positions, the first two alike, float32"
            neighbours(contrast, x[i : i + 1], torch.tensor([i % 3]), story, slack=1e-4)


def replaced(s: Subject) -> None:
    """replacing an example moves no release by more than its declared sensitivity"""
    s.noises()
    if s.method.sampler.relation is not Relation.REPLACE_ONE:
        raise Inapplicable("its sampler claims add-or-remove neighbours")
    x, y = s.data.x[:6], s.data.y[:6]
    for p in s.reached[::4]:
        whole = s.releases(s.prepared(x, y), at=p)
        for i, scale, label in itertools.product(range(len(y)), (1.0, -1.0, 1e4), range(3)):
            x2, y2 = x.clone(), y.clone()
            x2[i], y2[i] = scale * x[i], label  # the most opposite gradients: other labels, negated inputs
            story = f"replacing an example by {scale:g} times itself with label {label}"
            moved(whole, s.releases(s.prepared(x2, y2), at=p), story)


def statistics_refused(s: Subject) -> None:
    """a model that normalises by statistics of the batch is refused, or its examples are taken apart"""
    s.noises()
    channels = s.data.x.shape[1]
    norms: dict[int, Any] = {4: nn.BatchNorm2d, 3: nn.BatchNorm1d, 2: nn.BatchNorm1d}
    norm = norms[s.data.x.ndim](channels).double()
    mixing = dataclasses.replace(s, model=nn.Sequential(norm, *_layers(s.model)))
    if s.method.engine.accepts(s.method.loss, s.method.clip, mixing.model):
        return
    x, y = s.data.x[:6].clone(), s.data.y[:6]
    x[0] *= 1e4
    try:
        mixing.releases(mixing.prepared(x, y))
    except (ValueError, RuntimeError):  # an engine that cannot, says so in its own way
        return
    try:
        neighbours(mixing, x, y, "behind a BatchNorm, one of them large")
    except Violation as violation:
        raise Violation(
            f"{violation}: refuse models with BatchNorm in Engine.accepts, for their examples depend on each other",
            violation.evidence,
        ) from None


def _layers(model: nn.Module) -> list[nn.Module]:
    return list(model) if isinstance(model, nn.Sequential) else [model]


def neighbourhoods(data: Toy) -> Iterator[tuple[Tensor, Tensor, str]]:
    """Batches of six that are hard to bound: ordinary, alike, tiny, enormous, and not finite."""
    x, y = data.x[:6], data.y[:6]
    yield x, y, "ordinary examples"
    yield x[:1].expand_as(x).clone(), y[:1].expand_as(y).clone(), "six copies of one example"
    for scale in (1e-30, 1e4, 1e30):
        yield x * scale, y, f"inputs times {scale:g}"
    for value in (math.nan, math.inf, -math.inf):
        spoilt = x.clone()
        spoilt[2].view(-1)[0] = value
        yield spoilt, y, f"an example with an input of {value}"


def scaled(s: Subject, count: int, story: str = "", at: Progress | None = None) -> None:
    """`neighbours` of the first examples, as they are and enormous."""
    for scale in (1.0, 1e4):
        neighbours(s, s.data.x[:count] * scale, s.data.y[:count], f"{story}inputs times {scale:g}", at)


def neighbours(
    s: Subject,
    x: Tensor,
    y: Tensor,
    story: str,
    at: Progress | None = None,
    slack: float = 1e-6,
    only: Iterable[int] | None = None,
) -> None:
    """Remove each example in turn (`only` those), or under replace-one put another for it.

    Raises Violation if that moves too much.
    """
    batch = s.prepared(x, y)  # before one is removed: what is drawn for the others does not depend on it
    whole = s.releases(batch, at=at)
    for i in range(len(y)) if only is None else only:
        if s.method.sampler.relation is not Relation.REPLACE_ONE:
            keep = torch.arange(len(y)) != i
            other, what = Batch(batch.x[keep], batch.y[keep]), "removing one example"
        else:
            x2, y2 = x.clone(), y.clone()
            x2[i], y2[i] = -x[i], (y[i] + 1) % 3
            other, what = s.prepared(x2, y2), "replacing one example"
        moved(whole, s.releases(other, at=at), f"{story}: {what}", slack)


def moved(ours: dict[str, Release], theirs: dict[str, Release], story: str, slack: float = 1e-6) -> float:
    """How far the releases of neighbours lie apart, in sensitivities: the largest. Raises Violation above 1."""
    if list(ours) != list(theirs):
        raise Violation(
            f"{story} changes which values are released, from {list(ours)} to {list(theirs)}",
            evidence=f"{len(ours)} releases against {len(theirs)}",
        )
    largest = 0.0
    for name, r in ours.items():
        other = theirs[name]
        if r[1:] != other[1:]:
            raise Violation(
                f'{story} changes the declared sensitivity, sigma or scale of "{name}", from {r.sensitivity:.6g},'
                f" {r.sigma:.6g} and {r.scale} to {other.sensitivity:.6g}, {other.sigma:.6g} and {other.scale}: compute"
                " them from public values",
                evidence=f"noise {_factor(r, other):.3g} times as large",
            )
        if (r.value.layout, r.value.flat.dtype) != (other.value.layout, other.value.flat.dtype):
            raise Violation(
                f'{story} changes the shape or the dtype of "{name}", from {r.value} to {other.value}, and noise'
                " hides neither"
            )
        off = float(r.in_units(r.value - other.value).norm())
        ratio = off / r.sensitivity if r.sensitivity else math.inf
        if not ratio <= 1 + slack:
            raise Violation(
                f'{story} moves the release "{name}" by {off:.6g}, its declared sensitivity is {r.sensitivity:.6g}:'
                " declare what one example can move, and bound each example's whole contribution by it",
                evidence="not a number" if math.isnan(ratio) else f"{ratio:.3g} times the sensitivity",
                ratio=ratio,
            )
        largest = max(largest, ratio)
    return largest


def _factor(ours: Release, theirs: Release) -> float:
    """The larger of the two declared deviations, of whichever tensor they differ most in, over the smaller."""
    deviations = [
        [r.sensitivity * r.sigma * (r.scale[name] if r.scale else 1.0) for r in (ours, theirs)]
        for name in ours.value.names
    ]
    return max(max(pair) / max(min(pair), 1e-300) for pair in deviations)
