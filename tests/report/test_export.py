"""Exports of tables and the table of records: typed, complete, and never broken by what a record is called."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import harness
from harness.records import frame
from harness.report import board, build, export, text
from harness.report.model import tables
from tests.report.test_report import QUESTION, fixture_records, hostile, seeds
from tests.support import ROOT
from tests.support.records import make_record, put
from tests.support.report import PUBLISHED

EVIL = "\\end{tabular} & 100% of $x_1^2$ #1 {~<a>|[b]*`\"--' 中 é \\\\"


def structure(source: str) -> None:
    """Raises where LaTeX would: braces, math, environments, columns, characters that a plain document lacks."""
    plain = re.sub(r"\\(?:[A-Za-z]+|[{}$&#%_\\])", lambda m: " " if m[0] != r"\\" else "\n", source)
    depth = 0
    for c in re.sub(r"(?m)^%.*$", "", plain):
        depth += (c == "{") - (c == "}")
        assert depth >= 0
        assert c.isascii() or c in export._LETTERS, c
        assert c not in "#^~_%\\", f"{c} is markup: {source}"
    assert depth == 0 and plain.count("$") % 2 == 0
    environments = re.findall(r"(?<!\\)\\(begin|end)\{(\w+)\}", source)
    assert environments == [("begin", "table"), ("begin", "tabular"), ("end", "tabular"), ("end", "table")]
    columns = re.search(r"\\begin\{tabular\}\{(\S+)\}\n", source)
    assert columns
    width = len(re.sub(r"\{[^}]*\}", "", columns[1]))
    body = source.partition(r"\toprule")[2].partition(r"\bottomrule")[0]
    for line in filter(None, body.replace("\\midrule\n", "").splitlines()):
        assert line.endswith(r" \\") and not line.startswith(("[", "*")), line
        assert len(re.findall(r"(?<!\\)&", line)) == width - 1, line


@settings(max_examples=80, deadline=None)
@given(st.text())
@example(EVIL)
@example("\\\\[2cm] ---")
@example("−−$−")
def test_no_text_is_markup_in_latex(words: str) -> None:
    structure(export._tex(("a", words), [[words, "1"], ["1", words]], "lr", words, "x", [words]))
    assert "--" not in export.tex("a----b") and export.tex("a–b") == "a--b"


def test_latex_says_what_it_was_given() -> None:
    assert export.tex("dp_sgd & 5% of ε") == r"dp\_sgd \& 5\% of $\varepsilon$"
    assert export.tex("[é]\n中\\") == r"{[}é{]} {[}U+4E2D{]}\textbackslash{}"


@pytest.mark.parametrize("name", [EVIL, "=cmd()", "\x1b[31m\u202e", "a|b", "plain"])
def test_hostile_names_leave_every_form_valid(name: str) -> None:
    claim = {"method": name, "task": name, "epsilon": 3, "value": 0.5, "source": name, "note": name}
    found = export.files(board(name, name, hostile(name), [claim]))
    assert {Path(path).suffix for path in found} == set(export.SUFFIXES) and "tables/published.tex" in found
    for path, content in found.items():
        assert re.fullmatch(r"tables/[a-z0-9.-]+", path)
        content.encode()
        assert not re.search(r"[\u202a-\u202e\x1b]", content)
        if path.endswith(".tex"):
            structure(content)
        elif path.endswith(".json"):
            json.loads(content, parse_constant=pytest.fail)
        elif path.endswith(".csv"):
            rows = list(csv.reader(io.StringIO(content)))
            assert len({len(row) for row in rows}) == 1 and not any(c.startswith("=") for row in rows for c in row)
        else:
            widths = {len(re.findall(r"(?<!\\)\|", line)) for line in content.splitlines() if line.startswith("|")}
            assert len(widths) == 1


def test_every_table_is_there_in_four_forms_that_agree() -> None:
    model = board("core", QUESTION, fixture_records(), PUBLISHED)
    found = export.files(model)
    assert len(found) == 4 * (len(model.tables) + 1)
    assert len({Path(path).stem for path in found}) == len(model.tables) + 1
    for number, table in enumerate(model.tables):
        md, written, tex, plain = list(found.values())[4 * number : 4 * number + 4]
        data = json.loads(plain)
        rows = list(csv.DictReader(io.StringIO(written)))
        assert len(rows) == len(data["rows"]) == len(table.entries) + len(table.references)
        assert data["table"] == tables.heading(table) and md.startswith("## ")
        units = {one["name"]: one.get("unit") for one in data["columns"]}
        for row, typed in zip(rows, data["rows"], strict=True):
            assert text.escape(typed["label"]) in md and export.tex(typed["label"]) in tex
            for name, cell in row.items():
                if cell == "":
                    assert name not in typed
                elif units[name] is None:
                    assert typed[name] == cell.removeprefix("'")
                elif cell == "inf":
                    assert typed[name] is None  # as in a record
                else:
                    assert type(typed[name]) in (int, float) and typed[name] == float(cell)
    published = json.loads(found["tables/published.json"])
    assert len(published["rows"]) == len(model.published)
    assert all(isinstance(row["epsilon"], float | None) for row in published["rows"] if "epsilon" in row)


def test_every_column_of_numbers_has_a_unit() -> None:
    """A new column that is forgotten here would be text in the JSON."""
    model = board("core", QUESTION, fixture_records(), PUBLISHED)
    for table in model.tables:
        for entry in table.every:
            for name, value in text.csv_row(table, entry).items():
                assert not isinstance(value, int | float) or name in export.UNITS, f"say the unit of {name}"


def test_a_report_writes_its_tables_and_removes_those_that_are_no_more(tmp_path: Path) -> None:
    records = [*seeds("dp-sgd", [0.8, 0.82]), *seeds("dp-sgd", [0.9, 0.91], epsilon=8.0)]
    folder = build("core", "", records, tmp_path, private=True).folder / "tables"
    names = {f"mnist-5k-tanh-cnn-eps-{epsilon}{suffix}" for epsilon in (3, 8) for suffix in export.SUFFIXES}
    assert {path.name for path in folder.iterdir()} == names
    assert not build("core", "", records, tmp_path, private=True).written
    (folder / "mnist-5k-tanh-cnn-eps-3.tex").unlink()
    assert build("core", "", records, tmp_path, private=True).written  # a report that is not whole is made again
    build("core", "", records[:2], tmp_path, private=True)
    assert {path.name for path in folder.iterdir()} == {name for name in names if "eps-3" in name}


# ------------------------------------------------------------ --- load_results


def test_the_columns_are_those_that_are_documented() -> None:
    page = (ROOT / "docs" / "submitting.md").read_text()
    documented = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", page, re.MULTILINE)
    assert documented == [(name, kind) for name, (kind, _) in frame.COLUMNS.items()]


@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "metrics": st.fixed_dictionaries(
                    {"accuracy": st.floats(0, 1) | st.integers(0, 1), "loss": st.none() | st.floats(0, 9)}
                ),
                "started": st.sampled_from([None, "2025-01-01T00:00:00+00:00", "2025-W01-1", "9999-01-01"]),
                "device": st.fixed_dictionaries(
                    {}, optional={"name": st.none() | st.text(max_size=5), "threads": st.none() | st.integers(1)}
                ),
                "measured": st.just({"jobs": None}),
            },
        ),
        max_size=4,
    )
)
def test_types_do_not_depend_on_what_is_there(changes: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as place:
        for seed, change in enumerate(changes):
            folder = Path(place) / "core" / make_record(seed)["id"]
            folder.mkdir(parents=True)
            (folder / "record.json").write_text(json.dumps(make_record(seed, **change)))
        found = harness.load_results(place)
    assert {name: str(kind) for name, kind in found.dtypes.items()} == {n: k for n, (k, _) in frame.COLUMNS.items()}
    assert len(found) == len(changes) and sorted(found.seed) == list(range(len(changes)))
    by_seed = found.set_index("seed")
    for seed, change in enumerate(changes):
        held = {"accuracy": 0.9, "loss": 0.3} | change.get("metrics", {})
        assert by_seed.accuracy[seed] == held["accuracy"]
        assert math.isnan(by_seed.loss[seed]) if held["loss"] is None else by_seed.loss[seed] == held["loss"]


def test_epsilons_and_attempts_and_damage(tmp_path: Path) -> None:
    base = make_record()["privacy"]
    spent = {"spent": {"pld": 2.9, "rdp": 3.1}, "accountant": "pld", "epsilon": 2.9}
    put(tmp_path, make_record(0, privacy=base | spent))
    put(tmp_path, make_record(0, privacy=base | {"spent": {"pld": None}, "accountant": "pld"}), attempt=2)
    put(tmp_path, make_record(1, status="crashed", reason="x", privacy=base | {"spent": {}, "accountant": None}))
    bad = tmp_path / "core" / ("e" * 12)
    bad.mkdir()
    (bad / "record.json").write_text('{"schema": 1')
    with pytest.warns(UserWarning, match="quarantined: .*eeeeeeeeeeee/record.json: not JSON") as warned:
        found = harness.load_results(tmp_path)
    assert warned[0].filename == __file__
    (broken,) = found.attrs["broken"]
    assert "eeeeeeeeeeee" in broken
    first, again, crashed = (found.iloc[i] for i in found.sort_values(["seed", "attempt"]).index)
    assert (first.epsilon, first.epsilon_rdp, first.target_epsilon, first.attempt) == (2.9, 3.1, 3.0, 1)
    assert again.epsilon == math.inf and math.isnan(again.epsilon_rdp) and again.attempt == 2
    assert math.isnan(crashed.epsilon) and crashed.status == "crashed"
    assert json.loads(first.parameters) == {"clip": 1.0, "lr": 0.5}


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys; import harness; print({'pandas', 'torch', 'numpy', 'harness.records.store'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


def test_results_load_where_there_is_no_unix() -> None:
    """On Windows and macOS records are read: what exists on Unix alone is not needed for that."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('fcntl', 'resource', 'pwd', 'grp', 'termios')));"
        "import harness; print(len(harness.load_results('results')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) > 0
