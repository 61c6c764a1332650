"""What the engines share that are made of other libraries: refusals, and a comparison with ours on the first batch."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from harness.dp.clip import Clip, Flat, State
from harness.dp.engines.engine import Clipped, PerExample, group_norms
from harness.dp.engines.loop import Loop
from harness.dp.engines.rows import squared_norms
from harness.dp.engines.survey import untouched
from harness.dp.engines.vmap import chunk_within, refusal
from harness.dp.loss import Batch, Loss
from harness.dp.release import Bounded
from harness.dp.tree import Tree

TRIED = 3  # examples of a model's first batch whose norms are compared with the loop's
SLACK = {torch.float64: 1e-6}  # by how much a norm may differ in a trial; at kinks, float32 norms differ by 0.5 %
_trusted: WeakKeyDictionary[nn.Module, set[type[Peer]]] = WeakKeyDictionary()


class Library:
    """A part of ours that is computed by a package of others."""

    PACKAGE: ClassVar[str]  # the name of the distribution

    @classmethod
    def version(cls) -> str | None:
        """The version that is installed, None where it is not installed."""
        try:
            return importlib.metadata.version(cls.PACKAGE)
        except importlib.metadata.PackageNotFoundError:
            return None


@dataclass(frozen=True)
class Peer(Library, PerExample):
    """An engine whose per-example gradients, or their norms, come from another library.

    What the library refuses, or is known to get wrong, `accepts` refuses by reason. What cannot be seen from a model is
    found out on its first batch, where a few norms are compared with the loop's: a library that differs is stopped by a
    RuntimeError and never trains or is timed. A model that draws random numbers cannot be compared and is let through.
    """

    IMPORTS: ClassVar[str]  # the module to import
    INSTALL: ClassVar[str]  # what brings it

    def accepts(self, loss: Loss, clip: Clip, model: nn.Module) -> str | None:
        if importlib.util.find_spec(self.IMPORTS) is None:
            return f'{self.PACKAGE} is not installed: pip install "{self.INSTALL}"'
        if loss.coupled:
            return super().accepts(loss, clip, model)
        if clip.cuts_coordinates or loss.rows > 1:
            part = clip if clip.cuts_coordinates else loss
            return f"{type(part).__name__} works on each example's gradient, and {self.PACKAGE} weighs rows"
        return refusal(model) or self.refuses(loss, clip, model)

    def refuses(self, loss: Loss, clip: Clip, model: nn.Module) -> str | None:
        """Why the library, once installed, cannot serve them; None if it can."""
        for path, m in model.named_modules():
            if any(p.requires_grad for p in m.parameters(recurse=False)):
                reason = self.objection(m)
                if reason:
                    return f"{path or 'the model'} ({type(m).__name__}) {reason}"
        return None

    def objection(self, layer: nn.Module) -> str | None:
        """What the library has against a layer with trained parameters of its own: the end of a sentence about it."""
        return None

    def bounded(
        self, loss: Loss, clip: Clip, model: nn.Module, w: Tree, batch: Batch, *rest: Any, **more: Any
    ) -> Bounded:
        trusted = _trusted.setdefault(model, set())
        if type(self) in trusted or not len(batch):
            return super().bounded(loss, clip, model, w, batch, *rest, **more)
        try:
            found = super().bounded(loss, clip, model, w, batch, *rest, **more)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise RuntimeError(f"{self} fails on {type(model).__name__}: {error}") from error
        assert found.observed.norms is not None
        with untouched(model, batch.x.device):
            self.compare(loss, clip, model, w, batch, found.observed.norms[:TRIED])
        trusted.add(type(self))
        return found

    def wrap(self, module: nn.Module) -> nn.Module:
        """`module`, a copy that is ours to change, as the library wants it."""
        raise NotImplementedError

    def __str__(self) -> str:
        return f"{self.PACKAGE} {self.version()} ({type(self).__name__})"

    def compare(self, loss: Loss, clip: Clip, model: nn.Module, w: Tree, batch: Batch, norms: Tensor) -> None:
        """Raise RuntimeError unless `norms` [n, G], of the first n examples, are those of the loop."""
        few, groups = Batch(batch.x[: len(norms)], batch.y[: len(norms)]), clip.groups(w.layout)
        one, two = (Loop().clipped_sum(loss, Flat(), groups, model, w, few, None).norms for _ in range(2))
        assert one is not None and two is not None
        slack = SLACK.get(w.flat.dtype, 0.02)
        off = (norms.double() - one).abs() / one.clamp(min=1e-6 * float(one.nan_to_num(0, 0, 0).max()) + 1e-30)
        off = torch.where(one.isfinite() & norms.isfinite(), off, (one.isfinite() != norms.isfinite()).double())
        if torch.allclose(one, two, slack, equal_nan=True) and off.max() > slack:
            raise RuntimeError(
                f"{self} is wrong on {type(model).__name__}: a per-example gradient norm is off by "
                f"{float(off.max()):.2g} of its value. Use the engine Vmap or Loop."
            )


def tied(model: nn.Module) -> bool:
    """Whether two places of `model` share a parameter."""
    return len(list(model.named_parameters(remove_duplicate=False))) > len(list(model.parameters()))


@dataclass(frozen=True)
class GradientPeer(Peer):
    """A library that hands over every example's gradient; weighing and adding them up is left to us."""

    def chunk(self, loss: Loss, model: nn.Module, w: Tree, batch: Batch) -> int:
        sizes = [p.numel() * p.element_size() for p in model.parameters() if p.requires_grad]
        return self.microbatch or chunk_within(len(batch), batch.x.device, sizes)

    def rows(self, loss: Loss, model: nn.Module, w: Tree, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients [B, *shape] at `w` by name, and the losses [B]; a name left out has no gradient at all."""
        raise NotImplementedError

    def clipped_sum(
        self, loss: Loss, clip: Clip, groups: Mapping[str, int], model: nn.Module, w: Tree, batch: Batch, state: State
    ) -> Clipped:
        grads, losses = self.rows(loss, model, w, batch)
        norms = group_norms({name: squared_norms(g) for name, g in grads.items()}, groups, losses)
        weights = clip.weights(norms, state)
        v, good = weights.to(w.flat.dtype), norms.isfinite().all(1)
        if not good.all():  # weight 0 would not do: 0 * inf is not a number
            v, grads = v[good], {name: g[good] for name, g in grads.items()}
        parts = [
            torch.einsum("i,i...", v[:, groups[name]], grads[name]) if name in grads else torch.zeros_like(t)
            for name, t in w.items()
        ]
        return Clipped(w.with_flat(torch.cat([p.reshape(-1) for p in parts])), norms, weights, losses)


# Copies that a library may hook, wrap and mark in place of the model itself ---------------------------------


# The wrapped copy of a model, and its trained parameters under the names that they have in the model. Whatever a
# library adds to a parameter is not in its type.
Double = tuple[nn.Module, Mapping[str, Any]]
_doubles: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], Double]] = WeakKeyDictionary()


def structure(model: nn.Module) -> nn.Module:
    """A copy of `model` that shares its buffers and the memory of its parameters."""
    shared = {id(b): b for b in model.buffers()}
    own = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, {**shared, **own})


@contextmanager
def double(peer: Peer, model: nn.Module, w: Tree) -> Iterator[Double]:
    """The double of `model` that a peer wrapped, a copy with `w` for its parameters and no gradients.

    Made once for each kind of peer, for each dtype, device and set of modes and trained parameters; it lives as
    long as the model. A failure inside throws it away, for nobody knows what it left half-done.
    """
    modes = tuple(m.training for m in model.modules())
    made, key = _doubles.setdefault(model, {}), (type(peer), w.layout, w.flat.dtype, w.flat.device, modes)
    if key not in made:
        module = structure(model)
        wrapped = peer.wrap(module)
        names = dict(module.named_parameters())
        made[key] = wrapped, {name: names[name] for name in w.names}
    found = made[key]
    try:
        for name, p in found[1].items():
            p.data, p.grad = w[name], None
        yield found
    except BaseException:
        made.pop(key, None)
        raise
    for p in found[1].values():
        p.grad = None


class MarkingPeer(GradientPeer):
    """A library that leaves every example's gradient at the parameters of a copy of the model, as an attribute."""

    MARK: ClassVar[str]

    def recording(self) -> AbstractContextManager[Any]:
        """What stands around the forward and the backward pass."""
        return nullcontext()

    def rows(self, loss: Loss, model: nn.Module, w: Tree, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        with double(self, model, w) as (module, parameters):
            with self.recording():
                losses = loss.per_example(module(batch.x), batch.y)
                losses.sum().backward()
            found = {name: getattr(p, self.MARK, None) for name, p in parameters.items()}
            for p in parameters.values():
                setattr(p, self.MARK, None)
        return {name: g for name, g in found.items() if g is not None}, losses.detach()
