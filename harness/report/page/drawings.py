"""The figures of the page, from the data of `figures`, drawn by `plot`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from harness.report.figures import SERIES, Bars, accuracy_data, curves_data, memory_data, pareto_data, throughput_data
from harness.report.model.rows import BASELINE, REFERENCE, Row
from harness.report.model.statistics import Interval
from harness.report.model.tables import Board
from harness.report.model.words import BUSY, bounds, count, epsilon, percent
from harness.report.page.plot import Axis, Dot, bars, chart

PRIVATE = "Computed from private data: shown to understand training, not private to publish."


CROWDED = 12  # panels of one figure


@dataclass(frozen=True)
class Drawing:
    """A figure of the page: panels as (title, HTML), a caption, a warning, and the file for documents."""

    name: str
    title: str
    caption: str
    panels: Sequence[tuple[str, str]]
    files: Sequence[str]
    warning: str = ""


def of(board: Board) -> list[Drawing]:
    """Every figure that has something to show."""
    found = [
        _accuracy(board),
        _pareto(board),
        _over_epsilon(
            board, "curves", "accuracy", "Training curves",
            "Accuracy at the log points over the epsilon spent until then, by RDP; mean over seeds. "
            "Of two stages, the last. For information: nothing is chosen by it.", "training-curves.svg",
        ),
        _over_epsilon(
            board, "clipped", "clipped", "Clipped fraction",
            "Share of contributions with a weight below 1 since the last log point, over the epsilon spent until then. "
            "Of two stages, the last.", "clipped-fraction.svg", PRIVATE,
        ),
        _cost(board),
    ]  # fmt: skip
    return [d for d in found if d.panels]


def _panels(found: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(title, html) for title, html in found if html][:CROWDED]


def _dot(x: float, value: Interval, says: str) -> Dot:
    low, high = (None if v is None else 100 * v for v in (value.low, value.high))
    around = f" {bounds(value)}" if bounds(value) else ""
    return Dot(x, 100 * value.mean, f"{says}: {percent(value.mean)} %{around}, n = {value.n}", low, high)


def _looks(names: Iterable[str]) -> dict[str, int]:
    """A look for every series, the same in all panels of a figure: the baseline's is the first."""
    found = dict.fromkeys(names)
    return {name: i for i, name in enumerate(sorted(found, key=lambda n: n != BASELINE))}


def _dots(series: Mapping[str, Sequence[tuple[float, Interval]]]) -> dict[str, list[Dot]]:
    return {n: [_dot(e, i, f"ε = {epsilon(e)}") for e, i in points] for n, points in series.items()}


def _accuracy(board: Board) -> Drawing:
    panels = accuracy_data(board)
    looks = _looks(n for p in panels for n in p.series)
    made = []
    for p in panels:
        series = _dots(p.series)
        ticks = {e: epsilon(e) for points in p.series.values() for e, _ in points}
        levels = {n: 100 * i.mean for n, i in p.references.items()}
        y = Axis(f"{p.split} accuracy, %")
        label = f"Accuracy against target epsilon, {p.title}; the table holds the numbers"
        made.append((p.title, chart(series, Axis("target ε", True, ticks), y, label, levels=levels, looks=looks)))
    return Drawing(
        "accuracy", "Accuracy against epsilon",
        "Mean over seeds; bands are 95 % t-intervals; the dashed line is training without privacy. At most 12 series "
        "and 12 panels are drawn; the leaderboard holds all.",
        _panels(made), ["accuracy-vs-epsilon.svg"],
    )  # fmt: skip


def _pareto(board: Board) -> Drawing:
    made = []
    for title, choices in pareto_data(board):
        series: dict[str, list[Dot]] = {}
        names = [BASELINE, *(c.title for c in choices if c.front), *(c.title for c in choices)]
        kept = [n for n in dict.fromkeys(names) if n in {c.title for c in choices}][:SERIES]
        for c in choices:
            if c.title in kept and math.isfinite(c.seconds):
                says = f"ε = {epsilon(c.epsilon)}: {percent(c.accuracy)} %, {count(c.seconds)} s" + BUSY * c.busy
                tag = f"ε {epsilon(c.epsilon)}" if c.front else ""
                series.setdefault(c.title, []).append(Dot(c.seconds, 100 * c.accuracy, says, filled=c.front, tag=tag))
        ordered = {n: series[n] for n in kept if n in series}
        label = f"Accuracy against seconds of training, {title}; the table holds the numbers"
        html = chart(ordered, Axis("training, s", True), Axis("accuracy, %"), label, joined=False)
        made.append((title, html))
    return Drawing(
        "pareto", "Accuracy, epsilon and time",
        "Filled: no other row is at least as good in all three and better in one (means; intervals are ignored). "
        f"The label is epsilon spent. On one device. A row timed on a busy machine ({BUSY}) takes no part in it.",
        _panels(made), ["pareto.svg"],
    )  # fmt: skip


