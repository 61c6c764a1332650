"""One cell in this process: build it, train it, and say everything about it in a record."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness import codehash, data, measure, models, registry
from harness.dp.account import Ledger, epsilon, epsilons, ranking
from harness.dp.calibrate import calibrate
from harness.dp.method import Method, parts
from harness.dp.release import Relation
from harness.dp.tree import Tree
from harness.seeds import Seeds
from harness.train import (
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

if TYPE_CHECKING:
    from harness.suite import Cell

DTYPES = {"float32": torch.float32, "float64": torch.float64}
SLACK = 1e-6  # by how much an accountant's answer for the ledger may exceed the target it was calibrated for


def cache_folder() -> Path:
    """Where results of calibration are kept between runs: $EPSBENCH_CACHE, else ~/.cache/epsbench."""
    return Path(os.environ.get("EPSBENCH_CACHE") or Path.home() / ".cache" / "epsbench")


@dataclass(frozen=True)
class Target:
    """The privacy a cell asks for; epsilon None is training without privacy."""

    epsilon: float | None
    delta: float | None
    accountant: str

    @classmethod
    def of(cls, cell: Cell) -> Target:
        """The target in the cell's identity."""
        privacy = cell.canonical()["privacy"]
        return cls(privacy["epsilon"], privacy["delta"], privacy.get("accountant") or "pld")


def method_of(cell: Cell) -> Method:
    """The cell's method, with its engine set to the microbatch that the device asks for."""
    spec = cell.canonical()["method"]
    if cell.method_file:
        registry.add_file(Path(cell.method_file))
    method = registry.load(registry.resolve("method", spec["name"]))(**spec["parameters"])
    microbatch = cell.device.get("microbatch")
    if microbatch and any(f.name == "microbatch" for f in dataclasses.fields(method.engine)):
        method = dataclasses.replace(method, engine=dataclasses.replace(method.engine, microbatch=microbatch))
    return method


def code_of(cell: Cell) -> dict[str, Any]:
    """{"hash", "files"} of the source that decides the cell's numbers, as it is today."""
    method = method_of(cell)
    named = {"method": cell.method, "model": registry.parse_spec(cell.task["model"])[0]}
    modules = {type(part).__module__ for part in parts(method).values()} | {"harness.train"}
    starts = sorted(modules) + sorted(Path(registry.resolve(kind, name).file) for kind, name in named.items())
    # Neither a clock nor the registry decides a number.
    files = codehash.closure(starts, skip={"harness.measure", "harness.registry"})
    return {"hash": codehash.code_hash(files), "files": codehash.hashes(files)}


def noise_multiplier(method: Method, target: Target, n: int, batch: int, steps: int) -> float:
    """The calibrated noise multiplier; 0 where there is no noise."""
    if target.epsilon is None or target.delta is None:
        return 0.0
    folder = cache_folder() / "calibration"
    return calibrate(method, n, batch, steps, target.epsilon, target.delta, target.accountant, folder)


def prepare(cell: Cell) -> dict[str, Any]:
    """What can be known before training: {"noise_multiplier", "planned" by accountant, "accountant"}."""
    method, target = method_of(cell), Target.of(cell)
    facts = cell.canonical()
    n, batch, steps = facts["task"]["n_train"], facts["schedule"]["batch"], facts["schedule"]["steps"]
    sigma = noise_multiplier(method, target, n, batch, steps)
    return {"noise_multiplier": sigma or None} | _bounds(
        "planned", method.plan(sigma, n, batch, steps), target, method
    )


def _bounds(name: str, ledger: Ledger, target: Target, method: Method) -> dict[str, Any]:
    if target.delta is None:
        return {name: {}, "accountant": None, "epsilon": None}
    bounds = epsilons(ledger, target.delta, method.sampler.relation)
    first = ranking(bounds)
    finite = {key: value if math.isfinite(value) else None for key, value in bounds.items()}
    return {name: finite, "accountant": first, "epsilon": finite[first]}


