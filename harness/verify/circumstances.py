"""How a check or an audit was made, as its record says it: the code that decides it, the machine, and the time."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from harness.dp.method import Method, parts
from harness.provenance import code, measure
from harness.registry.parts import modules

SKIPPED = frozenset(
    f"harness.{name}"
    for name in (
        "records.audits", "provenance.measure", "registry", "registry.registry", "running.run", "records.store"
    )
)  # fmt: skip
"""Modules that take no part in an outcome."""


def code_of(method: Method, file: str | Path, *starts: str) -> dict[str, Any]:
    """{"hash", "files"} of the source that decides an outcome: a method's file, its parts, and the modules `starts`."""
    named = {module for part in parts(method).values() for module in modules(part)} | set(starts)
    files = code.closure([*sorted(named), Path(file)], skip=SKIPPED)
    return {"hash": code.code_hash(files), "files": code.hashes(files)}


class Circumstances:
    """The start of a check or an audit by code of this hash; `facts` says at its end how it was made."""

    def __init__(self, made_by: dict[str, Any]) -> None:
        self.made_by, self.started, self.clock = made_by, datetime.now(UTC), measure.Clock()
        self.begun = self.clock.now()

    def facts(self) -> dict[str, Any]:
        """The keys of the record."""
        wall, environment = self.clock.since(self.begun), measure.environment()
        return {
            "code": self.made_by | {key: environment.pop(key) for key in ("commit", "dirty")},
            "device": measure.device_info("cpu", torch.get_num_threads()), "environment": environment,
            "started": self.started.isoformat(timespec="seconds"), "wall_seconds": round(wall, 3),
        }  # fmt: skip
