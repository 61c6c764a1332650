"""Jacobians of unit embeddings, one for each row of a batch, piece by piece.

A batch of R rows has R * d gradients of embedding coordinates, each as large as the model: too many to hold. They are
read off a tape of one forward pass by d backward passes to the layers' outputs, and handed out in pieces that are as
small as their user likes: `Block`, a slice of the Jacobian, or `Factors`, whose products give it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.dp.engines.engine import Unserved, trainable
from harness.dp.engines.rows import AT_ONCE, factor_squares, squared_norms, weighted_rows, wide
from harness.dp.engines.survey import watching
from harness.dp.engines.tape import Run, Tape, repeated, taping
from harness.dp.engines.taped.gradients import Gradient, Outer
from harness.dp.engines.taped.patches import Patches
from harness.dp.engines.taped.plan import Plan, gradients
from harness.dp.engines.taped.trial import plan_for
from harness.dp.engines.weights import replaced
from harness.dp.loss import Batch, Loss
from harness.dp.loss.contrast import unit
from harness.dp.tree import Tree

HELD = 64 << 20  # bytes of a block


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


class Block(NamedTuple):
    """The Jacobians with respect to m parameters: [R, m, d], float64, as they are added up."""

    columns: Tensor


class Factors(NamedTuple):
    """The Jacobian of a weight whose gradients are outer products: row r has g[r, :, k] a[r]^T for coordinate k.

    `a` [R, c] and `g` [R, p, d].
    """

    a: Tensor
    g: Tensor


def jacobians(done: Pass, model: nn.Module, w: Tree, rows: Tensor) -> dict[str, list[Gradient]]:
    """The gradients of the d embedding coordinates, of all rows, by parameter: every use of it is added up."""
    found: dict[str, list[Gradient]] = {}
    for coordinate in range(done.units.shape[1]):
        for name, gradient in _row_gradients(done, model, w, rows, coordinate).items():
            found.setdefault(name, []).append(gradient)
    return found


def weighted(found: Mapping[str, list[Gradient]], v: Tensor, w: Tree) -> Tensor:
    """The flat sum over rows r and coordinates k of v[r, k] times the gradient of coordinate k of row r; `v` [R, d].

    In float64, as `v` is. It is made of the very gradients whose norms were read. Another backward pass would round
    otherwise, and where gradients cancel on their way back, inputs may make any number of that.
    """
    total = torch.zeros_like(w.flat, dtype=torch.float64)
    views = w.layout.views(total)
    for name, each in found.items():
        out = views[name]
        if (positions := factored(each)) is None:
            for weights, gradient in zip(v.unbind(1), each, strict=True):
                out += weighted_rows(weights, gradient.rows.double())
            continue
        for a, g, weights in zip(*(t.split(AT_ONCE) for t in (*positions, v)), strict=True):
            outputs = torch.einsum("rtpk,rk->rtp", g.double(), weights)
            out += (outputs.flatten(0, 1).mT @ a.double().flatten(0, 1)).view_as(out)
    return total


def pieces(found: Mapping[str, list[Gradient]], d: int) -> Iterator[Block | Factors]:
    """The Jacobians of all rows, of `d` coordinates, in pieces: every parameter is in one. Blocks are small."""
    small: list[Tensor] = []
    size = 1
    for each in found.values():
        positions = factored(each)
        if positions is None:
            jacobian = torch.stack([g.rows.flatten(1) for g in each], 2).double()
            size = _size(jacobian)
            if jacobian.shape[1] < size:
                small.append(jacobian)
            else:
                yield from map(Block, jacobian.split(size, 1))
            continue
        a, g = positions
        if a.shape[1] == 1 and a.dtype is torch.float32:  # whose squares float64 holds
            yield Factors(a[:, 0], g[:, 0])
            continue
        for outputs in g.split(max(1, _size(g) // a.shape[2]), 2):
            yield Block(torch.bmm(a.double().mT, outputs.double().flatten(2)).view(len(a), -1, d))
    if small:
        yield from map(Block, torch.cat(small, 1).split(size, 1))


def _size(like: Tensor) -> int:
    """How many parameters a block holds, from a tensor [R, ..., d]."""
    return max(1, HELD // (len(like) * like.shape[-1] * 8))


def _row_gradients(done: Pass, model: nn.Module, w: Tree, rows: Tensor, coordinate: int) -> dict[str, Gradient]:
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
    # A rule may repeat an input in its place.
    fresh = [replace(call, inputs=list(call.inputs)) for call in calls]
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
    patches = [g for g in each if isinstance(g, Patches) and g.geometry.groups == 1 and len(g.geometry.kernel) < 3]
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
