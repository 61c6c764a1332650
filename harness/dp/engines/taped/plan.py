"""A plan for turning a tape into per-example gradients.

A `Plan` says for every parameter where its gradient comes from:

* a rule of `harness.dp.engines.taped.rules`, for modules of torch.nn that compute what their class computes;
* a copy for each example, for a parameter that nothing but the batch's size ties to the batch (a class token, say);
* vmap over one module alone, for any other module that owns parameters: its inputs and output gradient are known, so
  only this module is differentiated once more, per example;
* vmap over the whole model, for a parameter that is used outside any module that could be isolated.

Nothing is taken on trust: `harness.dp.engines.taped.trial` makes plans, and tries them first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils._pytree import tree_flatten

from harness.dp.engines.engine import Unserved
from harness.dp.engines.survey import EACH, Layout, Place
from harness.dp.engines.tape import Call, Run, repeated, run
from harness.dp.engines.taped.gradients import Gradient, Rows
from harness.dp.engines.taped.rules import call_rule_for, rule_for
from harness.dp.engines.vmap import explicit_states, per_example_gradients
from harness.dp.engines.weights import replaced
from harness.dp.loss import Batch, Loss


@dataclass(frozen=True)
class Plan:
    """Where each parameter's gradient comes from.

    `rules`: module path -> {its own parameter's name: the model's name}; `modules`: path of a module to differentiate
    on its own -> {name within it: the model's name}; `whole`: the names for which the whole model is differentiated.
    `layouts`: path -> the layout of each of its calls. `free`: parameters, and `spread`: paths of modules by rule, of
    which each example gets a copy.

    `idle`: parameters that had no gradient when the plan was tried. `random`: the modules that draw random numbers.

    `copy`: whether tensors on the tape must be copied, because the model writes to them later. `footprints`: bytes per
    example of each per-example gradient that is kept, and `lean` where as few as can be are; `activations`: bytes per
    example on the tape, roughly.
    """

    rules: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    modules: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    whole: tuple[str, ...] = ()
    layouts: Mapping[str, tuple[Layout, ...]] = field(default_factory=dict)
    free: tuple[str, ...] = ()
    spread: frozenset[str] = frozenset()
    idle: tuple[str, ...] = ()
    random: frozenset[str] = frozenset()
    copy: bool = False
    footprints: tuple[int, ...] = ()
    lean: tuple[int, ...] = ()
    activations: int = 0

    @cached_property
    def paths(self) -> frozenset[str]:
        """The modules to tape."""
        return frozenset((*self.rules, *self.modules))

    def run(self, loss: Loss, model: nn.Module, leaves: Mapping[str, Tensor], batch: Batch) -> Run:
        """A pass that tapes what this plan needs, of a model that holds its weights: `leaves`."""
        taped = run(loss, model, leaves, batch, self.paths, self.free, self.spread, self.idle, self.copy, False)
        if taped.woken:
            raise Unserved(
                f"{', '.join(sorted(taped.woken))} has a gradient for some batches and none for others: which layers"
                f" are used depends on chance or on the data. {REMEDY}"
            )
        return taped


REMEDY = 'Only engine = "loop" gives it a meaning'


def gradients(
    plan: Plan, model: nn.Module, w: Mapping[str, Tensor], taped: Run, loss: Loss, batch: Batch
) -> dict[str, Gradient]:
    """The per-example gradients of every parameter that the batch reaches, by the model's names.

    The model holds `w`, the weights of the pass, detached.
    """
    found: dict[str, Gradient] = {}
    seen: dict[str, int] = defaultdict(int)

    def add(name: str, gradient: Gradient) -> None:
        found[name] = found[name] + gradient if name in found else gradient

    for call, cotangents in zip(taped.calls, taped.cotangents, strict=True):
        if call.path not in plan.paths:
            continue
        layouts = plan.layouts[call.path]
        if seen[call.path] == len(layouts):
            raise changed(call.path)
        layout = layouts[seen[call.path]]
        seen[call.path] += 1
        if all(c is None for c in cotangents):
            continue
        module = model.get_submodule(call.path)
        if call.path in plan.rules:
            names = plan.rules[call.path]
            if call.path in plan.spread:
                call.inputs[0], layout = repeated(call.inputs[0], len(batch)), EACH
            for own, gradient in by_rule(module, call, cotangents, layout, len(batch), names).items():
                add(names[own], gradient)
        if call.path in plan.modules:
            names = plan.modules[call.path]
            wanted = {own: w[name] for own, name in names.items()}
            for own, rows in by_module(module, call, cotangents, layout, len(batch), wanted).items():
                add(names[own], Rows(rows))
    for path in plan.paths:
        # Chance may skip a layer. What it skips of several unlike calls would not be known.
        if seen[path] != len(layouts := plan.layouts[path]) and not (plan.random and len(set(layouts)) == 1):
            raise changed(path)
    for name, value in taped.free.items():
        add(name, Rows(value))
    if plan.whole:
        for name, value in per_example_gradients(loss, model, w, plan.whole, batch)[0].items():
            add(name, Rows(value))
    return found


def changed(path: str) -> Unserved:
    """The error for a model whose control flow depends on its data."""
    return Unserved(
        f"{path or 'the model'} is called another number of times, or with another number of rows for each example, "
        f"from one batch to the next, so its layers cannot be planned. {REMEDY}"
    )


def by_rule(
    module: nn.Module,
    call: Call,
    cotangents: list[Tensor | None],
    layout: Layout,
    examples: int,
    wanted: Collection[str],
) -> dict[str, Gradient]:
    """The gradients of one call by its module's rule."""
    for tensors, places in ((call.inputs, layout.inputs), (cotangents, layout.outputs)):
        for t, planned in zip(tensors, places, strict=True):
            # Packed sequences, say, have rows that differ by example.
            if t is not None and planned is not None and t.shape[planned.dim] != examples * planned.rows:
                raise changed(call.path)
    answer = call_rule_for(module)
    if answer is not None:
        args, kwargs = call.arguments(call.inputs)
        return answer(module, args, kwargs, call.results, cotangents, examples, wanted)
    rule, x, g = rule_for(module), call.inputs[0], cotangents[0]
    if rule is None or g is None or layout.inputs[0] is None or layout.outputs[0] is None:
        raise Unserved(f"no rule serves {call.path or 'the model'}. {REMEDY}")
    dims = layout.inputs[0].dim, layout.outputs[0].dim
    x, g = (t.movedim(dim, 0) if dim else t for t, dim in zip((x, g), dims, strict=True))
    return rule(module, x, g, examples, wanted)


def by_module(
    module: nn.Module,
    call: Call,
    cotangents: list[Tensor | None],
    layout: Layout,
    examples: int,
    wanted: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The gradients [B, *shape] of one call by vmap over its module alone, for the weights `wanted` by its names."""
    live = [i for i, c in enumerate(cotangents) if c is not None]
    if any(layout.outputs[i] is None for i in live):
        raise LookupError(f"{call.path} returns something that belongs to no example")

    def split(t: Tensor, place: Place) -> Tensor:
        return t.unflatten(place.dim, (examples, place.rows))

    moving = {i: place for i, place in enumerate(layout.inputs) if place is not None}
    inputs = [split(call.inputs[i], place) for i, place in moving.items()]
    targets = [split(cotangents[i], layout.outputs[i]) for i in live]  # type: ignore[arg-type]

    def projected(free: dict[str, Tensor], xs: list[Tensor], cs: list[Tensor]) -> Tensor:
        leaves = list(call.inputs)
        for i, x in zip(moving, xs, strict=True):
            leaves[i] = x
        args, kwargs = call.arguments(leaves)
        with replaced(module, free):
            outputs = tree_flatten(module(*args, **kwargs))[0]
        return torch.stack([(outputs[i] * c).sum() for i, c in zip(live, cs, strict=True)]).sum()

    dims = ([place.dim for place in moving.values()], [layout.outputs[i].dim for i in live])  # type: ignore[union-attr]
    each = vmap(grad(projected), in_dims=(None, *dims), randomness="different")
    # The module's other parameters require gradients, and nobody asks for theirs.
    with explicit_states(module), torch.no_grad():
        return each(dict(wanted), inputs, targets)
