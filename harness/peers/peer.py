"""What the engines share that are made of other libraries: refusals, and a comparison with ours on the first batch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar
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
from harness.dp.release import Bounded, Relation
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
        trusted = _trusted.setdefault(model, set())
        if type(self) in trusted or not len(batch):
            return super().bounded(loss, clip, model, w, batch, state, sigma, relation, step)
        try:
            found = super().bounded(loss, clip, model, w, batch, state, sigma, relation, step)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise RuntimeError(f"{self} fails on {type(model).__name__}: {error}") from error
        assert found.observed.norms is not None
        with untouched(model, batch.x.device):
            self.compare(loss, clip, model, w, batch, found.observed.norms[:TRIED])
        trusted.add(type(self))
        return found

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
