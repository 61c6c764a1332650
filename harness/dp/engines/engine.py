"""What an engine is, and what all per-example engines share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from harness.dp.clip import Clip, State
from harness.dp.engines.draws import generators, rewind
from harness.dp.loss import Batch, Loss
from harness.dp.native.memory import keep_freed_memory
from harness.dp.release import Bounded, Observed, Relation, Release
from harness.dp.tree import Tree

SPEED = {"speed": True}  # marks a field that changes how fast, never what: it stays out of a run's identity


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by name; a tied parameter once, a frozen one not at all."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Unserved(ValueError):
    """An engine finds out, from a model at work and before it sees any data, that it cannot serve it."""


def losses_of(loss: Loss, model: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    """The losses [B] of a prepared batch. Raises Unserved where `loss` gives anything but one number for each example.

    A column [B, 1], a mean over the batch or a square [B, B] would broadcast against weights [B], and the sum that is
    released would not be the one whose norms were measured.
    """
    losses = loss.of(model, batch)
    if losses.shape != (len(batch),):
        raise Unserved(
            f"{type(loss).__name__} gives losses of shape {list(losses.shape)} for {len(batch)} examples; it must give"
            f' [{len(batch)}], one for each (write reduction="none", and no axis of length one)'
        )
    return losses


@dataclass(frozen=True)
class Engine:
    """Turns a logical batch into bounded releases."""

    @property
    def role(self) -> str:
        """Names the noise that is drawn for what this engine releases. Engines of different roles share none.

        Two engines of one mechanism should release the same sums; where one is wrong, the difference of two runs with
        the same noise would be what it sums wrongly, in the clear. Of this project's own files it is the package that
        counts, not where in it a file lies: moving one changes no number.
        """
        module = type(self).__module__.split(".")
        place = module[:2] if module[0] == "harness" else module
        return ".".join([*place, type(self).__qualname__])

    def accepts(self, loss: Loss, clip: Clip, model: nn.Module) -> str | None:
        """None, or the reason why this engine cannot serve them: the run is then skipped with that reason."""
        return None

    def split(self, clip: Clip, sigma: float, step: int = 0) -> dict[str, float]:
        """The multiplier of each release of step `step`, given the multiplier of the clipping rule's taken jointly."""
        return clip.split(sigma)

    def note(self, loss: Loss, clip: Clip, batch: int, relation: Relation) -> str | None:
        """One line on the sensitivity, for expected batches of `batch` examples; None where it is the rule's."""
        return None

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
        """The releases of one logical step, not yet noised: "grad" (a sum, never a mean) and side releases.

        `w` holds the trainable parameters to differentiate at; the model supplies code, buffers and frozen parameters.
        The releases are those that `split` names for this step, with its multipliers.
        """
        raise NotImplementedError


def laid_out(w: Tree, batch: Batch, channels_last: bool) -> tuple[dict[str, Tensor], Batch]:
    """The weights that the model holds in a pass, and the batch; both with channels last if asked for."""
    if not channels_last:
        return w.views, batch

    # `contiguous` would leave a single channel's strides, by which operators choose.
    def last(t: Tensor) -> Tensor:
        return t.to(memory_format=torch.channels_last) if t.ndim == 4 else t

    return {name: last(t) for name, t in w.items()}, Batch(last(batch.x), batch.y)


class Clipped(NamedTuple):
    """One microbatch: the weighted sum, norms [B, G] and weights [B, G] (None where none was needed), losses [B]."""

    total: Tree
    norms: Tensor | None
    weights: Tensor | None
    losses: Tensor


class Used(NamedTuple):
    """What a step was made of: its norms [B, G], its microbatch, and the generators' states before it."""

    loss: Loss
    clip: Clip
    groups: Mapping[str, int]
    model: nn.Module
    w: Tree
    batch: Batch
    state: State
    norms: Tensor
    chunk: int
    draws: list[Tensor]


