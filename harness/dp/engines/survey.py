"""What a model does with a few examples: where they lie in its tensors, where it draws numbers, what it mixes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from harness.dp.engines.draws import SEEDS, Loaded, generators, rewind
from harness.dp.engines.engine import Unserved, losses_of
from harness.dp.engines.rows import squared_norms
from harness.dp.engines.separable import mixed
from harness.dp.engines.tape import hooked, taping
from harness.dp.engines.weights import held, in_float64
from harness.dp.loss import Batch, Loss

PROBE = 3  # examples on which a plan is tried
FAR = 1e4  # times the inputs of a trial: what keeps their largest, say, is sure to keep these


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


@contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Passes that leave no trace: no random number is used up, and buffers stay what they were."""
    kept = [(b, b._version, b.detach().clone()) for b in model.buffers()]
    named = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            for module, buffers in named:
                for name, buffer in buffers.items():
                    module._buffers[name] = buffer
            for b, version, value in kept:
                if b._version != version:
                    with torch.no_grad():
                        b.copy_(value)


class NoProbe(Unserved):
    """No example of a batch has a finite gradient, not even on tame inputs: nothing can be tried on it."""


def probe_batch(batch: Batch, chosen: Tensor | None = None) -> Batch:
    """A few examples, no two alike even where the batch holds a single one, so that mixed-up rows show.

    They are the first of the batch, or of those `chosen` by number; their inputs are noise where these are not finite
    or far from unit scale. Whole numbers may be tokens: about half become others of the batch's range, since examples
    that are alike, or nearly, would hide that rows are mixed up.
    """
    numbers = torch.arange(len(batch), device=batch.x.device) if chosen is None else chosen
    pick = numbers[torch.arange(PROBE, device=batch.x.device) % len(numbers)]
    x = batch.x[pick].clone()
    rng = torch.Generator().manual_seed(0)
    if not whole(x):
        noise = torch.randn(x.shape, generator=rng).to(x)
        scale = x.float().square().mean().sqrt().item()
        x = x + 0.1 * scale * noise if 1e-3 < scale < 1e3 else noise
    else:
        top = min(max(int(x.max()), 1), TOKENS) if x.numel() else 0
        other = torch.randint(top + 1, x.shape, generator=rng)
        x = torch.where((torch.rand(x.shape, generator=rng) < 0.5).to(x.device), other.to(x), x)
    return Batch(x, batch.y[pick])


def whole(x: Tensor) -> bool:
    """Whether inputs are whole numbers from 0, not all of them 0: token numbers, whatever their type."""
    if not x.is_floating_point():
        return True
    return bool((x == x.round()).all() and (x >= 0).all() and (x > 0).any() and x.isfinite().all())


TOKENS = 1 << 31  # more than any vocabulary has
SOUGHT = 256  # examples among which those for a trial are sought


def finite_probe(loss: Loss, model: nn.Module, batch: Batch) -> Batch:
    """A `probe_batch` of examples with finite losses, where the batch has any: a label may make a loss 0 / 0."""
    few = Batch(batch.x[:SOUGHT], batch.y[:SOUGHT])
    tame = few.x
    if not whole(tame):
        tame = torch.randn(tame.shape, generator=torch.Generator().manual_seed(0)).to(tame)
    with torch.no_grad():
        finite = losses_of(loss, model, few).isfinite() | losses_of(loss, model, Batch(tame, few.y)).isfinite()
    good = finite.nonzero().squeeze(1)
    return probe_batch(batch, good if len(good) else None)


def moved(w: Mapping[str, Tensor], distance: float) -> dict[str, Tensor]:
    """Weights near `w`, off the zeros of a fresh network, where a wrong gradient of zero would look right."""
    out = {}
    for i, (name, t) in enumerate(w.items()):
        tame = t.detach().nan_to_num(0.0, 0.0, 0.0)
        noise = torch.randn(t.shape, generator=torch.Generator().manual_seed(i)).to(t)
        out[name] = tame + distance * noise * (0.1 * tame.std(correction=0) + 0.02)
    return out


