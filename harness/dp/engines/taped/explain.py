"""What book-keeping does with each parameter of a model, and what it reckons that this costs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from harness.dp.engines.taped.gradients import Costs
from harness.dp.engines.taped.plan import gradients
from harness.dp.engines.taped.trial import plan_for
from harness.dp.engines.weights import held
from harness.dp.loss import Batch, Loss
from harness.dp.tree import Tree


def explain(loss: Loss, model: nn.Module, w: Tree, batch: Batch) -> list[dict[str, Any]]:
    """A row for each parameter: `name`, `form` of its gradients, `shape`, `way` to the norm, and `costs` of each way.

    The ways: *keep* every example's gradient, *gram* matrices, or *free*; the costs in multiply-adds for each example,
    beyond those of an ordinary weight gradient.
    """
    plan = plan_for(loss, model, w.views, batch)
    with torch.enable_grad(), held(model, w.views) as leaves:
        found = gradients(plan, model, w.views, plan.run(loss, model, leaves, batch), loss, batch)
    by_vmap = {name for names in plan.modules.values() for name in names.values()} | set(plan.whole)
    rows = []
    for name in w.names:
        gradient = found.get(name)
        if gradient is None:
            rows.append({"name": name, "form": "unused", "shape": tuple(w[name].shape), "way": "-", "costs": {}})
            continue
        form = "vmap" if name in by_vmap else "copies" if name in plan.free else type(gradient).__name__.lower()
        costs = gradient.costs()
        way = costs.way if costs != Costs(0, 0) else "keep"
        rows.append({"name": name, "form": form, "shape": tuple(gradient.shape), "way": way, "costs": costs._asdict()})
    return rows
