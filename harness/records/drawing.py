"""Figures for documents, drawn by matplotlib: panels side by side, as the text of an SVG file.

The text is the same every time: matplotlib's defaults (no user settings), fixed ids, no date. Words stay words, the
background is transparent, and the two neutral colours are mid-tones that read on white and on black.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, LINE = "#6b7680", "#9aa4ad"
STYLE: dict[str, Any] = {
    "svg.hashsalt": "epsbench", "svg.fonttype": "none", "text.parse_math": False, "text.color": INK, "font.size": 9.0,
    "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.titlecolor": INK, "axes.labelcolor": INK,
    "axes.edgecolor": LINE, "axes.spines.top": False, "axes.spines.right": False, "xtick.color": LINE,
    "ytick.color": LINE, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "grid.color": LINE, "grid.alpha": 0.3,
    "grid.linewidth": 0.6, "legend.frameon": False, "figure.constrained_layout.use": True,
}  # fmt: skip


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Whatever is drawn inside has the style of all figures."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def grid(panels: int, height: float, least: float = 0.0) -> tuple[Figure, list[Axes]]:
    """A figure of panels of this height, three in a line, at least so wide: inches."""
    from matplotlib.figure import Figure

    columns = min(max(panels, 1), 3)
    lines = math.ceil(max(panels, 1) / columns)
    figure = Figure(figsize=(max(3.7 * columns, least), height * lines), facecolor="none")
    return figure, [figure.add_subplot(lines, columns, i + 1, facecolor="none") for i in range(panels)]


def svg(figure: Figure) -> str:
    """The figure as text."""
    out = io.BytesIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return out.getvalue().decode("utf-8")
