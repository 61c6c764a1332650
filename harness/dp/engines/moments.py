"""Moments of the features under a linear head: what a method that trains the last layer alone may release besides.

Features f are the rows of the input, shortened to the norm `radius`; where the head has a bias, a one is appended,
which is not shortened. So every row has norm at most c, c^2 = radius^2 (+ 1 with a bias), whatever the data. A row that
is not finite is zero in all coordinates.

Between neighbours by addition or removal one row f, of class l, appears or goes. Then
    the sum of f in row l of a matrix moves by |f| <= c;
    the sum of f f^T moves by |f f^T|_F = |f|^2 <= c^2, and so does that over class l, the others' staying.
By replacement f makes way for a row h of class k. Then
    the sums of rows move by |f - h| <= 2c if k = l, else by (|f|^2 + |h|^2)^(1/2) <= sqrt(2) c: by at most 2c;
    the sum of all f f^T moves by (|f|^4 + |h|^4 - 2 (f^T h)^2)^(1/2) <= sqrt(2) c^2; the sums over classes by as
    much if k = l, else by (|f|^4 + |h|^4)^(1/2) <= sqrt(2) c^2.

A symmetric matrix is released as the vector of its upper triangle, scaled so that lengths are kept (`packed`): each
entry of every class's matrix is noised once, by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from harness.dp.clip import Clip, State, Unclipped
from harness.dp.clip.flat import shortened
from harness.dp.clip.rule import positive, within_reach
from harness.dp.engines.engine import SPEED, Engine, Unserved, losses_of, trainable
from harness.dp.engines.rows import factor_squares, full_precision
from harness.dp.engines.taped.bookkeeping import BookKeeping
from harness.dp.engines.weights import held
from harness.dp.loss import Batch, Loss
from harness.dp.optimizer.solve import head_of, rows
from harness.dp.optimizer.symmetric import packed
from harness.dp.release import Bounded, Observed, Relation, Release
from harness.dp.tree import Tree

MICROBATCH = 8192  # rows: at 1,280 features, 40 MiB in float32
LARGEST = 1 << 28  # numbers in the classes' matrices: a gibibyte in float32, of which a step holds several


@dataclass(frozen=True)
class WithGram(Engine):
    """The releases of another engine and, at the first step, "gram": the sum of f f^T over all examples.

    `noise` is the matrix' noise multiplier in units of the clipping rule's: with `noise` = 1 and noise multiplier s,
    T steps cost as much as T + 1 releases of multiplier s, the first two of them from one sample.
    """

    engine: Engine = field(default_factory=BookKeeping)
    radius: float = 1.0
    noise: float = 1.0

    def __post_init__(self) -> None:
        within_reach(radius=self.radius)
        positive(noise=self.noise)

    def accepts(self, loss: Loss, clip: Clip, model: nn.Module) -> str | None:
        return unserved(loss, model) or self.engine.accepts(loss, clip, model)

    def split(self, clip: Clip, sigma: float, step: int = 0) -> dict[str, float]:
        gradient = self.engine.split(clip, sigma, step)
        return gradient if step else gradient | {"gram": self.noise * sigma}

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
        if reason := unserved(loss, model):
            raise Unserved(reason)
        releases, observed = self.engine.bounded(loss, clip, model, w, batch, state, sigma, relation, step)
        if step:
            return Bounded(releases, observed)
        width = rows(w).shape[1]
        total = w.flat.new_zeros(width, width, dtype=torch.float64)
        with full_precision(total.device):
            for part in pieces(batch.x, MICROBATCH):
                f, _ = features(part, self.radius, width)
                total.addmm_(f.T, f)
        multiplier = self.split(clip, sigma, step)["gram"]
        bound = second_moment(reach(self.radius, w), relation)
        gram = Release(Tree.of({"gram": packed(total)}), bound, multiplier)
        return Bounded(releases | {"gram": gram}, replace(observed, engine=f"{observed.engine}, with Gram"))


@dataclass(frozen=True)
class Moments(Engine):
    """The moments that least squares is made of, for K classes; no gradient is computed.

    "grad", in the layout of the head: the negative sum of each class's rows, which is the gradient of `Squares` at
    zero. "gram": the sum of f f^T over all examples. "class_gram" [K, width (width + 1) / 2]: that over each class.
    The three have one noise multiplier, sqrt(3) times that of the step. The microbatch changes memory and speed alone.
    """

    radius: float = 1.0
    microbatch: int | None = field(default=None, metadata=SPEED)

    def __post_init__(self) -> None:
        within_reach(radius=self.radius)
        if self.microbatch is not None and self.microbatch < 1:
            raise ValueError(f"a microbatch holds at least one example, not {self.microbatch}")

    def accepts(self, loss: Loss, clip: Clip, model: nn.Module) -> str | None:
        if type(clip) is not Unclipped:
            return f"moments bound each example themselves: write Unclipped() for {type(clip).__name__}"
        return unserved(loss, model) or too_large(model)

    def split(self, clip: Clip, sigma: float, step: int = 0) -> dict[str, float]:
        return dict.fromkeys(("grad", "gram", "class_gram"), math.sqrt(3.0) * sigma)

    def note(self, loss: Loss, clip: Clip, batch: int, relation: Relation) -> str:
        bounds = "c, of second moments c^2" if relation.moves == 1 else "2c, of second moments sqrt(2) c^2"
        return f"{bounds}; c^2 = {self.radius**2:g}, and 1 more with a bias"

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
        if reason := self.accepts(loss, clip, model):
            raise Unserved(reason)
        chunk = self.microbatch or MICROBATCH
        classes, width = rows(w).shape
        zero = w.flat.new_zeros((), dtype=torch.float64)
        first, gram = zero.new_zeros(classes, width), zero.new_zeros(width, width)
        own = zero.new_zeros(classes, width * (width + 1) // 2)
        losses = zero.new_zeros(len(batch))
        counts = torch.zeros(2, dtype=torch.long, device=zero.device)
        with torch.no_grad(), full_precision(zero.device), held(model, w.views):
            for label in range(classes):
                total = torch.zeros_like(gram)
                for members in pieces((batch.y == label).nonzero().squeeze(1), chunk):
                    part = Batch(batch.x[members], batch.y[members])
                    losses[members] = losses_of(loss, model, part).to(zero.dtype)
                    f, cut = features(part.x, self.radius, width)
                    counts += cut
                    first[label] -= f.sum(0)
                    total.addmm_(f.T, f)
                gram += total
                own[label] = packed(total)
        bound, sigmas = reach(self.radius, w), self.split(clip, sigma, step)
        square = second_moment(bound, relation)
        releases = {
            "grad": Release(head_of(first, w.with_flat(w.flat.double())), bound * relation.moves, sigmas["grad"]),
            "gram": Release(Tree.of({"gram": packed(gram)}), square, sigmas["gram"]),
            "class_gram": Release(Tree.of({"class_gram": own}), square, sigmas["class_gram"]),
        }
        clipped, non_finite = counts.unbind()
        return Bounded(releases, Observed(losses, None, clipped, non_finite, type(self).__name__, chunk))


def pieces(t: Tensor, chunk: int) -> tuple[Tensor, ...]:
    """`t` cut along its first dimension into views of at most `chunk` entries; no piece where there is no entry."""
    return t.split(chunk) if len(t) else ()


def features(x: Tensor, radius: float, width: int) -> tuple[Tensor, Tensor]:
    """Rows [B, width], in float64, of inputs [B, ...], shortened to `radius`, with a one appended if there is room.

    And two counts [2]: rows that were shortened, and rows that were not finite.
    """
    f = x.flatten(1).double()
    norms = factor_squares(f).sqrt()
    weights, finite = shortened(norms, radius), norms.isfinite()
    f = f.where(finite[:, None], 0.0).mul_(weights.to(f.dtype)[:, None])
    if width > f.shape[1]:
        f = torch.cat([f, finite[:, None].to(f.dtype)], 1)
    return f, torch.stack([((weights < 1) & finite).sum(), (~finite).sum()])


def reach(radius: float, w: Tree) -> float:
    """c, the bound on a row: `radius`, or with a bias in `w` that and the one appended."""
    return math.hypot(radius, 1.0) if len(w) > 1 else radius


def second_moment(bound: float, relation: Relation) -> float:
    """The sensitivity of a sum of f f^T, |f| <= `bound`, over all examples or class by class: see the module."""
    return bound**2 * math.sqrt(relation.moves)


def unserved(loss: Loss, model: nn.Module) -> str | None:
    """Why the inputs of `model` are not the features of a linear head; None if they are."""
    if loss.rows != 1:
        return f"{type(loss).__name__} makes an example of {loss.rows} rows, and a moment takes one"
    if linear(model) is None:
        return (
            f"{type(model).__name__} is not one linear layer on flat features, of which moments are taken:"
            ' use the model "linear-head" on a data set of features'
        )
    return None


def linear(model: nn.Module) -> nn.Linear | None:
    """The linear layer that is all of `model`, but for flattening its input; None if there is more to it, or less."""
    *before, last = model if type(model) is nn.Sequential else [model]
    flat = all(type(m) is nn.Flatten and (m.start_dim, m.end_dim) == (1, -1) for m in before)
    alone = type(last) is nn.Linear and last.weight.requires_grad
    return last if alone and flat and isinstance(last, nn.Linear) else None


def too_large(model: nn.Module) -> str | None:
    """Why the classes' matrices would not fit."""
    head = linear(model)
    assert head is not None
    width = head.in_features + (len(trainable(model)) > 1)
    numbers = head.out_features * width * (width + 1) // 2
    if numbers <= LARGEST:
        return None
    return (
        f"one matrix for each of {head.out_features} classes, {width} wide, makes {numbers / 1e6:,.0f} million numbers"
        f" ({numbers / 2**28:.1f} GiB in float32), several times over; at most {LARGEST / 1e6:,.0f} million are served"
    )
