"""Whether a model remembers examples: what it keeps of one batch must not show in the next, nor in evaluation.

A running mean, say, or the range of the last batch: it reaches later steps or published scores without noise. There are
two tests, at fixed weights and random numbers. What a model computes of a batch must be the same before and after it
sees others, small and large, wherever it may keep what it saw (`changed`). And copies of it that see different batches
and then the same one must hold the same, so that nothing waits to be used later (`remembered`): buffers and attributes
of modules, with what lies in their containers and objects, and in what their functions enclose or default to. What a
model hides in a module of Python, in a class, behind a weak reference or outside Python is not looked at by the second.
"""

from __future__ import annotations

import copy
import io
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from types import CellType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from harness.dp.engines.draws import generators, rewind
from harness.dp.engines.engine import Unserved, losses_of
from harness.dp.engines.survey import probe_batch, signature, untouched, whole
from harness.dp.engines.weights import held
from harness.dp.loss import Batch, Loss

DEEPEST = 8
MANY = 66  # examples of the larger batch that an engine tries: some models keep statistics of large ones alone
KEPT = (bool, int, float, complex, str, bytes, type(None))
COMPARED = (*KEPT, Tensor, np.ndarray)
SHARED = (type(threading.Lock()), type(threading.RLock()), io.IOBase, ModuleType, torch.Generator)
"""What copies of a model have in common: it cannot be copied, and holds nothing of an example."""
OWN = frozenset({"_parameters", "_modules", "_buffers", "training"})


_tried: WeakKeyDictionary[nn.Module, set[Any]] = WeakKeyDictionary()


def refuse_memory_once(loss: Loss, model: nn.Module, w: Mapping[str, Tensor], batch: Batch) -> None:
    """`refuse_memory` with weights `w`, on a few examples of this shape: once, and without a trace.

    For engines that try nothing else of a model before they use it.
    """
    known, key = _tried.setdefault(model, set()), signature(loss, model, w, batch)
    if key not in known:
        clone = {name: t.detach().clone() for name, t in w.items()}
        with untouched(model, batch.x.device), torch.enable_grad(), held(model, clone):
            refuse_memory(loss, model, probe_batch(batch))
        known.add(key)


def refuse_memory(loss: Loss, model: nn.Module, batch: Batch) -> None:
    """Raise Unserved where a model, which holds its weights, remembers an earlier batch."""
    times = -(-MANY // len(batch.x))

    def losses(one: nn.Module, x: Tensor) -> Tensor:
        y = batch.y if len(x) == len(batch.x) else torch.cat([batch.y] * times)
        return losses_of(loss, one, Batch(x, y))

    x, many = batch.x, torch.cat([batch.x] * times)
    try:
        found: Place | str | None = remembered(model, x, losses, many) or changed(model, x, losses, many)
    except Uncopied as error:
        raise Unserved(str(error)) from error
    if found:
        path = getattr(found, "path", "")
        raise Unserved(f"{path or type(model).__name__} {found}. {FORGET}")


FORGET = "Keep nothing of them"
ALIKE = 1e-5
"""Relative to the largest: by how much the same passes may differ, in their last digits."""


class Place(NamedTuple):
    """An attribute of the module at `path`, or something in it."""

    path: str
    name: str

    def __str__(self) -> str:
        return (
            f'keeps something of the examples that it saw in "{self.name}", beyond the next batch: it would reach later'
            " steps or the evaluation without noise"
        )


def changed(model: nn.Module, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor], many: Tensor) -> str | None:
    """What the model computes otherwise of `x` after it saw other batches, in words; None where nothing changes.

    `run` gives the outputs or losses of a pass, which are differentiated too. The model is in its mode, and in
    evaluation in between.
    """
    with untouched(model, x.device):
        draws = generators(x.device)

        def shown(inputs: Tensor) -> dict[str, Tensor | None]:
            # A pass may draw as many numbers as its examples make it.
            rewind(x.device, draws)
            outputs, gradients = _pass(model, run, inputs.clone())
            rewind(x.device, draws)
            evaluated = _evaluated(model, run, inputs)
            return {"outputs": outputs, "gradients": gradients, "outputs in evaluation": evaluated}

        first = shown(x)
        for other in (*_others(x), many, _others(many)[1]):
            rewind(x.device, draws)
            # Examples that the model does not take leave nothing.
            with suppress(RuntimeError, ValueError, IndexError):
                _pass(model, run, other.clone())
        rewind(x.device, draws)
        # Right after the others, as scores follow the last batch; and after one batch more.
        for name, value in [("outputs in evaluation", _evaluated(model, run, x)), *shown(x).items()]:
            if not _alike(first[name], value):
                return (
                    f"keeps something of the examples that it saw: its {name} depend on what came before. It would"
                    " reach later steps or the evaluation without noise"
                )
    return None


def remembered(model: nn.Module, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor], many: Tensor) -> Place | None:
    """The buffer or attribute that depends on the batch before the last; None where none does.

    Copies of the model, each in its mode, take one batch (`x`, the larger `many`, or others of their sizes) and then
    `x`. Raises `Uncopied` where a model cannot be copied.
    """
    with untouched(model, x.device):
        draws = generators(x.device)

        def after(first: Tensor) -> dict[Place, Any]:
            one = _copied(model)
            for inputs in (first, x):
                rewind(x.device, draws)
                if len(inputs) == len(x):
                    _pass(one, run, inputs.clone())
                else:
                    # Of many examples forward alone, which costs least.
                    run(one, inputs.clone())
            return dict(_state(one))

        for first, others in ((x, _others(x)), (many, _others(many)[1:])):
            once, again = after(first), None
            for other in others:
                # Examples that the model does not take leave nothing.
                with suppress(RuntimeError, ValueError, IndexError):
                    found = after(other)
                    differ = [p for p in once.keys() | found.keys() if not _equal(once.get(p), found.get(p))]
                    # What differs by itself, from one pass to the next, says nothing.
                    again = again or (after(first) if differ else None)
                    for p in sorted(differ):
                        if again and _equal(once.get(p), again.get(p)):
                            return p
    return None


