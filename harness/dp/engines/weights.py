"""The weights of a pass, put into the model for as long as the pass and its gradients take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

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
    chosen = {name: parameters[name] for name in w}
    with _restored(chosen.values()):
        for name, p in chosen.items():
            p.data = w[name].detach()
        yield chosen


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
