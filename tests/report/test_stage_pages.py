"""What pages and commands say of a run of two stages: each fact of its own stage, and of no other."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.cli.commands import plan as plan_command
from harness.report import figures
from harness.report.page import drawings
from harness.report.page import pages as below
from tests.report.test_report import make, record
from tests.support.records import put
from tests.support.report import ADDED, MIXED, ODD, pages, staged
from tests.support.show import said

"""A throughput of two stages together."""


def earlier(seed: int = 0) -> dict[str, Any]:
    """The same run in a record from before records had stages."""
    one = staged(seed)
    one["stages"] = [{k: v for k, v in stage.items() if k not in ADDED} for stage in one["stages"]]
    one["privacy"] |= {"sampling": "Poisson, q = 0.064", "sensitivity": {"grad": 0.25}}
    one["measured"]["examples_per_second"] = {"median": MIXED, "q1": MIXED, "q3": MIXED}
    one["measured"]["engine"] = "BookKeeping"
    one["diagnostics"] = {"clipped_fraction": 0.9}
    return one


def table(one: dict[str, Any]) -> list[dict[str, str]]:
    (row,) = make([one]).rows
    heads = [name for name, _ in below.HEADS]
    return [dict(zip(heads, line, strict=True)) for line in below.stage_lines(row)]


def test_a_line_for_each_stage_with_its_own_facts() -> None:
    first, second = table(staged())
    of_first = {"1", "logit-dp", "everything", "256", "40", "2.56", "grad 16.78", "1.75", "123", "Pairs"}
    of_second = {"2", "dp-adam", "the head", "512", "60", "7.68", "grad 0.25", "2.994", "9,876", "BookKeeping"}
    assert of_first | {"Poisson, q = 0.064"} <= set(first.values())
    assert of_second | {"Poisson, q = 0.128"} <= set(second.values())
    page = pages(make([staged()]))["runs"]
    assert "Examples/s of stage 1" in page and "Training, both stages" in page
    assert ">Schedule<" not in page, "one schedule would be that of one stage"
    plain = pages(make([record()]))["runs"]
    assert "Examples/s of stage 1" not in plain and ">Stages<" not in plain and ">Schedule<" in plain
    assert below.stage_lines(make([record()]).rows[0]) == []


def test_public_data_are_protected_by_nothing_and_cost_nothing() -> None:
    one = staged()
    one["cell"]["then"]["task"] = {"dataset": "other-data", "n_train": 512}
    one["stages"][1] |= {"data": "other-data", "public": True, "relation": None, "sensitivity": None}
    second = table(one)[1]
    assert (
        second["Data"] == "other-data (public)" and second["Relation"] == second["Sensitivity"] == "none: public data"
    )
    (row,) = make([one]).rows
    first, after = drawings.of_row(row)[0].panels
    assert "ε spent" in first[1] and "seconds of training" in after[1], "nothing is spent in the second"
    assert row.shared("sampling") == "Poisson, q = 0.064"


def test_an_earlier_record_shows_no_number_that_mixes_stages() -> None:
    first, second = table(earlier())
    unknown = below.UNKNOWN
    assert first["Sensitivity"] == first["Examples/s"] == second["Examples/s"] == second["Training, s"] == unknown
    assert first["Sampling"] == "Poisson, q = 0.064" and second["Sampling"] == unknown and first["Engine"] == unknown
    assert second["Sensitivity"] == "grad 0.25" and second["Engine"] == "BookKeeping" and second["Steps"] == "60"
    model = make([earlier(), *[record("dp-sgd", 0.7)]])
    row = next(row for row in model.rows if row.first.stages)
    assert row.rate is None and row.first.engine == ""
    shown = re.sub(r'<pre class="record">.*?</pre>', "", pages(model)["runs"], flags=re.S)
    assert unknown in shown and "4,568" not in shown
    assert str(MIXED) not in pages(model)["html"] and str(MIXED) not in pages(model)["csv"]
    assert row.shared("sampling") == f"Poisson, q = 0.064 (stage 1); {unknown} (stage 2)"


def test_no_line_goes_through_two_stages() -> None:
    model = make([staged(), staged(1), record("dp-sgd", 0.6)])
    row = next(row for row in model.rows if row.first.stages)
    for drawing, scale in zip(drawings.of_row(row), (100, 50), strict=True):
        titles = [title for title, _ in drawing.panels]
        assert titles == ["Stage 1: logit-dp", "Stage 2: dp-adam"]
        for (_, html), steps in zip(drawing.panels, ((10, 40), (50, 100)), strict=True):
            found = [(int(s), float(y)) for s, y in re.findall(r"step (\d+), [\d.]+: ([\d.]+) %", html)]
            wanted = [p for p in staged()["trace"] if steps[0] <= p["step"] <= steps[1]]
            assert found == 2 * [(p["step"], pytest.approx(scale * p["accuracy"], abs=0.01)) for p in wanted]
    (panel,) = figures.curves_data(model)
    assert [e for e, _ in panel.series[row.title]] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert row.seconds_to(0.9) == float("inf"), "the first stage's accuracy is of another network"
    assert row.seconds_to(0.6) == 8.0


OF_THEN = ("name", "parts", "parameters", "schedule", "schedule.batch", "task")
PATHS = [
    *(f"stages.{i}.{name}" for i in (0, 1) for name in (*ADDED, "method", "steps")),
    *(f"cell.then.{name}" for name in OF_THEN), "cell.then", "stages", "stages.0", "stages.1", "trace",
]  # fmt: skip


@settings(max_examples=16, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(PATHS), ODD), max_size=6), st.booleans())
def test_odd_stages_never_stop_a_report(edits: list[tuple[str, Any]], old: bool) -> None:
    one: Any = earlier() if old else staged()
    for path, value in edits:
        inner, (*way, last) = one, (int(key) if key.isdigit() else key for key in path.split("."))
        for key in way:
            there = inner if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
            inner = inner[key] if key in there else None
        if isinstance(inner, dict) or (isinstance(inner, list) and last in range(len(inner))):
            inner[last] = copy.deepcopy(value)
    for content in pages(make([one])).values():
        content.encode("utf-8")


def test_show_prints_each_stage_and_an_odd_one_is_quarantined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    now, old, odd = staged(), earlier(1), staged(2)
    odd["stages"][1]["sensitivity"] = "much"
    for one in (now, old):
        put(Path("results"), {k: v for k, v in one.items() if k not in ("path", "stale", "trace")})
    with pytest.raises(Exception, match=r'"stages.2.sensitivity": expected object \| null, got str'):
        put(Path("results"), {k: v for k, v in odd.items() if k not in ("path", "stale", "trace")})
    shown = said(capsys, "show", now["id"])
    first, second = shown.split("stage 1 ")[1].split("stage 2 ")
    assert "batch 256, 40 steps" in first and "sensitivity grad 16.78" in first and "speed 123 examples/s" in first
    assert "batch 512, 60 steps" in second and "sensitivity grad 0.25" in second and "q = 0.128" in second
    assert "speed 9876 examples/s" in second and "trains head" in second and "pld 2.994" in second
    assert "schedule of each stage" in shown and "diagnostics" not in shown
    before = said(capsys, "show", old["id"])
    assert before.count("speed not recorded") == 2 and "4567.8" not in before and "sensitivity not recorded" in before


def test_the_plan_counts_both_schedules() -> None:
    cell, plain = staged()["cell"], record()["cell"]
    kind, steps = plan_command._kind_of(cell)
    assert steps == 100 and plan_command._kind_of(plain) == (("dp-sgd", "mnist-5k/tanh-cnn"), 312)
    assert kind != plan_command._kind_of({k: v for k, v in cell.items() if k != "then"})[0]
    cell["then"]["schedule"]["steps"] = 20
    assert plan_command._kind_of(cell)[0] != kind, "head and body take another time a step"
