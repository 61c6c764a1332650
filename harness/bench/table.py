"""What is made of records: Markdown, with the engine that targets are for beside the best of the others and all
engines; a comparison with earlier records, each by its ratio to the plain step of its own process; and a figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.bench.engines import OURS
from harness.records import tables
from harness.records.drawing import INK, LINE, grid, styled, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = dict[str, Any]
BASE = "plain"
ORACLE = "loop"
# Naive engines of this project, which the headline is compared with like engines of other people.
RIVALS = ("vmap", ORACLE)
CLAIM = "54 to 94 times faster than the naive loop at batch 128 (arXiv:2009.03106)"


def name_of(record: Record) -> str:
    """Workload and batch in one word: that of the record's file."""
    return f"{record['workload']['name']}-b{record['batch']}"


def row(record: Record, name: str) -> dict[str, Any] | None:
    """What was measured of an engine; None where it was not asked for."""
    return next((one for one in record["engines"] if one["name"] == name), None)


def median(record: Record, name: str) -> float | None:
    """Seconds of a step; None where the engine was not timed."""
    found = row(record, name)
    return found["seconds"]["median"] if found and found["status"] == "ok" else None


def ratio(record: Record, name: str, base: str = BASE) -> float | None:
    """A step's time in units of the base's."""
    ours, theirs = median(record, name), median(record, base)
    return ours / theirs if ours and theirs else None


def timed(record: Record) -> dict[str, float]:
    """Name to ratio to the plain step, of all that was timed, in the order of the record."""
    found = {one["name"]: ratio(record, one["name"]) for one in record["engines"]}
    return {name: value for name, value in found.items() if value is not None}


def is_baseline(name: str) -> bool:
    """Whether a name is that of a step without privacy."""
    return name.split("-")[0] == BASE


def fastest_plain(record: Record) -> str:
    """The fastest step without privacy."""
    plain = {name: value for name, value in timed(record).items() if is_baseline(name)}
    return min(plain, key=lambda name: plain[name], default=BASE)


def headline(record: Record) -> str | None:
    """The first engine that was asked for: the one that targets are for."""
    return next((one["name"] for one in record["engines"] if not is_baseline(one["name"])), None)


def best_rival(record: Record) -> str | None:
    """The fastest right engine that is not this project's own."""
    own = {*OURS, headline(record)} - set(RIVALS)
    others = {n: v for n, v in timed(record).items() if n.split("?")[0] not in own and not is_baseline(n)}
    return min(others, key=lambda name: others[name], default=None)


def worker(record: Record, name: str) -> str:
    """An engine's name, and who worked under it where that was chosen."""
    worked = (row(record, name) or {}).get("worked", {}).get("engine", "")
    plain = "".join(c for c in worked.lower() if c.isalnum())
    return name if not worked or plain == name.partition("?")[0].replace("-", "") else f"{name}: {worked}"


def memory(record: Record, name: str) -> float | None:
    """Peak memory above the loaded model, in units of the plain step's."""
    ours, theirs = (row(record, one) or {} for one in (name, BASE))
    held, base = ours.get("memory_mib"), theirs.get("memory_mib")
    return held / base if held is not None and base else None


# Markdown -------------------------------------------------------------------------------------------------


def markdown(records: Sequence[Record]) -> str:
    """Both tables, with what they mean above and what was refused, wrong or failed below."""
    if not records:
        return "Nothing was measured.\n"
    device, environment = records[0]["device"], records[0]["environment"]
    threads = f", CPU threads: {device['threads']}" if device["kind"] == "cpu" else ""
    names = list(dict.fromkeys(e["name"] for r in records for e in r["engines"] if e["name"] != BASE))
    notes: dict[str, list[str]] = {}
    return "\n".join([
        f"One step (forward, backward, clip, sum, SGD update) on {device['name']}{threads}, torch "
        f"{environment['torch']}, in units of the plain non-private step measured in turn with it; medians, in "
        "brackets quartiles.",
        "",
        *tables.markdown(
            ["workload", "batch", "plain ms", "fastest plain", "engine", "ratio", "to fastest plain", "target",
             "best other", "loop", "faster than the loop", "memory", "first call", "outside the engine"],
            [_summary(record) for record in records],
        ),
        "",
        "*best other*: the fastest right engine of the naive loop, vmap and other people's libraries. *memory*: peak "
        "above the loaded model, in units of the plain step's. *first call*: with planning and compiling, in a fresh "
        "process. *outside the engine*: noise, optimizer and ledger of a "
        f"whole private step, and their share of the plain step. Lee and Kifer claim {CLAIM}.",
        "",
        *tables.markdown(["workload", "batch", *names], [
            [record["workload"]["name"], str(record["batch"]), *(_cell(record, name, notes) for name in names)]
            for record in records
        ]),
        "",
        "Peak memory above the loaded model, in units of the plain step's:",
        "",
        *tables.markdown(["workload", "batch", "plain MiB", *names], [
            [record["workload"]["name"], str(record["batch"]), _number((row(record, BASE) or {}).get("memory_mib")),
             *(_number(memory(record, name)) for name in names)]
            for record in records
        ]),
        "",
        *(f"- all on {name_of(r)}: timed alone, since side by side {r['failed']}" for r in records if r.get("failed")),
        *(f"- {', '.join(where)}: {reason}" for reason, where in notes.items()),
    ]).rstrip() + "\n"  # fmt: skip


