"""Draws small SVG charts for the page: lines with bands, bars, points. Pointing at a mark shows its numbers.

They are written from the data of `figures` as plain text: no library is loaded into the page, which stays light, opens
offline, follows the page's light and dark colours, and is the same bytes for the same records. Charting libraries for
the browser are a hundred to a thousand times larger than what is drawn here. The files for documents are matplotlib's
(`figures`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 460, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 10, 40
DENSE = 10  # points of a line beyond which its marks are small
LOOKS = 12
"""How many series have a look of their own (classes ``s0`` to ``s11`` of the style sheet)."""


@dataclass(frozen=True)
class Dot:
    """A mark: where, the ends of its interval (None is unknown), and what it says."""

    x: float
    y: float
    says: str
    low: float | None = None
    high: float | None = None
    filled: bool = True
    tag: str = ""


@dataclass(frozen=True)
class Axis:
    """An axis: its title, whether it is logarithmic, and its ticks where they are given (value -> text)."""

    title: str
    log: bool = False
    ticks: Mapping[float, str] = field(default_factory=dict)


def chart(
    series: Mapping[str, Sequence[Dot]],
    x: Axis,
    y: Axis,
    label: str,
    *,
    joined: bool = True,
    levels: Mapping[str, float] | None = None,
    looks: Mapping[str, int] | None = None,
) -> str:
    """A chart of named series with its legend, as HTML. `levels` are dashed lines across; `looks` fixes colours."""
    levels = levels or {}
    looks = looks or {name: i for i, name in enumerate(series)}
    dots = [d for points in series.values() for d in points]
    xs = [d.x for d in dots] + list(x.ticks)
    ys = [v for d in dots for v in (d.y, d.low, d.high) if v is not None] + list(levels.values())
    if not xs or not ys:
        return ""
    across = _Scale(xs, x.log, _LEFT, WIDTH - _RIGHT)
    up = _Scale(ys, y.log, HEIGHT - _BOTTOM, _TOP)
    parts = _axes(across, up, x, y)
    for name, value in levels.items():
        line = f'<path class="level" d="M{_LEFT} {_n(up.at(value))}H{WIDTH - _RIGHT}">'
        parts.append(f"{line}<title>{escape(name)}: {value:.4g}</title></path>")
    tags: list[tuple[float, float]] = []
    parts += [_series(name, points, looks[name], across, up, joined, tags) for name, points in series.items()]
    legend = "".join(f'<li class="s{looks[n] % LOOKS}"><i></i>{escape(n)}</li>' for n in series) + "".join(
        f'<li class="level"><i></i>{escape(n)}</li>' for n in levels
    )
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f'{"".join(parts)}</svg><ul class="legend">{legend}</ul>'
    )


def bars(values: Mapping[str, tuple[float, str]], label: str, level: float | None = None) -> str:
    """Horizontal bars as an HTML table-like list: name, bar, and the text of each value. `level` is marked."""
    top = max([v for v, _ in values.values()] + ([level] if level else []), default=0.0)
    if top <= 0:
        return ""
    mark = "" if level is None else f'<i class="mark-at" style="left:{_n(100 * level / top)}%"></i>'
    lines = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="num">{escape(text)}</td>'
        f'<td class="bar"><div>{mark}<b style="width:{_n(100 * value / top)}%"></b></div></td></tr>'
        for name, (value, text) in values.items()
    )
    return f'<table class="bars"><caption>{escape(label)}</caption><tbody>{lines}</tbody></table>'


class _Scale:
    """Values to coordinates, with a little room at both ends."""

    def __init__(self, values: Iterable[float], log: bool, start: float, end: float) -> None:
        known = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
        self.log = log and bool(known)
        low, high = (min(known), max(known)) if known else (0.0, 1.0)
        a, b = self._of(low), self._of(high)
        pad = 0.06 * (b - a) or (0.15 if self.log else 0.05 * abs(a) or 0.5)
        self.a, self.b, self.start, self.end = a - pad, b + pad, start, end

    def _of(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def at(self, value: float) -> float:
        if self.log and value <= 0:
            return self.start
        return self.start + (self._of(value) - self.a) / (self.b - self.a) * (self.end - self.start)

    def ticks(self) -> dict[float, str]:
        """Round values inside the range, four to seven of them."""
        if self.log:
            low, high = math.floor(self.a), math.ceil(self.b)
            steps = (1, 2, 5) if self.b - self.a < 2.5 else (1,)
            found = [m * 10.0**e for e in range(low, high + 1) for m in steps]
            found = [v for v in found if self.a <= math.log10(v) <= self.b]
            if len(found) > 1:
                return {v: f"{v:g}" for v in found}
            return {10**v: f"{10**v:.3g}" for v in (self.a + 0.1 * (self.b - self.a), self.b - 0.1 * (self.b - self.a))}
        step = 10.0 ** math.floor(math.log10((self.b - self.a) / 4))
        step = next(s * step for s in (1, 2, 5, 10) if (self.b - self.a) / (s * step) <= 6)
        first = math.ceil(self.a / step)
        count = math.floor(self.b / step) - first + 1
        return {(first + i) * step: f"{(first + i) * step:.6g}" for i in range(max(count, 0))}


def _axes(across: _Scale, up: _Scale, x: Axis, y: Axis) -> list[str]:
    bottom = HEIGHT - _BOTTOM
    out = []
    for value, text in (y.ticks or up.ticks()).items():
        at = _n(up.at(value))
        out.append(f'<path class="grid" d="M{_LEFT} {at}H{WIDTH - _RIGHT}"/>')
        out.append(f'<text class="y" x="{_LEFT - 6}" y="{at}">{escape(text)}</text>')
    last = -math.inf
    for value, text in sorted((x.ticks or across.ticks()).items()):
        place = across.at(value)
        if place - last > 7 * len(text) + 4:  # labels that would lie on each other are left out
            out.append(f'<text class="x" x="{_n(place)}" y="{bottom + 15}">{escape(text)}</text>')
            last = place
    out.append(f'<path class="axis" d="M{_LEFT} {bottom}H{WIDTH - _RIGHT}"/>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    out.append(f'<text class="x title" x="{_n(middle)}" y="{HEIGHT - 6}">{escape(x.title)}</text>')
    turned = f"translate(11 {_n((_TOP + bottom) / 2)}) rotate(-90)"
    out.append(f'<text class="x title" transform="{turned}">{escape(y.title)}</text>')
    return out


def _series(
    name: str, dots: Sequence[Dot], look: int, across: _Scale, up: _Scale, joined: bool, tags: list[tuple[float, float]]
) -> str:
    """One series; `tags` are the places of the tags so far: one that would lie on another is left out."""
    out = []
    banded = [(across.at(d.x), up.at(d.low), up.at(d.high)) for d in dots if d.low is not None and d.high is not None]
    if joined and len(banded) > 1:
        there = " ".join(f"{_n(px)} {_n(high)}" for px, _, high in banded)
        back = " ".join(f"{_n(px)} {_n(low)}" for px, low, _ in reversed(banded))
        out.append(f'<path class="band" d="M{there} {back}Z"/>')
    else:
        out += [f'<path class="whisker" d="M{_n(px)} {_n(low)}V{_n(high)}"/>' for px, low, high in banded]
    places = [(_n(across.at(d.x)), _n(up.at(d.y)), d) for d in dots]
    if joined and len(places) > 1:
        out.append(f'<path class="line" d="M{" ".join(f"{px} {py}" for px, py, _ in places)}"/>')
    size = "1.7" if joined and len(dots) > DENSE else "3.4"
    for px, py, dot in places:
        hollow = "" if dot.filled else ' class="hollow"'
        out.append(
            f'<circle cx="{px}" cy="{py}" r="{size}"{hollow}><title>{escape(name)}\n{escape(dot.says)}</title></circle>'
        )
        here = across.at(dot.x), up.at(dot.y)
        if dot.tag and all(abs(here[0] - x) > 26 or abs(here[1] - y) > 10 for x, y in tags):
            tags.append(here)
            out.append(f'<text class="tag" x="{px}" y="{py}" dx="6" dy="-4">{escape(dot.tag)}</text>')
    dashed = " dashed" if look >= LOOKS // 2 else ""
    return f'<g class="series s{look % LOOKS}{dashed}">{"".join(out)}</g>'


def _n(value: float) -> str:
    """A coordinate with two decimals at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