def execute(cell: Cell, out: Path, suite: str, jobs: int = 1, save_seconds: float = 20.0) -> dict[str, Any]:
    """Train `cell`, continuing from `out`/checkpoint if there is one, and return its record (docs/record-schema.md).

    Appends to `out`/trace.jsonl, and saves a checkpoint at the first log point `save_seconds` after the last one.
    Whatever is wrong with the cell itself ends in a status (diverged, over_budget, skipped); all else raises.
    """
    out.mkdir(parents=True, exist_ok=True)
    started = datetime.now(UTC)
    begun = measure.Clock().now()
    facts = cell.canonical()
    task, schedule, numerics = facts["task"], facts["schedule"], facts["numerics"]
    threads = int(cell.device.get("threads") or 1)
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = bool(numerics["tf32"])
    device = torch.device(cell.device.get("device") or "cpu")
    method, target = method_of(cell), Target.of(cell)
    dataset = data.load(task["dataset"])
    if task["evaluate"] == "validation":
        dataset = dataset.validation_split()
    dataset = dataset.to(device, DTYPES[numerics["dtype"]])
    n = dataset.n_train
    seeds = Seeds(cell)
    model = models.build(task["model"], dataset.input_shape, dataset.classes, seeds.init)
    model = model.to(device, DTYPES[numerics["dtype"]])

    record: dict[str, Any] = {
        "schema": 1, "id": cell.id, "group": cell.group, "suite": suite, "status": "ok", "reason": None,
        "cell": facts, "card": card(facts["method"]["name"]),
        "privacy": {
            "relation": method.sampler.relation.value, "unit": "example",
            "sampling": method.sampler.law(n, schedule["batch"]), "delta": target.delta, "claimed": None,
            "public_data": public_data(dataset.public_data, task), "sensitivity": None, "noise_multiplier": None,
            "planned": {}, "spent": {}, "accountant": None, "epsilon": None, "ledger": [],
        },
        "metrics": {}, "measured": {"jobs": jobs}, "diagnostics": {}, "weights_sha256": None, "code": code_of(cell),
        "device": measure.device_info(str(device), threads), "environment": measure.environment(),
        "started": started.isoformat(timespec="seconds"),
    }  # fmt: skip
    record["code"] |= {key: record["environment"].pop(key) for key in ("commit", "dirty")}

    reason = unfit(method, model, target, facts["privacy"]["relation"])
    if reason:
        return _finish(record, "skipped", reason)
    try:
        sigma = noise_multiplier(method, target, n, schedule["batch"], schedule["steps"])
    except ValueError as error:
        return _finish(record, "skipped", str(error))
    plan = method.plan(sigma, n, schedule["batch"], schedule["steps"])
    planned = _bounds("planned", plan, target, method)
    record["privacy"] |= {"noise_multiplier": sigma or None, "planned": planned["planned"]}

    checkpoint = out / "checkpoint" / "checkpoint.safetensors"
    trace = out / "trace.jsonl"
    progress = read_checkpoint(checkpoint, device) if checkpoint.exists() else start(method, model)
    _truncate(trace, progress.trace)
    measure.reset_peak_memory(device)
    peak = 0.0

    def log(point: LogPoint) -> None:
        nonlocal peak
        peak = max(peak, measure.peak_memory_mib(device))
        weights = method.path.kept(point.progress.w, point.progress.parts.path)
        line: dict[str, Any] = {
            "step": point.step,
            "seconds": round(sum(point.progress.seconds), 3),
            "loss": point.loss,
        }
        line |= {"accuracy": evaluate(model, weights, method.loss, dataset)["accuracy"]}
        if target.delta is not None:
            line["epsilon"] = _finite(
                epsilon(point.progress.ledger, target.delta, method.sampler.relation, "rdp")
            )
        clipped = point.clipped if method.clip.needs_norms else None
        line |= {"examples_per_second": _finite(point.rate), "clipped_fraction": clipped}
        with open(trace, "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            point.progress.trace = file.tell()

    def save(p: Progress) -> None:
        write_checkpoint(checkpoint, p)

    plan_of_steps = Schedule(schedule["steps"], schedule["batch"], max(1, schedule["steps"] // 20), save_seconds)
    status, why = "ok", None
    try:
        progress = train(method, model, dataset, sigma, plan_of_steps, seeds, progress, log, save)
        if progress.ledger != plan:
            raise RuntimeError(f"the ledger differs from the plan: {progress.ledger} is not {plan}")
        weights = method.path.kept(progress.w, progress.parts.path)
        record["metrics"] = evaluate(model, weights, method.loss, dataset)
        record["weights_sha256"] = digest(weights)
    except Diverged as error:
        status, why = "diverged", str(error)
    spent = _bounds("spent", progress.ledger, target, method)
    record["privacy"] |= spent | {
        "ledger": progress.ledger.to_json(),
        "sensitivity": _finite_all(progress.sensitivity),
    }
    used = spent["spent"].get(target.accountant) or spent["epsilon"]
    if target.epsilon is not None and (used is None or used > target.epsilon * (1 + SLACK)):
        status, why = (
            "over_budget",
            f"spent epsilon {used} by {target.accountant}, the target is {target.epsilon}",
        )
    rates = [
        size / seconds for size, seconds in zip(progress.sizes, progress.seconds, strict=True) if seconds > 0
    ]
    record["measured"] |= {
        "examples_per_second": measure.quartiles(rates), "train_seconds": sum(progress.seconds),
        "wall_seconds": measure.Clock(device).since(begun), "peak_memory_mib": peak or None,
        "warmup_steps": plan_of_steps.warmup, "sessions": progress.sessions,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }  # fmt: skip
    clipped = progress.clipped / progress.seen if progress.seen and method.clip.needs_norms else None
    record["diagnostics"] = {
        "train_loss": progress.loss, "clipped_fraction": clipped, "non_finite": progress.non_finite,
    }  # fmt: skip
    return _finish(record, status, why)


def unfit(method: Method, model: torch.nn.Module, target: Target, relation: str) -> str | None:
    """Why this method cannot run here, or None."""
    if target.epsilon is not None and method.sampler.relation is not Relation(relation):
        return (
            f"{type(method.sampler).__name__} sampling is analysed for {method.sampler.relation.value} neighbours, and"
            f" the suite asks for {relation}: set [privacy] relation, or take another sampler"
        )
    return method.engine.accepts(method.loss, method.clip, model)


def public_data(of_dataset: str, task: dict[str, Any]) -> str:
    """The public data that a result stands on: the data set's own, and what a pretrained model was trained on."""
    pretrained = (
        [f"pretraining of {task['model']}"] if task["architecture"]["options"].get("pretrained") else []
    )
    return "; ".join([of_dataset, *pretrained] if of_dataset != "none" else pretrained) or "none"


def card(name: str) -> dict[str, Any]:
    """What the registry says about a method: paper, family, one line."""
    entry = registry.resolve("method", name)
    return {"paper": entry.meta.get("paper"), "family": entry.meta.get("family"), "summary": entry.summary}


def digest(w: Tree) -> str:
    """sha256 of the weights, bit for bit."""
    return hashlib.sha256(w.flat.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _finish(record: dict[str, Any], status: str, reason: str | None) -> dict[str, Any]:
    return record | {
        "status": status, "reason": reason, "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _finite_all(values: dict[str, float]) -> dict[str, float | None]:
    return {key: _finite(value) for key, value in values.items()}


def _truncate(trace: Path, size: int) -> None:
    """Forget log points that a killed session wrote after its last checkpoint: they will be written again."""
    if trace.exists() and trace.stat().st_size != size:
        os.truncate(trace, size)
