"""One cell in this process: build it, train it, and say everything about it in a record."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch

from harness import data, models, registry
from harness.dp.account import Ledger, epsilon, explain
from harness.dp.account.tuning import Tuning, charge
from harness.dp.claim import Run
from harness.dp.engines.draws import secrecy
from harness.dp.engines.engine import Unserved, trainable
from harness.dp.method import Method, plan
from harness.dp.native import describe as kernels
from harness.dp.release import Relation
from harness.dp.tree import Layout, Tree
from harness.provenance import measure
from harness.records.cell import Cell
from harness.records.draw import begin
from harness.records.files import opened
from harness.records.schema import blank
from harness.running.plan import Target, bounds, code_of, methods_of, noise_multiplier, stages_of
from harness.running.seeds import Seeds
from harness.running.train import (
    Diverged,
    LogPoint,
    Progress,
    Schedule,
    evaluate,
    read_checkpoint,
    start,
    train,
    write_checkpoint,
)

DTYPES = {"float32": torch.float32, "float64": torch.float64}
LOG_POINTS = 20  # about how many lines a trace has
SLACK = 1e-6  # by how much an accountant's answer for the ledger may exceed the target it was calibrated for


def setting(cell: Cell, device: str, threads: int) -> str:
    """12 hex digits over what decides a run's sums to the bit besides cell, code and noise multiplier."""
    facts = {
        "device": measure.device_info(device, threads), "engine": cell.device.get("engine"),
        "microbatch": cell.device.get("microbatch"), "libraries": [torch.__version__, numpy.__version__],
        "kernels": kernels(),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def execute(cell: Cell, out: Path, suite: str, jobs: int = 1, save_seconds: float = 20.0) -> dict[str, Any]:
    """Train `cell`, continuing from `out`/checkpoint if there is one, and return its record (docs/record-schema.md).

    Appends to `out`/trace.jsonl, and saves a checkpoint at the first log point `save_seconds` after the last one.
    Noise, batches and path are those of the attempt that `out` is (``<id>.2`` is the second, any other name the first)
    by today's code; a checkpoint of other code is not continued. Raises `harness.records.draw.OtherCell` where `out`
    holds the checkpoint of another cell. Whatever is wrong with the cell itself ends in a status (diverged,
    over_budget, skipped); all else raises.
    """
    started, begun = datetime.now(UTC), measure.Clock().now()
    out.mkdir(parents=True, exist_ok=True)
    session = _Session(cell, out, save_seconds)
    record = session.blank(suite, started)
    status, reason = session.fill(record)
    record["measured"] |= {"jobs": jobs}
    record["diagnostics"] |= {
        "wall_seconds": measure.Clock(session.device).since(begun),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    return record | {"status": status, "reason": reason, "finished": finished}


@dataclass(frozen=True)
class _Leg:
    """One stage as it is trained. What a stage on public data releases costs the private data nothing."""

    name: str
    method: Method
    data: data.Dataset
    schedule: Schedule
    seeds: Seeds
    public: bool = False
    trains: str = "all"

    @property
    def sampling(self) -> str:
        """The distribution of its batches in words."""
        return self.method.sampler.distribution(self.data.n_train, self.schedule.batch)

    def facts(self) -> dict[str, Any]:
        """What is known of it before training. Nothing is protected where the data are public."""
        batch, steps = self.schedule.batch, self.schedule.steps
        return {
            "method": self.name, "data": self.data.name, "public": self.public, "trains": self.trains,
            "batch": batch, "steps": steps, "epochs": batch * steps / self.data.n_train, "sampling": self.sampling,
            "relation": None if self.public else self.method.sampler.relation.value,
        }  # fmt: skip


def _load(task: dict[str, Any], device: torch.device, dtype: torch.dtype) -> data.Dataset:
    loaded = data.load(task["dataset"])
    if loaded.digest != task["digest"]:
        raise data.DatasetMismatch(
            f"data set {loaded.name} (from {loaded.source}) is not the one that this run was planned on: its digest is"
            f" {loaded.digest}, not {task['digest']}. Give the command again: it plans the suite anew, and runs on"
            " other data are other runs."
        )
    return (loaded.validation_split() if task["evaluate"] == "validation" else loaded).to(device, dtype)


def kept(leg: _Leg, progress: Progress) -> Tree:
    """The weights that a stage is judged by."""
    return leg.method.path.kept(progress.w, progress.parts.path)


def alone(progress: Progress, before: Progress) -> Progress:
    """`progress` without what the stage before had measured when it ended: times and counts run on over stages."""
    blocks = len(before.seconds)
    return dataclasses.replace(
        progress, seconds=progress.seconds[blocks:], sizes=progress.sizes[blocks:], seen=progress.seen - before.seen,
        clipped=progress.clipped - before.clipped, non_finite=progress.non_finite - before.non_finite,
    )  # fmt: skip


class _Session:
    """A cell set up in this process: its parts, its data and model on the device, its files."""

    def __init__(self, cell: Cell, out: Path, save_seconds: float) -> None:
        facts = cell.canonical()
        numerics = facts["numerics"]
        self.cell, self.task = cell, facts["task"]
        self.threads = int(cell.device.get("threads") or 1)
        torch.set_num_threads(self.threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = bool(numerics["tf32"])
        self.device, dtype = torch.device(cell.device.get("device") or "cpu"), DTYPES[numerics["dtype"]]
        self.target, self.stages = Target.of(cell), stages_of(cell)
        self.data = _load(self.task, self.device, dtype)
        self.code = code_of(cell)
        self.draw, self.sessions = begin(out, cell, self.code["hash"], setting(cell, str(self.device), self.threads))
        drawn = self.draw.to_json()
        seeds = Seeds(cell, **drawn)
        data = self.data
        model = models.build(self.task["model"], data.input_shape, data.classes, seeds.init, data.tokens)
        self.model = model.to(self.device, dtype)
        methods, then = methods_of(cell), cell.then
        schedules = [
            Schedule(one["steps"], one["batch"], max(1, one["steps"] // LOG_POINTS), save_seconds)
            for one in (cell.schedule, then.get("schedule"))
            if one
        ]
        self.legs = [_Leg(cell.method, methods[0], self.data, schedules[0], seeds)]
        if then:
            public = _load(then["task"], self.device, dtype) if "task" in then else None
            self.legs.append(
                _Leg(
                    then["name"], methods[1], public or self.data, schedules[1], Seeds(cell, 1, **drawn),
                    public is not None, then["trains"],
                )
            )  # fmt: skip
        self.method = methods[0]
        self.checkpoint = out / "checkpoint" / "checkpoint.safetensors"
        self.trace = out / "trace.jsonl"
        self.peak = 0.0
        self.progress: Progress
        self.timed = 0  # blocks that were timed before the stage at hand

    def blank(self, suite: str, started: datetime) -> dict[str, Any]:
        """The record before anything has happened."""
        facts, sampler = self.cell.canonical(), self.method.sampler
        environment = measure.environment()
        return blank(
            id=self.cell.id, group=self.cell.group, suite=suite, cell=facts,
            card=registry.resolve("method", self.cell.method).card,
            privacy={
                "relation": sampler.relation.value, "unit": "example",
                "sampling": joined([leg.sampling for leg in self.legs if not leg.public]), "delta": self.target.delta,
                "public_data": public_data(self.data.public_data, self.cell),
                "privately_judged": [
                    number for number, leg in enumerate(self.legs, 1) if self.privately_judged(leg)
                ],
            },
            **self.staged(),
            randomness=self.draw.to_json() | {"dropout_bits": secrecy(self.device)},
            code=self.code | {key: environment.pop(key) for key in ("commit", "dirty")},
            device=measure.device_info(str(self.device), self.threads)
            | {"microbatch": self.cell.device.get("microbatch")},
            environment=environment,
            started=started.isoformat(timespec="seconds"),
        )  # fmt: skip

    def fill(self, record: dict[str, Any]) -> tuple[str, str | None]:
        """Train, and enter what came of it; returns the status and the reason."""
        m = self.method
        reason = self.unfit(self.legs[0])
        if reason:
            return "skipped", reason
        try:
            sigma = noise_multiplier(self.stages, self.target, self.data.n_train)
        except ValueError as error:
            return "skipped", str(error)
        planned = plan(self.stages, sigma, self.data.n_train)
        record["privacy"] |= {
            "noise_multiplier": sigma or None,
            "planned": bounds("", planned, self.target, m)[""],
            **self.accounting(planned),
        }
        record["privacy"] |= {} if self.cell.then else noted(self.legs[0])
        self.progress = (
            read_checkpoint(self.checkpoint, self.device)
            if self.checkpoint.exists()
            else begun(self.legs[0], self.model)
        )
        # What a killed session logged after its last checkpoint will be logged again.
        if self.trace.exists():
            os.truncate(self.trace, self.progress.trace)
        measure.reset_peak_memory(self.device)
        status, reason = "ok", None
        try:
            self.train_all(sigma)
            spent = self.private_ledger(self.progress)
            if spent != planned:
                raise RuntimeError(f"the ledger differs from the plan: {spent} is not {planned}")
            judged = self.legs[-1]
            weights = kept(judged, self.progress)
            record["metrics"] = self.scores(judged, weights) | {"examples": judged.data.n_test}
            record["weights_sha256"] = digest(weights)
        except Unserved as error:
            status, reason = "skipped", str(error)
            if not self.progress.stage + self.progress.step:  # nothing was released
                return status, reason
        except Diverged as error:
            status, reason = "diverged", str(error)
        ledger, done = self.private_ledger(self.progress), self.by_stage()
        record["privacy"] |= bounds("spent", ledger, self.target, m)
        record["privacy"]["claimed"] = self.claim(sigma, self.progress)
        record["privacy"]["ledger"] = ledger.to_json()
        # Engine and speed are the first stage's, which the cell's method trains; the rest is of the whole run.
        record["measured"] |= {
            "engine": done[0].engine or None, "kernels": kernels(),
            "warmup_steps": max(leg.schedule.untimed for leg in self.legs), "sessions": self.sessions,
        }  # fmt: skip
        record["diagnostics"] |= speed(done[0]) | {
            "train_seconds": sum(self.progress.seconds), "peak_memory_mib": self.peak or None,
        }  # fmt: skip
        if self.cell.then:
            record |= self.staged(done)
        else:
            record["privacy"]["sensitivity"] = self.progress.sensitivity
            record["diagnostics"] |= diagnostics(m, self.progress)
        over = excess(self.target, record["privacy"])
        return ("over_budget", over) if over else (status, reason)

    def unfit(self, leg: _Leg) -> str | None:
        """Why a stage's method cannot run here, or None."""
        m, asked = leg.method, self.cell.privacy["relation"]
        if self.target.epsilon is not None and m.sampler.relation is not Relation(asked):
            return (
                f"{type(m.sampler).__name__} sampling is analysed for {m.sampler.relation.value} neighbours, and the"
                f" suite asks for {asked}: set [privacy] relation, or take another sampler"
            )
        try:
            m.clip.init(Layout.of(trainable(self.model)))
        except ValueError as error:
            # Groups that leave a parameter out, thresholds that are not one for each group.
            return str(error)
        reason = m.unfit(leg.data.n_train, leg.schedule.batch, leg.schedule.steps)
        return reason or m.engine.accepts(m.loss, m.clip, self.model)

    def accounting(self, ledger: Ledger) -> dict[str, Any]:
        """What accountants have to say of a ledger, and what it costs with a search on private data."""
        if self.target.delta is None:
            return {}
        terms, tuning = (self.target.delta, self.method.sampler.relation), self.cell.privacy.get("tuning")
        found: dict[str, Any] = {"accounting": explain(ledger, *terms)}
        if tuning:
            found["epsilon_with_tuning"] = tuning | charge(ledger, Tuning(**tuning), *terms)
        return found

    def train_all(self, sigma: float) -> None:
        """Train every stage that is not finished. A finished one leaves its last checkpoint to the next."""
        for number, leg in enumerate(self.legs):
            if number < self.progress.stage:
                continue
            if number:
                self.model = self.headed(number)
                self.timed = len(self.ended(number - 1).seconds)
            if number > self.progress.stage:
                reason = self.unfit(leg)
                if reason and not leg.public:
                    raise Unserved(reason)
                fresh = begun(leg, self.model)
                self.progress = dataclasses.replace(
                    self.progress, step=0, w=fresh.w, parts=fresh.parts, stage=number,
                    ledger=Ledger() if leg.public else self.progress.ledger, sensitivity={}, loss=None, engine="",
                    microbatch=0,
                )  # fmt: skip
            save = partial(write_checkpoint, self.checkpoint)
            train(leg.method, self.model, leg.data, sigma, leg.schedule, leg.seeds, self.progress, self.log, save)
            if number + 1 < len(self.legs):
                write_checkpoint(self.finished(number), self.progress)

    def ended(self, number: int) -> Progress:
        """Where a finished stage ended."""
        return read_checkpoint(self.finished(number), self.device)

    def finished(self, number: int) -> Path:
        """The file of a finished stage's last checkpoint."""
        return self.checkpoint.with_stem(f"stage-{number}")

    def headed(self, number: int) -> torch.nn.Module:
        """The network of the stage before, as that stage left it, under a new head."""
        for name, t in kept(self.legs[number - 1], self.ended(number - 1)).items():
            self.model.get_parameter(name).data.copy_(t)
        leg, frozen = self.legs[number], self.cell.then["trains"] == "head"
        return models.Headed(self.model, leg.data.input_shape, leg.data.classes, frozen)

    def private_ledger(self, progress: Progress) -> Ledger:
        """What was released of the private data; a stage on public data adds nothing."""
        if progress.stage and self.legs[progress.stage].public:
            return self.ended(progress.stage - 1).ledger
        return progress.ledger

    def by_stage(self) -> list[Progress]:
        """What each stage that was begun has done alone."""
        p = self.progress
        if not p.stage:
            return [p]
        first = self.ended(0)
        return [first, alone(p, first)]

    def staged(self, done: Sequence[Progress] = ()) -> dict[str, Any]:
        """{"stages": what each one is, and what came of those that were begun}; {} for a run of one."""
        if not self.cell.then:
            return {}
        stages = [leg.facts() for leg in self.legs]
        for one, leg, p in zip(stages, self.legs, done, strict=False):
            one |= {
                "sensitivity": None if leg.public else p.sensitivity,
                **({} if leg.public else noted(leg)), "engine": p.engine or None,
                "diagnostics": speed(p) | {"train_seconds": sum(p.seconds)} | diagnostics(leg.method, p),
                **bounds("spent", self.private_ledger(p), self.target, self.method),
            }  # fmt: skip
        return {"stages": stages}

    def log(self, point: LogPoint) -> None:
        """Append a line to the trace. What it tells of private data is for diagnosis."""
        p, leg = point.progress, self.legs[point.progress.stage]
        m = leg.method
        self.peak = max(self.peak, measure.peak_memory_mib(self.device))
        scores = self.scores(leg, kept(leg, p))
        before = sum(one.schedule.steps for one in self.legs[: p.stage])
        line: dict[str, Any] = {"stage": p.stage + 1} if self.cell.then else {}
        line |= {"step": before + point.step, "seconds": round(sum(p.seconds), 3), "loss": _finite(point.loss)}
        rate = point.rate if len(p.seconds) > self.timed else None  # not that of the stage before
        line |= {"accuracy": scores["accuracy"], "examples_per_second": _finite(rate)}
        line |= {"clipped_fraction": point.clipped if m.clip.needs_norms else None}
        if self.target.delta is not None:
            spent = self.private_ledger(p)
            line["epsilon"] = _finite(epsilon(spent, self.target.delta, self.method.sampler.relation, "rdp"))
        with opened(self.trace, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            p.trace = file.tell()

    def privately_judged(self, leg: _Leg) -> bool:
        """Whether a stage's scores count private examples or follow their labels."""
        return not leg.public and (leg.method.loss.probes or self.task["evaluate"] == "validation")

    def scores(self, leg: _Leg, weights: Tree) -> dict[str, float | None]:
        """How weights do on the data of a stage, null where a score is not finite.

        Raises Diverged where the loss is not, unless private examples judge: whether it is would tell of one of them.
        """
        found = evaluate(self.model, weights, leg.method.loss, leg.data)
        if not self.privately_judged(leg) and not math.isfinite(found["loss"]):
            raise Diverged("outputs are not finite")
        return {name: _finite(value) for name, value in found.items()}

    def claim(self, sigma: float, progress: Progress) -> dict[str, Any] | None:
        """What the path claims beyond the ledger, under assumptions; None if it claims nothing."""
        if self.target.delta is None or self.cell.then:  # claims are of one method's analysis
            return None
        n, batch, steps = self.data.n_train, self.cell.schedule["batch"], self.cell.schedule["steps"]
        claim = self.method.path.claim(Run(self.method, sigma, n, batch, steps, self.target.delta), progress.parts.path)
        return claim.to_json() if claim else None


def excess(target: Target, privacy: dict[str, Any]) -> str | None:
    """By how much a run overspent, by the accountant that it was calibrated with; None if it did not."""
    if target.epsilon is None:
        return None
    spent = privacy["spent"][target.accountant]
    used = privacy["epsilon"] if spent is None else spent
    if used is not None and used <= target.epsilon * (1 + SLACK):
        return None
    return f"spent epsilon {used} by {target.accountant}, the target is {target.epsilon}"


def joined(samplings: Sequence[str]) -> str:
    """How the batches of private data are distributed, in words: once, or for each stage."""
    if len(set(samplings)) == 1:
        return samplings[0]
    return "; ".join(f"{one} (stage {number})" for number, one in enumerate(samplings, 1))


def speed(progress: Progress) -> dict[str, Any]:
    """How fast, and on how many examples at once."""
    blocks = zip(progress.sizes, progress.seconds, strict=True)
    return {
        "examples_per_second": measure.quartiles([size / seconds for size, seconds in blocks if seconds > 0]),
        "microbatch": progress.microbatch or None,
    }  # fmt: skip


def diagnostics(method: Method, progress: Progress) -> dict[str, Any]:
    """Exact functions of private data."""
    clips = method.clip.needs_norms and progress.seen
    return {
        "train_loss": progress.loss, "non_finite": progress.non_finite,
        "clipped_fraction": progress.clipped / progress.seen if clips else None,
    }  # fmt: skip


def noted(leg: _Leg) -> dict[str, str]:
    """{"sensitivity_note": what the engine says of the sensitivity}; {} where it is the clipping rule's."""
    m = leg.method
    note = m.engine.note(m.loss, m.clip, leg.schedule.batch, m.sampler.relation)
    return {"sensitivity_note": note} if note else {}


def begun(leg: _Leg, model: torch.nn.Module) -> Progress:
    """The state before the first step of a stage."""
    n, schedule = leg.data.n_train, leg.schedule
    return start(leg.method, model, schedule.steps, leg.method.sampler.separation(n, schedule.batch))


def public_data(of_dataset: str, cell: Cell) -> str:
    """The public data that a result stands on: the data set's own, what a pretrained model was trained on, and that of
    a second stage."""
    found = [] if of_dataset == "none" else [of_dataset]
    if cell.task["architecture"]["options"].get("pretrained"):
        found.append(f"pretraining of {cell.task['model']}")
    if "task" in cell.then:
        found.append(f"images and labels of {cell.then['task']['dataset']}")
    return "; ".join(found) or "none"


def digest(w: Tree) -> str:
    """sha256 of the weights, bit for bit."""
    return hashlib.sha256(w.flat.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
