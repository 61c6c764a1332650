"""Whether a pass computes from the weights that its model holds, and its gradients reach them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from harness.dp.engines.draws import generators, rewind
from harness.dp.engines.engine import Unserved, losses_of
from harness.dp.engines.survey import untouched
from harness.dp.engines.weights import held, written
from harness.dp.loss import Batch, Loss

NOT_LENT = "Compute it from the parameters in forward(), each time"


def refuse_strangers(loss: Loss, model: nn.Module, w: Mapping[str, Tensor], batch: Batch) -> None:
    """Raise Unserved where losses or gradients do not follow the values that the parameters hold.

    One pass has `w` put into the parameters, as engines do, and one has `w` written into their own memory, as an
    optimizer of PyTorch does. A model that keeps a tensor made of a parameter earlier tells them apart.
    """
    device = batch.x.device
    with untouched(model, device):
        draws = generators(device)
        with held(model, w):
            start = next_node()
            losses = losses_of(loss, model, batch)
            fault = graph_fault(losses, start)
            rewind(device, draws)
            again = losses_of(loss, model, batch)
        if fault:
            raise Unserved(f"{type(model).__name__} {fault}")
        # What differs from pass to pass is the business of `refuse_traces`.
        if not torch.equal(losses, again):
            return
        with written(model, w), torch.no_grad():
            rewind(device, draws)
            elsewhere = losses_of(loss, model, batch)
    if not torch.allclose(losses.to(elsewhere), elsewhere, rtol=1e-2, atol=1e-4, equal_nan=True):
        raise Unserved(
            f"{type(model).__name__} does not compute from the values that its parameters hold: it reads one of them by"
            f" a tensor that was made of it earlier (a transpose kept as an attribute, say). {NOT_LENT}"
        )


def next_node() -> int:
    """The number of the next node of an autograd graph: they count up."""
    return _number(torch.ones((), requires_grad=True).clone().grad_fn)


def graph_fault(outputs: Tensor, start: int) -> str | None:
    """What the graph of a pass shows, if anything, whose first node has the number `start`.

    Operations older than the pass, or checkpoints that differentiate by themselves.
    """
    todo, seen = [outputs.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            return "uses activation checkpointing that cannot be differentiated in parts: write use_reentrant=False"
        # Leaves have the largest number of all.
        if _number(node) < start:
            return (
                f"computes from a tensor that it made of its parameters before the pass ({node.name()}), and which does"
                f" not follow them. {NOT_LENT}"
            )
        todo += [following for following, _ in node.next_functions]
    return None


def _number(node: Any) -> int:
    number: int = node._sequence_nr()
    return number
