"""The two figures as SVG text: accuracy against epsilon, and throughput relative to non-private training.

Deterministic: matplotlib's defaults (no user settings), fixed ids, no date, sorted input. Text stays text,
the background is transparent, and the two neutral colours are mid-tones that read on white and on black; the
page replaces them by its own (`inline`).
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from .read import natural
from .statistics import Interval
from .tables import BASELINE, REFERENCE, Board, Row, _device, epsilon

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, LINE = "#6b7680", "#9aa4ad"
#: Okabe and Ito's colours that keep their contrast on white and on black; the first is the baseline's.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SERIES = 12
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
    """One throughput panel: series to a ratio, or to examples per second where no reference ran."""

    title: str
    relative: bool
    values: Mapping[str, float]


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
    """The throughput figure: one panel a task and device, the median over epsilons for each series."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    shown = {t.setting.split for t in (board.results or board.tables)}
    for row in board.rows:
        if row.rate and row.setting.split in shown:
            groups[row.setting.task, row.device.fingerprint].append(row)
    several = len({fingerprint for _, fingerprint in groups}) > 1
    panels = []
    for (task, _), rows in sorted(groups.items(), key=lambda g: (natural(g[0][0]), g[0][1])):
        rates: dict[str, list[float]] = defaultdict(list)
        for row in rows:
            rates[row.title].append(row.rate or 0.0)
        middle = {t: median(v) for t, v in rates.items()}
        middle = dict(sorted(middle.items(), key=lambda i: (i[0] != REFERENCE, -i[1], natural(i[0]))))
        base = middle.get(REFERENCE)
        values = {t: v / base for t, v in middle.items()} if base else middle
        title = f"{task}, {_device(rows[0].device)}" if several else task
        panels.append(Bars(title, bool(base), dict(_some(values))))
    return panels


def draw(board: Board) -> dict[str, str]:
    """File name -> SVG text of every figure."""
    import matplotlib
    from matplotlib.figure import Figure

    panels, bars = accuracy_data(board), throughput_data(board)
    names = {n for p in panels for n in (*p.series, *p.references)} | {n for b in bars for n in b.values}
    looks = _looks(sorted(names, key=_first))
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        return {
            "accuracy-vs-epsilon.svg": _svg(_accuracy(Figure, panels, looks)),
            "throughput.svg": _svg(_throughput(Figure, bars, looks)),
        }


def inline(svg: str, prefix: str, label: str) -> str:
    """`svg` for use inside an HTML page: own ids, scalable, a label, neutral colours from the page.

    `label` must be HTML-escaped by the caller.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href=", "href=")
    svg = re.sub(r'(?<=\sid=")', prefix, svg)
    svg = re.sub(r'(?<=href="#)|(?<=url\(#)', prefix, svg)
    svg = svg.replace(INK, "var(--ink-2)").replace(LINE, "var(--line-2)")
    opening = svg[: svg.index(">")]
    slim = re.sub(r'\s(width|height|version)="[^"]*"', "", opening)
    found = re.search(r'viewBox="0 0 ([\d.]+)', opening)
    width = float(found[1]) if found else 500.0
    return (
        f'{slim} style="max-width: {1.45 * width:.0f}px" role="img" aria-label="{label}"'
        + svg[len(opening) :]
    )


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
        looks[name] = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[(i + turn) % 7],
            "linestyle": style,
        }
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
                axis.fill_between(
                    [e for e, _ in banded], low, high, color=look["color"], alpha=0.13, linewidth=0
                )
            elif banded:
                axis.vlines(x, low, high, color=look["color"], linewidth=1.2)
        for name, value in panel.references.items():
            handles[name] = axis.axhline(
                100 * value.mean,
                color=looks[name]["color"],
                linestyle="--",
                linewidth=1.2,
                label=_short(name),
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
        axis.set_xlabel("target ε")
        axis.set_ylabel(f"{_short(panel.split)} accuracy, %")
        axis.set_title(_short(panel.title))
    _legend(fig, {n: handles[n] for n in sorted(handles, key=_first)})
    return fig


def _throughput(figure: type[Figure], panels: Sequence[Bars], looks: Mapping[str, Any]) -> Figure:
    tallest = max((len(p.values) for p in panels), default=4)
    fig, axes = _grid(figure, len(panels), 3.7, 0.9 + 0.27 * max(tallest, 3))
    for axis, panel in zip(axes, panels, strict=True):
        names = list(panel.values)
        values = [panel.values[n] for n in names]
        bars = axis.barh(
            range(len(names)), values, height=0.62, color=[looks[n]["color"] for n in names], alpha=0.85
        )
        axis.bar_label(
            bars, [f"{v:.2f}×" if panel.relative else f"{v:,.3g}" for v in values], padding=3, fontsize=8
        )
        axis.set_yticks(range(len(names)), labels=[_short(n, 28) for n in names])
        axis.set_ylim(tallest - 0.4, -0.6)
        axis.margins(x=0.16)
        axis.set_xlim(left=0)
        if panel.relative:
            axis.axvline(1.0, color=INK, linestyle="--", linewidth=1)
        axis.grid(True, axis="x")
        axis.set_axisbelow(True)
        axis.tick_params(length=0)
        axis.set_xlabel("examples/s" + (", relative to non-private" if panel.relative else ""))
        axis.set_title(_short(panel.title))
    return fig


def _legend(fig: Figure, handles: Mapping[str, Any]) -> None:
    if handles:
        fig.legend(
            handles=list(handles.values()),
            loc="outside lower center",
            ncols=min(len(handles), 5),
            fontsize=8.5,
        )


def _svg(fig: Figure) -> str:
    out = io.BytesIO()
    fig.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return out.getvalue().decode("utf-8")
