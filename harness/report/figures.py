"""The figures of a report: their data, which the page draws too (`plot`), and SVG files for documents.

The files are those of `harness.records.drawing`, from sorted input: equal records give equal bytes.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from statistics import median
from typing import TYPE_CHECKING, Any

from harness.records.drawing import INK, grid, styled, svg
from harness.report.model.fields import natural
from harness.report.model.rows import BASELINE, REFERENCE, Row
from harness.report.model.statistics import Interval, mean_interval, rounding
from harness.report.model.tables import Board, heading, quietest
from harness.report.model.words import BUSY, device_text, epsilon

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Handles = dict[str, Any]
Looks = Mapping[str, Mapping[str, Any]]
#: Okabe and Ito's colours that keep their contrast on white and on black; the first is the baseline's.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SERIES = 12
PANELS = 6
"""How many panels a file has at most. The page shows more, and the curves of every row on its own page."""


Points = Sequence[tuple[float, Interval]]


@dataclass(frozen=True)
class Panel:
    """One panel's data: (epsilon, interval) points for each series, and the intervals of references, which have none.

    `split` is what an accuracy was measured on, empty where the points are those of training.
    """

    title: str
    series: Mapping[str, Points]
    references: Mapping[str, Interval] = field(default_factory=dict)
    split: str = ""


@dataclass(frozen=True)
class Bars:
    """One panel of bars: series to a ratio to the reference, or to what was measured where no reference ran; the engine
    of each series; and those whose timings a busy machine has touched."""

    title: str
    relative: bool
    values: Mapping[str, float]
    engines: Mapping[str, str] = field(default_factory=dict)
    busy: frozenset[str] = frozenset()


def accuracy_data(board: Board) -> list[Panel]:
    """The accuracy figure: results if there are any, else searches; a panel for each task and device kind."""
    groups: dict[tuple[str, str, str], list[Any]] = defaultdict(list)
    for table in board.results or board.tables:
        groups[table.setting.task, table.setting.split, table.kind].append(table)
    kinds = {kind for _, _, kind in groups}
    panels = []
    for (task, split, kind), tables in groups.items():
        series: dict[str, dict[float, Interval]] = defaultdict(dict)
        references: dict[str, Interval] = {}
        for table in tables:
            for entry in table.entries:
                _keep(series[entry.row.title], table.setting.epsilon, entry.row.accuracy)
            for entry in table.references:
                _keep(references, entry.row.title, entry.row.accuracy)
        infinite = {t: p.pop(math.inf) for t, p in series.items() if math.inf in p}
        points = {
            t: sorted((e, i) for e, i in p.items() if e > 0)
            for t, p in sorted(series.items(), key=lambda i: _first(i[0]))
            if p
        }
        if points or references or infinite:
            title = task if len(kinds) < 2 else f"{task} ({kind})"
            panels.append(Panel(title, _some(points), _some({**infinite, **references}), split))
    return panels


def throughput_data(board: Board) -> list[Bars]:
    """Examples per second: one panel a task and device, the median over epsilons for each series."""
    return _bars(board, lambda row: row.rate, timed=True)


def memory_data(board: Board) -> list[Bars]:
    """Peak memory in MiB: as `throughput_data`, the least first."""
    return _bars(board, lambda row: row.peak_memory, timed=False)


def _by_device(board: Board, measured: Callable[[Row], bool]) -> list[tuple[str, list[Row]]]:
    """Title and measured rows of every task and device."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    shown = {t.setting.split for t in (board.results or board.tables)}
    for row in board.rows:
        if measured(row) and row.setting.split in shown:
            groups[row.setting.task, row.device.fingerprint].append(row)
    several = len({fingerprint for _, fingerprint in groups}) > 1
    ordered = sorted(groups.items(), key=lambda g: (natural(g[0][0]), g[0][1]))
    return [(f"{task}, {device_text(rows[0].device)}" if several else task, rows) for (task, _), rows in ordered]


