"""Canaries: crafted examples whose part in a training run can be read off its noised gradients.

A canary is as loud as its clipping rule allows, in coordinates of the gradient that no other example touches: it has
an input feature of its own, and the gradient with respect to that feature's weights is zero for every other example.
An observer who knows all of a run but its noise, its batches and the canaries' coins finds, in the public gradient of
a step, noise alone in those coordinates, or noise and the canary. On a correct implementation that is the pair of
distributions which the accountant of a sampled Gaussian takes for the worst, so that nothing is lost to the canary.

Under add-or-remove a canary is in the data set or absent from it. Under replace-one it is there with either sign.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from harness import data, models
from harness.dp.clip import Clip, Unclipped
from harness.dp.loss import Batch, Loss
from harness.dp.method import Method
from harness.dp.random import Stream
from harness.dp.release import Bounded, Relation, Release
from harness.dp.tree import Layout, Tree
from harness.running.train import start
from harness.verify.around import AroundEngine, AroundNoise

LOUD = 1e4  # a canary's feature: its gradient is far longer than any threshold
LAYERS = (1, 2, 4, 8, 16, 32, 64, 128)  # how many layers a canary may have weights in, tried in this order
FULL = 0.95  # of what the rule allows: more layers are not worth their time
SIDED = 200  # canaries whose side contributions are looked for: each takes a pass of the engine
OWN = "canaries"  # the name of the task below

Array = Any


class Refused(ValueError):
    """A method cannot be audited here; the message says why."""


@dataclass(frozen=True)
class AuditTask:
    """What is trained besides the canaries: ordinary examples `x` [n, ...] with labels `y`, and a network for them.

    `digest` names the content of the data set that the examples are the first of, `model` the network.
    """

    name: str
    x: Tensor
    y: Tensor
    classes: int
    body: nn.Module
    digest: str
    model: str

    @classmethod
    def named(cls, name: str, seed: int, examples: int = 0) -> AuditTask:
        """``DATA/MODEL`` by their specs, or `OWN`: 64 points in two classes and a linear model.

        Of a data set the first `examples` in canonical order, which is random with respect to content; 0 for all.
        Few ordinary examples beside many canaries keep thresholds that follow the data where canaries are, and cost
        little time. Raises Refused for a name of another form.
        """
        if name == OWN:
            x = torch.randn(64, 8, generator=torch.Generator().manual_seed(seed % 2**63))
            return cls.linear(name, x, (x.sum(1) > 0).long(), 2, seed)
        dataset, _, model = name.partition("/")
        if not model:
            raise Refused(f'task "{name}": write DATA/MODEL, as in mnist-5k/tanh-cnn-28, or {OWN}')
        loaded = data.load(dataset)
        x, y = loaded.batch(slice(examples or None))
        shape, classes = loaded.input_shape, loaded.classes
        body = models.build(model, shape, classes, seed % 2**63, loaded.tokens)
        return cls(name, x, y, loaded.classes, body, loaded.digest, model)

    @classmethod
    def linear(cls, name: str, x: Tensor, y: Tensor, classes: int, seed: int) -> AuditTask:
        """These examples and a linear model."""
        digest = hashlib.sha256(x.numpy().tobytes()).hexdigest()[:16]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed % 2**63)
            layer = nn.Linear(x[0].numel(), classes)
        return cls(name, x, y, classes, layer if x.ndim == 2 else nn.Sequential(nn.Flatten(), layer), digest, "linear")


class Gated(nn.Module):
    """A network beside `layers` linear layers without bias that only canaries have inputs to.

    Input [B, features + canaries], flat. The canaries' layers add h - stop(h) to the logits: zero in value, whatever
    their weights have become, with the gradient of h. And a canary's logits are those of no body. So a canary's
    gradient is (softmax(0) - onehot) times its feature in each of these layers, and zero elsewhere, in every step.
    """

    def __init__(self, body: nn.Module, shape: Iterable[int], canaries: int, layers: int, classes: int) -> None:
        super().__init__()
        self.body, self.shape = body, tuple(shape)
        self.canary = nn.ModuleList(nn.Linear(canaries, classes, bias=False) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        features = math.prod(self.shape)
        ordinary, own = x[:, :features].unflatten(1, self.shape), x[:, features:]
        silent = (own.abs().amax(1, keepdim=True) == 0).to(x.dtype)
        h = self.canary[0](own)
        for layer in list(self.canary)[1:]:
            h = h + layer(own)
        return self.body(ordinary) * silent + (h - h.detach())


class SideContribution(NamedTuple):
    """What each canary adds to a side release: `values` [canaries, k] at places `at` [canaries, k] of its buffer."""

    at: Tensor
    values: Tensor


@dataclass(frozen=True)
class Planted:
    """A task with `count` canaries planted after its examples; each has a slot in n, whether it is in or out.

    `coins` [count]: in (or of positive sign) where true. `chained` is the plain linear model on all features at once,
    for engines that take only chains of layers: its canaries have features of 1, since their outputs are not held.
    `sides` are the canaries' contributions to what the engine releases besides, by layout.
    """

    task: AuditTask
    coins: Tensor
    relation: Relation
    layers: int = 1
    chained: bool = False
    sides: Mapping[Layout, SideContribution] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of canaries."""
        return len(self.coins)

    @property
    def n_train(self) -> int:
        """Public: the ordinary examples and all slots."""
        return len(self.task.x) + self.count

    n_test = 0

    def batch(self, indices: Tensor, split: str = "train") -> tuple[Tensor, Tensor]:
        """Flat inputs and labels. An absent canary's slot holds nothing, and the batch is shorter by it."""
        ordinary = len(self.task.x)
        slots = indices[indices >= ordinary] - ordinary
        if self.relation is not Relation.REPLACE_ONE:
            slots = slots[self.coins[slots]]
        indices = indices[indices < ordinary]
        features = self.task.x[0].numel()
        x = self.task.x.new_zeros(len(indices) + len(slots), features + self.count)
        x[: len(indices), :features] = self.task.x[indices].flatten(1)
        signs = self.coins[slots].to(x) * 2 - 1
        x[torch.arange(len(indices), len(x)), features + slots] = self.loudness * signs
        return x, torch.cat([self.task.y[indices], self.task.y.new_zeros(len(slots))])

    @property
    def loudness(self) -> float:
        """The value of a canary's feature."""
        return 1.0 if self.chained else LOUD

    def model(self) -> nn.Module:
        """A fresh model; weights that only canaries use start at zero."""
        features, classes = self.task.x[0].numel(), self.task.classes
        if self.chained:
            linear = nn.Linear(features + self.count, classes, bias=False).to(self.task.x)
            nn.init.zeros_(linear.weight)
            return nn.Sequential(linear)
        gated = Gated(copy.deepcopy(self.task.body), self.task.x.shape[1:], self.count, self.layers, classes)
        for weight in gated.canary.parameters():
            nn.init.zeros_(weight)
        return gated.to(self.task.x)

    def columns(self, tree: Tree) -> Tensor:
        """The canaries' coordinates [layers, classes, canaries] of a gradient or of weights."""
        if self.chained:
            return tree["0.weight"][None, :, -self.count :]
        return torch.stack([tree[name] for name in self.names])

    @property
    def names(self) -> list[str]:
        """The parameters that canaries have coordinates in."""
        return ["0.weight"] if self.chained else [f"canary.{i}.weight" for i in range(self.layers)]


