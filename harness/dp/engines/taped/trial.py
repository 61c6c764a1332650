"""Making a plan: rules are tried against gradients taken one example at a time, and what is wrong is handed upwards.

A plan is tried on three examples, at weights moved off their initial symmetries. A parameter whose norm is wrong (a
tied weight used by a function, a fused kernel that bypasses its submodule, a layer fed something other than examples
first) is handed to the next enclosing module, and at last to the whole model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from harness.dp.engines.engine import Unserved, losses_of
from harness.dp.engines.memory import refuse_memory
from harness.dp.engines.reads import refuse_strangers
from harness.dp.engines.survey import (
    PROBE,
    Calls,
    Layout,
    NoProbe,
    agree,
    drawing,
    finite_probe,
    moved,
    refuse_chance,
    refuse_coupling,
    refuse_mixing,
    rounding,
    row_by_row,
    served,
    signature,
    silenced,
    squares_of,
    survey,
)
from harness.dp.engines.tape import Run, run, taping
from harness.dp.engines.taped.gradients import Gradient
from harness.dp.engines.taped.plan import Plan, gradients
from harness.dp.engines.taped.rules import call_rule_for, rule_for
from harness.dp.engines.weights import held
from harness.dp.loss import Batch, Loss


class Source(NamedTuple):
    """One place that a parameter's gradient comes from: the module at `path`, by its rule or by vmap over it.

    `path` None: the whole model, loss included.
    """

    path: str | None
    rule: bool


Sources = dict[str, tuple[Source, ...]]  # for each parameter, the places whose gradients add up to its own


WHOLE = (Source(None, False),)


_plans: WeakKeyDictionary[nn.Module, dict[Any, Plan]] = WeakKeyDictionary()


def plan_for(loss: Loss, model: nn.Module, w: Mapping[str, Tensor], batch: Batch) -> Plan:
    """The plan for `model` on examples of this shape, made and verified on first use and kept while the model lives.

    Raises Unserved where the model cannot be planned, `NoProbe` where it cannot on this batch.
    """
    plans, key = _plans.setdefault(model, {}), signature(loss, model, w, batch)
    if key not in plans:
        plans[key] = served(make_plan, loss, model, w, batch)
    return plans[key]


def make_plan(loss: Loss, model: nn.Module, w: Mapping[str, Tensor], batch: Batch) -> Plan:
    """Try the rules, and hand what they get wrong to the enclosing modules until every norm is right.

    In training mode, as in the run. Where chance skips layers, with the modules silenced that draw random numbers.
    """
    with held(model, w):
        refuse_coupling(loss, model, batch)
        batch = finite_probe(loss, model, batch)
    refuse_strangers(loss, model, moved(w, 1.0), batch)
    with held(model, w):
        random, calls = drawing(loss, model, batch)
        if random:
            refuse_chance(loss, model, batch)
    for quiet in (frozenset(), random) if random else (random,):
        if calls is None and not quiet:
            continue
        with silenced(model, quiet), suppress(Unsteady):
            return tame(loss, model, w, batch, random, None if quiet else calls)
    raise Unserved("which layers are called changes from pass to pass, also where no random numbers are drawn")


class Unsteady(Exception):
    """A layer was called another number of times than in the passes before."""


def tame(
    loss: Loss, model: nn.Module, w: Mapping[str, Tensor], batch: Batch, random: frozenset[str], calls: Calls | None
) -> Plan:
    """The plan, made at weights near `w` where all gradients are finite. `calls`: what each pass calls, if known."""
    for distance in (1.0, 0.0):
        values = moved(w, distance)
        with held(model, values) as leaves:
            rows = row_by_row(losses_of(loss, model, batch), leaves)
        if any(g is not None and not g.isfinite().all() for row in rows for g in row):
            continue
        refuse_mixing(loss, model, values, batch, random)
        with held(model, values) as leaves:
            refuse_memory(loss, model, batch)
            taped = run(loss, model, leaves, batch)
            layouts, counts = survey(model, batch)
            made = Counter(call.path for call in taped.calls)
            if random and (made != counts or (calls is not None and made != calls)):
                raise Unsteady
            rows = row_by_row(taped.losses, leaves)
            truth = squares_of(rows, leaves)
            if all(t.isfinite().all() for t in truth.values()):
                return tried(loss, model, values, leaves, batch, taped, layouts, random, truth, rows)
    raise NoProbe("the model's gradients are not finite even on tame inputs, so no plan can be verified")


def tried(
    loss: Loss,
    model: nn.Module,
    values: dict[str, Tensor],
    leaves: dict[str, Tensor],
    batch: Batch,
    taped: Run,
    layouts: dict[str, tuple[Layout, ...]],
    random: frozenset[str],
    truth: dict[str, Tensor],
    rows: list[tuple[Tensor | None, ...]],
) -> Plan:
    """The plan whose norms and sums are right, for a model that holds `values`, its parameters being `leaves`."""
    crossed = crossing(loss, model, batch, layouts)
    v = torch.randn(len(batch), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(batch.x.device)
    sums = {
        name: sum(own.double() * v[i] for i, own in enumerate(column) if own is not None)
        for name, column in zip(leaves, zip(*rows, strict=True), strict=True)
        if name in truth
    }
    trial = Trial(loss, model, leaves, values, batch, taped, layouts, random, crossed, truth, v, sums)
    free, spread = trial.copies()
    sources = first_sources(model, truth)
    for name in (*free, *(name for names in spread.values() for name in names.values())):
        sources[name] = ()
    unsettled = {name for name in truth if sources[name]}
    while unsettled:
        unsettled = trial.wrong({name: sources[name] for name in unsettled})
        for name in unsettled:
            if sources[name] == WHOLE:
                raise Unserved(
                    f"the gradient of {name} cannot be told example by example: the parameter is used where no module"
                    ' shows it (through a closure or a list, say). Use engine = "loop"'
                )
            sources[name] = enclosing(model, sources[name])
    rules, modules, whole = sorted_out(model, sources)
    rules |= spread
    plan = Plan(
        rules,
        modules,
        whole,
        {path: layouts[path] for path in {*rules, *modules}},
        free,
        frozenset(spread),
        idle=tuple(name for name in leaves if name not in truth),
        random=random,
        copy=taped.copied,
    )
    kept = []
    for lean in (False, True):
        found = gradients(plan, model, values, plan.run(loss, model, leaves, batch), loss, batch)
        for gradient in found.values():
            gradient.squares(lean)
        kept.append(tuple(gradient.footprint for gradient in found.values()))
    tensors = [t for call, cs in zip(taped.calls, taped.cotangents, strict=True) for t in (*call.inputs, *cs)]
    activations = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor)) // PROBE
    return replace(plan, footprints=kept[0], lean=kept[1], activations=activations)


def crossing(loss: Loss, model: nn.Module, batch: Batch, layouts: Mapping[str, tuple[Layout, ...]]) -> frozenset[str]:
    """The modules with outputs that an example's loss reaches outside the rows that are taken for its own.

    Rows that lie position by position, say. Norms of examples that are alike would not show it.
    """
    with taping(model, layouts) as tape:
        losses = losses_of(loss, model, batch)
    edges, seen = [], Counter[str]()
    for call in tape.calls:
        number, seen[call.path] = seen[call.path], seen[call.path] + 1
        if number < len(layouts[call.path]):
            pairs = zip(call.edges, layouts[call.path][number].outputs, strict=False)
            edges += [(call.path, edge, place) for edge, place in pairs if edge is not None and place is not None]
    found = set()
    for i, value in enumerate(losses) if edges else ():
        grads = torch.autograd.grad(value, [e for _, e, _ in edges], retain_graph=True, allow_unused=True)
        for (path, _, place), g in zip(edges, grads, strict=True):
            if g is not None and g.shape[place.dim] == len(losses) * place.rows:
                rows = g.movedim(place.dim, 0).unflatten(0, (len(losses), place.rows))
                if rows[:i].any() or rows[i + 1 :].any():
                    found.add(path)
    return frozenset(found)


def first_sources(model: nn.Module, names: Collection[str]) -> Sources:
    """For each parameter, the modules that own it: by rule where they have one."""
    known = {id(p): name for name, p in model.named_parameters()}
    sources: Sources = dict.fromkeys(names, ())
    for path, module in model.named_modules():
        for p in module._parameters.values():
            name = known.get(id(p))
            if name in sources:
                sources[name] += (Source(path, ruled(module)),)
    return sources


def ruled(module: nn.Module) -> bool:
    """Whether some rule serves the module."""
    return rule_for(module) is not None or call_rule_for(module) is not None


def enclosing(model: nn.Module, sources: tuple[Source, ...]) -> tuple[Source, ...]:
    """The next larger thing to differentiate as a whole: the same module without its rule, or what encloses it.

    What encloses it may have a rule for all that is inside.
    """
    paths = [source.path for source in sources if source.path is not None]
    if len(paths) == 1:
        (path,), rule = paths, sources[0].rule
        if rule:
            return (Source(path, False),)
        if not path:
            return WHOLE
        above = path.rpartition(".")[0]
        return (Source(above, call_rule_for(model.get_submodule(above)) is not None),)
    common = []
    for parts in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return (Source(".".join(common), False),)


def sorted_out(
    model: nn.Module, sources: Sources
) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]], tuple[str, ...]]:
    """The sources as the three tables of a `Plan`."""
    parameters = dict(model.named_parameters())
    rules: dict[str, dict[str, str]] = {}
    modules: dict[str, dict[str, str]] = {}
    whole = []
    for name, places in sources.items():
        for path, rule in places:
            if path is None:
                whole.append(name)
                continue
            module = model.get_submodule(path)
            owned = module.named_parameters(recurse=not rule or call_rule_for(module) is not None)
            own = next(own for own, p in owned if p is parameters[name])
            (rules if rule else modules).setdefault(path, {})[own] = name
    return rules, modules, tuple(whole)


@dataclass
class Trial:
    """Compares plans, parameter by parameter, with gradients taken one example at a time."""

    loss: Loss
    model: nn.Module
    leaves: dict[str, Tensor]
    w: dict[str, Tensor]
    batch: Batch
    taped: Run
    layouts: dict[str, tuple[Layout, ...]]
    random: frozenset[str]
    crossed: frozenset[str]
    truth: dict[str, Tensor]
    v: Tensor
    sums: dict[str, Tensor]

    def copies(self) -> tuple[tuple[str, ...], dict[str, dict[str, str]]]:
        """The parameters, and the modules, that need only a copy for each example: they belong to none before."""
        owners = [(path, module) for path, module in self.model.named_modules() if module._parameters]
        parameters = {id(p): name for name, p in self.model.named_parameters() if name in self.truth}
        places = Counter(id(p) for _, module in owners for p in module._parameters.values())
        free, spread = [], {}
        for path, module in owners:
            own = {key: p for key, p in module._parameters.items() if id(p) in parameters and places[id(p)] == 1}
            names = {key: parameters[id(p)] for key, p in own.items()}
            if not ruled(module):
                singles = [names[key] for key, p in own.items() if p.ndim > 1 and len(p) == 1]
                free += [name for name in singles if self.holds(Plan(free=(name,)), {name})]
            elif all(layout.outputs == (None,) for layout in self.layouts.get(path, ())) and names:
                plan = Plan({path: names}, layouts=self.layouts, spread=frozenset([path]))
                if self.holds(plan, set(names.values())):
                    spread[path] = names
        return tuple(free), spread

    def holds(self, plan: Plan, names: set[str]) -> bool:
        """Whether the model computes the same under `plan`, and the norms of `names` come out right."""
        try:
            taped = plan.run(self.loss, self.model, self.leaves, self.batch)
            found = gradients(plan, self.model, self.w, taped, self.loss, self.batch)
        except Exception:  # the model is not content with copies, in whatever way it says so
            return False
        same = self.random or torch.allclose(taped.losses, self.taped.losses, rtol=1e-3)
        return bool(same) and all(self.agrees(name, found) for name in names)

    def wrong(self, sources: Sources) -> set[str]:
        """The parameters whose norms these sources do not give."""
        rules, modules, whole = sorted_out(self.model, sources)
        plans = [Plan({path: names}, layouts=self.layouts) for path, names in rules.items()]
        plans += [Plan(modules={path: names}, layouts=self.layouts) for path, names in modules.items()]
        failed: set[str] = set()
        found: dict[str, Gradient] = {}
        for plan in plans:
            names = {name for table in (plan.rules, plan.modules) for own in table.values() for name in own.values()}
            unfit = self.crossed | self.random if plan.modules else self.crossed
            if not plan.paths <= self.layouts.keys() or plan.paths & unfit:
                failed |= names
                continue
            try:
                gradients_here = gradients(plan, self.model, self.w, self.taped, self.loss, self.batch)
                for name, gradient in gradients_here.items():
                    found[name] = found[name] + gradient if name in found else gradient
            except Exception:  # whatever it is, this module cannot be differentiated like this; the next one may be
                failed |= names
        if whole:
            plan = Plan(whole=whole)
            found |= gradients(plan, self.model, self.w, self.taped, self.loss, self.batch)
        # Where random numbers are drawn, another pass has another gradient, and there is nothing to compare.
        unchecked = set(whole) if self.random else set()
        return failed | {name for name in sources if name not in unchecked | failed and not self.agrees(name, found)}

    def agrees(self, name: str, found: Mapping[str, Gradient]) -> bool:
        """Whether the squared norms are right, and a sum with random weights, up to rounding."""
        truth, everything = self.truth[name], torch.stack(list(self.truth.values())).sum(0)
        if name not in found:
            return agree(torch.zeros_like(truth), truth, everything, self.w[name].dtype)
        # Norms first, as in a step: what was made for them is what is summed.
        if not agree(found[name].squares(), truth, everything, self.w[name].dtype):
            return False
        off = (found[name].weighted(self.v) - self.sums[name]).square().sum()
        scale = (self.v.square() * (truth + 1e-6 * everything)).sum()
        return bool(off <= rounding(self.w[name].dtype) * scale)
