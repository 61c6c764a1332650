"""Tries one engine in a fresh process: whether it is right, its memory, and the cost of its first call."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import sys
from typing import Any

import torch

from harness.bench import engines, steps
from harness.bench.fresh import Answer
from harness.bench.plan import Workload
from harness.provenance import measure

LARGEST_ERROR = 1e-5  # relative, in float64: beyond it an engine is wrong, and gets no time
CALLS = 3  # at most, after the first


def trial(name: str, workload: Workload, batch: int, device: str, threads: int, seconds: float) -> Answer:
    """The status of an engine or baseline on a workload, and what was measured by the way.

    "ok", "wrong" (its clipped sum is not the loop's), "refused" (with its reason), "failed" (with the error's first
    line) or "absent". `seconds` bounds the calls after the first.
    """
    torch.set_num_threads(threads)
    limit_memory(device)
    try:
        engine = None if name in steps.BASELINES else engines.make(name)
        return _tried(name, engine, workload, batch, device, seconds)
    except engines.Absent as why:
        return {"status": "absent", "reason": first_line(why)}
    except Exception as why:  # whatever a peer raises is its result
        return {"status": "failed", "reason": first_line(why)}


def _tried(name: str, engine: Any, workload: Workload, size: int, device: str, seconds: float) -> Answer:
    model, batch = steps.build(workload, size, torch.float32, device)
    if engine is not None and (reason := engine.accepts(steps.LOSS, steps.CLIP, model)):
        return {"status": "refused", "reason": reason}
    one = steps.stepper(name, engine, model, batch)
    clock = measure.Clock(device)
    first: list[float] = []
    later: list[float] = []
    before = held_mib(device)
    with clock.timed(first):
        one()
    held_mib(device)  # gives back to the system what planning and compiling needed
    measure.reset_peak_memory(device)
    while not later or (len(later) < CALLS and sum(later) + later[-1] < seconds):
        with clock.timed(later):
            one()
    peak = measure.peak_memory_mib(device)
    found: Answer = {
        "status": "ok", "first_seconds": first[0], "alone_seconds": measure.quartiles(later),
        "memory_mib": None if before is None else round(max(0.0, peak - before), 1),
    }  # fmt: skip
    if isinstance(one, steps.PrivateStep):
        found["worked"] = one.worked
    if engine is not None:
        found["error"] = steps.error(engine, workload, device)
        if not found["error"] <= LARGEST_ERROR:
            return {"status": "wrong", "error": found["error"]}
    return found


def held_mib(device: str) -> float | None:
    """Memory in use now, in MiB: torch's on a GPU, else the resident set, once what is free is given back."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device) / measure.MIB
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
    return measure.resident_mib(os.getpid())


def limit_memory(device: str) -> None:
    """Have too large an allocation fail in this process, rather than the system kill some other one."""
    if device == "cpu" and sys.platform == "linux":
        most = int(0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        if hard == resource.RLIM_INFINITY or most < hard:
            resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def first_line(error: BaseException) -> str:
    """The first line of an error, with its type, and without the folders of this machine."""
    text = (str(error).strip() or "no message").splitlines()[0]
    text = re.sub(r"(?<![\w.])/(?:[^\s/:'\"]+/)+", "", f"{type(error).__name__}: {text}")
    return text if len(text) <= 200 else text[:199] + "…"