def plant(method: Method, task: AuditTask, coins: Tensor) -> tuple[Planted, float]:
    """Canaries that `method` can be audited with, and their reach: how much of its bound one contributes.

    A rule that clips layers apart, or cuts coordinates off, leaves a canary in one layer short; in more layers it
    comes closer to the bound. Raises Refused where the engine takes neither model.
    """
    relation = method.sampler.relation
    best: tuple[Planted, float] | None = None
    reason: str | None = None
    for layers in LAYERS:
        one = Planted(task, torch.tensor([True]), relation, layers)
        reach, reason = _reach(method, one)
        if reason:
            break
        if best is None or reach > best[1]:
            best = dataclasses.replace(one, coins=coins), reach
        if reach >= FULL:
            break
    if best is None:
        one = Planted(task, torch.tensor([True]), relation, chained=True)
        reach, second = _reach(method, one)
        if second:
            raise Refused(f"{reason}; {second}" if second != reason else reason)
        best = _sided(method, dataclasses.replace(one, coins=coins)), reach
    return best


def _reach(method: Method, one: Planted) -> tuple[float, str | None]:
    """How much of its bound the only canary contributes, by the method's own engine; or why that refuses."""
    try:
        releases = _released(method, one, one.n_train - 1)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return 0.0, str(error)
    heard = {name: r for name, r in releases.items() if name == "grad" or name not in method.clip.split(1.0)}
    shares = [float(r.in_units(r.value).norm()) * one.relation.moves / r.sensitivity / r.sigma for r in heard.values()]
    return math.hypot(*shares), None


