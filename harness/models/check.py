"""What a network must be to be trained here: no mixing of examples, and weights that follow the run's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from harness.dp.engines.memory import FORGET, changed, remembered
from harness.dp.engines.weights import held, restored
from harness.models import mixing, reading
from harness.models.passes import REMEDY, CrossExampleLayer, called, kind, seeded


def check(
    model: nn.Module, input_shape: tuple[int, ...] | None = None, classes: int | None = None, tokens: int | None = None
) -> None:
    """Raise `CrossExampleLayer`, naming the first module that mixes examples, or `ValueError` for other obstacles.

    Types of layers that mix, and parameters that are no real numbers, are found without running the network. With
    `input_shape` (of one example) it is also run, on noise and, where `tokens` is given, on whole numbers below that:

    - in training mode one example is changed, to near and to very far values, and examples are left out; the outputs
      of the others must stay as they are, in a small and in a large batch; so must every buffer, and no pass may
      change anything in the network; nothing that it keeps of a batch may outlive the next;
    - other weights are written into its parameters, and put there as a run does; outputs and gradients must agree in
      both modes, and again after evaluation, and gradients must reach every parameter that is used.

    It ends in the state that it had: parameters, buffers, modes, generators. Attributes that are no tensors stay as its
    own code leaves them. This is a test with a few inputs, not a proof.

    Raises `ValueError` where the network does not turn `[B, *input_shape]` into `[B, ...]` (with `classes`:
    `[B, classes]`).
    """
    for path, module in model.named_modules():
        reason, remedy = _known(module)
        if reason:
            raise CrossExampleLayer(model, path, reason, remedy)
    _real(model)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} has no parameter that is trained: all of them are frozen, or there are none"
        )
    if input_shape is None:
        return
    device, _ = kind(model)
    with restored(model), seeded(device, 0):
        model.train()
        values = _shaken(model)
        with held(model, values):
            draws = mixing.drawn(model, tuple(input_shape), tokens)
            x, many = draws[0](mixing.PROBE), mixing.large(model, draws[0])
            # First of all: what is kept of an infinite example would hide all that comes after it.
            if found := remembered(model, x, called, many):
                raise CrossExampleLayer(model, found.path, str(found), FORGET)
            how = changed(model, x, called, many)
            for draw in draws:
                mixing.probe(model, classes, draw)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        reading.probe(model, draws[0](1), {name: t for name, t in values.items() if name in trained})
        # Last: the others say more precisely what a model does, where they see it.
        if how:
            raise CrossExampleLayer(model, "", how, FORGET)


def _shaken(model: nn.Module) -> dict[str, Tensor]:
    """Slightly moved parameters: a branch that starts at zero would hide what is in it."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: p.detach() + 0.02 * torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        for name, p in model.named_parameters()
        if p.is_floating_point()
    }


def _real(model: nn.Module) -> None:
    for name, t in model.named_parameters():
        if is_lazy(t):
            raise ValueError(
                f'parameter "{name}" has no shape yet: run the network once on an example before it is returned'
            )
        if t.is_complex():
            raise ValueError(
                f'parameter "{name}" is complex ({t.dtype}), and clipping and noise are for real numbers: hold'
                " torch.view_as_real of it, with a last dimension of 2, and use torch.view_as_complex in forward"
            )


def _known(module: nn.Module) -> tuple[str, str]:
    if isinstance(module, _BatchNorm):
        return "normalises by statistics of the batch", REMEDY
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        return (
            "keeps running statistics of the examples, which are published without noise",
            "Write track_running_stats=False.",
        )
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
        return (
            "rewrites the rows that a batch looks up, and so publishes which they are without noise",
            "Leave max_norm out.",
        )
    return "", ""
