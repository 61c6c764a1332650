"""A plan for turning a tape into per-example gradients.

A `Plan` says for every parameter where its gradient comes from:

* a rule of `harness.dp.engines.rules`, for modules of torch.nn that compute what their class computes;
* a copy for each example, for a parameter that nothing but the batch's size ties to the batch (a class token, say);
* vmap over one module alone, for any other module that owns parameters: its inputs and output gradient are known, so
  only this module is differentiated once more, per example;
* vmap over the whole model, for a parameter that is used outside any module that could be isolated.

Nothing is taken on trust. A plan is tried on three examples, at weights moved off their initial symmetries, against
gradients computed one example at a time; a parameter whose norm is wrong (a tied weight used by a function, a fused
kernel that bypasses its submodule, a layer fed something other than examples first) is handed to the next enclosing
module, and at last to the whole model.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_flatten

from harness.dp.engines.gradients import Gradient, Rows
from harness.dp.engines.rows import squared_norms
from harness.dp.engines.rules import call_rule_for, rule_for
from harness.dp.engines.tape import Call, Run, repeated, run, taping
from harness.dp.engines.vmap import explicit_states, per_example_gradients
from harness.dp.loss import Batch, Loss

PROBE = 3  # examples on which a plan is tried


class Place(NamedTuple):
    """Where the examples lie in a tensor: `dim` has `rows` entries for each of them."""

    dim: int
    rows: int


Places = tuple[Place | None, ...]  # one per tensor; None: it holds no examples


class Layout(NamedTuple):
    """Where the examples lie in the inputs and outputs of one module call."""

    inputs: Places
    outputs: Places


EACH = Layout((Place(0, 1),), (Place(0, 1),))


@dataclass(frozen=True)
class Plan:
    """Where each parameter's gradient comes from.

    `rules`: module path -> {its own parameter's name: the model's name}; `modules`: path of a module to differentiate
    on its own -> {name within it: the model's name}; `whole`: the names for which the whole model is differentiated.
    `layouts`: path -> the layout of each of its calls. `free`: parameters, and `spread`: paths of modules by rule, of
    which each example gets a copy.

    `copy`: whether tensors on the tape must be copied, because the model writes to them later. `footprints`: bytes per
    example of each per-example gradient that two passes keep; `activations`: bytes per example on the tape, roughly.
    """

    rules: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    modules: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    whole: tuple[str, ...] = ()
    layouts: Mapping[str, tuple[Layout, ...]] = field(default_factory=dict)
    free: tuple[str, ...] = ()
    spread: frozenset[str] = frozenset()
    copy: bool = False
    footprints: tuple[int, ...] = ()
    activations: int = 0

    @cached_property
    def paths(self) -> frozenset[str]:
        """The modules to tape."""
        return frozenset((*self.rules, *self.modules))

    def run(
        self, loss: Loss, model: nn.Module, state: Mapping[str, Tensor], batch: Batch, retain: bool = True
    ) -> Run:
        """A pass that tapes what this plan needs."""
        return run(loss, model, state, batch, self.paths, self.free, self.spread, self.copy, retain)


def gradients(
    plan: Plan, model: nn.Module, w: Mapping[str, Tensor], taped: Run, loss: Loss, batch: Batch
) -> dict[str, Gradient]:
    """The per-example gradients of every parameter that the batch reaches, by the model's names.

    `w` are the weights of the pass, detached.
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
            state = local_state(model, call.path, w) if call.results else {}
            for own, gradient in by_rule(module, call, cotangents, layout, len(batch), names, state).items():
                add(names[own], gradient)
        if call.path in plan.modules:
            names = plan.modules[call.path]
            state = local_state(model, call.path, w)
            for own, rows in by_module(module, call, cotangents, layout, len(batch), names, state).items():
                add(names[own], Rows(rows))
    if any(seen[path] != len(plan.layouts[path]) for path in plan.paths):
        raise changed(next(path for path in plan.paths if seen[path] != len(plan.layouts[path])))
    for name, value in taped.free.items():
        add(name, Rows(value))
    if plan.whole:
        for name, value in per_example_gradients(loss, model, w, plan.whole, batch)[0].items():
            add(name, Rows(value))
    return found


def changed(path: str) -> RuntimeError:
    """The error for a model whose control flow depends on its data."""
    return RuntimeError(
        f"{path or 'the model'} is called another number of times, or with another number of rows for each example, "
        "from one batch to the next, so its layers cannot be planned: use the engine Vmap or Loop"
    )


def by_rule(
    module: nn.Module,
    call: Call,
    cotangents: list[Tensor | None],
    layout: Layout,
    examples: int,
    wanted: Collection[str],
    state: Mapping[str, Tensor],
) -> dict[str, Gradient]:
    """The gradients of one call by its module's rule. `state`: the module's weights, where its rule reads them."""
    for tensors, places in ((call.inputs, layout.inputs), (cotangents, layout.outputs)):
        for t, planned in zip(tensors, places, strict=True):
            # Packed sequences, say, have rows that differ by example.
            if t is not None and planned is not None and t.shape[planned.dim] != examples * planned.rows:
                raise changed(call.path)
    answer = call_rule_for(module)
    if answer is not None:
        given = call.arguments(call.inputs)

        def ask(inner: nn.Module) -> dict[str, Gradient]:
            return answer(inner, *given, call.results, cotangents, examples, wanted)

        inside = {f"module.{name}": t for name, t in state.items()}
        found: dict[str, Gradient] = functional_call(Holding(module), inside, (ask,))
        return found
    rule, x, g = rule_for(module), call.inputs[0], cotangents[0]
    if rule is None or g is None or layout.inputs[0] is None or layout.outputs[0] is None:
        raise LookupError(f"no rule serves {call.path}")
    dims = layout.inputs[0].dim, layout.outputs[0].dim
    x, g = (t.movedim(dim, 0) if dim else t for t, dim in zip((x, g), dims, strict=True))
    return rule(module, x, g, examples, wanted)


class Holding(nn.Module):
    """Hands its module to a function: so that `functional_call` lends the weights of the pass to a rule."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, ask: Any) -> Any:
        """What `ask` says of the module."""
        return ask(self.module)


def by_module(
    module: nn.Module,
    call: Call,
    cotangents: list[Tensor | None],
    layout: Layout,
    examples: int,
    wanted: Collection[str],
    state: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The gradients [B, *shape] of one call by vmap over its module alone."""
    live = [i for i, c in enumerate(cotangents) if c is not None]
    if any(layout.outputs[i] is None for i in live):
        raise LookupError(f"{call.path} returns something that belongs to no example")

    def split(t: Tensor, place: Place) -> Tensor:
        return t.unflatten(place.dim, (examples, place.rows))

    moving = {i: place for i, place in enumerate(layout.inputs) if place is not None}
    inputs = [split(call.inputs[i], place) for i, place in moving.items()]
    targets = [split(cotangents[i], layout.outputs[i]) for i in live]  # type: ignore[arg-type]
    fixed = {name: t for name, t in state.items() if name not in wanted}

    def projected(free: dict[str, Tensor], xs: list[Tensor], cs: list[Tensor]) -> Tensor:
        leaves = list(call.inputs)
        for i, x in zip(moving, xs, strict=True):
            leaves[i] = x
        args, kwargs = call.arguments(leaves)
        outputs = tree_flatten(functional_call(module, {**fixed, **free}, args, kwargs))[0]
        return torch.stack([(outputs[i] * c).sum() for i, c in zip(live, cs, strict=True)]).sum()

    dims = ([place.dim for place in moving.values()], [layout.outputs[i].dim for i in live])  # type: ignore[union-attr]
    each = vmap(grad(projected), in_dims=(None, *dims), randomness="different")
    with explicit_states(module):
        return each({name: t for name, t in state.items() if name in wanted}, inputs, targets)


def names_within(model: nn.Module, path: str) -> dict[str, str]:
    """{name within the module at `path`: the model's name} of its trainable parameters; a tied one once."""
    known = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    module = model.get_submodule(path)
    return {own: known[id(p)] for own, p in module.named_parameters() if id(p) in known}


def local_state(model: nn.Module, path: str, w: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights `w` by their names within the module at `path`."""
    return {own: w[name] for own, name in names_within(model, path).items()}


# ---------------------------------------------------------------------------------------------------------------------
# Planning


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
    """The plan for `model` on examples of this shape, made and verified on first use and kept while the model lives."""
    x = batch.x
    key = (type(loss), x.shape[1:], x.dtype, x.device.type, tuple(w), modes(model))
    plans = _plans.setdefault(model, {})
    if key not in plans:
        with untouched(model, x.device), torch.enable_grad():
            plans[key] = make_plan(loss, model, w, batch)
    return plans[key]


def modes(model: nn.Module) -> tuple[Any, ...]:
    """The type of every module, and whether it is in training mode: what a plan stands on. In every step, so quick."""
    found: list[Any] = []
    open_: list[nn.Module | None] = [model]
    while open_:
        module = open_.pop()
        if module is not None:
            found += (type(module), module.training)
            open_ += module._modules.values()
    return tuple(found)


@contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Passes that leave no trace: no random number is used up, and running statistics stay what they were."""
    kept = [(b, b._version, b.detach().clone()) for b in model.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            for b, version, value in kept:
                if b._version != version:
                    with torch.no_grad():
                        b.copy_(value)


def make_plan(loss: Loss, model: nn.Module, w: Mapping[str, Tensor], batch: Batch) -> Plan:
    """Try the rules, and hand what they get wrong to the enclosing modules until every norm is right."""
    batch = probe_batch(batch)
    for distance in (1.0, 0.0):
        state = {name: t.requires_grad_() for name, t in moved(w, distance).items()}
        taped = run(loss, model, state, batch)
        truth = one_by_one(taped.losses, state)
        if all(t.isfinite().all() for t in truth.values()):
            break
    else:
        raise ValueError(
            "the model's gradients are not finite even on tame inputs, so no plan can be verified"
        )
    layouts, random = survey(model, state, batch)
    refuse_mixing(loss, model, state, batch, random)
    detached = {name: t.detach() for name, t in state.items()}
    trial = Trial(loss, model, state, detached, batch, taped, layouts, random, truth)
    free, spread = trial.copies()
    sources = first_sources(model, truth)
    for name in (*free, *(name for names in spread.values() for name in names.values())):
        sources[name] = ()
    unsettled = {name for name in truth if sources[name]}
    while unsettled:
        unsettled = trial.wrong({name: sources[name] for name in unsettled})
        for name in unsettled:
            if sources[name] == WHOLE:
                raise ValueError(
                    f"the gradient of {name} differs between an example on its own and the same example in a batch: "
                    'some layer mixes examples, and only engine = "loop" gives it a meaning'
                )
            sources[name] = enclosing(model, sources[name])
    rules, modules, whole = sorted_out(model, sources)
    rules |= spread
    chosen = {path: layouts[path] for path in {*rules, *modules}}
    plan = Plan(rules, modules, whole, chosen, free, frozenset(spread), taped.copied)
    found = gradients(plan, model, detached, plan.run(loss, model, state, batch), loss, batch)
    for gradient in found.values():
        gradient.squares(again=True)
    tensors = [t for call, cs in zip(taped.calls, taped.cotangents, strict=True) for t in (*call.inputs, *cs)]
    activations = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor)) // PROBE
    footprints = tuple(gradient.footprint for gradient in found.values())
    return replace(plan, footprints=footprints, activations=activations)


def probe_batch(batch: Batch) -> Batch:
    """A few examples, no two alike even where the batch holds a single one, so that mixed-up rows show.

    They are the first of the batch, or noise where these are not finite or far from unit scale.
    """
    pick = torch.arange(PROBE, device=batch.x.device) % len(batch)
    x = batch.x[pick].clone()
    if x.is_floating_point():
        rng = torch.Generator().manual_seed(0)
        noise = torch.randn(x.shape, generator=rng).to(x)
        scale = x.float().square().mean().sqrt().item()
        x = x + 0.1 * scale * noise if 1e-3 < scale < 1e3 else noise
    elif x.ndim > 1:
        for i in range(len(batch), PROBE):
            x[i] = x[i].roll(i, -1)
    return Batch(x, batch.y[pick])


def moved(w: Mapping[str, Tensor], distance: float) -> dict[str, Tensor]:
    """Weights near `w`, off the zeros of a fresh network, where a wrong gradient of zero would look right."""
    out = {}
    for i, (name, t) in enumerate(w.items()):
        tame = t.detach().nan_to_num(0.0, 0.0, 0.0)
        noise = torch.randn(t.shape, generator=torch.Generator().manual_seed(i)).to(t)
        out[name] = tame + distance * noise * (0.1 * tame.std(correction=0) + 0.02)
    return out


def one_by_one(losses: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Squared norms [B] of each example's own gradient, by one backward pass per example: the judge.

    A parameter that the losses do not depend on is left out.
    """
    leaves = list(state.values())
    rows = [torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True) for value in losses]
    truth = {}
    for name, column in zip(state, zip(*rows, strict=True), strict=True):
        given = [g for g in column if g is not None]
        if given:
            none = torch.zeros_like(given[0])
            truth[name] = torch.cat([squared_norms((none if g is None else g)[None]) for g in column])
    return truth


def refuse_mixing(
    loss: Loss, model: nn.Module, state: Mapping[str, Tensor], batch: Batch, random: Collection[str]
) -> None:
    """Raise ValueError where an example's loss or gradient depends on the examples beside or before it.

    Each example is taken by itself, and with the others, with all modules silenced that draw random numbers. In
    float64, where kinks do not tell one from three, unless the model insists on its own type.
    """
    with silenced(model, random):
        try:
            found = apart_and_together(loss, model, doubled(state), doubled(batch.x), batch.y)
        except (RuntimeError, TypeError):
            found = apart_and_together(loss, model, dict(state), batch.x, batch.y)
    if found is None:
        return
    together, alone, scale, tolerance = found
    for name in sorted(together.keys() | alone.keys()):
        none = torch.zeros_like(scale).expand(PROBE)
        a, b = together.get(name, none), alone.get(name, none)
        if ((a - b).abs() > tolerance * (b + tolerance * scale)).any():
            raise ValueError(
                f"the gradient of {name} differs between an example on its own and the same example in a batch: "
                'some layer mixes examples, and only engine = "loop" gives it a meaning'
            )


def doubled(given: Any) -> Any:
    """Floating tensors in float64, with the gradients that they require."""
    if isinstance(given, Tensor):
        return (
            given.detach().double().requires_grad_(given.requires_grad)
            if given.is_floating_point()
            else given
        )
    return {name: doubled(t) for name, t in given.items()}


def apart_and_together(
    loss: Loss, model: nn.Module, state: dict[str, Tensor], x: Tensor, y: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, float] | None:
    """Squared norms [B] by parameter, of examples together and of each alone; their scale, and what rounding may do.

    None for a model that draws random numbers all the same.
    """
    kind = next(t.dtype for t in state.values())
    rest = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    others = {name: t.detach().clone() for name, t in rest.items() if name not in state}
    given = state | {name: t.to(kind) if t.is_floating_point() else t for name, t in others.items()}

    def losses(x: Tensor, y: Tensor) -> Tensor:
        return loss.per_example(functional_call(model, given, (x,)), y)

    drawn: set[str] = set()
    with watching(model, drawn):
        first, again = losses(x, y), losses(x, y)
    if drawn:
        return None
    if not torch.equal(first, again):
        raise ValueError(
            "a forward pass changes a buffer that the next one depends on: examples leave traces"
        )
    try:
        single = torch.cat([losses(*one) for one in zip(x.split(1), y.split(1), strict=True)])
    except ValueError as why:
        raise ValueError(
            f"an example by itself cannot be served, so some layer mixes examples ({why})"
        ) from why
    together, alone = one_by_one(first, state), one_by_one(single, state)
    scale = (
        torch.stack(list(together.values())).sum() if together else first.new_zeros((), dtype=torch.float64)
    )
    return together, alone, scale, 1e-6 if kind is torch.float64 else 0.05


def agree(squares: Tensor, truth: Tensor, everything: Tensor, dtype: torch.dtype) -> bool:
    """Whether squared norms are right, up to rounding; `everything`: those of the whole gradient."""
    eps = torch.finfo(dtype).eps
    relative = max(1e-6, min(0.1, 2e4 * eps))  # 2e-3 in float32
    # A gradient that is zero but for rounding, like that of an attention key's bias, has no relative accuracy.
    return bool(((squares - truth).abs() <= relative * truth + (100 * eps) ** 2 * everything).all())


@contextmanager
def silenced(model: nn.Module, paths: Collection[str]) -> Iterator[None]:
    """The modules at `paths` as in evaluation, one by one and not what is inside them."""
    modules = [model.get_submodule(path) for path in paths]
    before = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, before, strict=True):
            module.training = mode


def survey(
    model: nn.Module, state: Mapping[str, Tensor], batch: Batch
) -> tuple[dict[str, tuple[Layout, ...]], set[str]]:
    """Where the examples lie in every call, and the modules that draw random numbers.

    Found by comparing the shapes of two passes, over two and over three examples: what grows holds examples. A module
    whose calls cannot be told apart this way is left out.
    """
    passes = []
    random: set[str] = set()
    for count in (PROBE - 1, PROBE):
        with taping(model) as tape, watching(model, random):
            functional_call(model, dict(state), (batch.x[:count],))
        shapes: dict[str, list[list[list[torch.Size | None]]]] = {
            path: [] for path, _ in model.named_modules()
        }
        for call in tape.calls:
            sides = (call.inputs, call.outputs)
            shapes[call.path].append(
                [[t.shape if isinstance(t, Tensor) else None for t in side] for side in sides]
            )
        passes.append(shapes)
    layouts = {}
    for path in passes[0]:
        few, many = passes[0][path], passes[1][path]
        try:
            layouts[path] = tuple(
                Layout(
                    *(
                        tuple(place(*pair) for pair in zip(*sides, strict=True))
                        for sides in zip(a, b, strict=True)
                    )
                )
                for a, b in zip(few, many, strict=True)
            )
        except ValueError:  # another number of calls or tensors, or a shape that grows in no simple way
            continue
    return layouts, random


def place(few: torch.Size | None, many: torch.Size | None) -> Place | None:
    """Where the examples lie, from a tensor's shapes with PROBE - 1 and with PROBE examples."""
    if few == many:
        return None
    if few is None or many is None or len(few) != len(many):
        raise ValueError("shapes of different rank")
    grown = [dim for dim in range(len(few)) if few[dim] != many[dim]]
    rows = many[grown[0]] // PROBE
    if len(grown) > 1 or (few[grown[0]], many[grown[0]]) != (rows * (PROBE - 1), rows * PROBE):
        raise ValueError("more than one dimension grows with the number of examples")
    return Place(grown[0], rows)


@contextmanager
def watching(model: nn.Module, random: set[str]) -> Iterator[None]:
    """Add to `random` the paths of the modules that draw random numbers while they are called."""
    before: list[list[Tensor]] = []

    def states() -> list[Tensor]:
        return [
            torch.get_rng_state(),
            *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []),
        ]

    def enter(module: nn.Module, args: Any) -> None:
        before.append(states())

    def leave(path: str, module: nn.Module, args: Any, output: Any) -> None:
        if any(not torch.equal(a, b) for a, b in zip(before.pop(), states(), strict=True)):
            random.add(path)

    handles = []
    try:
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(partial(leave, path)))
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    state: dict[str, Tensor]
    w: dict[str, Tensor]
    batch: Batch
    taped: Run
    layouts: dict[str, tuple[Layout, ...]]
    random: set[str]
    truth: dict[str, Tensor]

    def copies(self) -> tuple[tuple[str, ...], dict[str, dict[str, str]]]:
        """The parameters, and the modules, that need only a copy for each example: they belong to none before."""
        owners = [(path, module) for path, module in self.model.named_modules() if module._parameters]
        parameters = {id(p): name for name, p in self.model.named_parameters() if name in self.truth}
        places = Counter(id(p) for _, module in owners for p in module._parameters.values())
        free, spread = [], {}
        for path, module in owners:
            own = {
                key: p for key, p in module._parameters.items() if id(p) in parameters and places[id(p)] == 1
            }
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
            taped = plan.run(self.loss, self.model, self.state, self.batch)
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
            names = {
                name
                for table in (plan.rules, plan.modules)
                for own in table.values()
                for name in own.values()
            }
            if not plan.paths <= self.layouts.keys() or (plan.modules and plan.paths & self.random):
                failed |= names
                continue
            try:
                gradients_here = gradients(plan, self.model, self.w, self.taped, self.loss, self.batch)
                for name, gradient in gradients_here.items():
                    found[name] = found[name] + gradient if name in found else gradient
            except (
                Exception
            ):  # whatever it is, this module cannot be differentiated like this; the next one may be
                failed |= names
        if whole:
            plan = Plan(whole=whole)
            found |= gradients(plan, self.model, self.w, self.taped, self.loss, self.batch)
        # Where random numbers are drawn, another pass has another gradient, and there is nothing to compare.
        unchecked = set(whole) if self.random else set()
        return failed | {
            name for name in sources if name not in unchecked | failed and not self.agrees(name, found)
        }

    def agrees(self, name: str, found: Mapping[str, Gradient]) -> bool:
        """Whether the squared norms are right, up to rounding."""
        truth = self.truth[name]
        squares = found[name].squares() if name in found else torch.zeros_like(truth)
        return agree(squares, truth, torch.stack(list(self.truth.values())).sum(0), self.w[name].dtype)