def _sided(method: Method, planted: Planted) -> Planted:
    """`planted` with its canaries' contributions to what the engine, and no clipping rule, releases besides gradients.

    They are those of the first step, and are taken to be the same in all. A canary with either sign adds the same to a
    release that is even in its features, so that none are looked for where it is never absent.
    """
    own = set(method.engine.split(method.clip, 1.0)) - set(method.clip.split(1.0))
    if not own or planted.relation is Relation.REPLACE_ONE:
        return planted
    few = dataclasses.replace(planted, coins=torch.ones(min(SIDED, planted.count), dtype=torch.bool))
    added: dict[Layout, list[tuple[Tensor, Tensor]]] = {}
    for slot in range(few.count):
        releases = _released(method, few, len(few.task.x) + slot)
        for name in sorted(own):
            value = releases[name].value
            at = value.flat.nonzero().squeeze(1)
            added.setdefault(value.layout, []).append((at, value.flat[at].double()))
    stacked = {}
    for layout, pairs in added.items():
        if len({len(at) for at, _ in pairs}) == 1:
            stacked[layout] = SideContribution(torch.stack([at for at, _ in pairs]), torch.stack([v for _, v in pairs]))
    return dataclasses.replace(few, coins=planted.coins[: few.count], sides=stacked)


def _released(method: Method, planted: Planted, index: int) -> dict[str, Release]:
    """The releases of a first step on one example alone, at noise multiplier 1. Raises ValueError for a refusal."""
    model = planted.model()
    reason = method.engine.accepts(method.loss, method.clip, model)
    if reason:
        raise ValueError(reason)
    p = start(method, model, 1)
    try:
        batch = method.loss.prepare(Batch(*planted.batch(torch.tensor([index]))), Stream(1, "views", 0))
    except ValueError as error:
        raise ValueError(f"canaries lie in vectors, and {error}") from error
    return method.engine.bounded(
        method.loss, method.clip, model, p.w, batch, p.parts.clip, 1.0, planted.relation
    ).releases


# The observer ---------------------------------------------------------------------------------------------


@dataclass
class CanaryObserver:
    """Sees what a run makes public, and the public state of its parts; never a private value.

    After the run, `values` holds for each step the projections [canaries] of the noised gradient on what each canary
    would contribute, in units of the noise's claimed standard deviation, and `lengths` the length of that
    contribution in the same units.
    """

    planted: Planted
    loss: Loss
    values: list[Tensor] = field(default_factory=list)
    lengths: list[Tensor] = field(default_factory=list)
    state: Any = None
    weights: Tree | None = None

    def watched(self, method: Method) -> Method:
        """`method`, its noise and its engine overheard."""
        engine = Watched(method.engine, self.see)
        noise = Overheard(method.noise, lambda public: self.hear(public, method.clip))
        return dataclasses.replace(method, engine=engine, noise=noise)

    def see(self, w: Tree, state: Any, step: int) -> None:
        """Note where a step differentiates, and the state of its clipping rule."""
        self.weights, self.state = w, state

    def hear(self, public: Release, clip: Clip) -> None:
        """Note the noised gradient of a step."""
        w = self.weights
        if w is None or public.value.layout != w.layout:
            if self.values and public.value.layout in self.planted.sides:
                self._hear_beside(public)
            return
        deviations = public.value.flat.new_tensor(
            [public.sigma * public.sensitivity * (public.scale or {}).get(n, 1.0) for n in self.planted.names]
        )[:, None, None].double()
        there = self.planted.columns(public.value).double() / deviations
        mine = self._contribution(w, clip, public.sensitivity) / deviations
        length = mine.square().sum((0, 1)).sqrt()
        self.values.append((there * mine).sum((0, 1)) / length.clamp(min=1e-300))
        self.lengths.append(length.expand(self.planted.count))

    def _hear_beside(self, public: Release) -> None:
        """Add what a side release shows to what the gradient of the same step showed: its noise is independent."""
        at, mine = self.planted.sides[public.value.layout]
        mine = mine / (public.sigma * public.sensitivity)
        shown = public.value.flat.double()[at] / (public.sigma * public.sensitivity)
        length = mine.square().sum(1).sqrt()
        shown = (shown * mine).sum(1) / length.clamp(min=1e-300)
        before = self.lengths[-1]
        both = torch.hypot(before, length)
        self.values[-1] = (before * self.values[-1] + length * shown) / both.clamp(min=1e-300)
        self.lengths[-1] = both

    def _error(self, outputs: Tensor) -> Tensor:
        """The gradient [classes, canaries] of the loss at canaries' outputs [canaries, classes]; their label is 0."""
        with torch.enable_grad():
            leaf = outputs.double().requires_grad_()
            labels = torch.zeros(len(outputs), dtype=torch.long)
            (error,) = torch.autograd.grad(self.loss.per_example(leaf, labels).sum(), leaf)
        return error.T

    def _contribution(self, w: Tree, clip: Clip, sensitivity: float) -> Tensor:
        """What a canary in the batch adds, [layers, classes, 1 or canaries]."""
        p = self.planted
        if p.chained:
            error = self._error(p.columns(w)[0].T * p.loudness)
            return (error / error.norm(dim=0).clamp(min=1e-300) * (sensitivity / p.relation.moves))[None]
        gradient = self._error(torch.zeros(1, p.task.classes)).mul(p.loudness).expand(p.layers, -1, 1)
        if isinstance(clip, Unclipped):
            return gradient
        groups = clip.groups(w.layout)
        of = [groups[name] for name in p.names]
        squares = torch.zeros(1, 1 + max(groups.values()), dtype=torch.float64)
        squares[0].index_add_(0, torch.tensor(of), gradient.square().sum((1, 2)))
        norms = squares.sqrt()
        limit = clip.limit(norms, self.state)
        if limit is not None:
            gradient = gradient.clamp(-float(limit), float(limit))
        return gradient * clip.weights(norms, self.state)[0, of][:, None, None]


