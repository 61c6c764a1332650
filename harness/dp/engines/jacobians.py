"""Jacobians of unit embeddings, one for each row of a batch, piece by piece.

A batch of R rows has R * d gradients of embedding coordinates, each as large as the model: too many to hold. They are
read off a tape of one forward pass by d backward passes to the layers' outputs, and handed out in pieces that are as
small as their user likes: `Block`, a slice of the Jacobian, or `Factors`, whose products give it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.dp.contrast import unit
from harness.dp.engines.engine import Unserved, trainable
from harness.dp.engines.gradients import Gradient, Outer, Patches
from harness.dp.engines.plan import Plan, gradients
from harness.dp.engines.rows import factor_squares, squared_norms, wide
from harness.dp.engines.survey import probe_batch, signature, untouched, watching
from harness.dp.engines.tape import Run, Tape, repeated, taping
from harness.dp.engines.trial import plan_for
from harness.dp.engines.weights import replaced
from harness.dp.loss import Batch, Loss
from harness.dp.tree import Tree

HELD = 64 << 20  # bytes of a block
UNLIKE = (
    1e-2  # times their size by which sums may differ from what is due: float32 of a few rows differs by 1e-5
)
_tried: WeakKeyDictionary[nn.Module, set[Any]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Coordinate(Loss):
    """One coordinate of each row's unit embedding; None: a mixture of them all, to try a plan on."""

    index: int | None = None

    def per_example(self, outputs: Tensor, y: Tensor) -> Tensor:
        units = unit(outputs)
        if self.index is not None:
            return units[:, self.index]
        return units @ torch.arange(1, units.shape[1] + 1, device=units.device).double().sqrt()


class Pass(NamedTuple):
    """A taped forward pass: unit embeddings [R, d] with their graph, and the parameters to differentiate it by."""

    units: Tensor
    sources: dict[str, Tensor]  # a parameter, or a copy of it for each row, [R, ...]
    copies: frozenset[str]
    tape: Tape
    plan: Plan


def forward(model: nn.Module, w: Tree, rows: Tensor) -> Pass:
    """Run `model`, which holds `w` until all is read off, on R > 0 rows.

    Raises `Unserved` where the rows do not have Jacobians of their own.
    """
    batch = Batch(rows, torch.zeros(len(rows), dtype=torch.long, device=rows.device))
    try:
        plan = plan_for(Coordinate(), model, w.views, batch)
    except ValueError as error:
        raise Unserved(str(error)) from error
    key = signature(Coordinate(), model, w.views, batch)
    if key not in _tried.setdefault(model, set()):
        with untouched(model, rows.device):
            refuse_nonlinear(_taped(model, w, probe_batch(batch).x, plan, plan.copy), plan, w)
        _tried[model].add(key)
    done = _taped(model, w, rows, plan, plan.copy)
    return _taped(model, w, rows, plan, True) if done.tape.disturbed and not plan.copy else done


def _taped(model: nn.Module, w: Tree, rows: Tensor, plan: Plan, copy: bool) -> Pass:
    parameters = trainable(model)
    leaves = {name: parameters[name] for name in w}
    copies = {name: repeated(w[name].detach(), len(rows)).requires_grad_() for name in plan.free}
    random: set[str] = set()
    tapes = taping(model, plan.paths, copy, plan.spread, len(rows))
    with tapes as tape, watching(model, random), replaced(model, copies):
        outputs = model(rows)
    if random:  # where a row is not finite, the others are passed again: new draws would move all of them
        raise Unserved(f"{', '.join(sorted(random))} draws random numbers: leave dropout and the like out")
    return Pass(unit(outputs), {**leaves, **copies}, frozenset(copies), tape, plan)


def refuse_nonlinear(done: Pass, plan: Plan, w: Tree) -> None:
    """Raise `Unserved` where a weighted pass back does not give the weighted sum of the rows' Jacobians.

    Norms are read off one pass for each coordinate, and the sum is that of another pass. A hook that clamps, normalises
    or replaces gradients on their way would change what is summed and not what was measured. Of a few made-up rows,
    coordinates weighed by numbers of either sign and of all sizes are compared with the sum over single coordinates;
    that rows add up, the plan's trial has seen.
    """
    units = done.units.detach()
    if units.shape[1] == 1:  # of length one, so 1 or -1: all gradients are rounding
        return
    one = [row.expand_as(units) for row in torch.eye(units.shape[1]).to(units)]
    each = torch.stack([pull(done, cotangent, w).double() for cotangent in one])
    rng = torch.Generator().manual_seed(0)
    for size in (1.0, 1e-3, 1e-6, 1e3):
        v = size * torch.randn(len(each), generator=rng, dtype=torch.float64).to(units)
        due, found = v.double() @ each, pull(done, v.expand_as(units), w).double()
        scale = (v.double()[:, None] * each).square().sum().sqrt()
        if not plan.linear or float((found - due).norm()) > UNLIKE * float(scale):
            raise Unserved(
                "the gradient of weighted similarities is not the weighted sum of their gradients: a hook or a function"
                " of the model's own changes gradients on their way back, and what is summed would not be what was"
                " measured. Take it out"
            )


