"""What is to be timed: `suites/throughput.toml`, checked as a whole.

The file begins with ``kind = "throughput"``; ``[bench]`` says how, each ``[[workload]]`` what.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from harness import registry
from harness.bench import engines
from harness.registry import did_you_mean
from harness.suite import Many, Positive, Reader, Size, SuiteError, Table, Text, document, source
from harness.suite.toml.lines import Lines

KIND = "throughput"
FILE = Path("suites/throughput.toml")


class Bench(Table):
    """``[bench]``: the engines, and how long to time them.

    The first engine is the one that targets are for. ``rounds`` are the most timed calls of an
    engine. ``seconds`` is about what one workload and batch takes on average, all engines together; slow engines join
    fewer rounds.
    """

    question: Text
    engines: Annotated[tuple[Text, ...], Many]
    rounds: Size = 40
    seconds: Positive = 100.0


class Workload(Table):
    """``[[workload]]``: a model and the batches to time it at.

    ``shape`` is that of one example; ``tokens`` makes it token numbers below that, not normals. ``target`` is the
    largest ratio to the plain step that the first engine should need at the default batch.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
    title: Text
    model: Text
    shape: Annotated[tuple[Size, ...], Many]
    classes: Size = 10
    batches: Annotated[tuple[Size, ...], Many]
    default: Size
    tokens: Size | None = None
    target: Positive | None = None


@dataclass(frozen=True)
class Plan:
    """A checked file."""

    file: str
    bench: Bench
    workloads: tuple[Workload, ...]


def is_plan(path: Path) -> bool:
    """Whether a TOML file says that it is one of these; False where it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig")).get("kind") == KIND
    except (OSError, ValueError, RecursionError):
        return False


def load(path: Path) -> Plan:
    """Read and check a file. Raises `SuiteError` with every problem and its line."""
    return parse(source(path), str(path))


def parse(text: str, file: str = "throughput.toml") -> Plan:
    """Check a text; `file` is the name that errors give. Raises `SuiteError`."""
    return _Reader(file, document(text, file), Lines(text), registry.installed(), []).plan()


class _Reader(Reader):
    kind: ClassVar[str] = "throughput suite"
    single: ClassVar[Mapping[str, type[Table]]] = {"bench": Bench}
    arrays: ClassVar[Mapping[str, type[Table]]] = {"workload": Workload}
    needed: ClassVar[Sequence[str]] = ("bench", "workload")

    def plan(self) -> Plan:
        if self.data.pop("kind", None) != KIND:
            self.bad(("kind",), f'the file should begin with kind = "{KIND}".')
        self.known_tables()
        bench, workloads = self.one("bench", Bench), self.array("workload", Workload)
        if bench is not None:
            self.distinct(("bench", "engines"), bench.engines)
            known = engines.names()
            for number, name in enumerate(bench.engines):
                if reason := engines.unknown(name):
                    self.bad(("bench", "engines", number), reason, did_you_mean(name, known))
        for index, workload in workloads.items():
            self.lookup(("workload", index, "model"), "model", workload.model)
            if workload.default not in workload.batches:
                self.bad(
                    ("workload", index, "default"),
                    f"[[workload]] default = {workload.default} is none of its batches, "
                    f"{', '.join(map(str, workload.batches))}.",
                )
            if workload.name in [other.name for i, other in workloads.items() if i < index]:
                self.bad(("workload", index, "name"), f'two workloads are called "{workload.name}".')
        if self.problems or bench is None:
            raise SuiteError(self.problems)
        return Plan(self.file, bench, tuple(workloads.values()))
