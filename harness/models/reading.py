"""Whether a network computes from the parameters that it holds, whoever changes them and however.

A run's weights are put into the network for the length of a pass (`harness.dp.engines.weights.held`): its parameters
stand on other memory then. An ordinary optimizer writes into the parameters' own memory. A sound network cannot tell
these apart, in either mode, and its gradients reach every parameter that its outputs depend on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from harness.dp.engines.reads import NOT_LENT, graph_fault, next_node
from harness.dp.engines.weights import held, restored, written
from harness.models.passes import called, same, seeded

SHIFT = 0.05  # how far a parameter is moved to see whether outputs depend on it
EQUAL = 1e-4  # relative: the same operations on other memory may be cut differently


class Answer(NamedTuple):
    """The outputs of a pass, and the gradient of a mixture of them by each trained parameter, None where none."""

    outputs: Tensor
    grads: dict[str, Tensor | None]


def probe(model: nn.Module, x: Tensor, values: Mapping[str, Tensor]) -> None:
    """Raise ValueError where `model`, in training mode, does not read its parameters or its gradients miss one.

    `x` are a few examples, `values` other weights for all trained parameters.

    It ends in the state that it had but for attributes that are no tensors.
    """
    if not values:
        return
    with written(model, values):
        here = _answer(model, x)
    with held(model, values):
        there = _answer(model, x)
        _gradients_reach(model, x, values, there)
    if not same(here.outputs, there.outputs, EQUAL):
        raise _stale(model, x, values, True)
    for name, g in here.grads.items():
        if not _alike(g, there.grads[name]):
            raise ValueError(
                f'{type(model).__name__}: the gradient of "{name}" depends on where its values lie in memory: it goes'
                f" through a tensor that was made of the parameter earlier. {NOT_LENT}"
            )
    with written(model, values):
        evaluated = _evaluated(model, x)
    with held(model, values):
        if not same(evaluated, _evaluated(model, x), EQUAL):
            raise _stale(model, x, values, False)
        later = _answer(model, x)
    if not same(there.outputs, later.outputs, EQUAL) or any(
        not _alike(g, later.grads[name]) for name, g in there.grads.items()
    ):
        raise ValueError(
            f"{type(model).__name__} gives other outputs or gradients in training mode after it was in evaluation mode"
            " for a while: train() must take back what evaluation mode does, parameters and attributes alike"
        )


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else same(a, b, EQUAL)


def _evaluated(model: nn.Module, x: Tensor) -> Tensor:
    """The outputs in evaluation mode; the model is in training mode before and after."""
    with restored(model):
        model.eval()
        with seeded(x.device, 0), torch.no_grad():
            outputs = called(model, x.clone())
        model.train()
    return outputs


def _answer(model: nn.Module, x: Tensor) -> Answer:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with seeded(x.device, 0), torch.enable_grad():
        start = next_node()
        outputs = called(model, x.clone())
        if not outputs.requires_grad:
            return Answer(outputs, dict.fromkeys(trained))
        fault = graph_fault(outputs, start)
        if fault:
            raise ValueError(f"{type(model).__name__} {fault}")
        mix = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2))
        try:
            grads = torch.autograd.grad(
                (outputs.to(mix.dtype) * mix.to(outputs.device)).sum(), list(trained.values()), allow_unused=True
            )
        except RuntimeError as error:
            raise ValueError(f"{type(model).__name__} cannot be differentiated: {error}") from error
    return Answer(outputs.detach(), dict(zip(trained, grads, strict=True)))


def _gradients_reach(model: nn.Module, x: Tensor, values: Mapping[str, Tensor], before: Answer) -> None:
    """Refuse a parameter that the outputs depend on and no gradient reaches."""
    unreached = [name for name, g in before.grads.items() if g is None]
    if not unreached or same(_moved(model, x, values, unreached), before.outputs):
        return
    for name in unreached:
        if not same(_moved(model, x, values, [name]), before.outputs):
            raise ValueError(
                f'{type(model).__name__} uses "{name}", and no gradient reaches it: a .detach(), an autograd.Function'
                " that does not return it, or activation checkpointing without use_reentrant=False leaves it out. Mend"
                " that, or freeze the parameter by requires_grad_(False)"
            )


def _moved(model: nn.Module, x: Tensor, values: Mapping[str, Tensor], names: list[str]) -> Tensor:
    """The outputs with the parameters of these names moved on."""
    with held(model, {name: values[name] * 1.5 + SHIFT for name in names}), seeded(x.device, 0), torch.no_grad():
        return called(model, x.clone())


def _stale(model: nn.Module, x: Tensor, values: Mapping[str, Tensor], training: bool) -> ValueError:
    """Say which parameter is read by a way of its own."""
    culprits = []
    for name, value in values.items():
        found = []
        for put in (written, held):
            with put(model, {name: value}), seeded(x.device, 0), torch.no_grad():
                found.append(called(model, x.clone()) if training else _evaluated(model, x))
        if not same(found[0], found[1], EQUAL):
            culprits.append(f'"{name}"')
    return ValueError(
        f"{type(model).__name__} in {'training' if training else 'evaluation'} mode does not compute from the values"
        f" that its parameters hold: it reads {', '.join(culprits) or 'one of them'} by a tensor that was made of it"
        f" earlier (a transpose kept as an attribute, say). {NOT_LENT}"
    )
