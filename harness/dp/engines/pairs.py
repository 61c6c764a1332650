"""Logit-DP: clips the gradient of every similarity of a contrastive loss (Kong et al., arXiv:2310.03104)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from harness.dp.clip import Clip, State
from harness.dp.engines.engine import Engine, Unserved
from harness.dp.engines.jacobians import Block, Factors, energies, forward, jacobians, pieces, weighted
from harness.dp.engines.memory import refuse_memory_once
from harness.dp.engines.rows import full_precision, product, squared_norms
from harness.dp.engines.taped.gradients import Gradient
from harness.dp.engines.weights import held
from harness.dp.engines.whole import refusal
from harness.dp.loss import Batch, Loss
from harness.dp.loss.contrast import InfoNCE
from harness.dp.native.memory import keep_freed_memory
from harness.dp.release import Bounded, Observed, Relation, Release
from harness.dp.tree import Tree

TILE = 4 << 20  # bytes of what is made for some pairs at a time
LARGEST = 1e15  # the norm of a Jacobian beyond which an example counts as not finite: float32 would overflow
EXACT = 64  # rounding units, and one for each coordinate, of terms that cancel in a squared norm


def sensitivity(bound: float, temperature: float, relation: Relation, batch: int | None = None) -> float:
    """How far sum_ij c_ij g_ij moves between neighbours, where c_ij = softmax_j(Z_ij) - [i = j] and |g_ij| <= `bound`.

    Z_ij lies in [-s, s], s = 1 / temperature, and depends on examples i and j alone, as g_ij does. With n examples, and
    by the argument in docs/contrastive.md, which also shows that no smaller number would do:

        addition or removal   2 bound (a + b),  replacement  2 bound (2a + b),
        a = (n - 1) / (n - 1 + e^(-2s)),  b = (n - 1) / (1 + (n - 1) e^(-2s)).

    Both grow with n: a to 1 and b to e^(2s), which is the answer for a batch of unknown size (`batch` None). Otherwise
    `batch` is public, and the most that either neighbour holds. For one example, where the sum is zero, the answer is
    that for two: noise needs a scale.
    """
    faint = math.exp(-2 / temperature)
    if batch is None:
        a, b = 1.0, 1 / faint if faint > 0 else math.inf
    else:
        others = max(batch, 2) - 1
        a, b = others / (others + faint), others / (1 + others * faint)
    return 2 * bound * (relation.moves * a + b)


@dataclass(frozen=True)
class Pairs(Engine):
    """The sum over pairs (i, j) of dL/dZ_ij times the clipped gradient of Z_ij, L the batch's summed InfoNCE loss.

    Z_ij = <u_i, v_j> / temperature is the logit as the softmax sees it, divided by the temperature before its gradient
    is clipped. Clipping norms are the rule's; the sensitivity is the engine's own (`sensitivity`). Where the batch has
    no fixed public size (add-or-remove neighbours) it is that for any size, unless `cap` gives a largest one: a
    batch's examples beyond the first `cap` are then left out. One more example may push another out, which is a
    replacement in a batch of `cap`, and is charged as one: the cap pays where e^(2 / temperature) is above it.

    An example whose embeddings are not finite, or whose Jacobian is longer than 1e15, is left out of the batch: that is
    a removal, decided by its own views. An empty batch and a batch of one give zero.

    The sum is made of the very Jacobians that gave the norms. No gradient of a pair is held beyond a tile of a block of
    parameters. With R = 2n rows, embeddings of width d and E
    numbers at the outputs of layers with parameters, memory is 4 R d E bytes, and time grows by n d backward passes and
    2 n^2 d P multiply-adds, P the parameters (far fewer for linear layers). Convolutions with groups, attention,
    recurrence and layers that no rule knows take 4 R d bytes for each of their parameters.
    """

    cap: int | None = None

    def __post_init__(self) -> None:
        if self.cap is not None and self.cap < 2:
            raise ValueError(f"a contrast needs two examples or more, not a cap of {self.cap}")

    def accepts(self, loss: Loss, clip: Clip, model: nn.Module) -> str | None:
        if not isinstance(loss, InfoNCE):
            return f"{type(loss).__name__} has no pairs: this engine serves InfoNCE"
        return refusal(clip, model)

    def reach(self, loss: InfoNCE, bound: float, batch: int, relation: Relation) -> float:
        """The sensitivity for gradients up to `bound`: `batch` counts only where neighbours keep it."""
        if relation is Relation.REPLACE_ONE:
            return sensitivity(bound, loss.temperature, relation, min(batch, self.cap or batch))
        if self.cap is not None:
            return sensitivity(bound, loss.temperature, Relation.REPLACE_ONE, self.cap)
        return sensitivity(bound, loss.temperature, relation)

    def note(self, loss: Loss, clip: Clip, batch: int, relation: Relation) -> str | None:
        if not isinstance(loss, InfoNCE):
            return None
        reach, naive = self.reach(loss, 1.0, batch, relation), 2 * batch
        return f"{reach:.4g} times the bound of a logit's gradient; {reach / naive:.3g} times the naive 2 n = {naive}"

    def bounded(
        self,
        loss: Loss,
        clip: Clip,
        model: nn.Module,
        w: Tree,
        batch: Batch,
        state: State,
        sigma: float,
        relation: Relation,
        step: int = 0,
    ) -> Bounded:
        reason = self.accepts(loss, clip, model)
        if reason or not isinstance(loss, InfoNCE):
            raise Unserved(str(reason))
        keep_freed_memory()
        bound = self.reach(loss, clip.sensitivity(state, Relation.ADD_OR_REMOVE), len(batch), relation)
        taken = min(len(batch), self.cap or len(batch))
        x = batch.x
        if taken:
            refuse_memory_once(loss, model, w.views, batch)
        total, losses = (
            torch.zeros_like(w.flat, dtype=torch.float64),
            x.new_full((taken,), math.nan, dtype=torch.float64),
        )
        clipped = torch.zeros((), dtype=torch.long, device=x.device)
        present = torch.arange(taken, device=x.device)
        while len(present):
            rows = x[present].flatten(0, 1)
            with held(model, w.views):
                done = forward(model, w, rows)
                good = examples(done.units.isfinite().all(1))
                if good.all():
                    with full_precision(rows.device):
                        found = jacobians(done, model, w, rows)
                        squares, energy = pair_squares(found, done.units.detach(), loss.temperature)
                    good = examples(energy <= LARGEST**2)
                if good.all():
                    norms = safe_norms(squares, energy, done.units.shape[1])
                    weights = clip.weights(norms.view(-1, 1), state).view_as(norms)
                    with full_precision(rows.device):
                        total = weighted(found, cotangents(loss, done.units.detach(), weights), w)
                    losses[present] = loss.of_units(done.units.detach())
                    clipped = (weights < 1).sum() // len(present)
                    break
            present = present[good]  # the rest is looked at anew, as if the others had never been drawn
        release = Release(w.with_flat(total), bound, clip.split(sigma)["grad"])
        absent = torch.tensor(taken - len(present), device=x.device)
        # n^2 pairs stand behind n examples: `clipped` is n times the share of pairs that were clipped.
        return Bounded({"grad": release}, Observed(losses, None, clipped, absent, "Pairs"))


def examples(rows: Tensor) -> Tensor:
    """What holds of both views of an example, [n], from what holds of its rows, [2n]."""
    return rows.view(-1, 2).all(1)


def cotangents(loss: InfoNCE, units: Tensor, weights: Tensor) -> Tensor:
    """The gradient [2n, d] of sum_ij weights_ij c_ij Z_ij with respect to the units; c_ij = softmax_j(Z_ij) - [i = j].

    In float64, with the logits where they would be without rounding: in [-1/temperature, 1/temperature].
    """
    s = 1 / loss.temperature
    c = loss.logits(units).clamp(-s, s).softmax(1)
    c = (c - torch.eye(len(c), dtype=c.dtype, device=c.device)) * weights * s
    return torch.stack([c @ units[1::2], c.T @ units[0::2]], 1).flatten(0, 1)


def safe_norms(squares: Tensor, energy: Tensor, d: int) -> Tensor:
    """Norms [n, n], in float64, that underestimate none: computed squares, plus what rounding may take off.

    The gradient of a pair is a sum of `d` columns of two Jacobians, of squared norms `energy` [2n], which may cancel.
    """
    rounding = (EXACT + d) * torch.finfo(torch.float64).eps
    return squares.add(rounding * (energy[0::2, None] + energy[None, 1::2])).sqrt()


def pair_squares(found: Mapping[str, list[Gradient]], units: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Squared norms [n, n] of the gradients of Z_ij, and of the Jacobians of the rows over the temperature, [2n]."""
    n = len(units) // 2
    squares, energy = (units.new_zeros(shape) for shape in ((n, n), (2 * n,)))
    for piece in pieces(found, units.shape[1]):
        energy += energies(piece)
        if isinstance(piece, Block):
            add_block(squares, piece, units)
        else:
            add_factors(squares, piece, units)
    return squares / temperature**2, energy / temperature**2