def _bars(board: Board, measure: Callable[[Row], float | None], timed: bool) -> list[Bars]:
    """Bars of a timing, the fastest first, or of a size, the least first."""
    panels = []
    for title, rows in _by_device(board, lambda row: bool(measure(row))):
        timings: dict[str, list[tuple[float | None, bool]]] = defaultdict(list)
        engines: dict[str, str] = {}
        for row in rows:
            timings[row.title].append((measure(row), timed and row.busy))
            engines.setdefault(row.title, row.shared("engine") or "")
        chosen = {t: quietest(v) for t, v in timings.items()}
        sign = -1 if timed else 1
        ordered = sorted(chosen.items(), key=lambda i: (i[0] != REFERENCE, sign * i[1][0], natural(i[0])))
        base, spoilt = chosen.get(REFERENCE, (None, False))
        values = {t: value / (base or 1) for t, (value, _) in ordered}
        busy = frozenset(t for t, (_, one) in chosen.items() if one or (base is not None and spoilt))
        panels.append(Bars(title, bool(base), _some(values), engines, busy))
    return panels


@dataclass(frozen=True)
class TradeOff:
    """A row as a choice between accuracy (a fraction), epsilon and seconds of training; `front`: none is better in
    one of them and no worse in the others. One that was timed on a busy machine takes no part in that."""

    title: str
    accuracy: float
    epsilon: float
    seconds: float
    front: bool
    busy: bool = False


def pareto_data(board: Board) -> list[tuple[str, list[TradeOff]]]:
    """Title and choices of every task and device. Means over seeds: the front ignores their intervals."""

    def known(row: Row) -> bool:
        return row.accuracy is not None and row.epsilon is not None and bool(row.train_seconds)

    panels = []
    for title, rows in _by_device(board, known):
        # Epsilon to three significant figures: calibration ends within its tolerance, not at the target.
        points = [
            (r.title, r.accuracy.mean if r.accuracy else 0.0, float(f"{r.epsilon or 0:.3g}"), r.train_seconds or 0.0)
            for r in rows
        ]
        quiet = [i for i, row in enumerate(rows) if not row.busy]
        front = {quiet[i] for i in _front([(-a, e, s) for _, a, e, s in (points[i] for i in quiet)])}
        panels.append((title, [TradeOff(*point, i in front, rows[i].busy) for i, point in enumerate(points)]))
    return panels


def _front(costs: Sequence[tuple[float, float, float]]) -> set[int]:
    """Indices of the costs that no other one is at most as large as everywhere, and smaller somewhere."""
    front: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: costs[i]):  # whatever dominates comes earlier
        if not any(
            all(a <= b for a, b in zip(costs[j], costs[i], strict=True)) and costs[j] != costs[i] for j in front
        ):
            front.append(i)
    return set(front)


def curves_data(board: Board, what: str = "accuracy") -> list[Panel]:
    """Training curves over epsilon spent, at every log point, for every setting with a finite epsilon.

    `what` is ``accuracy`` or ``clipped``, the share of clipped contributions, which is computed from private data.
    """
    panels: list[Panel] = []
    for table in board.results or board.tables:
        series = {}
        for entry in table.entries:
            steps: dict[int, list[tuple[float, float]]] = defaultdict(list)
            least = rounding(entry.row.examples) if what == "accuracy" else 0.0
            for run in entry.row.counted:
                for point in run.judged:
                    value = getattr(point, what)
                    if point.epsilon is not None and math.isfinite(point.epsilon) and value is not None:
                        steps[point.step].append((point.epsilon, value))
            points = [
                (median(e for e, _ in found), interval)
                for _, found in sorted(steps.items())
                if (interval := mean_interval((v for _, v in found), least))
            ]
            if points:
                series[entry.row.title] = points
        if series and len(panels) < PANELS:
            panels.append(Panel(heading(table), _some(series)))
    return panels


