"""Passes through a network under examination, and whether two of them ended alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harness.dp.engines.draws import generators

REMEDY = (
    "Clipping bounds what one example adds only if its output depends on no other example. Use GroupNorm: "
    'for timm "timm:NAME?norm_layer=groupnorm" or "timm:NAME?groupnorm=true", '
    "else harness.models.to_groupnorm(model)."
)
ROUNDING = 1e-5  # relative to the largest number: a reduction may be cut differently for another batch size
FAILURES = (RuntimeError, ValueError, AssertionError, TypeError, IndexError)  # what a forward pass may raise
Recorded = tuple[str, nn.Module, list[Tensor]]  # a module with its path and its outputs


class CrossExampleLayer(ValueError):
    """A network whose output for one example depends on others. ``path`` and ``layer`` name the module."""

    def __init__(self, model: nn.Module, path: str, reason: str, remedy: str = REMEDY) -> None:
        self.path, self.layer = path or "(the model)", type(model.get_submodule(path)).__name__
        super().__init__(f'module "{self.path}" ({self.layer}) {reason}. {remedy}')


@dataclass
class Pass:
    """One forward pass: the output, the buffers after it, whether random numbers were drawn.

    And, if recorded, each module's output in turn.
    """

    output: Tensor
    buffers: dict[str, Tensor]
    drew: bool
    modules: list[Recorded]


def kind(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a network computes, and on numbers of which type."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    return (torch.device("cpu"), torch.float32) if first is None else (first.device, first.dtype)


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Random numbers from ``seed`` within; afterwards the generators are as they were."""
    devices = [device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed(seed)
        yield


def called(model: nn.Module, x: Tensor) -> Tensor:
    """The output, one tensor. Raises ValueError, saying what to write, where it fails or is something else."""
    try:
        output = model(x)
    except FAILURES as error:
        raise ValueError(
            f"{type(model).__name__} does not run on examples of shape {list(x.shape[1:])}: {error}{_hint(error)}"
        ) from error
    if isinstance(output, Tensor):
        return output
    what = f"a {type(output).__name__} of {len(output)}" if isinstance(output, tuple | list | dict) else None
    raise ValueError(
        f"{type(model).__name__} returns {what or type(output).__name__}; it should return one tensor, the outputs"
        " [B, ...] that the loss is computed from: write a forward that returns them alone (for a Hugging Face model"
        " its .logits)"
    )


def _hint(error: BaseException) -> str:
    if "scalar types: Long, Int" in str(error):
        return ". Data sets hold whole numbers as floats: write x.long() first in forward"
    if isinstance(error, IndexError) or "index out of" in str(error):
        return (
            ". Where inputs are whole numbers, say so: data whose training inputs all are is recognised by that,"
            " and check(..., tokens=N) takes them below N. A table must have an entry for each"
        )
    return ""


def forward(model: nn.Module, x: Tensor, seed: int = 0, record: bool = False) -> Pass:
    """Run ``model``, always from the same buffers and random numbers; ``record`` keeps modules' outputs."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modules: list[Recorded] = []
    named = [m for m in model.named_modules() if not isinstance(m[1], torch.jit.ScriptModule)]
    handles = [m.register_forward_hook(partial(_record, modules, path)) for path, m in named if record]
    try:
        with seeded(x.device, seed), torch.no_grad():
            draws = generators(x.device)
            output = called(model, x.clone())
            drew = any(not torch.equal(a, b) for a, b in zip(draws, generators(x.device), strict=True))
    finally:
        for handle in handles:
            handle.remove()
    after = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in before and not torch.equal(buffer, before[name]):
                buffer.copy_(before[name])
    return Pass(output, after, drew, modules)


def _record(modules: list[Recorded], path: str, module: nn.Module, inputs: Any, output: Any) -> None:
    modules.append((path, module, [t.detach().clone() for t in _tensors(output)]))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def same(a: Tensor, b: Tensor, rounding: float = ROUNDING) -> bool:
    """Equal up to ``rounding`` of the largest number, and to some units in the last place of half precision."""
    if a.shape != b.shape:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    slack = max(rounding, 8 * torch.finfo(a.dtype).eps)
    a, b = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (a, b))
    finite = a[a.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=slack * scale, equal_nan=True)
