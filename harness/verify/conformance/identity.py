"""The check that another process gives a run the same id.

`python -m harness.verify.conformance.identity [METHOD.py]` is that process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from harness import registry
from harness.dp.method import Method, describe
from harness.records.cell import Cell
from harness.verify.conformance.subject import Subject, Violation


def cell(name: str, method: Method) -> Cell:
    """A run of a method in which nothing else varies."""
    return Cell("check", name, name, {}, describe(method), {"digest": "0"}, {"epsilon": 3.0}, {"steps": 1}, {}, 0)


def identified(s: Subject) -> None:
    """a run's id is the same in every process, for every hash seed, microbatch and number of threads"""
    name, file = s.identity or ("a method", "")
    here = cell(name, s.method)
    if "microbatch" in {f.name for f in dataclasses.fields(s.method.engine)}:
        split: dict[str, Any] = {"microbatch": 3}
        other = dataclasses.replace(s.method, engine=dataclasses.replace(s.method.engine, **split))
        if cell(name, other).id != here.id:
            raise Violation(
                'the microbatch changes a run\'s id, and not its result: give the field metadata={"speed": True}'
            )
    path = Path(file).resolve()
    # Another process must be given the file of a user's own method; one process serves all others.
    own = path in registry.files() and path.parent != registry.installed().root / "methods"
    if s.identity and elsewhere(file if own else None)[name] != here.id:
        raise Violation(
            "another process gives the same run another id: describe parts by plain values in an order of their own,"
            " not by sets, addresses or the clock"
        )


@cache
def elsewhere(file: str | None = None) -> dict[str, str]:
    """The id of every method's run, those of `file` among them, as a process with another hash seed makes it."""
    seed = "17" if os.environ.get("PYTHONHASHSEED") != "17" else "18"
    command = [sys.executable, "-m", "harness.verify.conformance.identity", *([file] if file else [])]
    environment = os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ids cannot be made in another process: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(files: list[str]) -> None:
    """Print the id of every method as JSON; of those that can be made without options."""
    for file in files:
        registry.add_file(Path(file))
    found = {}
    for name in registry.index("method"):
        try:
            found[name] = cell(name, registry.load(registry.resolve("method", name))()).id
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
