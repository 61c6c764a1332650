"""Published values beside what was measured: whether they agree, and if that cannot be decided, why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.report.model.fields import number, scalar
from harness.report.model.rows import REDUCED_TASK, Row
from harness.report.model.runs import Run
from harness.report.model.statistics import Interval, mean_interval, rounding
from harness.report.model.words import by_status, epsilon, tally


@dataclass(frozen=True)
class PublishedValue:
    """One published value beside what was measured. `row` is None when nothing here measures it.

    `verdict` is ``agrees`` (the value lies in the 95 % interval of the measurement), ``differs`` or
    ``not comparable``, and then `because` says why. `difference` is measured minus published, None where nothing was
    measured.
    """

    method: str
    task: str
    epsilon: float
    metric: str
    value: float | None
    source: str
    note: str
    row: Row | None
    measured: Interval | None
    verdict: str
    difference: float | None
    because: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()

    @property
    def would_change(self) -> str:
        """What would make the verdict another one."""
        m = self.measured
        if self.verdict == "not comparable" or m is None or self.value is None or m.low is None or m.high is None:
            return "; ".join(dict.fromkeys(self.remedies))
        if self.verdict == "agrees":
            room = min(self.value - m.low, m.high - self.value)
            return f"an end of our interval moving by {_amount(self.metric, room)} or more, as more seeds may do"
        gap = max(m.low - self.value, self.value - m.high)
        return f"an interval of ours that reaches {_amount(self.metric, gap)} further"


def verdicts(claim: Mapping[str, Any], rows: Sequence[Row], reduced: bool) -> list[PublishedValue]:
    """Compare one published value with every row that measures it (each variant and each device by itself)."""

    def text(name: str) -> str:
        value = claim.get(name)
        return "" if value is None else scalar(value)

    method, task, metric = text("method"), text("task"), text("metric") or "accuracy"
    target, value = _epsilon_value(claim.get("epsilon")), number(claim.get("value"))
    if metric == "accuracy" and value is not None and value > 1:
        value /= 100  # papers print percent
    known = PublishedValue(
        method, task, target, metric, value, text("source"), text("note"), None, None, "not comparable", None
    )
    names = [(r.setting.task, r.setting.task.removesuffix(REDUCED_TASK), r.first.dataset) for r in rows]
    there = [row for row, called in zip(rows, names, strict=True) if task in called]
    plain = [r for r in there if r.first.method == method and not r.first.changes]  # with its own parts
    there = [r for r in there if r.label == method] or plain
    tested = [row for row in there if row.setting.split == "test"]
    here = [row for row in tested if math.isclose(row.setting.epsilon, target, rel_tol=1e-9)]
    out = []
    for row in here:
        measured = mean_interval(
            (v for v in (_metric(run, metric) for run in row.counted) if v is not None),
            rounding(row.examples) if metric == "accuracy" else 0.0,
        )
        if measured is None or value is None or not math.isfinite(measured.mean):
            continue
        why = _obstacles(row, metric, measured, text("accountant"), reduced)
        verdict = "not comparable" if why else "agrees" if measured.contains(value) else "differs"
        reasons, remedies = zip(*why, strict=True) if why else ((), ())
        made = replace(known, row=row, measured=measured, verdict=verdict, difference=measured.mean - value)
        out.append(replace(made, because=reasons, remedies=remedies))
    reason, remedy = _absent(known, there, tested, here, reduced)
    return out or [replace(known, because=(reason,), remedies=(remedy,))]


def _obstacles(row: Row, metric: str, measured: Interval, accountant: str, reduced: bool) -> list[tuple[str, str]]:
    """Why a measurement cannot be held against a published value, each with what would help; `accountant` is the one
    of the published epsilon."""
    why = []
    if reduced or row.setting.task.endswith(REDUCED_TASK):
        why.append(_REDUCED)
    others = {run.calibrated for run in row.counted if run.calibrated} - {accountant}
    if accountant and others and math.isfinite(row.setting.epsilon):
        why.append(
            (f"its epsilon is by {accountant}, ours by {', '.join(sorted(others))}", f"runs calibrated by {accountant}")
        )
    if stale := sum(run.stale for run in row.counted):
        why.append((f"{stale} of {len(row.counted)} runs were made by other code than today's", "running it again"))
    if metric in ("examples_per_second", "train_seconds") and (busy := sum(run.busy for run in row.counted)):
        why.append((f"{busy} of {len(row.counted)} runs were timed on a busy machine", "running it on a quiet one"))
    if measured.low is None:
        why.append(("one seed gives no interval", "more seeds"))
    return why


_REDUCED = ("this is a reduced profile", "running the whole suite")


def _absent(
    claim: PublishedValue, there: Sequence[Row], tested: Sequence[Row], here: Sequence[Row], reduced: bool
) -> tuple[str, str]:
    """Why nothing stands beside a published value, and what would help: `there` are its rows, `tested` those on the
    test split, `here` those of them at its epsilon."""
    if claim.value is None:
        return "no value is given", "a published value"
    if reduced:
        return _REDUCED
    if not there:
        return f"nothing here runs {claim.method} on {claim.task}", f"runs of {claim.method} on {claim.task}"
    at = f"at ε = {epsilon(claim.epsilon)}"
    if here:
        ended = by_status(tally(r for row in here for r in row.runs))
        name = claim.metric.replace("_", " ")
        return f"no run gave its {name} ({ended})", f"runs that give its {name}"
    if not tested:
        return "only a validation split was evaluated", f"runs {at} on the test split"
    others = sorted({row.setting.epsilon for row in tested})
    return f"no run {at}, only at {', '.join(map(epsilon, others))}", f"runs {at}"


def _amount(metric: str, value: float) -> str:
    return f"{100 * value:.2f} points" if metric == "accuracy" else f"{value:.4g}"


def _epsilon_value(value: Any) -> float:
    if isinstance(value, str) and value.strip().lstrip("+").lower() not in ("inf", "infinity", "∞"):
        try:
            value = float(value)
        except ValueError:
            return math.nan
    x = number(value)
    return math.inf if x is None else x


def _metric(run: Run, name: str) -> float | None:
    measured = {
        "epsilon": run.epsilon, "examples_per_second": run.rate, "peak_memory_mib": run.peak_memory,
        "train_seconds": run.train_seconds, "noise_multiplier": run.sigma,
    }  # fmt: skip
    return run.metrics.get(name, measured.get(name))
