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
from harness.report.model import fields
from harness.report.model.fields import Fields, FromFields, RecordLike, at, number, visible

CROWDED = 1.5
"""A run was timed on a busy machine where the load average was at least so many times the cores in use."""

#: Statuses in the order in which they are shown; a status that is not here comes last, under its own name.
STATUSES = ("ok", "diverged", "oom", "timeout", "over_budget", "skipped", "crashed")


@dataclass(frozen=True)
class Machine(FromFields):
    """Where a run happened. `fingerprint` names one machine model, `kind` is cpu or cuda."""

    name: str = at(Fields.text, "device.name")
    kind: str = at(Fields.text, "device.kind")
    threads: int | None = at(Fields.whole, "device.threads")
    fingerprint: str = at(Fields.text, "device.fingerprint")


@dataclass(frozen=True)
class Setting(FromFields):
    """What a run was asked to do. Rows are ranked against each other only inside one setting."""

    task: str
    epsilon: float
    digest: str = at(Fields.text, "cell.task.digest")
    split: str = at(Fields.text, "cell.task.evaluate", "test")
    delta: float | None = at(Fields.number, "cell.privacy.delta")
    relation: str = at(Fields.text, "cell.privacy.relation")
    unit: str = at(Fields.text, "cell.privacy.unit")


@dataclass(frozen=True)
class LogPoint:
    """A log point of a run: what the trace says after `step` steps. `clipped` is of private data."""

    step: int
    epsilon: float | None
    seconds: float | None
    accuracy: float | None
    clipped: float | None


@dataclass(frozen=True)
class StageFacts(FromFields):
    """One stage of `harness.records.stages.stage_facts`, read as a `Run` is.

    `epsilon` is what had been spent on the private data when the stage ended, `rdp` the same by RDP.
    """

    epsilon: float | None
    rdp: float | None
    method: str = at(Fields.text, "method", "(unnamed)")
    parameters: str = at(lambda f: ", ".join(f"{k} = {v}" for k, v in f.pairs("parameters")))
    parts: str = at(lambda f: ", ".join(f"{k} {v}" for k, v in f.parts("parts")))
    trains: str = at(Fields.text, "trains")
    data: str = at(Fields.text, "data")
    public: bool = at(Fields.true, "public")
    batch: int | None = at(Fields.whole, "batch")
    steps: int | None = at(Fields.whole, "steps")
    epochs: float | None = at(Fields.number, "epochs")
    sampling: str = at(Fields.text, "sampling")
    relation: str = at(Fields.text, "relation")
    sensitivity: Mapping[str, float] = at(Fields.epsilons, "sensitivity")
    note: str = at(Fields.text, "sensitivity_note")
    rate: float | None = at(Fields.number, "examples_per_second.median")
    seconds: float | None = at(Fields.number, "train_seconds")
    engine: str = at(Fields.text, "engine")


def _stage(f: Fields) -> StageFacts:
    spent = f.epsilons("spent")
    epsilon, rdp = spent.get(f.text("accountant"), f.number("epsilon")), spent.get("rdp")
    if rdp == math.inf and epsilon is not None and math.isfinite(epsilon):
        rdp = None
    return StageFacts.of(f, epsilon=epsilon, rdp=rdp)


def _sampling(stages: tuple[StageFacts, ...], of_run: str) -> str:
    """How batches of private data are sampled: in all stages, or of each where they differ or are not all known."""
    names = [one.sampling or "not recorded" for one in stages if not one.public]
    if len(set(names)) < 2:
        return names[0] if stages and names[0] == stages[0].sampling else of_run
    return "; ".join(f"{name} (stage {number})" for number, name in enumerate(names, 1))


def _claim(value: Any) -> tuple[float | None, str]:
    """The epsilon claimed under assumptions, None if one of them failed; and what is open and what failed, as text."""
    if not isinstance(value, dict):
        return number(value), ""
    epsilon, assumptions = number(value.get("epsilon")), value.get("assumptions")
    if not isinstance(assumptions, list):
        return epsilon, "; ".join(
            f"{k}: {v}" for k, v in fields.pairs({k: v for k, v in value.items() if k != "epsilon"})
        )
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
    words = [f"{name}: {'; '.join(map(fields.scalar, texts))}" for name, texts in parts.items() if any(texts)]
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


def _tuned(f: Fields) -> float | None:
    """Epsilon with the search for hyper-parameters: a number, or an object that holds one."""
    value = f.any("privacy.epsilon_with_tuning")
    return number(value.get("epsilon") if isinstance(value, dict) else value)


def _files(f: Fields) -> tuple[str, ...]:
    return tuple(sorted(visible(str(one)) for one in f.mapping("code.files") if "/" not in str(one)))


def _trace(f: Fields) -> tuple[LogPoint, ...]:
    """The log points in order; null epsilon is infinite, an absent one is unknown."""
    points, read = f.any("trace"), []
    for one in points if isinstance(points, list) else ():
        step = number(one.get("step")) if isinstance(one, dict) else None
        if step is None:
            continue
        epsilon = math.inf if "epsilon" in one and one["epsilon"] is None else number(one.get("epsilon"))
        values = (number(one.get(key)) for key in ("seconds", "accuracy", "clipped_fraction"))
        read.append(LogPoint(int(step), epsilon, *values))
    return tuple(sorted(read, key=lambda p: p.step))