def _others(x: Tensor) -> list[Tensor]:
    """Batches of the size of `x` that differ in every statistic."""
    moved = x[-1:].expand_as(x) if whole(x) else 1.7 * x + 0.3
    return [x[:1].expand_as(x), moved]


def _evaluated(model: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> Tensor | None:
    """What the model computes of `x` in evaluation; None where it cannot. Its modes are those that it had."""
    mode, modes = model.training, {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), suppress(RuntimeError):
            return run(model, x.clone()).detach().clone()
    finally:
        model.train(mode)
        for module, training in modes.items():
            module.training = training
    return None


class Uncopied(ValueError):
    """A model cannot be copied, and so not be compared with itself."""


def _copied(model: nn.Module) -> nn.Module:
    """A copy, also of what its functions enclose and default to: `deepcopy` leaves functions as they are."""
    memo: dict[int, Any] = {}
    reached = [value for _, value in _walk(model)]
    for value in reached:
        if isinstance(value, SHARED):
            memo[id(value)] = value
        elif isinstance(value, Tensor) and not value.is_leaf:
            memo[id(value)] = value.detach().clone().requires_grad_(value.requires_grad)
    functions = [f for f in reached if isinstance(f, FunctionType) and not (f.__module__ or "").startswith("torch")]
    for one in functions:
        cells = tuple(CellType() for _ in one.__closure__ or ())
        memo[id(one)] = FunctionType(one.__code__, one.__globals__, one.__name__, None, cells)
    try:
        for one in functions:
            memo[id(one)].__defaults__ = copy.deepcopy(one.__defaults__, memo)
            memo[id(one)].__kwdefaults__ = copy.deepcopy(one.__kwdefaults__, memo)
            vars(memo[id(one)]).update(copy.deepcopy(vars(one), memo))
            for cell, other in zip(one.__closure__ or (), memo[id(one)].__closure__, strict=True):
                if _filled(cell):
                    other.cell_contents = copy.deepcopy(cell.cell_contents, memo)
        return copy.deepcopy(model, memo)
    except Exception as error:  # they say so in many ways
        raise Uncopied(
            f"{type(model).__name__} cannot be copied ({str(error)[:200]}), and so not be compared with itself after"
            " other examples. Keep nothing in it that copy.deepcopy does not copy"
        ) from error


def _pass(model: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The outputs of a pass, and all gradients of their sum as one vector; None where there are none."""
    with torch.enable_grad():
        outputs = run(model, x)
        trained = [p for p in model.parameters() if p.requires_grad]
        # What cannot be differentiated shows by itself.
        with suppress(RuntimeError):
            found = torch.autograd.grad(outputs.float().sum(), trained, allow_unused=True)
            reached = [g.flatten().double() for g in found if g is not None]
            return outputs.detach().clone(), torch.cat(reached) if reached else None
    return outputs.detach().clone(), None


def _state(model: nn.Module) -> Iterator[tuple[Place, Any]]:
    """What can be compared of all that the modules hold beside parameters, by name."""
    for place, value in _walk(model):
        if isinstance(value, COMPARED):
            yield place, value.detach().clone() if isinstance(value, Tensor) else copy.copy(value)


def _walk(model: nn.Module) -> Iterator[tuple[Place, Any]]:
    """Whatever the modules hold, directly or in what they hold; each object once."""
    seen = {id(module) for module in model.modules()}
    for path, module in model.named_modules():
        held: Iterable[tuple[Any, Any]] = module.named_buffers(recurse=False)
        own = ((name, one) for name, p in module.named_parameters(recurse=False) for name, one in _inside(p))
        held = [*held, *own]
        if not isinstance(module, torch.jit.ScriptModule):
            held += [(name, value) for name, value in vars(module).items() if name not in OWN]
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
    if isinstance(value, (*KEPT, type, nn.Module, ModuleType, np.ndarray)):
        return []
    if isinstance(value, Tensor):
        return [("grad", value.grad if value.is_leaf else None), *vars(value).items()]
    if isinstance(value, dict | MappingProxyType):
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
        defaults = [*enumerate(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).items()]
        return [*enclosed, *defaults, *vars(value).items()]
    # Bytes and arrays, also those of other libraries; then attributes; then what a copy is made of, of numbers say.
    with suppress(Exception):
        return [("", bytes(memoryview(value)))]
    if attributes := [*vars(value).items()] if hasattr(value, "__dict__") else []:
        return attributes + [(name, getattr(value, name)) for name in _slots(value) if hasattr(value, name)]
    with suppress(Exception):
        _, *parts = value.__reduce_ex__(4)
        return [("", list(one) if isinstance(one, Iterator) else one) for one in parts]
    return [(name, getattr(value, name)) for name in _slots(value) if hasattr(value, name)]


def _slots(value: Any) -> list[str]:
    found = [getattr(kind, "__slots__", ()) for kind in type(value).__mro__]
    return [name for names in found for name in ((names,) if isinstance(names, str) else names)]


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
    return type(a) is type(b) and bool(a == b or (a != a and b != b))


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return False
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    return not a.numel() or float((a - b).abs().max()) <= ALIKE * float(a.abs().max())