@dataclass(frozen=True)
class Watched(AroundEngine):
    """An engine that reports its public arguments: the weights, the clipping rule's state and the step."""

    report: Callable[[Tree, Any, int], None]

    def bounded(
        self, loss: Loss, clip: Clip, model: nn.Module, w: Tree, batch: Batch, state: Any, sigma: float,
        relation: Relation, step: int = 0,
    ) -> Bounded:  # fmt: skip
        self.report(w, state, step)
        return self.engine.bounded(loss, clip, model, w, batch, state, sigma, relation, step)


@dataclass(frozen=True)
class Overheard(AroundNoise):
    """Noise that reports its public results: releases with their noised value, and what is claimed of them."""

    report: Callable[[Release], None]

    def publish(self, release: Release, rng: Stream, state: Any) -> tuple[Tree, Any]:
        public, after = self.noise.publish(release, rng, state)
        self.report(release._replace(value=public.clone()))
        return public, after


# Scores ---------------------------------------------------------------------------------------------------


class Projections(NamedTuple):
    """`values` and `lengths` [steps, canaries] of an observer, and the rate at which examples are sampled."""

    values: Tensor
    lengths: Tensor
    rate: float


def whitened(o: Projections, method: Method, n: int, batch: int) -> Projections:
    """The same, where noise is correlated: of each step what is left once the noise of the others is taken out.

    A step shows a deviation of 1 then, and a canary by as much more as the others tell of its noise.
    """
    if not method.noise.remembers:
        return o
    covariance = method.noise.covariance(len(o.values), method.sampler.separation(n, batch) or 1)
    precision = torch.from_numpy(np.linalg.inv(covariance))
    own = precision.diagonal().sqrt()[:, None]
    return o._replace(values=precision @ o.values / own, lengths=o.lengths * own)


def likelihood(o: Projections, relation: Relation) -> Tensor:
    """Log-likelihood ratios [canaries] of in against out, or of the signs: the best score for independent noise.

    A step shows N(0, 1) without the canary, and with it the mixture (1 - q) N(0, 1) + q N(a, 1), a its length.
    """

    def mixture(sign: float) -> Tensor:
        exponent = sign * o.lengths * o.values - o.lengths.square() / 2
        if o.rate >= 1:
            return exponent
        quiet = torch.full_like(exponent, math.log1p(-o.rate))
        return torch.logaddexp(quiet, math.log(o.rate) + exponent)

    steps = mixture(1.0) if relation is not Relation.REPLACE_ONE else mixture(1.0) - mixture(-1.0)
    return steps.sum(0)


def unsteadiness(o: Projections, relation: Relation) -> Tensor:
    """How much a canary's coordinate varies over the steps: [canaries], as deviations from their mean.

    Noise that repeats itself cancels in the differences between steps, and a canary that comes and goes does not.
    """
    return (o.values - o.values.mean(0)).square().sum(0)


SCORES: dict[str, Callable[[Projections, Relation], Tensor]] = {
    "likelihood ratio": likelihood, "variance over steps": unsteadiness
}  # fmt: skip