def row_by_row(losses: Tensor, leaves: Mapping[str, Tensor]) -> list[tuple[Tensor | None, ...]]:
    """Each example's own gradients, in the order of `leaves`, by one backward pass per example. None: it has none."""
    each = list(leaves.values())
    return [torch.autograd.grad(value, each, retain_graph=True, allow_unused=True) for value in losses]


def squares_of(rows: Sequence[Sequence[Tensor | None]], names: Iterable[str]) -> dict[str, Tensor]:
    """Squared norms [B] of rows that `row_by_row` gave, by name; those that no loss depends on are left out."""
    truth = {}
    for name, column in zip(names, zip(*rows, strict=True), strict=True):
        given = [g for g in column if g is not None]
        if given:
            none = torch.zeros_like(given[0])
            truth[name] = torch.cat([squared_norms((none if g is None else g)[None]) for g in column])
    return truth


def one_by_one(losses: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Squared norms [B] of each example's own gradient, by one backward pass per example: the reference."""
    return squares_of(row_by_row(losses, leaves), leaves)


def refuse_mixing(loss: Loss, model: nn.Module, w: Mapping[str, Tensor], batch: Batch, random: Collection[str]) -> None:
    """Raise Unserved where an example's loss or gradient at `w` depends on the examples beside or before it.

    Each example is taken by itself, and with the others, with all modules silenced that draw random numbers. In
    float64, where kinks do not tell one from three, unless the model insists on its own type.
    """
    x = batch.x.double() if batch.x.is_floating_point() else batch.x
    with silenced(model, random):
        try:
            with in_float64(model), held(model, {n: t.double() for n, t in w.items()}) as leaves:
                found, crossed = apart_and_together(loss, model, leaves, Batch(x, batch.y))
        except (RuntimeError, TypeError):
            with held(model, w) as leaves:
                found, crossed = apart_and_together(loss, model, leaves, batch)
    if found is None:
        return
    together, alone, scale, tolerance = found
    for name in sorted(together.keys() | alone.keys()):
        none = torch.zeros_like(scale).expand(PROBE)
        a, b = together.get(name, none), alone.get(name, none)
        if ((a - b).abs() > tolerance * (b + tolerance * scale)).any():
            raise Unserved(
                f"the gradient of {name} differs between an example on its own and the same example in a batch: "
                'some layer mixes examples, and only engine = "loop" gives it a meaning'
            )
    if crossed:
        raise Unserved(
            f"the gradient of {crossed} in a batch is not the sum of its examples' own: the backward pass mixes them (a"
            ' hook or a straight-through estimator that looks along the batch), and only engine = "loop" gives it a'
            " meaning"
        )


def apart_and_together(
    loss: Loss, model: nn.Module, leaves: Mapping[str, Tensor], batch: Batch
) -> tuple[tuple[dict[str, Tensor], dict[str, Tensor], Tensor, float] | None, str | None]:
    """Squared norms [B] by parameter, of examples together and of each alone; their scale, and what rounding may do.

    And a parameter with gradients that `mixed` finds. The model holds `leaves`. None for a model that draws random
    numbers all the same.
    """
    first = refuse_traces(loss, model, batch)
    if first is None:
        return None, None
    try:
        single = torch.cat([losses_of(loss, model, one) for one in singles(batch)])
    except ValueError as why:
        raise Unserved(f"an example by itself cannot be served, so some layer mixes examples ({why})") from why
    together, alone = one_by_one(first, leaves), one_by_one(single, leaves)
    scale = torch.stack(list(together.values())).sum() if together else first.new_zeros((), dtype=torch.float64)
    tolerance = 1e-6 if first.dtype is torch.float64 else 0.05
    crossed = mixed(lambda few: losses_of(loss, model, few), leaves, batch, tolerance)
    return (together, alone, scale, tolerance), crossed


def refuse_traces(loss: Loss, model: nn.Module, batch: Batch) -> Tensor | None:
    """The losses [B] of a batch, or None where random numbers are drawn.

    Raises Unserved if another pass has others, after one over far examples and from the same random numbers. Buffers
    end as they were; attributes that are no tensors stay as the model leaves them.
    """
    drawn: set[str] = set()
    device = batch.x.device
    with untouched(model, device):
        draws = generators(device)
        with watching(model, drawn):
            first = losses_of(loss, model, batch)
        # An example that the model does not take shows by itself.
        with suppress(RuntimeError, ValueError, IndexError), torch.no_grad():
            losses_of(loss, model, Batch(batch.x * (0 if whole(batch.x) else FAR), batch.y))
        rewind(device, draws)
        again = losses_of(loss, model, batch)
    if not torch.equal(first, again) and not first.isnan().any():
        raise Unserved(
            "a forward pass changes a buffer or an attribute that the next one depends on, or draws random numbers that"
            " torch.manual_seed does not seed: examples leave traces"
        )
    return None if drawn else first


def refuse_chance(loss: Loss, model: nn.Module, batch: Batch) -> None:
    """Raise Unserved where a model mixes its examples now and then, by a random number (mixup, say).

    The model holds its weights. An example beside others must have the loss that it has beside copies of itself, from
    the same random numbers, `Loaded`.
    """
    device = batch.x.device
    with untouched(model, device), torch.no_grad(), Loaded() as chance:
        for _ in range(SEEDS):
            draws = generators(device)
            together = losses_of(loss, model, batch)
            after = generators(device)
            for i, one in enumerate(singles(batch)):
                rewind(device, draws)
                copies = Batch(*(t.expand(len(batch), *t.shape[1:]).clone() for t in one))
                own = losses_of(loss, model, copies)[i]
                if not torch.allclose(together[i], own, rtol=1e-2, atol=1e-4, equal_nan=True):
                    raise Unserved(
                        "by some random numbers that the model draws an example has another loss beside others than by"
                        ' itself: it mixes examples, and only engine = "loop" gives it a meaning'
                    )
            if not chance.single:
                break
            rewind(device, after)


def singles(batch: Batch) -> list[Batch]:
    """The examples of a batch, each as a batch of its own."""
    return [Batch(x, y) for x, y in zip(batch.x.split(1), batch.y.split(1), strict=True)]


COUPLED = 16  # examples on which a loss is tried, each twice


def refuse_coupling(loss: Loss, model: nn.Module, batch: Batch) -> None:
    """Raise Unserved where a loss gives an example another value beside others, from the same outputs of the model.

    The model holds its weights. Some of the batch's examples are taken, each twice, so that equal labels come together.
    """
    batch = Batch(*(torch.cat([t[:COUPLED]] * 2) for t in batch))
    outputs: list[Tensor] = []

    def remembered(x: Tensor) -> Tensor:
        outputs.append(model(x))
        return outputs[-1]

    with torch.no_grad():
        together = losses_of(loss, remembered, batch)
        each = zip(outputs[-1].split(loss.rows), singles(batch), strict=True)
        alone = torch.cat([losses_of(loss, lambda x, own=own: own, one) for own, one in each])  # type: ignore[misc]
    if not torch.allclose(together, alone, rtol=1e-3, atol=1e-6, equal_nan=True):
        raise Unserved(
            f"{type(loss).__name__} couples the examples of a batch: from the same outputs it gives an example another"
            " loss beside others than alone, so that none has a gradient of its own to clip. Compute each example's"
            ' loss from its own row (reduction="none", no mean and no counts over the batch)'
        )


@contextmanager
def silenced(model: nn.Module, paths: Collection[str]) -> Iterator[None]:
    """The modules at `paths` as in evaluation, one by one and not what is inside them."""
    found = dict(model.named_modules())
    modules = [found[path] for path in paths]
    before = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, before, strict=True):
            module.training = mode


