"""Whether a model remembers examples: what it keeps of one batch must not outlive the next.

A running mean in an attribute, say. It reaches later steps or the evaluation without noise. Buffers and attributes of
modules are looked at, with what lies in their lists and dicts, in objects of the model's own, and in what its functions
enclose; what a module of Python holds is not.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from harness.dp.engines.draws import generators, rewind
from harness.dp.engines.engine import Unserved, losses_of
from harness.dp.engines.survey import untouched, whole
from harness.dp.loss import Batch, Loss

DEEPEST = 8
KEPT = (bool, int, float, complex, str, bytes, type(None))
OWN = frozenset({"_parameters", "_modules", "_buffers", "training"})


def refuse_memory(loss: Loss, model: nn.Module, batch: Batch) -> None:
    """Raise Unserved where a model, which holds its weights, remembers an earlier batch; see `remembered`."""
    found = remembered(model, batch.x, lambda one, x: losses_of(loss, one, Batch(x, batch.y)))
    if found:
        raise Unserved(f"{found.path or type(model).__name__} {found}. {FORGET}")


FORGET = "Keep nothing of them"


class Place(NamedTuple):
    """An attribute of the module at `path`, or something in it."""

    path: str
    name: str

    def __str__(self) -> str:
        return (
            f'keeps something of the examples that it saw in "{self.name}", beyond the next batch: it would reach later'
            " steps or the evaluation without noise"
        )


def remembered(model: nn.Module, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> Place | None:
    """The buffer or attribute that depends on the batch before the last; None where none does.

    `run` gives the outputs or losses of a pass, which are differentiated too. Copies of the model, each in its mode,
    take one batch, `x` or others, and then `x`. Where a model cannot be copied it is run itself, and numbers, which may
    count passes, are not compared.
    """
    others = [x[:1].expand_as(x), x[-1:].expand_as(x) if whole(x) else 1.7 * x + 0.3]
    compared: tuple[type, ...] = (*KEPT, Tensor, np.ndarray)
    with untouched(model, x.device):
        draws = generators(x.device)

        def after(first: Tensor) -> dict[Place, Any]:
            nonlocal compared
            try:
                one = _copied(model)
            except Exception:  # some models hold what cannot be copied, and say so in many ways
                one, compared = model, (Tensor, np.ndarray)
            rewind(x.device, draws)
            for inputs in (first, x):
                _pass(one, run, inputs.clone())
            return dict(_state(one, compared))

        once, again = after(x), after(x)
        steady = {place: value for place, value in once.items() if place in again and _equal(value, again[place])}
        for other in others:
            # Examples that the model does not take leave nothing.
            with suppress(RuntimeError, ValueError, IndexError):
                found = after(other)
                for place, value in steady.items():
                    if place not in found or not _equal(value, found[place]):
                        return place
    return None


def _copied(model: nn.Module) -> nn.Module:
    """A copy, also of what its functions enclose: `deepcopy` leaves functions as they are."""
    memo: dict[int, Any] = {}
    functions = [value for value in _reached(model) if isinstance(value, FunctionType) and value.__closure__]
    for one in functions:
        cells = tuple(CellType() for _ in one.__closure__ or ())
        memo[id(one)] = FunctionType(one.__code__, one.__globals__, one.__name__, one.__defaults__, cells)
        memo[id(one)].__kwdefaults__ = one.__kwdefaults__
    for one in functions:
        for cell, other in zip(one.__closure__ or (), memo[id(one)].__closure__, strict=True):
            if _filled(cell):
                other.cell_contents = copy.deepcopy(cell.cell_contents, memo)
    return copy.deepcopy(model, memo)


def _pass(model: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> None:
    with torch.enable_grad():
        outputs = run(model, x)
        trained = [p for p in model.parameters() if p.requires_grad]
        # What cannot be differentiated shows by itself.
        with suppress(RuntimeError):
            torch.autograd.grad(outputs.float().sum(), trained, allow_unused=True)


def _state(model: nn.Module, compared: tuple[type, ...]) -> Iterator[tuple[Place, Any]]:
    """What can be compared of all that the modules hold beside parameters, by name."""
    for place, value in _walk(model):
        if isinstance(value, compared):
            yield place, value.detach().clone() if isinstance(value, Tensor) else copy.copy(value)


def _reached(model: nn.Module) -> list[Any]:
    return [value for _, value in _walk(model)]


def _walk(model: nn.Module) -> Iterator[tuple[Place, Any]]:
    """Whatever the modules hold, directly or in what they hold; each object once."""
    seen = {id(p) for p in model.parameters()} | {id(module) for module in model.modules()}
    for path, module in model.named_modules():
        held: Iterable[tuple[Any, Any]] = module.named_buffers(recurse=False)
        if not isinstance(module, torch.jit.ScriptModule):
            held = [*held, *((name, value) for name, value in vars(module).items() if name not in OWN)]
        todo = [(str(name), value, 0) for name, value in held]
        while todo:
            name, value, depth = todo.pop()
            # Small numbers and texts are one object wherever they are.
            if id(value) in seen and not isinstance(value, KEPT):
                continue
            seen.add(id(value))
            yield Place(path, name), value
            if depth < DEEPEST:
                todo += [(f"{name}.{key}".strip("."), one, depth + 1) for key, one in _inside(value)]


def _inside(value: Any) -> Iterable[tuple[Any, Any]]:
    """What an object holds, by name; nothing for one that is not looked into."""
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, list | tuple | deque):
        return list(enumerate(value))
    if isinstance(value, set | frozenset):
        return [("", sorted(map(repr, value)))]
    if isinstance(value, partial):
        return [("", value.func), ("", value.args), ("", value.keywords)]
    if isinstance(value, MethodType):
        return [("", value.__self__), ("", value.__func__)]
    if isinstance(value, FunctionType):
        names, cells = value.__code__.co_freevars, value.__closure__ or ()
        enclosed = [(name, cell.cell_contents) for name, cell in zip(names, cells, strict=True) if _filled(cell)]
        return [*enclosed, *enumerate(value.__defaults__ or ()), *vars(value).items()]
    if not hasattr(value, "__dict__") or isinstance(value, type | nn.Module | Tensor):
        return []
    return [] if type(value).__module__.partition(".")[0] == "torch" else list(vars(value).items())


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.tobytes() == b.tobytes() and a.shape == b.shape
    return type(a) is type(b) and (a == b or (a != a and b != b))
