"""The naive loop: one backward pass per example. Slow, and right: every other engine is judged by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import nn

from harness.dp.clip import Clip, State
from harness.dp.engines.engine import Clipped, PerExample, Unserved, Used, group_norms, losses_of
from harness.dp.engines.memory import refuse_memory
from harness.dp.engines.reads import refuse_strangers
from harness.dp.engines.survey import moved, probe_batch, refuse_traces
from harness.dp.engines.weights import held
from harness.dp.loss import Batch, Loss
from harness.dp.tree import Tree

_tried: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True)
class Loop(PerExample):
    """Abadi et al.'s definition, read aloud: for each example, differentiate, weigh, add."""

    def accepts(self, loss: Loss, clip: Clip, model: nn.Module) -> str | None:
        for path, module in model.named_modules():
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
                what = f"{path or 'the model'} ({type(module).__name__})"
                return f"{what} rewrites the rows that it looks up: leave max_norm out"
        return super().accepts(loss, clip, model)

    def inspect(self, used: Used) -> None:
        if used.model not in _tried:
            few = probe_batch(used.batch)
            with held(used.model, used.w.clone().views):
                refuse_traces(used.loss, used.model, few)
                refuse_memory(used.loss, used.model, few)
            refuse_strangers(used.loss, used.model, moved(used.w.views, 1.0), few)
            _tried.add(used.model)

    def clipped_sum(
        self, loss: Loss, clip: Clip, groups: Mapping[str, int], model: nn.Module, w: Tree, batch: Batch, state: State
    ) -> Clipped:
        total = torch.zeros_like(w.flat, dtype=torch.float64)
        norms, weights, losses = [], [], []
        # A clone: whatever a model writes to its own weights must not reach those of the run.
        with held(model, w.clone().views) as leaves:
            for x, y in zip(batch.x.split(1), batch.y.split(1), strict=True):
                before = [p._version for p in leaves.values()]
                value = losses_of(loss, model, Batch(x, y))
                if [p._version for p in leaves.values()] != before:
                    raise Unserved("the model writes to its own weights in a forward pass: examples leave traces")
                grads = torch.autograd.grad(
                    value.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
                )
                squares = {name: g.double().square().sum()[None] for name, g in zip(leaves, grads, strict=True)}
                norm = group_norms(squares, groups, value.detach())
                weight = clip.weights(norm, state)
                limit = clip.limit(norm, state)
                if norm.isfinite().all():  # weight 0 would not do: 0 * inf is not a number
                    cut = grads if limit is None else [g.clamp(-float(limit), float(limit)) for g in grads]
                    grad = [g.double() * weight[0, groups[name]] for name, g in zip(leaves, cut, strict=True)]
                    total += torch.cat([g.reshape(-1) for g in grad])
                norms.append(norm)
                weights.append(weight)
                losses.append(value.detach())
        return Clipped(w.with_flat(total), torch.cat(norms), torch.cat(weights), torch.cat(losses))
