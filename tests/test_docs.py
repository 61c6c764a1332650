"""What the documents say is true: their examples run, and the records in the repository fit the schema."""

import json
import re

import jsonschema

from harness import suite
from harness.records.schema import schema
from harness.verify.conformance import named
from tests.support import ROOT
from tests.support.conforming import failed

RECORDS = sorted(ROOT.glob("results/*/*/record.json"))
SCHEMA = json.loads((ROOT / "docs" / "record.schema.json").read_text())
ADAPTERS = [
    (page, code)
    for page in ("README.md", "docs/adding-a-method.md")
    for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    if "@method(" in code
]


def test_documented_methods_conform(tmp_path):
    file = tmp_path / "documented.py"
    file.write_text("\n".join(code for _, code in ADAPTERS))  # all in one: a process of its own makes ids of a file
    methods = named(str(file))
    assert len(methods) == len(ADAPTERS)
    assert [line for one in methods for line in failed(one.method, (one.name, one.file))] == []


def test_the_readme_example_is_as_short_as_it_says():
    readme = [code for page, code in ADAPTERS if page == "README.md"]
    assert len(readme) == 1 and len([line for line in readme[0].splitlines() if line.strip()]) <= 20


def test_the_published_schema_is_that_of_records():
    """``python -m harness.records.schema docs/record.schema.json`` writes it."""
    assert schema() == SCHEMA


def test_records_fit_the_published_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    assert RECORDS, "the repository holds the records of its reference suites"
    for path in RECORDS:
        errors = [f"{path}: {e.json_path}: {e.message}" for e in validator.iter_errors(json.loads(path.read_text()))]
        assert errors == []


def test_the_two_commands_are_in_the_readme():
    text = (ROOT / "README.md").read_text()
    assert "make reproduce" in text and "make test" in text


def test_the_documented_suite_is_valid():
    whole, methods = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "suites.md").read_text(), re.DOTALL)
    assert suite.parse(whole, "suites.md").name == "mine"
    others = whole[: whole.index("[[method]]")] + methods
    assert [v.then.name for v in suite.parse(others, "suites.md").variants if v.then] == ["dp-sgd", "non-private"]
