"""Audits of steps as they are made: the norm that a step used for an example, and that of the example by itself.

A trial sees a few tame examples before the first step. What a model does only in large batches, or only beside an
example that is far from all others, shows in the batches of the run alone: so norms that steps really used are
compared, now and then, with those of the same examples on their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn

from harness.dp.engines.draws import rewind
from harness.dp.engines.engine import PerExample, Unserved, Used
from harness.dp.engines.loop import Loop
from harness.dp.engines.survey import untouched
from harness.dp.engines.weights import in_float64
from harness.dp.loss import Batch
from harness.dp.tree import Tree

EVERY = 128  # logical batches between two audits; fewer at first
SLACK = 0.02  # by how much two float32 norms may differ before float64 decides: kinks alone make 0.5 %
SURE = 1e-3  # by how much two float64 norms may differ
FAINT = 1e-12  # shorter gradients vanish when they are squared in float32
REACH = 1.1  # times the furthest input of any audited batch: further, and the batch is audited
GROWN = 1.1  # times the largest microbatch that was audited


@dataclass
class Seen:
    """What audits have seen of a model at work in an engine.

    The number of batches, the largest microbatch and furthest input audited, the number of batches with a gradient that
    is not finite.
    """

    batches: int = 0
    largest: int = 0
    furthest: float = -1.0
    broken: int = 0


_seen: WeakKeyDictionary[nn.Module, dict[str, Seen]] = WeakKeyDictionary()
_paused: WeakSet[nn.Module] = WeakSet()


@contextmanager
def unaudited(model: nn.Module) -> Iterator[None]:
    """Batches that are not audited, and do not count among those that audits are spread over."""
    _paused.add(model)
    try:
        yield
    finally:
        _paused.discard(model)


def due(seen: Seen, used: Used) -> bool:
    """Whether this step is audited: a model's first, second, fourth and so on, and then every 128th.

    So is the first with so large a microbatch, the first with inputs so far out, and the first, second, fourth and so
    on with an example whose gradient is not finite: what mixes examples may do so only then.
    """
    number, size, furthest = seen.batches, min(used.chunk, len(used.batch)), reach(used.batch.x)
    seen.batches += 1
    broken = not used.norms.isfinite().all()
    seen.broken += broken
    regular = number % EVERY == 0 or (number < EVERY and power_of_two(number))
    unusual = size > GROWN * seen.largest or furthest > REACH * seen.furthest
    unusual = unusual or bool(broken and power_of_two(seen.broken))
    if regular or unusual:
        seen.largest, seen.furthest = max(seen.largest, size), max(seen.furthest, furthest)
    return regular or unusual


def audited(seen: Seen, used: Used, random: bool) -> set[int]:
    """The examples of a step that are audited: the one with the furthest finite input, and another one each time.

    Of token numbers none is furthest: it is two others each time.
    """
    within = min(used.chunk, len(used.batch)) if random else len(used.batch)
    x, number = used.batch.x[:within], seen.batches * 2654435761 % within
    if not x.is_floating_point() or not x.numel():
        return {number, (number + seen.batches * 40503 + 1) % within}
    furthest = int(x.abs().nan_to_num(0, 0, 0).flatten(1).amax(1).argmax())
    return {furthest, (number + (number == furthest)) % within}


def power_of_two(number: int) -> bool:
    """Whether `number` is 0, 1, 2, 4, 8, ..."""
    return number & (number - 1) == 0


def reach(x: Tensor) -> float:
    """The largest absolute value of the inputs; 0 for token numbers."""
    if not x.is_floating_point() or not x.numel():
        return 0.0
    low, high = x.aminmax()
    return max(-float(low), float(high))


def audit(engine: PerExample, used: Used, random: bool) -> bool:
    """Compare the norms that a step used for some of its examples with those of each by itself.

    By itself means by the loop. Where the model draws random numbers (`random`) it means in a microbatch of copies of
    the example, with the same numbers: its own place has the same masks then, and nobody else is there. Returns
    whether the step was audited. Raises Unserved if the norms differ: then what the example adds depends on others, or
    is not what was measured. The error names no value of the data.
    """
    if used.model in _paused:
        return False
    seen = _seen.setdefault(used.model, {}).setdefault(engine.label, Seen())
    before = replace(seen)
    if not due(seen, used):
        return False
    with untouched(used.model, used.batch.x.device):
        for number in audited(seen, used, random):
            alone = by_itself(engine, used, number, random)
            if not unlike(used.norms[number], alone, SLACK) or not confirmed(engine, used, number, random):
                continue
            # Not seen: the next such batch is audited as well.
            _seen[used.model][engine.label] = before
            raise Unserved(
                "the gradient of an example has another norm inside its batch than by itself: the model lets examples"
                " depend on each other or regroups them, or uses its parameters where no layer shows it. Only"
                ' engine = "loop" gives it a meaning'
            )
    return True


def unlike(read: Tensor, true: Tensor, slack: float) -> bool:
    """Whether norms [G] differ by more than `slack`, or one is finite and the other is not."""
    if read.isfinite().all() != true.isfinite().all():
        return True
    if not true.isfinite().all():
        return False
    # The norm of a group whose gradient cancels is made of the rounding of the others.
    allowed = slack * (true + slack * true.square().sum().sqrt()) + FAINT
    return bool(((read - true).abs() > allowed).any())


def by_itself(engine: PerExample, used: Used, number: int, random: bool) -> Tensor:
    """The norms [G] of an example of the batch, where no other one is."""
    x, y = used.batch.x[number : number + 1], used.batch.y[number : number + 1]
    if not random:
        return norms_of(Loop(), used, Batch(x, y))[0]
    size = min(used.chunk, len(used.batch))
    copies = Batch(x.expand(size, *x.shape[1:]).clone(), y.expand(size, *y.shape[1:]).clone())
    return microbatch(engine, used, copies)[number]


def microbatch(engine: PerExample, used: Used, batch: Batch) -> Tensor:
    """The norms [B, G] of `batch` as the step's first microbatch, with the random numbers that it had."""
    rewind(batch.x.device, used.draws)
    return norms_of(engine, used, batch)


def norms_of(engine: PerExample, used: Used, batch: Batch) -> Tensor:
    """The norms [B, G] of `batch`, in place of the step's own."""
    norms = engine.clipped_sum(used.loss, used.clip, used.groups, used.model, used.w, batch, used.state).norms
    assert norms is not None
    return norms


def confirmed(engine: PerExample, used: Used, number: int, random: bool) -> bool:
    """Whether the norms differ in float64 too, where rounding makes no difference. Yes, if float64 is refused."""
    x = used.batch.x.double() if used.batch.x.is_floating_point() else used.batch.x
    wide = used._replace(w=Tree(used.w.layout, used.w.flat.double()), batch=Batch(x, used.batch.y))
    start = number // used.chunk * used.chunk
    part = Batch(*(t[start : start + used.chunk] for t in wide.batch))
    try:
        with in_float64(used.model):
            read = microbatch(engine, wide, part)[number - start]
            return unlike(read, by_itself(engine, wide, number, random), SURE)
    except (RuntimeError, TypeError):
        return True
