"""Reads what is to be timed from `suites/throughput.toml`, with all errors at once.

The file begins with ``kind = "throughput"``; ``[bench]`` says how, each ``[[workload]]`` what.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from harness.bench import engines
from harness.registry import did_you_mean
from harness.suite.tables import Many, Positive, Size, Text, TomlTable, distinct, known
from harness.suite.toml.reader import Reader, source


class Bench(TomlTable):
    """``[bench]``: the engines, and how long to time them.

    The first engine is the one that targets are for. ``rounds`` are the most timed calls of an
    engine. ``seconds`` is about what one workload and batch takes on average, all engines together; slow engines join
    fewer rounds.
    """

    question: Text
    engines: Annotated[tuple[Text, ...], Many, AfterValidator(distinct)]
    rounds: Size = 40
    seconds: Positive = 100.0


class Workload(TomlTable):
    """``[[workload]]``: a model and the batches to time it at.

    ``shape`` is that of one example; ``tokens`` makes it token numbers below that, not normals. ``target`` is the
    largest ratio to the plain step that the first engine should need at the default batch.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
    title: Text
    model: Annotated[Text, known("model")]
    shape: Annotated[tuple[Size, ...], Many]
    classes: Size = 10
    batches: Annotated[tuple[Size, ...], Many]
    default: Size
    tokens: Size | None = None
    target: Positive | None = None

    @field_validator("default")
    @classmethod
    def _among(cls, default: int, info: ValidationInfo) -> int:
        batches = info.data.get("batches", (default,))
        if default not in batches:
            raise ValueError(f"is not one of its batches, {', '.join(map(str, batches))}")
        return default


@dataclass(frozen=True)
class BenchPlan:
    """A checked file."""

    file: str
    bench: Bench
    workloads: tuple[Workload, ...]


def load(path: Path) -> BenchPlan:
    """Read and check a file. Raises `SuiteError` with every problem and its line."""
    return parse(source(path), str(path))


def parse(text: str, file: str = "throughput.toml") -> BenchPlan:
    """Check a text; `file` is the name that errors give. Raises `SuiteError`."""
    return PlanReader(text, file).plan()


class PlanReader(Reader):
    noun: ClassVar[str] = "throughput suite"
    kind: ClassVar[str] = "throughput"
    single: ClassVar[Mapping[str, type[TomlTable]]] = {"bench": Bench}
    arrays: ClassVar[Mapping[str, type[TomlTable]]] = {"workload": Workload}
    needed: ClassVar[Sequence[str]] = ("bench", "workload")

    def plan(self) -> BenchPlan:
        bench, workloads = self.one("bench", Bench), self.array("workload", Workload)
        if bench is not None:
            names = engines.names()
            for number, name in enumerate(bench.engines):
                if reason := engines.unknown(name):
                    self.bad(("bench", "engines", number), reason, did_you_mean(name, names))
        called = [raw.get("name") for raw in self.rows("workload")]
        for index, one in enumerate(called):
            if isinstance(one, str) and one in called[:index]:
                self.bad(("workload", index, "name"), f'two workloads are called "{one}".')
        self.stop()
        assert bench is not None
        return BenchPlan(self.file, bench, tuple(workloads.values()))
