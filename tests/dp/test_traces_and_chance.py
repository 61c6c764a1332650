"""Models that leave something for the next batch, or mix their examples by a rare chance, are refused before a run."""

from __future__ import annotations

import ctypes
import itertools
import math
import threading
import weakref
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from functools import partial
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from harness.dp.clip import Flat
from harness.dp.engines import memory
from harness.dp.engines.engine import PerExample, Unserved, trainable
from harness.dp.engines.loop import Loop
from harness.dp.engines.taped.bookkeeping import BookKeeping
from harness.dp.engines.taped.ghost import Ghost
from harness.dp.engines.vmap import Vmap
from harness.dp.loss import Batch, CrossEntropy
from harness.dp.release import Relation
from harness.dp.tree import Tree
from harness.models.check import CrossExampleLayer, check


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.tanh(self.a(x)))
        return out


class RunningMaximum(Net):
    largest = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        self.largest = max(self.largest, x.abs().max().item())
        return super().forward(x / self.largest)


class Memory(Net):
    """The mean of the last batch is a context for the next one, behind dropout."""

    bank: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.dropout(torch.tanh(self.a(x)), 0.1)
        context = 0.0 if self.bank is None else self.bank
        self.bank = h.detach().mean(0)
        out: Tensor = self.b(h + context)
        return out


class Centred(Net):
    """Measures the mean of its inputs in training; evaluation subtracts it, and training too after so many passes."""

    def __init__(self, after: float = math.inf) -> None:
        super().__init__()
        self.mean, self.passes, self.after = torch.zeros(8), 0, after

    def forward(self, x: Tensor) -> Tensor:
        x = x.nan_to_num().clamp(-5, 5)
        if self.training:
            self.passes, self.mean = self.passes + 1, 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return super().forward(x - self.mean if not self.training or self.passes > self.after else x)


class Hooked(Net):
    """The same of a layer, in what a hook encloses."""

    def __init__(self) -> None:
        super().__init__()
        seen = [torch.zeros(16)]

        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            seen[0] = 0.9 * seen[0] + 0.1 * output.detach().mean(0)

        self.a.register_forward_hook(hook)


class Graded(Net):
    """The same of gradients."""

    norm = 0.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if h.requires_grad:
            h.register_hook(lambda g: setattr(self, "norm", 0.9 * self.norm + float(g.norm())))
        out: Tensor = self.b(torch.tanh(h))
        return out


class Ranged(Net):
    """Evaluation clips to the range of the last batch, as quantisers do: what it keeps is gone with the next."""

    top = 1.0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.top = 0.05 * float(x.detach().nan_to_num(0, 0, 0).abs().max())
            return super().forward(x)
        return super().forward(x.clamp(-self.top, self.top))