def pull(done: Pass, cotangents: Tensor, w: Tree) -> Tensor:
    """The flat gradient of sum(cotangents * units), both [R, d]: one backward pass."""
    sources = [done.sources[name] for name in w.names]
    grads = torch.autograd.grad(
        done.units, sources, cotangents, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    total = [g.sum(0) if name in done.copies else g for name, g in zip(w.names, grads, strict=True)]
    return torch.cat([g.reshape(-1) for g in total])


class Block(NamedTuple):
    """The Jacobians with respect to m parameters, or to what stands for them: [R, m, d]."""

    columns: Tensor


class Factors(NamedTuple):
    """The Jacobian of a weight whose gradients are outer products: row r has g[r, :, k] a[r]^T for coordinate k.

    `a` [R, c] and `g` [R, p, d].
    """

    a: Tensor
    g: Tensor


def pieces(done: Pass, model: nn.Module, w: Tree, rows: Tensor) -> Iterator[Block | Factors]:
    """The Jacobians of all rows in pieces: every parameter is in one, all its uses added up. Blocks are small."""
    found: dict[str, list[Gradient]] = {}
    for coordinate in range(done.units.shape[1]):
        for name, gradient in _row_gradients(done, model, w, rows, coordinate).items():
            found.setdefault(name, []).append(gradient)
    count, d = done.units.shape
    size = max(1, HELD // (d * count * w.flat.element_size()))
    small: list[Tensor] = []
    for name in list(found):
        each = found.pop(name)
        positions = factored(each)
        if positions is None:
            jacobian = torch.stack([wide(g.rows).flatten(1) for g in each], 2)
            if jacobian.shape[1] < size:
                small.append(jacobian)
            else:
                yield from map(Block, jacobian.split(size, 1))
            continue
        del each
        a, g = positions
        if a.shape[1] == 1:
            yield Factors(a[:, 0], g[:, 0])
            continue
        for outputs in g.split(max(1, size // a.shape[2]), 2):
            yield Block(torch.bmm(a.mT, outputs.flatten(2)).view(count, -1, d))
    if small:
        yield from map(Block, torch.cat(small, 1).split(size, 1))


def _row_gradients(
    done: Pass, model: nn.Module, w: Tree, rows: Tensor, coordinate: int
) -> dict[str, Gradient]:
    """The gradients of one embedding coordinate, by rows: one backward pass to the layers' outputs."""
    calls, copies = done.tape.calls, [done.sources[name] for name in done.plan.free]
    ends: list[Any] = [edge for call in calls for edge in call.edges if edge is not None]
    ends += copies
    value = done.units[:, coordinate]
    grads = iter(torch.autograd.grad(value.sum(), ends, retain_graph=True, allow_unused=True) if ends else ())
    cotangents = [[None if edge is None else next(grads) for edge in call.edges] for call in calls]
    free = {
        name: g.unflatten(0, (-1, *w[name].shape[:1]))
        for name, g in zip(done.plan.free, grads, strict=True)
        if g is not None
    }
    fresh = [
        replace(call, inputs=list(call.inputs)) for call in calls
    ]  # a rule may repeat an input in its place
    taped = Run(value.detach(), fresh, cotangents, free, False)
    batch = Batch(rows, torch.zeros(len(rows), dtype=torch.long, device=rows.device))
    return gradients(done.plan, model, w.views, taped, Coordinate(coordinate), batch)


def factored(each: list[Gradient]) -> tuple[Tensor, Tensor] | None:
    """The d gradients of a weight as sum_t g_t a_t^T over T positions: a [R, T, c] and g [R, T, p, d].

    None but for linear layers, and convolutions without groups over lines or images. All d share the inputs `a`: unit
    embeddings depend on the whole output, so that every backward pass reaches the same calls.
    """
    if all(isinstance(g, Outer) for g in each):
        outer = [g for g in each if isinstance(g, Outer)]
        return wide(outer[0].a), torch.stack([wide(g.g) for g in outer], 3)
    patches = [
        g for g in each if isinstance(g, Patches) and g.geometry.groups == 1 and len(g.geometry.kernel) < 3
    ]
    if len(patches) < len(each):
        return None
    one, geometry = patches[0], patches[0].geometry.as_image()
    x = wide(one.x).flatten(0, 1)
    x = x if x.ndim == 4 else x.unsqueeze(2)
    a = F.unfold(x, geometry.kernel, geometry.dilation, geometry.padding, geometry.stride).mT
    a = a.reshape(len(one.x), -1, math.prod(one.shape[1:]))
    return a, torch.stack([wide(g.g).flatten(3).mT.flatten(1, 2) for g in patches], 3)


def energies(piece: Block | Factors) -> Tensor:
    """What a piece adds to the rows' squared Frobenius norms, [R], in float64."""
    if isinstance(piece, Block):
        return squared_norms(piece.columns)
    return factor_squares(piece.a) * factor_squares(piece.g)