def _over_epsilon(
    board: Board, name: str, what: str, title: str, caption: str, file: str, warning: str = ""
) -> Drawing:
    panels = curves_data(board, what)
    looks = _looks(n for p in panels for n in p.series)
    x, y = Axis("ε spent, by RDP"), Axis(f"{what}, %")
    drawn = _panels(
        (p.title, chart(_dots(p.series), x, y, f"{y.title} over epsilon spent, {p.title}", looks=looks)) for p in panels
    )
    return Drawing(name, title, caption, drawn, [file], warning)


def of_row(row: Row) -> list[Drawing]:
    """The curves of every seed of one row: accuracy over epsilon (over seconds without privacy), clipped fraction.

    Each of two stages has a panel: they train for other losses, on other networks.
    """
    names = [f"Stage {number}: {stage.method}" for number, stage in enumerate(row.first.stages, 1)] or [""]
    out = []
    for what, title, warning in (("accuracy", "Accuracy in training", ""), ("clipped", "Clipped fraction", PRIVATE)):
        label = f"{title} of every seed"
        panels = _panels(
            (name, _of_stage(row, i, what, f"{label}, {name}" if name else label)) for i, name in enumerate(names)
        )
        if panels:
            caption = "Each stage is judged as its own loss judges, on its own data." if row.first.stages else ""
            out.append(Drawing(what, title, caption * (what == "accuracy"), panels, (), warning))
    return out


def _of_stage(row: Row, stage: int, what: str, label: str) -> str:
    """A line for every seed, of one stage. One on public data spends nothing, and is drawn over seconds."""
    traces = [(run, [p for p in run.trace if run.stage_at(p.step) == stage]) for run in row.runs]
    public = any(one.public for one in row.first.stages[stage : stage + 1])
    private = not public and any(
        p.epsilon is not None and math.isfinite(p.epsilon) for _, trace in traces for p in trace
    )
    series: dict[str, list[Dot]] = {}
    for run, trace in traces:
        dots = []
        for p in trace:
            x, y = (p.epsilon if private else p.seconds), getattr(p, what)
            if x is not None and math.isfinite(x) and y is not None:
                dots.append(Dot(x, 100 * y, f"step {p.step}, {x:.4g}: {percent(y)} %"))
        if dots:
            name = f"seed {run.seed}" if run.seed is not None else run.id
            series[name if name not in series else f"{name}, {run.id}"] = dots
    return chart(series, Axis("ε spent, by RDP" if private else "seconds of training"), Axis("%"), label)


def _cost(board: Board) -> Drawing:
    speed = _bars(throughput_data(board), "examples/s", lambda v: f"{v:,.3g}")
    memory = _bars(memory_data(board), "peak memory", lambda v: f"{count(v)} MiB")
    return Drawing(
        "cost",
        "Throughput and memory",
        "Relative to non-private training on the same task and device where it ran, with the engine that computed the "
        "gradients; the median over runs and epsilons. Memory: tensors on a GPU, the resident process on a CPU. "
        f"{BUSY}: timed on a busy machine.",
        [panel for pair in zip(speed, memory, strict=False) for panel in pair],
        ("throughput.svg", "memory.svg"),
    )


def _bars(panels: Sequence[Bars], what: str, absolute: Callable[[float], str]) -> list[tuple[str, str]]:
    made = []
    for p in panels:
        engines = set(p.engines.values()) - {""}
        values: Mapping[str, tuple[float, str]] = {
            name + (f" · {p.engines[name]}" if len(engines) > 1 and p.engines.get(name) else ""): (
                v, (f"{v:.2f}×" if p.relative else absolute(v)) + BUSY * (name in p.busy),
            )
            for name, v in p.values.items()
        }  # fmt: skip
        label = f"{p.title}: {what}" + (f" relative to {REFERENCE}" if p.relative else "")
        made.append(("", bars(values, label, 1.0 if p.relative else None)))
    return _panels(made)
