"""How the engine would compute the norm of each parameter of a workload's model, and its estimates of the cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from harness.bench import steps
from harness.bench.plan import Workload
from harness.dp.engines.engine import trainable
from harness.dp.tree import Tree


def explained(workload: Workload, batch: int, device: str) -> list[list[str]]:
    """A row for each parameter, below a header: the way to its norm, and the estimated cost of every way."""
    from harness.dp.engines.taped.explain import explain

    model, examples = steps.build(workload, batch, torch.float32, device)
    rows = explain(steps.LOSS, model, Tree.of(trainable(model)), examples)
    return [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)] if rows else [["no parameters"]]


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(one)}" for key, one in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)