@dataclass(frozen=True)
class Run(FromFields):
    """One record, read. Accuracies are fractions, times seconds, memory MiB; None is unknown.

    Of a run of two `stages` batch, steps, parts, rate and engine are the first one's; the accuracy is the last one's.

    `changes` are the parts that the suite gave the method in place of its own, slot and spec. `spent` and `planned` are
    epsilons by accountant; those that do not apply are in `refused`, each with its reason. `cores` are those that the
    run and the ones beside it could keep busy, `load` the load average after it. `files` are files of code outside the
    packages. `attempt` is whose random numbers were drawn; `origin` says of a run that was merged from where, and what
    of it is its sender's word; `believed` says that its privacy is, too.
    """

    # What several fields of a record decide together, or where another one stands in for a missing one.
    group: str
    status: str
    setting: Setting
    device: Machine
    method: str
    label: str
    stages: tuple[StageFacts, ...]
    spent: Mapping[str, float]
    planned: Mapping[str, float]
    refused: Mapping[str, str]
    epsilon: float | None
    claimed: float | None
    claim: str
    sampling: str
    rate: float | None
    engine: str
    order: str

    id: str = at(Fields.text, "id", "(no id)")
    seed: int | None = at(Fields.whole, "cell.seed")
    reason: str = at(Fields.text, "reason")
    dataset: str = at(Fields.text, "cell.task.dataset")
    model: str = at(Fields.text, "cell.task.model")
    family: str = at(Fields.text, "card.family")
    paper: str = at(Fields.text, "card.paper")
    summary: str = at(Fields.text, "card.summary")
    parameters: tuple[tuple[str, str], ...] = at(Fields.pairs, "cell.method.parameters")
    parts: tuple[tuple[str, str], ...] = at(Fields.parts, "cell.method.parts")
    changes: tuple[tuple[str, str], ...] = at(Fields.pairs, "cell.method.with")
    batch: int | None = at(Fields.whole, "cell.schedule.batch")
    steps: int | None = at(Fields.whole, "cell.schedule.steps")
    dtype: str = at(lambda f: f.text("cell.numerics.dtype") + " tf32" * f.true("cell.numerics.tf32"))
    metrics: Mapping[str, float] = at(Fields.numbers, "metrics")
    calibrated: str = at(Fields.text, "cell.privacy.accountant")
    tuned: float | None = at(_tuned)
    sigma: float | None = at(Fields.number, "privacy.noise_multiplier")
    public_data: str = at(Fields.text, "privacy.public_data")
    peak_memory: float | None = at(Fields.number, "diagnostics.peak_memory_mib")
    train_seconds: float | None = at(Fields.number, "diagnostics.train_seconds")
    jobs: int | None = at(Fields.whole, "measured.jobs")
    load: float | None = at(Fields.number, "diagnostics.load_average")
    cores: int | None = at(_cores)
    stale: bool = at(Fields.true, "stale")
    believed: bool = at(lambda f: bool((f.any("origin") or {}).get("unknown")))
    origin: str = at(lambda f: "; ".join(map(visible, origin.words(f.any("origin")))))
    path: str = at(lambda f: fields.record_path(f.any("path")))
    started: str = at(Fields.text, "started")
    finished: str = at(Fields.text, "finished")
    commit: str = at(Fields.text, "code.commit")
    dirty: bool = at(Fields.true, "code.dirty")
    files: tuple[str, ...] = at(_files)
    attempt: int = at(lambda f: f.whole("randomness.attempt") or 1)
    torch: str = at(Fields.text, "environment.torch")
    environment: tuple[tuple[str, str], ...] = at(Fields.pairs, "environment")
    trace: tuple[LogPoint, ...] = at(_trace)

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
        fields.natural(s.task), s.digest, s.split, s.epsilon, fields.natural(run.label), run.group,
        run.device.fingerprint, -1 if run.seed is None else run.seed, run.id, run.order,
    )  # fmt: skip


def _run(record: RecordLike) -> Run:
    f = Fields({**record, "diagnostics": public.diagnostics(record)})
    stages = tuple(_stage(Fields(one)) for one in stage_facts(record))
    status, method = f.text("status", "crashed"), f.text("cell.method.name", "(unnamed)")
    target = f.number("cell.privacy.epsilon")
    task = "/".join(filter(None, (f.text("cell.task.dataset"), f.text("cell.task.model")))) or "(unnamed task)"
    claimed, claim = _claim(f.any("privacy.claimed"))
    spent, planned, refused = _bounds(f)
    reached = spent.get(f.text("privacy.accountant", "pld"), f.number("privacy.epsilon"))
    if reached is None and status == "ok":  # null is infinite, once something has been spent
        reached = math.inf
    return Run.of(
        f,
        group=f.text("group", f.text("id", "(no group)")),
        status=status,
        setting=Setting.of(f, task=f.text("cell.task.name", task), epsilon=math.inf if target is None else target),
        device=Machine.of(f),
        method=method,
        label=f.text("cell.method.label", method),
        stages=stages,
        spent=spent,
        planned=planned,
        refused=refused,
        epsilon=reached,
        claimed=claimed,
        claim=claim,
        sampling=_sampling(stages, f.text("privacy.sampling")),
        rate=stages[0].rate if stages else f.number("diagnostics.examples_per_second.median"),
        engine=stages[0].engine if stages else f.text("measured.engine"),
        order=fields.canonical(record),
    )
