"""Specs to networks: ``build("tanh-cnn", (1, 28, 28), 10, seed)``."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from harness import registry
from harness.models.check import check


def build(spec: str, input_shape: tuple[int, ...], classes: int, seed: int, tokens: int | None = None) -> nn.Module:
    """The network ``"name"``, ``"name?key=value&..."`` or ``"timm:NAME?..."`` in training mode, on the CPU.

    Weights depend on the spec, the shape, the classes and ``seed`` alone; the global generators are left as
    they were. ``input_shape`` is that of one example, ``(C, H, W)`` for images; ``tokens`` says that inputs are
    whole numbers below it, as `harness.data.Dataset.tokens` does.

    Raises :class:`CrossExampleLayer` for a network whose output for an example depends on others,
    ``ValueError`` where the network does not take this shape, and the registry's errors for a misspelt name
    or option.
    """
    entry, arguments = registry.lookup("model", spec)
    function = registry.load(entry)
    supplied: dict[str, Any] = {"input_shape": tuple(input_shape), "classes": classes, "seed": seed}
    wanted = inspect.signature(function).parameters
    arguments.update({key: value for key, value in supplied.items() if key in wanted})
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # torch.manual_seed would also seed every GPU, and fork_rng restores only the CPU's generator here.
        torch.default_generator.manual_seed(seed)
        model: nn.Module = function(**arguments)
    if not isinstance(model, nn.Module):
        raise ValueError(f'model "{spec}" gives {type(model).__name__}: its function must return an nn.Module')
    model.train()
    made = sorted({str(p.dtype) for p in model.parameters() if p.is_floating_point()} - {"torch.float32"})
    if made:
        raise ValueError(
            f'model "{spec}" has parameters in {", ".join(made)}, and a run turns all into the dtype of its suite: make'
            " them in float32, and write dtype in the suite's [numerics]"
        )
    # An embedding has a width of its own.
    check(model, tuple(input_shape), None if entry.meta.get("embedding") else classes, tokens)
    return model