Calls = Counter[str]  # how often each module is called in a pass


def survey(model: nn.Module, batch: Batch) -> tuple[dict[str, tuple[Layout, ...]], Calls | None]:
    """Where the examples lie in every call, and how often each module is called; None if that differs by pass.

    Found by comparing the shapes of two passes, over two and over three examples: what grows holds examples. A module
    whose calls cannot be told apart this way is left out.
    """
    passes = []
    counts = []
    for count in (PROBE - 1, PROBE):
        with taping(model) as tape:
            model(batch.x[:count])
        counts.append(Counter(call.path for call in tape.calls))
        shapes: dict[str, list[list[list[torch.Size | None]]]] = {path: [] for path in hooked(model)}
        for call in tape.calls:
            sides = (call.inputs, call.outputs)
            shapes[call.path].append([[t.shape if isinstance(t, Tensor) else None for t in side] for side in sides])
        passes.append(shapes)
    layouts = {}
    for path in passes[0]:
        few, many = passes[0][path], passes[1][path]
        try:
            layouts[path] = tuple(
                Layout(*(tuple(place(*pair) for pair in zip(*sides, strict=True)) for sides in zip(a, b, strict=True)))
                for a, b in zip(few, many, strict=True)
            )
        except ValueError:  # another number of calls or tensors, or a shape that grows in no simple way
            continue
    return layouts, counts[0] if counts[0] == counts[1] else None