def tiles(n: int, bytes_per_pair: int) -> Iterator[tuple[slice, slice]]:
    """Squares of pairs (i, j) that fit in a tile."""
    side = max(1, math.isqrt(TILE // max(1, bytes_per_pair)))
    places = [slice(start, min(n, start + side)) for start in range(0, n, side)]
    return ((i, j) for i in places for j in places)


class Sides(NamedTuple):
    """Unit embeddings [n, d] and Jacobians [n, m, d] of the first views, and of the second."""

    u: Tensor
    left: Tensor
    v: Tensor
    right: Tensor

    @classmethod
    def of(cls, units: Tensor, jacobians: Tensor) -> Sides:
        """From rows [2n, ...] of both views."""
        u, v = (units[side::2].to(jacobians.dtype) for side in (0, 1))
        return cls(u, jacobians[0::2].contiguous(), v, jacobians[1::2].contiguous())

    def halves(self, i: slice, j: slice) -> tuple[Tensor, Tensor]:
        """The two halves of the pairs' gradients: J_i^T v_j [j, i, m] and J'_j^T u_i [i, j, m]."""
        left, right = self.left[i], self.right[j]
        first = product(self.v[j], left.flatten(0, 1)).unflatten(1, left.shape[:2])
        return first, product(self.u[i], right.flatten(0, 1)).unflatten(1, right.shape[:2])


def add_block(squares: Tensor, piece: Block, units: Tensor) -> None:
    """Add the squared norms of J_i^T v_j + J'_j^T u_i: the very entries of the gradient, so that nothing cancels."""
    sides = Sides.of(units, piece.columns)
    for i, j in tiles(len(squares), piece.columns[0, :, 0].nbytes):
        first, second = sides.halves(i, j)
        whole = second.add_(first.transpose(0, 1))
        squares[i, j] += squared_norms(whole.flatten(0, 1)).view(whole.shape[:2])


def add_factors(squares: Tensor, piece: Factors, units: Tensor) -> None:
    """Add the squared norms of f a_i^T + f' a_j^T, f and f' the halves of the gradient of the layer's outputs.

    |f|^2 |a_i|^2 + |f'|^2 |a_j|^2 + 2 (f . f') (a_i . a_j), in float64: the terms may cancel.
    """
    sides, (a, b) = Sides.of(units, piece.g.double()), piece.a.double().view(len(squares), 2, -1).unbind(1)
    size, other, across = a.square().sum(1), b.square().sum(1), a @ b.T
    for i, j in tiles(len(squares), sides.left[0, :, 0].nbytes):
        first, second = sides.halves(i, j)
        first = first.transpose(0, 1)
        own = first.square().sum(2) * size[i, None] + second.square().sum(2) * other[None, j]
        squares[i, j] += (own + 2 * (first * second).sum(2) * across[i, j]).clamp(min=0)
