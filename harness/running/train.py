"""Training: one logical step, the loop around it, and the checkpoint that makes the loop resumable to the same bits."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from harness.dp.account import Ledger
from harness.dp.engines.draws import fill
from harness.dp.engines.engine import Unserved, trainable
from harness.dp.engines.weights import held, restored
from harness.dp.loss import Batch, Data, Loss, Split
from harness.dp.method import Method
from harness.dp.random import Stream
from harness.dp.release import Observed, Release
from harness.dp.tree import Layout, Tree
from harness.provenance.measure import Clock
from harness.records.files import opened


class Parts(NamedTuple):
    """The state of those parts of a method that have one."""

    optimizer: Any
    path: Any
    clip: Any
    # By release. Secret: what was released less its noise is the private value.
    noise: Any


class Streams(NamedTuple):
    """The secret random streams of one step."""

    noise: Stream
    path: Stream

    def own(self, name: str, release: Release, observed: Observed) -> Stream:
        """The noise of one release, which no other shares: it depends on every bit of what is released.

        Two runs of one seed whose sums differ, for whatever reason, would otherwise show the difference without noise:
        by rounding (another number of threads, another library), by an engine that is wrong, or by code that no hash
        covers. `Auto` chooses its engine by time, and what two engines release is not compared at all.
        """
        return self.noise.under(f"{name} by {observed.engine}: {release.digest}")


class Stepped(NamedTuple):
    """What a step leaves behind; everything but `observed` is public."""

    w: Tree
    parts: Parts
    sigmas: tuple[float, ...]
    sensitivity: dict[str, float]
    observed: Observed


def step(
    m: Method,
    model: nn.Module,
    w: Tree,
    batch: Batch,
    s: Parts,
    sigma: float,
    denominator: int,
    rng: Streams,
    number: int = 0,
) -> Stepped:
    """One logical step of any method. `denominator` is public: it never depends on who is in the batch."""
    probe = m.path.probe(w, s.path)
    releases, observed = m.engine.bounded(
        m.loss, m.clip, model, probe, batch, s.clip, sigma, m.sampler.relation, number
    )
    # Raw values die here. Noise may leave them in the format of the sum; weights divide them in their own.
    if m.noise.remembers and releases.keys() != s.noise.keys():
        raise ValueError(f"noise of {', '.join(s.noise)} goes on, and this step releases {', '.join(releases)}")
    public, kept, deviations = {}, dict(s.noise), {}
    for name, r in wanted(releases, w).items():
        noise = rng.own(name, r, observed) if m.noise.private else rng.noise
        spread = m.noise.deviation(r, s.noise.get(name))
        deviations[name] = {tensor: one / denominator for tensor, one in spread.items()}
        noised, kept[name] = m.noise.publish(r, noise, s.noise.get(name))
        public[name] = r._replace(value=noised).formatted / denominator
    g = public.pop("grad")
    state = m.optimizer.receive(s.optimizer, public, deviations)
    new, optimizer = m.optimizer.update(g, state, m.path.base(w, s.path, rng.path))
    parts = Parts(optimizer, m.path.after(w, new, g, s.path), m.clip.update(s.clip, public), kept)
    sigmas = tuple(r.sigma for r in releases.values())
    return Stepped(new, parts, sigmas, {name: r.sensitivity for name, r in releases.items()}, observed)


def wanted(releases: Mapping[str, Release], w: Tree) -> dict[str, Release]:
    """Releases in the formats that they are wanted in: the gradient's is that of the weights `w`."""
    grad = releases["grad"]
    return {**releases, "grad": grad._replace(dtype=w.flat.dtype)}


class Seeds(Protocol):
    """The secret seeds of a run, by role, of any length."""

    sampling: int
    noise: int
    path: int