def draw(board: Board) -> dict[str, str]:
    """File name -> SVG text of every figure."""
    panels, curves, clipped = accuracy_data(board)[:PANELS], curves_data(board), curves_data(board, "clipped")
    speed, memory = throughput_data(board)[:PANELS], memory_data(board)[:PANELS]
    pareto = pareto_data(board)[:PANELS]
    names = {n for p in (*panels, *curves, *clipped) for n in (*p.series, *p.references)}
    names |= {n for b in (*speed, *memory) for n in b.values} | {c.title for _, choices in pareto for c in choices}
    looks = _looks(sorted(names, key=_first))
    with warnings.catch_warnings(), styled():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)
        return {
            "accuracy-vs-epsilon.svg": _figure(panels, looks, _accuracy),
            "throughput.svg": _bars_figure(speed, looks, "examples/s", "{:,.3g}"),
            "memory.svg": _bars_figure(memory, looks, "peak memory", "{:,.0f} MiB"),
            "pareto.svg": _figure(pareto, looks, _pareto, named=SERIES),
            "training-curves.svg": _figure(curves, looks, partial(_curves, "accuracy, %")),
            "clipped-fraction.svg": _figure(clipped, looks, partial(_curves, "clipped, % (not private to publish)")),
        }


def _keep(into: dict[Any, Interval], key: Any, value: Interval | None) -> None:
    """Keep the interval with the most seeds where two devices or devices' kinds give one point."""
    if value is not None and (key not in into or into[key].n < value.n):
        into[key] = value


def _first(label: str) -> tuple[Any, ...]:
    """The baseline first, the reference last, the others by name."""
    return (label == REFERENCE, label != BASELINE, natural(label))


def _some(values: Mapping[str, Any]) -> dict[str, Any]:
    return dict(islice(values.items(), SERIES))


