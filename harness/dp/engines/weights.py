"""The weights of a pass, put into the model for as long as the pass and its gradients take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn


@contextmanager
def held(model: nn.Module, w: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Inside the block the parameters of `model` named in `w` hold these values; afterwards those they had before.

    Yields the parameters by name: they are the leaves to differentiate by. Their memory is that of `w`, so nothing is
    copied, and whoever holds a parameter in a list or a closure, or computes a layer once more during the backward
    pass, sees the same weights as the layers do. Gradients must be taken inside the block. A model that writes to its
    own weights writes to `w`: give it a clone. A tensor that a model computed from its parameters before the block
    (a cached transpose, say) keeps the old values; `harness.models.check` refuses such models.

    The values may have another dtype or memory layout than the parameters. Raises KeyError for an unknown name.
    """
    parameters = dict(model.named_parameters())
    chosen: dict[str, Tensor] = {name: parameters[name] for name in w}
    with _restored(chosen.values()):
        for name, p in chosen.items():
            p.data = w[name].detach()
        yield chosen


@contextmanager
def written(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block `values` are in the parameters' own memory, as an optimizer writes them."""
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in values}
    try:
        for name, value in values.items():
            parameters[name].data.copy_(value)
        yield
    finally:
        for name, value in before.items():
            parameters[name].data.copy_(value)


@contextmanager
def replaced(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block the parameters named in `tensors` are these tensors, of any shape, wherever they are registered.

    For what cannot be put into a parameter's own memory: a copy for each example, or the tensors of a transformation.
    (torch.func.functional_call leaves them in a module that is registered under two names.)
    """
    chosen = {id(p): tensors[name] for name, p in model.named_parameters() if name in tensors}
    places = [
        (module, key, p) for module in model.modules() for key, p in module._parameters.items() if id(p) in chosen
    ]
    try:
        for module, key, p in places:
            module._parameters[key] = chosen[id(p)]  # type: ignore[assignment]
        yield
    finally:
        for module, key, p in places:
            module._parameters[key] = p


@contextmanager
def in_float64(model: nn.Module) -> Iterator[None]:
    """Inside the block all floating parameters and buffers of `model` are in float64.

    Losses computed before the block have no gradients by its parameters any more: PyTorch ties them to a type.
    """
    floats = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    with _restored(floats):
        for t in floats:
            t.data = t.data.double()
        yield


@contextmanager
def _restored(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Afterwards each tensor stands on the memory that it stood on before."""
    before = [(t, t.data) for t in tensors]
    try:
        yield
    finally:
        for t, data in before:
            t.data = data


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Whatever the block does to the parameters, buffers and modes of `model` is undone afterwards, to the bit.

    Written to, pointed elsewhere or replaced: each module has its own tensors back, with their values, and their memory
    where nobody took it away. Attributes that are no tensors stay as the block left them.
    """
    kept = [
        (owned, name, t, t.data, t.detach().clone())
        for module in model.modules()
        for owned in cast(tuple[dict[str, Any], ...], (module._parameters, module._buffers))
        for name, t in owned.items()
        if t is not None
    ]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for owned, name, t, data, value in kept:
            owned[name] = t
            t.data = data
            if not torch.equal(data, value):  # of what is expanded, no entry can be written alone
                with torch.no_grad():
                    data.copy_(value)
