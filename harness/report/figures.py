"""The figures of a report: their data, which the page draws too (`plot`), and SVG files for documents.

The files are deterministic: matplotlib's defaults (no user settings), fixed ids, no date, sorted input. Text stays
text, the background is transparent, and the two neutral colours are mid-tones that read on white and on black.
"""

from __future__ import annotations

import io
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from harness.report.model.fields import natural
from harness.report.model.rows import BASELINE, REFERENCE, Row
from harness.report.model.statistics import Interval, mean_interval, rounding
from harness.report.model.tables import Board, heading, quietest
from harness.report.model.words import BUSY, device_text, epsilon

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, LINE = "#6b7680", "#9aa4ad"
#: Okabe and Ito's colours that keep their contrast on white and on black; the first is the baseline's.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SERIES = 12
PANELS = 6
"""How many panels a file has at most. The page shows more, and the curves of every row on its own page."""
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "epsbench",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": LINE,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Panel:
    """One panel's data: (epsilon, interval) points for each series, and the references' intervals."""

    title: str
    split: str
    series: Mapping[str, Sequence[tuple[float, Interval]]]
    references: Mapping[str, Interval]


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
            panels.append(Panel(title, split, dict(_some(points)), dict(_some({**infinite, **references}))))
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
        panels.append(Bars(title, bool(base), dict(_some(values)), engines, busy))
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
        points = [
            (r.title, r.accuracy.mean if r.accuracy else 0.0, _rounded(r.epsilon or 0.0), r.train_seconds or 0.0)
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


def _rounded(value: float) -> float:
    """Epsilon to three significant figures: calibration ends within its tolerance, not at the target."""
    return value if math.isinf(value) else float(f"{value:.3g}")


@dataclass(frozen=True)
class Curves:
    """What the traces of one setting say: for each series (epsilon spent, interval over seeds) at every log point."""

    title: str
    series: Mapping[str, Sequence[tuple[float, Interval]]]


def curves_data(board: Board, what: str = "accuracy") -> list[Curves]:
    """Training curves over epsilon spent, for every setting with a finite epsilon.

    `what` is ``accuracy`` or ``clipped``, the share of clipped contributions, which is computed from private data.
    """
    panels: list[Curves] = []
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
            panels.append(Curves(heading(table), dict(_some(series))))
    return panels


def draw(board: Board) -> dict[str, str]:
    """File name -> SVG text of every figure."""
    import matplotlib
    from matplotlib.figure import Figure

    panels, speed, memory = (
        accuracy_data(board)[:PANELS],
        throughput_data(board)[:PANELS],
        memory_data(board)[:PANELS],
    )
    pareto, curves, clipped = pareto_data(board)[:PANELS], curves_data(board), curves_data(board, "clipped")
    names = {n for p in panels for n in (*p.series, *p.references)}
    names |= {n for b in (*speed, *memory) for n in b.values} | {n for c in (*curves, *clipped) for n in c.series}
    names |= {c.title for _, choices in pareto for c in choices}
    looks = _looks(sorted(names, key=_first))
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        return {
            "accuracy-vs-epsilon.svg": _svg(_accuracy(Figure, panels, looks)),
            "throughput.svg": _svg(_relative(Figure, speed, looks, "examples/s", "{:,.3g}")),
            "memory.svg": _svg(_relative(Figure, memory, looks, "peak memory", "{:,.0f} MiB")),
            "pareto.svg": _svg(_pareto(Figure, pareto, looks)),
            "training-curves.svg": _svg(_curves(Figure, curves, looks, "accuracy, %")),
            "clipped-fraction.svg": _svg(_curves(Figure, clipped, looks, "clipped, % (not private to publish)")),
        }


def _keep(into: dict[Any, Interval], key: Any, value: Interval | None) -> None:
    """Keep the interval with the most seeds where two devices or devices' kinds give one point."""
    if value is not None and (key not in into or into[key].n < value.n):
        into[key] = value


def _first(label: str) -> tuple[Any, ...]:
    """The baseline first, the reference last, the others by name."""
    return (label == REFERENCE, label != BASELINE, natural(label))


def _some(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return list(values.items())[:SERIES]


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


def _grid(figure: type[Figure], panels: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(max(panels, 1), 3)
    lines = math.ceil(max(panels, 1) / columns)
    fig = figure(figsize=(max(width * columns, 4.6), height * lines), facecolor="none")
    axes = [fig.add_subplot(lines, columns, i + 1, facecolor="none") for i in range(panels)]
    if not panels:
        fig.text(0.5, 0.5, "no finished run yet", ha="center", va="center")
    return fig, axes


def _accuracy(figure: type[Figure], panels: Sequence[Panel], looks: Mapping[str, Any]) -> Figure:
    fig, axes = _grid(figure, len(panels), 3.7, 3.1)
    handles: dict[str, Any] = {}
    for axis, panel in zip(axes, panels, strict=True):
        epsilons = sorted({e for points in panel.series.values() for e, _ in points})
        for name, points in panel.series.items():
            look, x = looks[name], [e for e, _ in points]
            if len(points) == 1 and len(panel.series) > 1:  # lone points would lie on each other
                x[0] *= 1 + 0.02 * (list(panel.series).index(name) - len(panel.series) / 2)
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
        if epsilons:
            axis.set_xscale("log")
            axis.set_xticks(epsilons, labels=[epsilon(e) for e in epsilons])
            axis.set_xticks([], minor=True)
            axis.margins(x=0.08 if len(epsilons) > 1 else 0.5)
        else:
            axis.set_xticks([])
        axis.grid(True, axis="y")
        axis.tick_params(length=0)
        _named(axis, panel.title, "target ε", f"{_short(panel.split)} accuracy, %")
    return _explained(fig, handles)


def _pareto(figure: type[Figure], panels: Sequence[tuple[str, Sequence[TradeOff]]], looks: Mapping[str, Any]) -> Figure:
    fig, axes = _grid(figure, len(panels), 3.7, 3.1)
    handles: dict[str, Any] = {}
    for axis, (title, choices) in zip(axes, panels, strict=True):
        for c in sorted(choices, key=lambda c: (c.epsilon, c.title)):
            look = looks[c.title]
            (handles[c.title],) = axis.plot(
                [c.seconds], [100 * c.accuracy], linestyle="", marker=look["marker"] or "*", markersize=5,
                color=look["color"], markerfacecolor=look["color"] if c.front else "none", label=_short(c.title),
            )  # fmt: skip
            if c.front:
                axis.annotate(
                    f"ε = {epsilon(c.epsilon)}", (c.seconds, 100 * c.accuracy), (4, 4),
                    textcoords="offset points", fontsize=6.5,
                )  # fmt: skip
        axis.set_xscale("log")
        axis.grid(True)
        axis.tick_params(length=0, which="both")
        busy = "\nhollow too: timed on a busy machine" if any(c.busy for c in choices) else ""
        _named(axis, title, "training, s; filled: on the front" + busy, "accuracy, %")
    return _explained(fig, handles, SERIES)


def _curves(figure: type[Figure], panels: Sequence[Curves], looks: Mapping[str, Any], title: str) -> Figure:
    fig, axes = _grid(figure, len(panels), 3.7, 3.1)
    handles: dict[str, Any] = {}
    for axis, panel in zip(axes, panels, strict=True):
        for name, points in panel.series.items():
            look = {**looks[name], "marker": ""}
            (handles[name],) = axis.plot(
                [e for e, _ in points], [100 * i.mean for _, i in points], linewidth=1.3, label=_short(name), **look
            )
        axis.grid(True, axis="y")
        axis.tick_params(length=0)
        _named(axis, panel.title, "ε spent, by RDP", title)
    return _explained(fig, handles)


def _relative(
    figure: type[Figure], panels: Sequence[Bars], looks: Mapping[str, Any], what: str, absolute: str
) -> Figure:
    tallest = max((len(p.values) for p in panels), default=4)
    fig, axes = _grid(figure, len(panels), 3.7, 0.9 + 0.27 * max(tallest, 3))
    for axis, panel in zip(axes, panels, strict=True):
        names, values = list(panel.values), list(panel.values.values())
        bars = axis.barh(range(len(names)), values, height=0.62, color=[looks[n]["color"] for n in names], alpha=0.85)
        texts = [
            (f"{v:.2f}×" if panel.relative else absolute.format(v)) + BUSY * (n in panel.busy)
            for n, v in panel.values.items()
        ]
        axis.bar_label(bars, texts, padding=3, fontsize=8)
        axis.set_yticks(range(len(names)), labels=[_short(n, 28) for n in names])
        axis.set_ylim(tallest - 0.4, -0.6)
        axis.margins(x=0.16)
        axis.set_xlim(left=0)
        if panel.relative:
            axis.axvline(1.0, color=INK, linestyle="--", linewidth=1)
        axis.grid(True, axis="x")
        axis.set_axisbelow(True)
        axis.tick_params(length=0)
        busy = f"\n{BUSY} timed on a busy machine" if panel.busy else ""
        _named(axis, panel.title, what + (", relative to non-private" if panel.relative else "") + busy)
    return fig


def _named(axis: Axes, title: str, x: str, y: str = "") -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_title(_short(title))


def _explained(fig: Figure, handles: Mapping[str, Any], most: int | None = None) -> Figure:
    """`fig` with a legend of its series, of `most` of them at most."""
    lines = [handles[name] for name in sorted(handles, key=_first)[:most]]
    if lines:
        fig.legend(handles=lines, loc="outside lower center", ncols=min(len(lines), 5), fontsize=8.5)
    return fig


def _svg(fig: Figure) -> str:
    out = io.BytesIO()
    fig.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return out.getvalue().decode("utf-8")