def _looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for every series, the same in every figure; the reference is neutral."""
    looks: dict[str, dict[str, Any]] = {REFERENCE: {"color": INK, "marker": "", "linestyle": "--"}}
    for i, name in enumerate(n for n in names if n != REFERENCE):
        turn = i // len(COLOURS)
        style = ("-", (0, (4, 1.5)), (0, (1, 1.2)))[turn % 3]
        looks[name] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[(i + turn) % 7], "linestyle": style}
    return looks


def _short(text: str, limit: int = 40) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _figure(
    panels: Sequence[Any], looks: Looks, draw: Callable[..., Handles], height: float = 3.1, named: int | None = None
) -> str:
    """The SVG text of the panels, and a legend of what `draw` returns by series, of so many at most."""
    fig, axes = grid(len(panels), height, least=4.6)
    if not panels:
        fig.text(0.5, 0.5, "no finished run yet", ha="center", va="center")
    handles: Handles = {}
    for axis, panel in zip(axes, panels, strict=True):
        handles |= draw(axis, panel, looks)
        axis.tick_params(length=0, which="both")
    if lines := [handles[name] for name in sorted(handles, key=_first)[:named]]:
        fig.legend(handles=lines, loc="outside lower center", ncols=min(len(lines), 5), fontsize=8.5)
    return svg(fig)


def _accuracy(axis: Axes, panel: Panel, looks: Looks) -> Handles:
    handles: Handles = {}
    epsilons = sorted({e for points in panel.series.values() for e, _ in points})
    for number, (name, points) in enumerate(panel.series.items()):
        look, x = looks[name], [e for e, _ in points]
        # Lone points would lie on each other.
        if len(points) == 1 and len(panel.series) > 1:
            x[0] *= 1 + 0.02 * (number - len(panel.series) / 2)
        means = [100 * i.mean for _, i in points]
        (handles[name],) = axis.plot(x, means, markersize=4.5, linewidth=1.5, label=_short(name), **look)
        banded = [(e, i) for e, i in points if i.low is not None and i.high is not None]
        low, high = [100 * (i.low or 0) for _, i in banded], [100 * (i.high or 0) for _, i in banded]
        if len(banded) > 1:
            axis.fill_between([e for e, _ in banded], low, high, color=look["color"], alpha=0.13, linewidth=0)
        elif banded:
            axis.vlines(x, low, high, color=look["color"], linewidth=1.2)
    for name, value in panel.references.items():
        handles[name] = axis.axhline(
            100 * value.mean, color=looks[name]["color"], linestyle="--", linewidth=1.2, label=_short(name)
        )
    if not epsilons:
        axis.set_xticks([])
    else:
        axis.set_xscale("log")
        axis.set_xticks(epsilons, labels=[epsilon(e) for e in epsilons])
        axis.set_xticks([], minor=True)
        axis.margins(x=0.08 if len(epsilons) > 1 else 0.5)
    axis.grid(True, axis="y")
    axis.set(title=_short(panel.title), xlabel="target ε", ylabel=f"{_short(panel.split)} accuracy, %")
    return handles


def _pareto(axis: Axes, panel: tuple[str, Sequence[TradeOff]], looks: Looks) -> Handles:
    handles: Handles = {}
    title, choices = panel
    for c in sorted(choices, key=lambda c: (c.epsilon, c.title)):
        look, place = looks[c.title], (c.seconds, 100 * c.accuracy)
        (handles[c.title],) = axis.plot(
            *place, linestyle="", marker=look["marker"] or "*", markersize=5, color=look["color"],
            markerfacecolor=look["color"] if c.front else "none", label=_short(c.title),
        )  # fmt: skip
        if c.front:
            axis.annotate(f"ε = {epsilon(c.epsilon)}", place, (4, 4), textcoords="offset points", fontsize=6.5)
    axis.set_xscale("log")
    axis.grid(True)
    busy = "\nhollow too: timed on a busy machine" if any(c.busy for c in choices) else ""
    axis.set(title=_short(title), xlabel="training, s; filled: on the front" + busy, ylabel="accuracy, %")
    return handles


def _curves(what: str, axis: Axes, panel: Panel, looks: Looks) -> Handles:
    handles: Handles = {}
    for name, points in panel.series.items():
        look = {**looks[name], "marker": ""}
        means = [100 * i.mean for _, i in points]
        (handles[name],) = axis.plot([e for e, _ in points], means, linewidth=1.3, label=_short(name), **look)
    axis.grid(True, axis="y")
    axis.set(title=_short(panel.title), xlabel="ε spent, by RDP", ylabel=what)
    return handles


def _bars_figure(panels: Sequence[Bars], looks: Looks, what: str, absolute: str) -> str:
    rows = max((len(panel.values) for panel in panels), default=4)
    draw = partial(_relative, what, absolute, rows)
    return _figure(panels, looks, draw, 0.9 + 0.27 * max(rows, 3))


def _relative(what: str, absolute: str, rows: int, axis: Axes, panel: Bars, looks: Looks) -> Handles:
    names, values = list(panel.values), list(panel.values.values())
    bars = axis.barh(range(len(names)), values, height=0.62, color=[looks[n]["color"] for n in names], alpha=0.85)
    texts = [
        (f"{v:.2f}×" if panel.relative else absolute.format(v)) + BUSY * (n in panel.busy)
        for n, v in panel.values.items()
    ]
    axis.bar_label(bars, texts, padding=3, fontsize=8)
    axis.set_yticks(range(len(names)), labels=[_short(n, 28) for n in names])
    axis.set_ylim(rows - 0.4, -0.6)
    axis.margins(x=0.16)
    axis.set_xlim(left=0)
    if panel.relative:
        axis.axvline(1.0, color=INK, linestyle="--", linewidth=1)
    axis.grid(True, axis="x")
    axis.set_axisbelow(True)
    busy = f"\n{BUSY} timed on a busy machine" if panel.busy else ""
    relative = ", relative to non-private" if panel.relative else ""
    axis.set(title=_short(panel.title), xlabel=what + relative + busy)
    return {}
