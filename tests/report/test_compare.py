"""Comparisons: the interval is the paired t-interval, what has no pair is counted, the exit code is the verdict."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import cli
from harness.report import compare
from harness.report.model import pairs
from tests.report.test_report import record, seeds
from tests.support.records import make_cell, make_record, put

FRACTIONS = st.floats(0, 1).map(lambda x: round(x, 6))
PAIRS = st.lists(st.tuples(FRACTIONS, FRACTIONS), min_size=2, max_size=8)
SCALE = {"accuracy": 0, "examples_per_second": 1, "peak_memory_mib": 1}


def measured(method: str, values: list[float], metric: str, **options: Any) -> list[dict[str, Any]]:
    """Finished records with these values of a metric, one a seed."""
    out = seeds(method, values if metric == "accuracy" else [0.5] * len(values), **options)
    for one, value in zip(out, values, strict=True):
        if metric == "examples_per_second":
            one["diagnostics"]["examples_per_second"]["median"] = value
        elif metric == "peak_memory_mib":
            one["diagnostics"]["peak_memory_mib"] = value
    return out


@settings(max_examples=24, deadline=None)
@given(PAIRS, st.sampled_from(list(pairs.METRICS)), st.floats(0, 0.2), st.randoms())
def test_a_line_is_the_paired_t_interval_of_scipy(pairs: Any, metric: str, threshold: float, order: Any) -> None:
    a, b = ([x + SCALE[metric] for x in side] for side in zip(*pairs, strict=True))
    records = [*measured("dp-sgd", a, metric), *measured("dp-adam", b, metric)]
    order.shuffle(records)
    made = compare.methods(records, "dp-sgd", "dp-adam", metric=metric, threshold=threshold)
    (line,) = made.lines
    changes = [y - x if metric == "accuracy" else y / x - 1 for x, y in pairs_of(a, b)]
    assert line.difference is not None and line.difference.mean == pytest.approx(math.fsum(changes) / len(changes))
    if len({round(x, 12) for x in changes}) > 1:
        expected = scipy.stats.ttest_1samp(changes, 0.0).confidence_interval(0.95)
        assert (line.difference.low, line.difference.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
        if metric == "accuracy":
            paired = scipy.stats.ttest_rel(b, a).confidence_interval(0.95)
            assert (line.difference.low, line.difference.high) == pytest.approx((paired.low, paired.high), abs=1e-12)
    assert line.difference.low is not None and line.difference.high is not None
    lost = line.difference.low > threshold if metric == "peak_memory_mib" else line.difference.high < -threshold
    assert made.regressions == lost == (line.verdict == "worse")


def pairs_of(a: list[float], b: list[float]) -> list[tuple[float, float]]:
    return list(zip(a, b, strict=True))


def test_lines_of_several_settings_are_means_seed_by_seed() -> None:
    """Not a pool of their differences, whose interval would count a seed twice."""
    gains = {1.0: [0.01, 0.02, 0.06], 8.0: [0.03, 0.02, 0.02]}
    records = []
    for epsilon, gain in gains.items():
        records += seeds("dp-sgd", [0.5, 0.6, 0.7], epsilon=epsilon)
        records += seeds("dp-adam", [x + g for x, g in zip([0.5, 0.6, 0.7], gain, strict=True)], epsilon=epsilon)
    (line,) = compare.methods(records, "dp-sgd", "dp-adam", by="task").lines
    expected = scipy.stats.ttest_1samp([0.02, 0.02, 0.04], 0.0).confidence_interval(0.95)
    assert line.difference is not None and line.pairings == 2
    assert (line.difference.low, line.difference.high) == pytest.approx((expected.low, expected.high))
    assert [len(compare.methods(records, "dp-sgd", "dp-adam", by=by).lines) for by in compare.BY] == [2, 1, 1, 2, 1, 1]
    short = [r for r in records if not (r["cell"]["seed"] == 1 and r["cell"]["privacy"]["epsilon"] == 8.0)]
    (line,) = compare.methods(short, "dp-sgd", "dp-adam", by="all").lines
    assert line.incomplete == 1 and line.difference is not None
    assert line.difference.mean == pytest.approx(0.03)  # that of the pairing that has every seed


def test_what_cannot_be_paired_is_counted() -> None:
    a = [
        *seeds("dp-sgd", [0.8, 0.81, 0.82]),
        *seeds("dp-sgd", [0.7], epsilon=8.0),
        *seeds("dp-sgd", [0.6], epsilon=1.0),
    ]
    b = [
        record("dp-adam", 0.8, 0), record("dp-adam", seed=1, status="diverged", reason="not finite"),
        record("dp-adam", 0.8, 7), *seeds("dp-adam", [0.72], epsilon=8.0),
    ]  # fmt: skip
    made = compare.methods([*a, *b], "dp-sgd", "dp-adam")
    three, eight = made.lines
    assert (three.verdict, three.seeds, three.broken, three.unpaired) == ("fails", (0,), 1, (2, 1))
    assert three.statuses == ({"ok": 3}, {"ok": 2, "diverged": 1})
    assert eight.verdict == "one seed" and eight.difference is not None and eight.difference.low is None
    assert made.regressions == 1 and made.missing == (("core: mnist-5k/tanh-cnn, ε = 1",), ())
    said = made.terminal()
    for expected in ("1 of 2 lines have one paired seed: there is no interval", "2 of A, 1 of B", "Only in A, 1:",
                     "1 runs that A finished failed in B", "2 ok, 1 diverged"):  # fmt: skip
        assert expected in said, said
    elsewhere = measured("dp-adam", [2.0, 2.0], "examples_per_second", device="Another CPU")
    (line,) = compare.methods(
        [*seeds("dp-sgd", [0.8, 0.8]), *elsewhere], "dp-sgd", "dp-adam", metric="examples_per_second"
    ).lines
    assert (line.verdict, line.unpaired) == ("no pairs", (2, 2))  # a speed on another machine says nothing
    free = seeds("non-private", [0.9, 0.92], epsilon=None)
    made = compare.methods([*a, *free], "non-private", "dp-sgd")
    assert [len(line.seeds) for line in made.lines] == [1, 2, 1]  # at every epsilon


def test_names_that_mean_nothing_or_too_much() -> None:
    records = [*seeds("dp-sgd", [0.8], lr=1.0), *seeds("dp-sgd", [0.7], lr=3.0), *seeds("dp-adam", [0.7])]
    with pytest.raises(pairs.CompareError, match="no record is of such a method; there are dp-adam, dp-sgd"):
        compare.methods(records, "dp-adma", "dp-sgd")
    with pytest.raises(pairs.CompareError, match=r"(?s)2 rows of core: .*write group or title:.*dp-sgd \(lr=3\)"):
        compare.methods(records, "dp-sgd", "dp-adam")
    (line,) = compare.methods(records, "dp-sgd (lr=3)", "dp-adam").lines
    assert line.a is not None and line.a.mean == 0.7
    assert compare.methods(records, records[0]["group"], "dp-adam").lines[0].a.mean == 0.8  # type: ignore[union-attr]
    with pytest.raises(pairs.CompareError, match="no task and epsilon in common"):
        compare.methods([*seeds("a", [0.1], epsilon=1.0), *seeds("b", [0.1], epsilon=2.0)], "a", "b")
    with pytest.raises(pairs.CompareError, match="no cell in common"):
        compare.folders(seeds("dp-sgd", [0.1]), seeds("dp-adam", [0.1]), "a", "b")


@settings(max_examples=16, deadline=None)
@given(PAIRS, st.floats(0, 0.1))
def test_turning_a_comparison_round_turns_its_sign(pairs: Any, threshold: float) -> None:
    before, after = (seeds("dp-sgd", list(side)) for side in zip(*pairs, strict=True))
    there = compare.folders(before, after, "a", "b", threshold=threshold)
    back = compare.folders(after, before, "b", "a", threshold=threshold)
    one, other = there.lines[0].difference, back.lines[0].difference
    assert one is not None and other is not None and one.mean == pytest.approx(-other.mean, abs=1e-15)
    assert {there.lines[0].verdict, back.lines[0].verdict} in ({"worse", "better"}, {"undecided"})
    assert not compare.folders(before, before, "a", "a").regressions
    plain = json.loads(json.dumps(there.json(), allow_nan=False))
    assert plain["lines"][0]["change"]["mean"] == one.mean and plain["lines"][0]["epsilon"] == 3.0
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in there.markdown().splitlines() if line.startswith("|")]
    assert len(set(cells)) == 1


def test_the_command_and_its_exit_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, loss in (("before", 0.0), ("same", 0.0), ("after", 0.05)):
        for seed in range(3):
            put(Path(folder), make_record(seed, metrics={"accuracy": 0.9 + 0.001 * seed - loss * (1 + 0.01 * seed)}))

    def code(request: str) -> int:
        return cli.main(["compare", *request.split()])

    assert code("before same") == cli.OK
    assert code("before after --json out.json --markdown out.md") == cli.FAILED
    assert "worse" in capsys.readouterr().out and "worse" in Path("out.md").read_text()
    assert json.loads(Path("out.json").read_text())["regressions"] == 1
    assert code("after before") == cli.OK
    assert code("before after --threshold 0.04") == cli.FAILED and code("before after --threshold 0.06") == cli.OK
    assert code("before/core after/core --by all") == cli.FAILED  # a suite's own folders
    capsys.readouterr()
    for seed in range(3):  # a change that makes every run crash is no success
        put(Path("crash"), make_record(seed, status="crashed", reason="for the test", metrics={}))
    assert code("before crash") == cli.FAILED and "3 runs that A finished failed in B" in capsys.readouterr().out
    put(Path("one"), make_record(0, metrics={"accuracy": 0.1}))
    assert code("before one") == cli.OK and "there is no interval" in capsys.readouterr().out
    broken = Path("same/core") / ("e" * 12)
    broken.mkdir()
    (broken / "record.json").write_text("{")
    assert code("before same") == cli.OK and "quarantined: same/core/eeeeeeeeeeee" in capsys.readouterr().out
    wrong = {
        "before nowhere": "before is a folder and nowhere is not",
        "dp-sgd dp-adam --results before": "no record is of such a method",
        "dp-sgd dp-sgd --results nowhere": "holds no records to compare",
        "before after --threshold -1": "no threshold",
        "before after --threshold nan": "no threshold",
        "before after --suite other": "holds no records",
    }
    for request, said in wrong.items():
        assert code(request) == cli.USER_ERROR and said in capsys.readouterr().err, request
    for request in ("before", "before after --metric speed", "before after --by seed"):
        with pytest.raises(SystemExit) as end:
            code(request)
        assert end.value.code == cli.USER_ERROR
    assert make_cell().group  # the records above are of one group


def test_the_command_offers_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Its choices are written down twice, so that --help imports nothing."""
    with pytest.raises(SystemExit):
        cli.main(["compare", "--help"])
    text = re.sub(r"\s+", "", capsys.readouterr().out)
    assert "{" + ",".join(pairs.METRICS) + "}" in text and "{" + ",".join(compare.BY) + "}" in text