@dataclass(frozen=True)
class PerExample(Engine):
    """An engine that bounds one gradient per example and adds them up, microbatch by microbatch.

    The microbatch is compute only: noise, step and ledger belong to the logical batch. None means all at once, or
    what the engine thinks best.
    """

    microbatch: int | None = field(default=None, metadata=SPEED)

    def __post_init__(self) -> None:
        if self.microbatch is not None and self.microbatch < 1:
            raise ValueError(f"a microbatch holds at least one example, not {self.microbatch}")

    @property
    def label(self) -> str:
        """The engine's name, with the switches that are on."""
        switches = [f.name.replace("_", " ") for f in fields(self) if getattr(self, f.name) is True]
        return ", ".join([type(self).__name__, *switches])

    def accepts(self, loss: Loss, clip: Clip, model: nn.Module) -> str | None:
        if loss.coupled:
            return f"{type(loss).__name__} couples the examples of a batch, and none has a gradient of its own to clip"
        return None

    def chunk(self, loss: Loss, model: nn.Module, w: Tree, batch: Batch) -> int:
        """How many examples of a non-empty batch to take at once."""
        return self.microbatch or len(batch)

    def clipped_sum(
        self, loss: Loss, clip: Clip, groups: Mapping[str, int], model: nn.Module, w: Tree, batch: Batch, state: State
    ) -> Clipped:
        """The weighted sum of one non-empty microbatch's gradients.

        `groups` maps each name of `w` to its clipping group. An example whose gradient is not finite adds zero. A sum
        of clipped gradients is float64, whatever the weights are.
        """
        raise NotImplementedError

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
        keep_freed_memory()
        groups = clip.groups(w.layout)
        chunk = self.chunk(loss, model, w, batch) if len(batch) else 1
        draws = generators(batch.x.device)
        while True:
            try:
                total, parts = self._summed(chunk, loss, clip, groups, model, w, batch, state)
                break
            except torch.OutOfMemoryError:  # an accelerator says when it is full: half as many may fit
                if chunk == 1:
                    raise
                chunk //= 2
                rewind(batch.x.device, draws)
        norms, observed = observe(parts, w, 1 + max(groups.values(), default=0))
        if norms is not None and len(batch):
            self.inspect(Used(loss, clip, groups, model, w, batch, state, norms, chunk, draws))
        bound, multiplier = clip.sensitivity(state, relation), clip.split(sigma)["grad"]
        releases = {"grad": Release(w.with_flat(total), bound, multiplier, clip.scale(w.layout, state))}
        if norms is not None:
            releases |= clip.side(norms, state, relation, sigma)
        return Bounded(releases, replace(observed, engine=self.label, microbatch=chunk))

    def inspect(self, used: Used) -> None:
        """Audit a step that was made, before anything is released. Raises Unserved for a fault."""

    def _summed(
        self,
        chunk: int,
        loss: Loss,
        clip: Clip,
        groups: Mapping[str, int],
        model: nn.Module,
        w: Tree,
        batch: Batch,
        state: State,
    ) -> tuple[Tensor, list[Clipped]]:
        """The flat weighted sum of a logical batch, `chunk` examples at a time, and its microbatches without theirs."""
        total: Tensor | None = None
        parts: list[Clipped] = []
        for x, y in zip(batch.x.split(chunk), batch.y.split(chunk), strict=True):
            if len(x):
                part = self.clipped_sum(loss, clip, groups, model, w, Batch(x, y), state)
                flat = part.total.flat.double()
                total = flat if total is None else total.add_(flat)
                parts.append(part._replace(total=w))
        return torch.zeros_like(w.flat, dtype=torch.float64) if total is None else total, parts


def observe(parts: list[Clipped], w: Tree, groups: int) -> tuple[Tensor | None, Observed]:
    """All norms [B, G] of a logical batch (None if no microbatch has any), and the diagnosis."""
    none = w.flat.new_zeros(0)
    losses = joined([p.losses for p in parts]) if parts else none
    if parts and (parts[0].norms is None or parts[0].weights is None):
        return None, Observed(losses, None, none.sum(), (~losses.isfinite()).sum())
    empty = w.flat.new_zeros(0, groups, dtype=torch.float64)  # as `group_norms` gives them
    norms = joined([p.norms for p in parts if p.norms is not None]) if parts else empty
    weights = joined([p.weights for p in parts if p.weights is not None]) if parts else norms
    finite = norms.isfinite().all(1)
    clipped = ((weights < 1).any(1) & finite).sum()
    return norms, Observed(losses, norms, clipped, (~finite).sum())


def joined(parts: list[Tensor]) -> Tensor:
    """The parts one after another."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def group_norms(squares: Mapping[str, Tensor], groups: Mapping[str, int], losses: Tensor) -> Tensor:
    """Norms [B, G], in float64, from squared norms [B] of each parameter's gradient, for `losses` [B].

    A parameter without an entry has no gradient. A norm is inf or NaN wherever a square is not finite.
    """
    columns: list[list[Tensor]] = [[] for _ in range(1 + max(groups.values(), default=0))]
    for name, square in squares.items():
        columns[groups[name]].append(square)
    none = losses.new_zeros(len(losses), dtype=torch.float64)
    sums = [torch.stack(column).sum(0) if column else none for column in columns]
    return (sums[0].unsqueeze(1) if len(sums) == 1 else torch.stack(sums, 1)).sqrt()