@dataclass
class Progress:
    """Where a run stands: `step` steps into its stage `stage`.

    `seconds` and `sizes` per timed block of steps; the sums are since the last log point.
    """

    step: int
    w: Tree
    parts: Parts
    stage: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    sensitivity: dict[str, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    seen: int = 0
    clipped: int = 0
    non_finite: int = 0
    loss: float | None = None
    trace: int = 0
    engine: str = ""
    microbatch: int = 0


class LogPoint(NamedTuple):
    """What is known at a log point. `loss` and `clipped` come from private values: for diagnosis, not for release."""

    step: int
    loss: float | None
    clipped: float | None
    rate: float | None
    progress: Progress


@dataclass(frozen=True)
class Schedule:
    """Logical steps, the expected batch size, and how often to time, to log and to save (the last two: no science)."""

    steps: int
    batch: int
    log_every: int
    save_seconds: float = 20.0
    warmup: int = 3

    @property
    def untimed(self) -> int:
        """Steps of a session that warm up and are not timed: fewer than there are."""
        return min(self.warmup, self.steps - 1)

    @property
    def block(self) -> int:
        """Steps per timed block: a synchronised clock inside every step would slow a GPU down."""
        return max(1, min(10, self.log_every))


class Diverged(Exception):
    """The weights or the outputs are not finite any more."""


def start(method: Method, model: nn.Module, steps: int, separation: int | None = 1) -> Progress:
    """The state before the first of `steps` steps, at the model's own parameters.

    `separation`: how many steps apart an example is used, by the method's sampler.
    """
    w = Tree.of(trainable(model))
    noise = {name: method.noise.init(steps, separation or 1) for name in method.engine.split(method.clip, 1.0)}
    parts = Parts(method.optimizer.init(w, steps), method.path.init(w), method.clip.init(w.layout), noise)
    return Progress(0, w, parts)


def train(
    method: Method,
    model: nn.Module,
    data: Data,
    sigma: float,
    schedule: Schedule,
    seeds: Seeds,
    progress: Progress,
    log: Callable[[LogPoint], None] = lambda point: None,
    save: Callable[[Progress], None] = lambda progress: None,
    streams: type[Streams] = Streams,
) -> Progress:
    """Run `method` from `progress` to the end of `schedule`.

    **Two calls with the same `seeds` draw the same batches, and the same noise for as long as they release the same to
    the bit** (`Streams.own`). That is what makes a run repeatable. The batches of a release are secret too, so whoever
    releases what comes out draws new seeds for every call. The harness's own runs derive them from the cell, the
    attempt and the code (`harness.running.seeds`). `streams` is for those who compare runs whose sums differ in the
    last bits, and release neither.

    Every random draw is a function of (seed, step), so a run continued from a checkpoint is the run that was never
    interrupted. Raises Unserved, before anything is drawn, where the engine does not serve this loss, clipping rule or
    model, and Diverged as soon as a log point sees weights that are not finite.
    """
    n, device = data.n_train, progress.w.flat.device
    reason = method.unfit(n, schedule.batch, schedule.steps) or method.engine.accepts(method.loss, method.clip, model)
    if reason:
        raise Unserved(reason)
    denominator, cycle = method.sampler.denominator(n, schedule.batch), method.sampler.cycle(n, schedule.batch)
    clock = Clock(device)
    losses: list[Tensor] = []
    counts: list[Tensor] = []
    size = examples = 0
    first = progress.step
    model.train()
    p = progress
    saved = lap = clock.now()
    while p.step < schedule.steps:
        indices = method.sampler.draw(n, schedule.batch, p.step, seeds.sampling).to(device)
        views = Stream(seeds.path, "views", p.step)
        batch = method.loss.prepare(Batch(*data.batch(indices)), views)
        fill(device, Stream(seeds.path, "dropout", p.step))
        noise, path = Stream(seeds.noise, f"noise of {method.engine.role}", p.step), Stream(seeds.path, "path", p.step)
        done = step(method, model, p.w, batch, p.parts, sigma, denominator, streams(noise, path), p.step)
        sigmas = done.sigmas
        if cycle > 1:
            # The ledger has nothing of a step that is free, and of the first what the costliest is planned to release.
            if sigmas != (planned := tuple(method.engine.split(method.clip, sigma, p.step).values())):
                raise RuntimeError(f"step {p.step} released with multipliers {sigmas}, and {planned} were planned")
            sigmas = method.charged(sigma, n, schedule.batch, p.step)
        p.ledger.add(event_of(method, sigmas, n, schedule.batch, p.step))
        p.w, p.parts, p.step = done.w, done.parts, p.step + 1
        p.sensitivity, p.engine, p.microbatch = (done.sensitivity, done.observed.engine, done.observed.microbatch)
        losses.append(done.observed.losses.sum())
        counts.append(torch.stack([done.observed.clipped, done.observed.non_finite]))
        size += len(batch)
        examples += len(batch)
        logging = p.step % schedule.log_every == 0 or p.step == schedule.steps
        if p.step % schedule.block == 0 or logging:
            now = clock.now()
            if p.step - first > schedule.untimed:  # the first steps of a session pay for warming up
                p.seconds.append(now - lap)
                p.sizes.append(size)
            size, lap = 0, now
        if logging:
            clipped, non_finite = (int(c) for c in torch.stack(counts).sum(0))
            p.seen, p.clipped, p.non_finite = (p.seen + examples, p.clipped + clipped, p.non_finite + non_finite)
            p.loss = float(torch.stack(losses).sum()) / examples if examples else None
            if not p.w.flat.isfinite().all():
                raise Diverged(f"weights are not finite after step {p.step}")
            rate = p.sizes[-1] / p.seconds[-1] if p.sizes else None
            log(LogPoint(p.step, p.loss, clipped / examples if examples else None, rate, p))
            losses, counts, examples = [], [], 0
            if clock.since(saved) > schedule.save_seconds and p.step < schedule.steps:
                save(p)
                saved = clock.now()
            lap = clock.now()  # logging and saving are not training
    return p


def event_of(method: Method, sigmas: tuple[float, ...], n: int, batch: int, step: int) -> Any:
    """The event of a step that released values with these multipliers: what was done, not what was planned."""
    return method.sampler.wrap(method.path.amend(method.noise.event(sigmas)), n, batch, step)


@contextmanager
def evaluating(model: nn.Module, w: Tree) -> Iterator[None]:
    """Inside the block `model` is in evaluation mode with weights `w`; afterwards it is as before, to the bit.

    Its mode is changed while it holds `w`: what runs when it changes may fold parameters into one another, as
    LoRA layers do, and folds those of the run. It writes into a copy.
    """
    training = model.training
    with restored(model), held(model, w.clone().views), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            model.train(training)


def evaluate(model: nn.Module, w: Tree, loss: Loss, data: Data, split: Split = "test") -> dict[str, float]:
    """How weights `w` do on a split, as `loss` judges. A score may be infinite, or not a number.

    Raises PermissionError where a loss that does not say so (`probes`) reads anything but this split.
    """
    seen = data if loss.probes else OneSplit(data, split, type(loss).__name__)
    with evaluating(model, w):
        return loss.scores(model, seen, w.flat.device, split)


@dataclass(frozen=True)
class OneSplit:
    """A data set of which one split can be read: what is published must follow from it and from the weights alone."""

    data: Data
    split: Split
    reader: str

    @property
    def n_train(self) -> int:
        return self.data.n_train

    @property
    def n_test(self) -> int:
        return self.data.n_test

    def batch(self, indices: Tensor, split: Split = "train") -> tuple[Tensor, Tensor]:
        """As `Data` has it."""
        if split != self.split:
            raise self._refused(f"the {split} split")
        return self.data.batch(indices, split)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._refused(f'"{name}" of the data set')

    def _refused(self, what: str) -> PermissionError:
        return PermissionError(
            f"{self.reader}.scores reads {what}, and is to judge the {self.split} split: its scores would be published."
            f" Read data.batch(indices, split) alone, or let {self.reader}.probes be True: then scores stay private"
        )


# --- checkpoints: one safetensors file, the structure as JSON in its header; nothing in it can be executed ---


def write_checkpoint(file: Path, p: Progress) -> None:
    """Write `p` atomically: a kill at any moment leaves the old file or the new one."""
    tensors: dict[str, Tensor] = {}
    head = {one.name: getattr(p, one.name) for one in fields(p)}
    head |= {
        "w": _pack(p.w, tensors),
        "parts": [_pack(part, tensors) for part in p.parts],
        "ledger": p.ledger.to_json(),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    with opened(temporary) as out:  # realised sizes, losses and counts are in it
        out.write(save({name: t.contiguous() for name, t in tensors.items()}, metadata={"progress": json.dumps(head)}))
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, file)


def read_checkpoint(file: Path, device: torch.device | str = "cpu") -> Progress:
    """The progress in `file`."""
    with safe_open(file, framework="pt", device=str(device)) as stored:
        head = json.loads(stored.metadata()["progress"])
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a mapping)
    w = _unpack(head.pop("w"), tensors)
    parts = Parts(*(_unpack(part, tensors) for part in head.pop("parts")))
    return Progress(w=w, parts=parts, ledger=Ledger.from_json(head.pop("ledger")), **head)


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, its tensors set aside under numbered names."""
    if isinstance(value, Tree):
        shapes = [list(shape) for shape in value.layout.shapes]
        return {"tree": _pack(value.flat, tensors)["tensor"], "names": list(value.names), "shapes": shapes}
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": {key: _pack(item, tensors) for key, item in value.items()}}
    if isinstance(value, (list, tuple)):
        return [_pack(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a part's state holds trees, tensors, numbers and collections of them, not {type(value).__name__}")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return tuple(_unpack(item, tensors) for item in value)
    if not isinstance(value, dict):
        return value
    if "tree" in value:
        shapes = tuple(torch.Size(shape) for shape in value["shapes"])
        return Tree(Layout(tuple(value["names"]), shapes), tensors[value["tree"]])
    if "tensor" in value:
        return tensors[value["tensor"]]
    return {key: _unpack(item, tensors) for key, item in value["dict"].items()}
