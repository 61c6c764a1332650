"""What is known of a cell before it is trained: its methods, its noise, what that costs, and its code."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import registry
from harness.dp import cache
from harness.dp.account import Ledger, epsilons, ranking
from harness.dp.calibrate import calibrate_stages
from harness.dp.engines import per_example
from harness.dp.method import Method, Stage, parts, plan
from harness.provenance import code as codehash
from harness.records.cell import Cell
from harness.registry.parts import combine, modules


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


def methods_of(cell: Cell) -> list[Method]:
    """The method of each stage, with the parts that the suite gives it and the engine and microbatch of the device."""
    for file in cell.method_files:
        registry.add_file(Path(file))
    named = [(cell.method, cell.parameters, cell.changes)]
    if cell.then:
        named.append((cell.then["name"], cell.then["parameters"], {}))
    return [
        _on_device(combine(registry.load(registry.resolve("method", name))(**given), changes), cell)
        for name, given, changes in named
    ]


def _on_device(method: Method, cell: Cell) -> Method:
    """Only the default engine gives way to another: an engine that a method names is part of what it is."""
    engine, microbatch = cell.device.get("engine"), cell.device.get("microbatch")
    chosen: Any = per_example(engine) if engine and method.engine == Method().engine else method.engine
    if microbatch and any(field.name == "microbatch" for field in dataclasses.fields(chosen)):
        chosen = dataclasses.replace(chosen, microbatch=microbatch)
    return dataclasses.replace(method, engine=chosen)


def code_of(cell: Cell) -> dict[str, Any]:
    """{"hash", "files"} of the source that decides the cell's numbers, as it is today."""
    every = [part for method in methods_of(cell) for part in parts(method).values()]
    named = {("method", cell.method), ("model", registry.parse_spec(cell.task["model"])[0])}
    rooms = {module for part in every for module in modules(part)} | {"harness.running.train", "harness.running.seeds"}
    if cell.then:
        named.add(("method", cell.then["name"]))
        rooms.add("harness.models.layers")
    starts = sorted(rooms) + sorted({Path(registry.resolve(kind, name).file) for kind, name in named})
    # Neither a clock nor the registry nor how a file is written decides a number.
    files = codehash.closure(starts, skip={"harness.provenance.measure", "harness.registry", "harness.records.files"})
    return {"hash": codehash.code_hash(files), "files": codehash.hashes(files)}


def stages_of(cell: Cell) -> list[Stage]:
    """The stages that touch the private data: all but one on public data."""
    schedules = [cell.schedule, *([cell.then["schedule"]] if cell.then else [])]
    stages = [Stage(m, s["batch"], s["steps"]) for m, s in zip(methods_of(cell), schedules, strict=True)]
    return stages[:1] if "task" in cell.then else stages


def noise_multiplier(stages: Sequence[Stage], target: Target, n: int) -> float:
    """The calibrated noise multiplier of all stages; 0 where there is no noise."""
    if target.epsilon is None or target.delta is None:
        return 0.0
    folder = cache.root() / "calibration"
    return calibrate_stages(stages, n, target.epsilon, target.delta, target.accountant, folder)


def prepare(cell: Cell) -> dict[str, Any]:
    """What can be known before training: {"noise_multiplier", "planned" by accountant, "accountant"}."""
    stages, target, n = stages_of(cell), Target.of(cell), cell.task["n_train"]
    sigma = noise_multiplier(stages, target, n)
    ledger = plan(stages, sigma, n)
    return {"noise_multiplier": sigma or None} | bounds("planned", ledger, target, stages[0].method)


def bounds(name: str, ledger: Ledger, target: Target, method: Method) -> dict[str, Any]:
    """Epsilon of a ledger by every accountant, under `name`; and which accountant ranks, with what it says."""
    if target.delta is None:
        return {name: {}, "accountant": None, "epsilon": None}
    bounds = epsilons(ledger, target.delta, method.sampler.relation)
    first = ranking(bounds)
    finite = {key: value if math.isfinite(value) else None for key, value in bounds.items()}
    return {name: finite, "accountant": first, "epsilon": finite[first]}
