"""Refusing networks that mix examples, by the type of a module and by what the network does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

REMEDY = (
    "Clipping bounds what one example adds only if its output depends on no other example. Use GroupNorm: "
    'for timm "timm:NAME?norm_layer=groupnorm" or "timm:NAME?groupnorm=true", '
    "else harness.models.to_groupnorm(model)."
)
# Five examples: few, and unlikely to be the length of another leading dimension.
PROBE = 5
WHOLE = "(the model)"


class CrossExampleLayer(ValueError):
    """A network whose output for one example depends on others. ``path`` and ``layer`` name the module."""

    def __init__(self, path: str, layer: str, reason: str, remedy: str = REMEDY) -> None:
        self.path, self.layer, self.reason, self.remedy = path, layer, reason, remedy
        super().__init__(f'module "{path}" ({layer}) {reason}. {remedy}')


def check(model: nn.Module, input_shape: tuple[int, ...] | None = None, classes: int | None = None) -> None:
    """Raise :class:`CrossExampleLayer` naming the first module that mixes examples.

    Known types are found without running the network. With ``input_shape`` (of one example) a copy is also
    run in training mode: one example is changed, then one is left out, and the outputs of the others must
    stay as they are; so must every buffer, and no pass may change anything in the network. That finds modules
    nobody knows; it is a test with a few inputs, not a proof.

    Raises ``ValueError`` where the network does not turn ``[B, *input_shape]`` into ``[B, ...]`` (with
    ``classes``: ``[B, classes]``).
    """
    for path, module in model.named_modules():
        reason, remedy = _known(module)
        if reason:
            raise CrossExampleLayer(path or WHOLE, type(module).__name__, reason, remedy)
    if input_shape is not None:
        _probe(model, input_shape, classes)


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


# The probe ------------------------------------------------------------------------------------------------


@dataclass
class _Pass:
    """One forward pass: the output, the buffers after it and, if recorded, each module's output in turn."""

    output: Tensor
    buffers: dict[str, Tensor]
    modules: list[tuple[str, str, list[Tensor]]]


def _probe(model: nn.Module, shape: tuple[int, ...], classes: int | None) -> None:
    device, dtype = _kind(model)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(PROBE, *shape, generator=generator).to(device, dtype)
    others = torch.randn(2, *shape, generator=generator).to(device, dtype)
    probe = _shaken(model, generator)
    before = {name: tensor.clone() for name, tensor in probe.state_dict(keep_vars=False).items()}
    base = _forward(probe, x)
    _same_state(before, {**probe.state_dict(), **base.buffers}, probe)
    expected = [PROBE] if classes is None else [PROBE, classes]
    got = list(base.output.shape)
    if (got[:1] if classes is None else got) != expected:
        raise ValueError(
            f"{type(model).__name__} turns {PROBE} examples of shape {list(shape)} into {got}; "
            f"it should give one row per example{'' if classes is None else f', [{PROBE}, {classes}]'}"
        )
    # Far away and near: a maximum over the batch sees the first, a threshold the second.
    for changed in (100.0 * others[0], others[1]):
        x_changed = torch.cat([changed[None], x[1:]])
        after = _forward(probe, x_changed)
        _same_buffers(base, after, probe)
        if not _same(base.output[1:], after.output[1:]):
            raise _culprit(probe, x, x_changed, slice(1, None), "changes")
    # With dropout, leaving one out may change the masks of the others.
    deterministic = _same(base.output, _forward(probe, x, seed=1).output)
    if deterministic and not _same(base.output[1:], _forward(probe, x[1:]).output):
        raise _culprit(probe, x, x[1:], slice(None), "is left out")


def _kind(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    return (torch.device("cpu"), torch.float32) if first is None else (first.device, first.dtype)


def _shaken(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy with slightly moved parameters: a branch that starts at zero would hide what is in it."""
    probe = copy.deepcopy(model).train()
    with torch.no_grad():
        for parameter in probe.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.02 * noise.to(parameter.device, parameter.dtype))
    return probe


def _forward(probe: nn.Module, x: Tensor, seed: int = 0, record: bool = False) -> _Pass:
    """Run ``probe``, always from the same buffers and random numbers; ``record`` keeps modules' outputs."""
    before = {name: buffer.clone() for name, buffer in probe.named_buffers()}
    modules: list[tuple[str, str, list[Tensor]]] = []
    named = probe.named_modules() if record else ()
    handles = [m.register_forward_hook(_recorder(modules, path, type(m).__name__)) for path, m in named]
    devices = [x.device.index] if x.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.default_generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed(seed)
            output = probe(x)
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:
        raise ValueError(
            f"{type(probe).__name__} does not run on examples of shape {list(x.shape[1:])}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(output, Tensor):
        raise ValueError(
            f"{type(probe).__name__} returns {type(output).__name__}; it should return one tensor"
        )
    after = {name: buffer.clone() for name, buffer in probe.named_buffers()}
    with torch.no_grad():
        for name, buffer in probe.named_buffers():
            if name in before:
                buffer.copy_(before[name])
    return _Pass(output, after, modules)


def _recorder(
    modules: list[tuple[str, str, list[Tensor]]], path: str, layer: str
) -> Callable[[nn.Module, Any, Any], None]:
    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        modules.append((path, layer, [t.detach().clone() for t in _tensors(output)]))

    return record


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding: a reduction may be cut differently for another batch size."""
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    a, b = a.double(), b.double()
    finite = a[a.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=1e-5 * scale, equal_nan=True)


def _same_state(before: dict[str, Tensor], after: dict[str, Tensor], probe: nn.Module) -> None:
    """Refuse what a pass changes by itself: how many passes make a step depends on how many examples there are."""
    for name, tensor in before.items():
        if name in after and not torch.equal(tensor, after[name]):
            path, _, last = name.rpartition(".")
            raise CrossExampleLayer(
                path or WHOLE,
                type(probe.get_submodule(path)).__name__,
                f'changes "{last}" in every pass, and the number of passes depends on the size of the batch',
                "Compute it from the parameters, or do not update it in training.",
            )


def _same_buffers(a: _Pass, b: _Pass, probe: nn.Module) -> None:
    for name, buffer in a.buffers.items():
        if not _same(buffer, b.buffers[name]):
            path, _, last = name.rpartition(".")
            raise CrossExampleLayer(
                path or WHOLE,
                type(probe.get_submodule(path)).__name__,
                f'writes the data into its buffer "{last}", which is published without noise',
                "Remove the buffer, or do not update it in training.",
            )


def _culprit(probe: nn.Module, x: Tensor, x_changed: Tensor, rows: slice, what: str) -> CrossExampleLayer:
    """The first module to end with another output for the examples that stayed: its parts ended unchanged."""
    reason = f"gives another output for an example when another one of the batch {what}"
    a, b = _forward(probe, x, record=True), _forward(probe, x_changed, record=True)
    for (path, layer, ours), (_, _, theirs) in zip(a.modules, b.modules, strict=False):
        for one, other in zip(ours, theirs, strict=False):
            batch_first = (
                one.ndim > 0 and len(one) == len(x) and other.ndim > 0 and len(other) == len(x_changed)
            )
            if batch_first and not _same(one[1:], other[rows]):
                return CrossExampleLayer(path or WHOLE, layer, reason)
    return CrossExampleLayer(WHOLE, type(probe).__name__, reason)
