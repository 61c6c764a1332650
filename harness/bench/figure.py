"""Draws records as one SVG: a panel for each workload, a bar for each engine. Equal records give equal bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.bench.table import Record, headline, is_baseline, timed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Mid-tones, readable on white and on black; the background stays transparent.
INK, LINE = "#6b7680", "#9aa4ad"
FIRST, OTHER, PLAIN = "#d55e00", "#0072b2", "#9aa4ad"
CUT = 5.0  # longer bars end here, with their number
STYLE: dict[str, Any] = {
    "svg.hashsalt": "epsbench", "svg.fonttype": "none", "font.size": 9.0, "text.parse_math": False,
    "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.titlecolor": INK, "axes.labelcolor": INK,
    "axes.edgecolor": LINE, "text.color": INK, "xtick.color": LINE, "ytick.color": LINE, "xtick.labelcolor": INK,
    "ytick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}  # fmt: skip


def draw(records: Sequence[Record]) -> str:
    """The figure as SVG text: each engine's step in units of the plain one."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(3, max(1, len(records)))
    lines = max(1, math.ceil(len(records) / columns))
    most = max((len(timed(record)) for record in records), default=1)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(3.7 * columns, (0.9 + 0.24 * most) * lines), facecolor="none")
        for place, record in enumerate(records):
            _panel(figure.add_subplot(lines, columns, place + 1, facecolor="none"), record, most)
        out = io.BytesIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return out.getvalue().decode("utf-8")


def _panel(axis: Axes, record: Record, most: int) -> None:
    first = headline(record)
    ratios = timed(record)
    names = list(ratios)
    colours = [PLAIN if is_baseline(name) else FIRST if name == first else OTHER for name in names]
    bars = axis.barh(range(len(names)), [min(ratios[n], CUT) for n in names], height=0.66, color=colours)
    texts = [f"{ratios[n]:.2f}" if ratios[n] < 10 else f"{ratios[n]:.0f}" for n in names]
    axis.bar_label(
        bars, [f"{t} ▸" if ratios[n] > CUT else t for n, t in zip(names, texts, strict=True)], padding=3, fontsize=8
    )
    axis.axvline(1.0, color=INK, linestyle="--", linewidth=1)
    if (target := record["workload"]["target"]) is not None and record["batch"] == record["workload"]["default"]:
        axis.axvline(target, color=FIRST, linestyle=":", linewidth=1)
    axis.set_yticks(range(len(names)), labels=names)
    axis.set_ylim(most - 0.4, -0.6)
    axis.set_xlim(0, CUT * 1.18)
    axis.tick_params(length=0)
    axis.set_title(f"{record['workload']['name']} {record['workload']['title']}, batch {record['batch']}")
    axis.set_xlabel("step / plain step")
