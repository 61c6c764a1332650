"""Engines compared with the loop: an odd clipping rule, one release, and how far two are apart."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from harness.dp import Batch, CrossEntropy, Relation, Tree
from harness.dp.clip import Clip
from harness.dp.engines.engine import trainable


@dataclass(frozen=True)
class Halves(Clip):
    """Two groups, the first half of the parameters and the rest, each with its own bound."""

    bounds: tuple[float, float] = (0.1, 0.4)

    def groups(self, layout):
        return {name: int(2 * i >= len(layout.names)) for i, name in enumerate(layout.names)}

    def weights(self, norms, state):
        weights = (norms.new_tensor(self.bounds)[: norms.shape[1]] / norms).clamp(max=1)
        return weights * norms.isfinite().all(1, keepdim=True) if norms.isfinite().all() else self._safe(norms)

    def _safe(self, norms):
        return torch.where(norms.isfinite().all(1, keepdim=True), self.weights(norms.nan_to_num(1, 1, 1), None), 0)

    def sensitivity(self, state, relation):
        return math.hypot(*self.bounds) * relation.moves


def release(engine, model, x, y, clip):
    """The private sum as a float64 vector, and what the engine observed."""
    w = Tree.of(trainable(model))
    out = engine.bounded(CrossEntropy(), clip, model, w, Batch(x, y), None, 1.0, Relation.ADD_OR_REMOVE)
    return out.releases["grad"].value.flat.double(), out.observed


def error(got, want):
    return float((got - want).norm() / want.norm().clamp(min=1e-30))