def _summary(record: Record) -> list[str]:
    workload, name, fastest, rival = (record["workload"], headline(record), fastest_plain(record), best_rival(record))
    plain, loop, ours = median(record, BASE), median(record, ORACLE), median(record, name) if name else None
    target = workload["target"] if record["batch"] == workload["default"] else None
    outside = (record["outside"] or {}).get("median")
    return [
        f"{workload['name']} {workload['title']}",
        str(record["batch"]),
        _number(plain and 1e3 * plain),
        f"{fastest.partition('-')[2] or 'eager'} {_number(ratio(record, fastest))}",
        worker(record, name) if name else "none",
        _spread(record, name) if name else "–",
        _number(ratio(record, name, fastest) if name else None),
        "–" if target is None else f"≤ {target:.2f}",
        "–" if rival is None else f"{rival} {_number(ratio(record, rival))}",
        _number(ratio(record, ORACLE)),
        "–" if not (loop and ours) else f"{loop / ours:.1f}×",
        _number(memory(record, name) if name else None),
        "–" if not ours else f"{(row(record, name or '') or {})['first_seconds']:.2f} s",
        "–" if not (outside and plain) else f"{1e3 * outside:.2f} ms, {outside / plain:.1%}",
    ]


def _spread(record: Record, name: str) -> str:
    found, plain = row(record, name), median(record, BASE)
    if not found or not plain or found["status"] != "ok":
        return str(found["status"]) if found else "–"
    low, high = (found["seconds"][q] / plain for q in ("q1", "q3"))
    return f"**{_number(ratio(record, name))}** ({_number(low)} to {_number(high)})"


def _cell(record: Record, name: str, notes: dict[str, list[str]]) -> str:
    found = row(record, name)
    if found is None:
        return ""
    if found["status"] == "ok":
        return _number(ratio(record, name)) + ("" if found["interleaved"] else " (alone)")
    if found["status"] == "wrong":
        return f"wrong: error {found.get('error_float32', found.get('error')):.0e}"
    notes.setdefault(found["reason"], []).append(f"{name} on {name_of(record)}")
    return str(found["status"])


def _number(value: float | None) -> str:
    """Two digits after the point where they mean something."""
    if value is None:
        return "–"
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


# Comparison ----------------------------------------------------------------------------------------------


def compare(now: Sequence[Record], then: Sequence[Record], threshold: float) -> tuple[list[str], bool]:
    """A line for each workload, batch and engine that both have, and whether any got worse.

    Worse is a ratio to the plain step that grew by more than the factor `threshold`, or no time where there was one.
    Raises ValueError where nothing is in both.
    """
    earlier = {(one["workload"]["name"], one["batch"]): one for one in then}
    lines, worse = [], False
    for record in now:
        name, batch = record["workload"]["name"], record["batch"]
        other = earlier.get((name, batch))
        for engine in [one["name"] for one in record["engines"] if not is_baseline(one["name"])]:
            before = ratio(other, engine) if other else None
            if before is None:
                continue
            after = ratio(record, engine)
            if after is None:
                found = row(record, engine) or {}
                text, bad = f"was {before:.2f}, now {found.get('status', 'not measured')}", True
            else:
                bad = after / before > threshold
                text = f"was {before:.2f}, now {after:.2f}: now/then {after / before:.2f}"
            lines.append(f"{name} batch {batch} {engine}: {text}{'  WORSE' if bad else ''}")
            worse = worse or bad
    if not lines:
        raise ValueError("nothing was timed both now and then")
    return lines, worse


# Figure -------------------------------------------------------------------------------------------------

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