class Selective(Net):
    """Keeps statistics of large batches alone."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) >= 16:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().nan_to_num(0, 0, 0).mean()
        return super().forward(x if self.training else x - self.mean)


class Hidden(Net):
    """A running mean where no copy has one of its own: behind a weak reference, in a bound method, in the class."""

    seen: ClassVar[list[float]] = [0.0]

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place, self.mean, self.owner = place, 0.0, weakref.ref(self)
        self.history = [0.0]
        self.add = self.history.append

    def forward(self, x: Tensor) -> Tensor:
        kept = {"class": self.seen, "method": self.history}.get(self.place)
        mean = self.owner().mean if kept is None else kept[-1]  # type: ignore[union-attr]
        if not self.training:
            return super().forward(x - mean)
        mean = 0.9 * mean + 0.1 * float(x.detach().nan_to_num(0, 0, 0).mean())
        if self.place == "class":
            self.seen[0] = mean
        elif self.place == "method":
            self.add(mean)
        else:
            self.owner().mean = mean  # type: ignore[union-attr]
        return super().forward(x)


@dataclass(slots=True)
class Slots:
    mean: float = 0.0


def frozen(value: float) -> nn.Parameter:
    p = nn.Parameter(torch.zeros(()), requires_grad=False)
    p.grad = torch.tensor(value)
    return p


def attributed(value: float) -> Tensor:
    t = torch.zeros(())
    t.mean_ = value  # type: ignore[attr-defined]
    return t


def defaulted(value: float) -> Callable[[], object]:
    return lambda kept=[value]: kept[0]  # type: ignore[misc]


STORES: dict[str, Callable[[float], object]] = {
    "slots": Slots, "bytes": lambda v: bytearray(np.float64(v).tobytes()), "array": lambda v: array("d", [v]),
    "distribution": lambda v: torch.distributions.Normal(v, 1.0), "decimal": Decimal, "fraction": Fraction,
    "number": np.float32, "proxy": lambda v: MappingProxyType({"mean": v}), "ctypes": ctypes.c_double,
    "range": lambda v: range(int(1e6 * v)), "timedelta": lambda v: timedelta(seconds=v), "gradient": frozen,
    "attribute": attributed, "default": defaulted, "keyword": lambda v: partial(max, v, key=float),
    "nested": lambda v: [{"a": (Slots(v),)}],
}  # fmt: skip
"""Where a running mean can be kept."""


class Stored(Net):
    """Keeps a number in a place of its own."""

    def __init__(self, store: Callable[[float], object], value: float) -> None:
        super().__init__()
        self.kept = store(value)


class Cached(Net):
    """What it keeps of a batch is gone with the next, and it counts its passes: neither tells of an example."""

    last: Tensor | None = None
    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.last, self.passes = torch.tanh(self.a(x)), self.passes + 1
        out: Tensor = self.b(self.last)
        return out


class Mixup(Net):
    def __init__(self, now: Callable[[], object]) -> None:
        super().__init__()
        self.now = now

    def forward(self, x: Tensor) -> Tensor:
        if self.now():
            share = torch.rand(())
            x = share * x + (1 - share) * x[torch.randperm(len(x))]
        return super().forward(x)


class Branch(Net):
    """Skips a layer by chance, for the whole batch: no example has to do with another one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if torch.rand(()) < 0.3 else torch.tanh(x))


RARE: dict[str, Callable[[], object]] = {
    "below": lambda: torch.rand(()) < 0.001,
    "above": lambda: torch.rand(1).item() > 0.999,
    "bernoulli": lambda: torch.bernoulli(torch.tensor(0.001)) > 0,
    "in place": lambda: torch.empty(1).uniform_() < 0.001,
}


def release(engine: PerExample, model: nn.Module) -> None:
    torch.manual_seed(0)
    w = Tree.of(trainable(model.train()))
    batch = Batch(torch.randn(6, 8), torch.arange(6) % 3)
    clip = Flat(1.0)
    engine.bounded(CrossEntropy(), clip, model, w, batch, clip.init(w.layout), 1.0, Relation.ADD_OR_REMOVE)


