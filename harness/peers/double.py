"""Copies of a model that a library may hook, wrap and mark in place of the model itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

from harness.dp.tree import Tree


class Double(NamedTuple):
    """The wrapped copy of a model, and its trained parameters under the names that they have in the model."""

    module: nn.Module
    parameters: Mapping[str, Any]  # whatever a library adds to a parameter is not in its type


Wrap = Callable[[nn.Module], nn.Module]
_doubles: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], Double]] = WeakKeyDictionary()


def structure(model: nn.Module) -> nn.Module:
    """A copy of `model` that shares its buffers and the memory of its parameters."""
    shared = {id(b): b for b in model.buffers()}
    own = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, {**shared, **own})


@contextmanager
def double(kind: object, wrap: Wrap, model: nn.Module, w: Tree) -> Iterator[Double]:
    """The double of `model` that `wrap` made of a copy, with `w` for its parameters and no gradients.

    Made once for each `kind` of wrapping, for each dtype, device and set of modes and trained parameters; it lives as
    long as the model. A failure inside throws it away, for nobody knows what it left half-done.
    """
    modes = tuple(m.training for m in model.modules())
    made, key = _doubles.setdefault(model, {}), (kind, w.layout, w.flat.dtype, w.flat.device, modes)
    if key not in made:
        module = structure(model)
        wrapped = wrap(module)
        names = dict(module.named_parameters())
        made[key] = Double(wrapped, {name: names[name] for name in w.names})
    found = made[key]
    try:
        for name, p in found.parameters.items():
            p.data, p.grad = w[name], None
        yield found
    except BaseException:
        made.pop(key, None)
        raise
    for p in found.parameters.values():
        p.grad = None
