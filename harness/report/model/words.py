"""Writes the values of a report as text: numbers, intervals, epsilons, counts, dates, and how to repeat a run."""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from harness.report.model.fields import natural
from harness.report.model.runs import STATUSES, Machine, Run
from harness.report.model.statistics import Interval

ABSENT = "does not apply"
"""What stands in the place of an epsilon by an accountant that has no number for what was released."""
BUSY = "†"
"""Marks a timing that was taken on a busy machine."""


def epsilon(value: float | None) -> str:
    """Epsilon as text: ``∞`` when infinite, ``–`` when unknown."""
    if value is None or math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else f"{value:.4g}"


def small(value: float | None) -> str:
    """A small number as it is written by hand: ``1e-5``."""
    return "–" if value is None else re.sub(r"e([+-])0+(?=\d)", r"e\1", f"{value:g}").replace("e+", "e")


def percent(value: float | None, signed: bool = False) -> str:
    """A fraction as percent with two decimals, with a true minus sign."""
    if value is None:
        return "–"
    return (f"{100 * value:+.2f}" if signed else f"{100 * value:.2f}").replace("-", "−")


def count(value: float | None) -> str:
    """A quantity with three or more significant figures and thousands separators."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ratio(value: float | None) -> str:
    """A ratio such as ``0.41×``."""
    return "–" if value is None else f"{value:.2f}×"


def interval(value: Interval | None, signed: bool = False) -> str:
    """``93.10 ± 0.41`` (percent), or only the mean where there is no interval."""
    if value is None:
        return "–"
    return f"{percent(value.mean, signed)} {half(value)}".rstrip()


def half(value: Interval | None) -> str:
    """``± 0.41`` (percent), empty without an interval."""
    return "" if value is None or value.half is None else f"± {percent(value.half)}"


def bounds(value: Interval | None, signed: bool = False) -> str:
    """``[92.69, 93.51]`` in percent, empty without an interval."""
    if value is None or value.low is None or value.high is None:
        return ""
    return f"[{percent(value.low, signed)}, {percent(value.high, signed)}]"


def gap(value: Interval | None) -> str:
    """A difference, ``+0.41 [+0.10, +0.72]`` (points), or only the mean where there is no interval."""
    return "–" if value is None else f"{percent(value.mean, signed=True)} {bounds(value, signed=True)}".strip()


def by_accountant(values: Mapping[str, float], refused: Mapping[str, str]) -> str:
    """Epsilon by every accountant: ``gdp does not apply, pld 2, rdp 2.1``; empty where nothing is known."""
    texts = dict.fromkeys(refused, ABSENT) | {name: epsilon(value) for name, value in values.items()}
    return ", ".join(f"{name} {texts[name]}" for name in sorted(texts))


def refusals(refused: Mapping[str, str]) -> str:
    """Why accountants do not apply, empty where all do: ``gdp does not apply: only plain Gaussians are exact``."""
    return "; ".join(f"{name} {ABSENT}: {why}" for name, why in sorted(refused.items()) if why)


def tally(runs: Iterable[Run]) -> dict[str, int]:
    """Number of runs by status, in the order of `STATUSES`, unknown ones last."""
    counts = Counter(run.status for run in runs)
    known = {s: counts[s] for s in STATUSES if s in counts}
    return known | {s: counts[s] for s in sorted(counts) if s not in known}


def by_status(counts: Mapping[str, int]) -> str:
    """``3 ok``, ``2 ok, 1 diverged``."""
    return ", ".join(f"{n} {status}" for status, n in counts.items())


def dates(runs: Sequence[Run]) -> str:
    """First and last day of the runs, UTC."""
    days = sorted({t[:10] for r in runs for t in (r.started, r.finished) if re.match(r"\d{4}-\d\d-\d\d", t)})
    return "" if not days else days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def device_text(device: Machine) -> str:
    """A device in words: its name, and its threads where they are known."""
    threads = f", {device.threads} thread{'s' if device.threads != 1 else ''}" if device.threads else ""
    name = device.name or device.kind
    return name + threads if name else ""


def joined(values: Iterable[str]) -> str:
    """What there is, each once, in natural order."""
    return ", ".join(sorted(set(values) - {""}, key=natural))


def recipe(run: Run, suite: str, reduced: bool = False, installed: bool = True) -> list[str]:
    """What to type to make `run` again, into a folder where it has no record yet.

    `suite` is the path of the suite's file, empty where it is unknown; `reduced` says that the run is of its reduced
    profile, `installed` that its method needs no file of the user. A path outside the working directory is given by its
    name alone: it means nothing elsewhere.
    """
    lines = []
    if run.commit:
        unknown = "    # and the changes it was run with, which git does not know" if run.dirty else ""
        lines.append(f"git checkout {shlex.quote(run.commit)}{unknown}")
    path = Path(suite)
    here = bool(suite) and not path.is_absolute() and ".." not in path.parts
    file = (suite if here else path.name) or "SUITE.toml"
    words = ["epsbench", "run", file, *(["--reduced"] if reduced else []), "--only", run.id]
    words += ["--attempt", str(run.attempt)] if run.attempt != 1 else []
    words += ["--results", "again", "--no-track"]
    if not installed:  # files outside the packages are known by their bare names
        words += [word for name in run.files or ("FILE.py",) for word in ("--method", name)]
    own = "" if installed and here else "    # with the files of your own that it was run from"
    return [*lines, shlex.join(words) + own]