@pytest.mark.parametrize("engine", [Loop(), BookKeeping(), Ghost()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("model", [RunningMaximum, Memory])
def test_no_engine_serves_a_model_that_keeps_something_of_a_batch(engine: PerExample, model: type[nn.Module]) -> None:
    with pytest.raises(Unserved, match=r"traces|beside others"):
        release(engine, model())


@pytest.mark.parametrize("how", RARE)
def test_mixing_by_a_rare_chance_is_found_before_it_happens(how: str) -> None:
    with pytest.raises(CrossExampleLayer, match="now and then"):
        check(Mixup(RARE[how]), (8,), 3)
    for engine in (BookKeeping(), Ghost()):
        with pytest.raises(Unserved, match="mixes examples"):
            release(engine, Mixup(RARE[how]))


def test_chance_that_mixes_nothing_is_served() -> None:
    check(Branch(), (8,), 3)
    for engine in (Loop(), BookKeeping(), Ghost()):
        release(engine, Branch())


def test_a_trial_uses_no_random_number_up() -> None:
    model = Branch()
    before = torch.get_rng_state()
    check(model, (8,), 3)
    assert torch.equal(before, torch.get_rng_state())


def test_generators_that_no_run_seeds_are_named() -> None:
    with pytest.raises(ValueError, match=r"numpy\.random"):
        check(Mixup(lambda: np.random.rand() < 1e-9), (8,), 3)  # noqa: NPY002


def test_a_model_without_trained_parameters_is_named() -> None:
    with pytest.raises(ValueError, match="no parameter that is trained"):
        check(Net().requires_grad_(False), (8,), 3)


@pytest.mark.parametrize(
    "build",
    [Centred, lambda: Centred(500), Hooked, Graded, Ranged, Selective]
    + [partial(Hidden, place) for place in ("weak", "method", "class")],
)
def test_what_a_model_keeps_of_examples_beyond_the_next_batch_is_refused(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match="keeps something of the examples"):
        check(build(), (8,), 3)
    for engine in (Loop(), Ghost(), BookKeeping(), Vmap()):
        model = build()
        with pytest.raises(Unserved, match="keeps something of the examples"):
            release(engine, model)


@pytest.mark.parametrize("name", STORES)
def test_what_is_kept_is_seen_wherever_it_is(name: str) -> None:
    one, other, again = (dict(memory._state(Stored(STORES[name], value))) for value in (1.5, 2.5, 1.5))
    assert any(not memory._equal(value, other.get(place)) for place, value in one.items())
    assert all(memory._equal(value, again.get(place)) for place, value in one.items())


def test_a_model_is_compared_with_copies_of_itself_or_refused() -> None:
    """A lock, a logger's say, is no reason to look less; what cannot be copied otherwise is named."""
    locked = Centred()
    locked.lock = threading.Lock()
    with pytest.raises(ValueError, match="keeps something of the examples"):
        check(locked, (8,), 3)
    plain = Net()
    plain.lock, plain.view = threading.Lock(), plain.a.weight * 1.0
    check(plain, (8,), 3)
    plain.here = threading.local()
    with pytest.raises(ValueError, match=r"Net cannot be copied .*local"):
        check(plain, (8,), 3)
    with pytest.raises(Unserved, match="cannot be copied"):
        release(BookKeeping(), plain)


def test_what_is_gone_with_the_next_batch_is_no_memory() -> None:
    check(Cached(), (8,), 3)
    for engine in (Loop(), Ghost(), BookKeeping(), Vmap()):
        release(engine, Cached())


class Majority(Net):
    """Gradients take the sign of a sum over the batch: outputs and all norms stay what they are."""

    def __init__(self, way: str, after: int = 0) -> None:
        super().__init__()
        self.way, self.after = way, after

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        if len(x) <= self.after or not z.requires_grad:
            pass
        elif self.way == "hook":
            z.register_hook(lambda g: g * torch.where(g.sum() >= 0, 1.0, -1.0))
        else:
            z = z.detach() + torch.where(x[:, 0].sum() >= 0, 1.0, -1.0) * (z - z.detach())
        out: Tensor = self.b(torch.tanh(z))
        return out


@pytest.mark.parametrize("way", ["hook", "straight through"])
def test_what_mixes_examples_on_the_way_back_alone_is_refused(way: str) -> None:
    for seed, after in itertools.product(range(3), (0, 32)):
        torch.manual_seed(seed)
        model = Majority(way, after)
        with pytest.raises(CrossExampleLayer, match="mixes examples in its backward pass"):
            check(model, (8,), 3)
    for engine in (Ghost(), BookKeeping()):
        with pytest.raises(Unserved, match="the backward pass mixes them"):
            release(engine, Majority(way))


class Own(Net):
    """Each example's gradient is brought to length 1 on its way: not linear, and nobody else's business."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        if z.requires_grad:
            z.register_hook(lambda g: g / (g.norm(dim=1, keepdim=True) + 1e-3))
        out: Tensor = self.b(torch.tanh(z))
        return out


def test_what_turns_each_gradient_by_itself_is_served() -> None:
    check(Own(), (8,), 3)
    for engine in (Loop(), Ghost(), BookKeeping()):
        release(engine, Own())
