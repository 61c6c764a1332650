"""What the engine would do with each parameter of a workload's model, and what it thinks that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from harness.bench import steps
from harness.bench.plan import Workload
from harness.dp.engines.engine import trainable
from harness.dp.tree import Tree


def explained(workload: Workload, batch: int, device: str) -> str:
    """A table of the parameters: the engine's way to each norm, and its estimate of the cost of every way."""
    from harness.dp.engines.taped.explain import explain

    model, examples = steps.build(workload, batch, torch.float32, device)
    rows = explain(steps.LOSS, model, Tree.of(trainable(model)), examples)
    return f"{workload.name} {workload.title}, batch {batch}\n" + columns(rows)


def columns(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned columns, headed by the keys of the first."""
    if not rows:
        return "  no parameters\n"
    lines = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() + "\n" for line in lines
    )


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(one)}" for key, one in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)
