"""Reads records, in which any field may be missing or null, into `Run` values that the rest of a report can rely on.

Everything unusual about a record is settled here, once: a field of the wrong type is a missing one,
text is made printable, a null epsilon is infinite. Nothing behind this file looks into a record again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from harness.records import origin, public
from harness.records.stages import stage_facts
from harness.report.model.fields import (
    Fields,
    RecordLike,
    canonical,
    natural,
    number,
    pairs,
    part_text,
    record_path,
    scalar,
    visible,
)
from harness.report.model.stage import StageFacts, sampling

CROWDED = 1.5
"""A run was timed on a busy machine where the load average was at least so many times the cores in use."""

#: Statuses in the order in which they are shown; a status that is not here comes last, under its own name.
STATUSES = ("ok", "diverged", "oom", "timeout", "over_budget", "skipped", "crashed")


@dataclass(frozen=True)
class Machine:
    """Where a run happened. `fingerprint` names one machine model, `kind` is cpu or cuda."""

    name: str = ""
    kind: str = ""
    spec: str = ""
    threads: int | None = None
    fingerprint: str = ""


@dataclass(frozen=True)
class Setting:
    """What a run was asked to do. Rows are ranked against each other only inside one setting."""

    task: str
    digest: str
    split: str
    epsilon: float
    delta: float | None
    relation: str
    unit: str


@dataclass(frozen=True)
class LogPoint:
    """A log point of a run: what the trace says after `step` steps. `clipped` and `loss` are of private data."""

    step: int
    seconds: float | None
    accuracy: float | None
    epsilon: float | None
    loss: float | None
    clipped: float | None


@dataclass(frozen=True)
class Run:
    """One record, read. Accuracies are fractions, times seconds, memory MiB; None is unknown.

    Of a run of two `stages` batch, steps, parts, rate and engine are the first one's; the accuracy is the last one's.

    `changes` are the parts that the suite gave the method in place of its own, slot and spec. `spent` and `planned` are
    epsilons by accountant; those that do not apply are in `refused`, each with its reason. `cores` are those that the
    run and the ones beside it could keep busy, `load` the load average after it. `files` are files of code outside the
    packages. `attempt` is whose random numbers were drawn; `origin` says of a run that was merged from where, and what
    of it is its sender's word; `believed` says that its privacy is, too.
    """

    id: str
    group: str
    seed: int | None
    status: str
    reason: str
    setting: Setting
    device: Machine
    dataset: str
    model: str
    n_train: int | None
    method: str
    label: str
    family: str
    paper: str
    summary: str
    parameters: tuple[tuple[str, str], ...]
    parts: tuple[tuple[str, str], ...]
    changes: tuple[tuple[str, str], ...]
    batch: int | None
    steps: int | None
    dtype: str
    metrics: Mapping[str, float]
    spent: Mapping[str, float]
    planned: Mapping[str, float]
    refused: Mapping[str, str]
    epsilon: float | None
    calibrated: str
    claimed: float | None
    claim: str
    tuned: float | None
    delta: float | None
    sampling: str
    sigma: float | None
    public_data: str
    rate: float | None
    peak_memory: float | None
    train_seconds: float | None
    jobs: int | None
    engine: str
    clipped: float | None
    load: float | None
    cores: int | None
    stale: bool
    origin: str
    believed: bool
    path: str
    started: str
    finished: str
    commit: str
    dirty: bool
    files: tuple[str, ...]
    attempt: int
    torch: str
    environment: tuple[tuple[str, str], ...]
    trace: tuple[LogPoint, ...]
    stages: tuple[StageFacts, ...]
    order: str

    @property
    def ok(self) -> bool:
        """Whether this run counts: it ended well and was evaluated."""
        return self.status == "ok" and self.accuracy is not None

    @property
    def accuracy(self) -> float | None:
        """Accuracy at the last step on the split that `setting` names, a fraction."""
        return self.metrics.get("accuracy")

    @property
    def examples(self) -> int | None:
        """How many examples the accuracy is counted on, where the record says so."""
        found = self.metrics.get("examples")
        return int(found) if found and found >= 1 else None

    @property
    def judged(self) -> tuple[LogPoint, ...]:
        """The log points of the last stage: those before it are of another network, by another measure."""
        return tuple(p for p in self.trace if self.stage_at(p.step) + 1 >= len(self.stages))

    def stage_at(self, step: int) -> int:
        """Which stage the step of this number is in: 0 or 1."""
        return int(len(self.stages) > 1 and step > (self.stages[0].steps or 0))

    @property
    def busy(self) -> bool:
        """Whether other work ran on the machine: its load was `CROWDED` times what the runs account for, or more."""
        return self.load is not None and self.cores is not None and self.load >= CROWDED * self.cores


def read(records: Iterable[RecordLike]) -> list[Run]:
    """Read `records` into runs, in an order that does not depend on the order they come in."""
    return sorted((_run(r) for r in records), key=_order)


def _order(run: Run) -> tuple[Any, ...]:
    s = run.setting
    return (
        natural(s.task), s.digest, s.split, s.epsilon, natural(run.label), run.group, run.device.fingerprint,
        -1 if run.seed is None else run.seed, run.id, run.order,
    )  # fmt: skip


def _claim(value: Any) -> tuple[float | None, str]:
    """The epsilon claimed under assumptions, None if one of them failed; and what is open and what failed, as text."""
    if not isinstance(value, dict):
        return number(value), ""
    epsilon, assumptions = number(value.get("epsilon")), value.get("assumptions")
    if not isinstance(assumptions, list):
        return epsilon, "; ".join(f"{k}: {v}" for k, v in pairs({k: v for k, v in value.items() if k != "epsilon"}))
    read = [one for one in assumptions if isinstance(one, dict) and isinstance(one.get("text"), str)]
    known = [one["text"] for one in read if one.get("holds") is True]
    failed = [f"{one['text']} ({one.get('why') or 'no'})" for one in read if one.get("holds") is False]
    unknown = [one["text"] for one in read if not isinstance(one.get("holds"), bool)]
    parts: dict[str, list[Any]] = {
        "source": [value.get("source")],
        "failed": failed,
        "assumed, not checked": unknown,
        "checked": known,
    }
    words = [f"{name}: {'; '.join(map(scalar, texts))}" for name, texts in parts.items() if any(texts)]
    return None if failed else epsilon, ". ".join(words)


def _cores(f: Fields) -> int | None:
    """The cores that the runs at a time may keep busy: on a CPU their threads, beside a GPU those of the machine."""
    if f.text("device.kind") == "cuda":
        return f.whole("environment.cores")
    return max(1, f.whole("device.threads") or 1) * max(1, f.whole("measured.jobs") or 1)


def _bounds(f: Fields) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    """Epsilons spent and planned by accountant, and those that do not apply, each with its reason.

    A record has null for both: an infinite epsilon, and an accountant that does not know what was released, or has no
    number for it. Where any accountant has a finite epsilon nothing infinite was spent, so null is of the second kind.
    """
    refused: dict[str, str] = {}
    found = {}
    for name in ("spent", "planned"):
        values = f.epsilons(f"privacy.{name}")
        if any(map(math.isfinite, values.values())):
            lost = [accountant for accountant, value in values.items() if math.isinf(value)]
            refused |= {one: f.text(f"privacy.accounting.{one}") for one in lost}
            values = {one: value for one, value in values.items() if one not in lost}
        found[name] = values
    return found["spent"], found["planned"], refused


def _tuned(value: Any) -> float | None:
    """Epsilon with the search for hyper-parameters: a number, or an object that holds one."""
    return number(value.get("epsilon") if isinstance(value, dict) else value)


def _trace(points: Any) -> tuple[LogPoint, ...]:
    """The log points in order; null epsilon is infinite, an absent one is unknown."""
    read = []
    for one in points if isinstance(points, list) else ():
        step = number(one.get("step")) if isinstance(one, dict) else None
        if step is None:
            continue
        epsilon = math.inf if "epsilon" in one and one["epsilon"] is None else number(one.get("epsilon"))
        values = [number(one.get(key)) for key in ("seconds", "accuracy", "loss", "clipped_fraction")]
        seconds, accuracy, loss, clipped = values
        read.append(LogPoint(int(step), seconds, accuracy, epsilon, loss, clipped))
    return tuple(sorted(read, key=lambda p: p.step))


def _run(record: RecordLike) -> Run:
    f = Fields({**record, "diagnostics": public.diagnostics(record)})
    stages = tuple(StageFacts.of(Fields(one)) for one in stage_facts(record))
    status = f.text("status", "crashed")
    target = f.number("cell.privacy.epsilon")
    claimed, claim = _claim(f.any("privacy.claimed"))
    dataset, model = f.text("cell.task.dataset"), f.text("cell.task.model")
    method = f.text("cell.method.name", "(unnamed)")
    spent, planned, refused = _bounds(f)
    reached = spent.get(f.text("privacy.accountant", "pld"), f.number("privacy.epsilon"))
    if reached is None and status == "ok":  # null is infinite, once something has been spent
        reached = math.inf
    return Run(
        id=f.text("id", "(no id)"),
        group=f.text("group", f.text("id", "(no group)")),
        seed=f.whole("cell.seed"),
        status=status,
        reason=f.text("reason"),
        setting=Setting(
            task=f.text("cell.task.name", "/".join(filter(None, (dataset, model))) or "(unnamed task)"),
            digest=f.text("cell.task.digest"),
            split=f.text("cell.task.evaluate", "test"),
            epsilon=math.inf if target is None else target,
            delta=f.number("cell.privacy.delta"),
            relation=f.text("cell.privacy.relation"),
            unit=f.text("cell.privacy.unit"),
        ),
        device=Machine(
            f.text("device.name"), f.text("device.kind"), f.text("device.spec"),
            f.whole("device.threads"), f.text("device.fingerprint"),
        ),
        dataset=dataset,
        model=model,
        n_train=f.whole("cell.task.n_train"),
        method=method,
        label=f.text("cell.method.label", method),
        family=f.text("card.family"),
        paper=f.text("card.paper"),
        summary=f.text("card.summary"),
        parameters=pairs(f.mapping("cell.method.parameters")),
        parts=tuple((visible(str(k)), part_text(v)) for k, v in sorted(f.mapping("cell.method.parts").items())),
        changes=pairs(f.mapping("cell.method.with")),
        batch=f.whole("cell.schedule.batch"),
        steps=f.whole("cell.schedule.steps"),
        dtype=f.text("cell.numerics.dtype") + (" tf32" if f.any("cell.numerics.tf32") is True else ""),
        metrics=f.numbers("metrics"),
        spent=spent,
        planned=planned,
        refused=refused,
        epsilon=reached,
        calibrated=f.text("cell.privacy.accountant"),
        claimed=claimed,
        claim=claim,
        tuned=_tuned(f.any("privacy.epsilon_with_tuning")),
        delta=f.number("privacy.delta"),
        sampling=sampling(stages, f.text("privacy.sampling")),
        sigma=f.number("privacy.noise_multiplier"),
        public_data=f.text("privacy.public_data"),
        rate=stages[0].rate if stages else f.number("diagnostics.examples_per_second.median"),
        peak_memory=f.number("diagnostics.peak_memory_mib"),
        train_seconds=f.number("diagnostics.train_seconds"),
        jobs=f.whole("measured.jobs"),
        engine=stages[0].engine if stages else f.text("measured.engine"),
        clipped=None if stages else f.number("diagnostics.clipped_fraction"),
        load=f.number("diagnostics.load_average"),
        cores=_cores(f),
        stale=f.any("stale") is True,
        believed=bool((f.any("origin") or {}).get("unknown")),
        origin="; ".join(map(visible, origin.words(f.any("origin")))),
        path=record_path(f.any("path")),
        started=f.text("started"),
        finished=f.text("finished"),
        commit=f.text("code.commit"),
        dirty=f.any("code.dirty") is True,
        files=tuple(sorted(visible(str(one)) for one in f.mapping("code.files") if "/" not in str(one))),
        attempt=f.whole("randomness.attempt") or 1,
        torch=f.text("environment.torch"),
        environment=pairs(f.mapping("environment")),
        trace=_trace(f.any("trace")),
        stages=stages,
        order=canonical(record),
    )  # fmt: skip