PASSES = 4  # that are compared to see whether chance decides which layers are called


def drawing(loss: Loss, model: nn.Module, batch: Batch) -> tuple[frozenset[str], Calls | None]:
    """The modules that draw random numbers, and how often each module is called in every pass.

    None where chance decides which layers are called: then all are sure to be called only where these are silenced.
    """
    random: set[str] = set()

    def calls() -> Calls:
        with taping(model) as tape, watching(model, random):
            losses_of(loss, model, batch)
        return Counter(call.path for call in tape.calls)

    first = calls()
    if not random:
        return frozenset(), first
    others = [calls() for _ in range(PASSES - 1)]
    with silenced(model, random):
        steady = calls()
    unsteady = any(other != first for other in others) or steady > first
    return frozenset(random), None if unsteady else first


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
    """Add to `random` the paths of the modules that draw random numbers while they are called.

    What torch.jit compiled takes no hooks. If anything is drawn in the block, all of it may have been there.
    """
    before: list[list[Tensor]] = []

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]

    def enter(module: nn.Module, args: Any) -> None:
        before.append(states())

    def leave(path: str, module: nn.Module, args: Any, output: Any) -> None:
        if any(not torch.equal(a, b) for a, b in zip(before.pop(), states(), strict=True)):
            random.add(path)

    handles = []
    start, modules = states(), hooked(model)
    try:
        for path, module in modules.items():
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(partial(leave, path)))
        yield
        if any(not torch.equal(a, b) for a, b in zip(start, states(), strict=True)):
            random |= {path for path, _ in model.named_modules()} - modules.keys()
    finally:
        for handle in handles:
            handle.remove()


# ---------------------------------------------------------------------------------------------------------------------
# Trials: what is found out of a model once, and stands as long as its modules and the shape of its examples


Made = TypeVar("Made")


def signature(loss: Loss, model: nn.Module, w: Mapping[str, Tensor], batch: Batch) -> tuple[Any, ...]:
    """What a trial stands on."""
    x = batch.x
    return type(loss), x.shape[1:], x.dtype, x.device.type, tuple(w), modes(model)


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


def served(make: Callable[..., Made], loss: Loss, model: nn.Module, w: Mapping[str, Tensor], batch: Batch) -> Made:
    """What `make` makes of these, without a trace. Raises Unserved where it fails and the loop does not."""
    try:
        with untouched(model, batch.x.device), torch.enable_grad():
            return make(loss, model, w, batch)
    except (Unserved, torch.OutOfMemoryError):
        raise
    except Exception as error:
        one = Batch(batch.x[:1], batch.y[:1])
        with untouched(model, batch.x.device), torch.enable_grad(), held(model, w) as leaves:
            losses = losses_of(loss, model, one)
            torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
        raise Unserved(
            f"{type(model).__name__} works on single examples, and this engine cannot take it apart in a batch"
            f' ({(str(error) or type(error).__name__).splitlines()[0][:160]}). Use engine = "loop"'
        ) from error


def rounding(dtype: torch.dtype) -> float:
    """By how much of itself a squared norm may be off through rounding alone: 2e-3 in float32."""
    return max(1e-6, min(0.1, 2e4 * torch.finfo(dtype).eps))


def agree(squares: Tensor, truth: Tensor, everything: Tensor, dtype: torch.dtype) -> bool:
    """Whether squared norms are right, up to rounding; `everything`: those of the whole gradient."""
    # A gradient that is zero but for rounding, like that of an attention key's bias, has no relative accuracy.
    tiny = (100 * torch.finfo(dtype).eps) ** 2 * everything
    return bool(((squares - truth).abs() <= rounding(dtype) * truth + tiny).all())
