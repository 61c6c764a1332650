"""Draws records as one SVG: a panel for each workload, a bar for each engine. Equal records give equal bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from harness.bench.table import Record, headline, is_baseline, timed
from harness.records.drawing import INK, LINE, grid, styled, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIRST, OTHER, PLAIN = "#d55e00", "#0072b2", LINE
CUT = 5.0  # longer bars end here, with their number


def draw(records: Sequence[Record]) -> str:
    """The figure as SVG text: each engine's step in units of the plain one."""
    most = max((len(timed(record)) for record in records), default=1)
    with styled():
        figure, axes = grid(len(records), 0.9 + 0.24 * most)
        for axis, record in zip(axes, records, strict=True):
            _panel(axis, record, most)
        return svg(figure)


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
