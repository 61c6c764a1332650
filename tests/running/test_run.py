"""Whole runs: what their records say of plan, price, claim and failure."""

import dataclasses
import json

import jsonschema
import pytest

from harness import registry, suite
from harness.records.cell import Cell
from harness.report.model.runs import read
from harness.running.run import execute
from tests.support import ROOT

SCHEMA = json.loads((ROOT / "docs" / "record.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA | {"$ref": "#/$defs/Privacy"})
SUITE = """
[suite]
name = "kill"
question = "Does a kill change anything?"
seeds = 1
[privacy]
epsilon = 3.0
delta = 1e-5
relation = "add-or-remove"
accountant = "rdp"
[train]
batch = 64
steps = {steps}
[[task]]
dataset = "digits"
model = "mlp?hidden=64"
[[method]]
name = "{method}"
"""


def cell(method: str = "dp-adam", steps: int = 300) -> Cell:
    return suite.parse(SUITE.format(method=method, steps=steps), "kill.toml").cells()[0]


def test_a_record_says_what_was_planned_and_spent(tmp_path):
    record = execute(cell("dp-sgd", 40), tmp_path, "kill")
    privacy = record["privacy"]
    assert privacy["planned"] == privacy["spent"]
    assert 2.97 <= privacy["spent"]["rdp"] <= 3.0 and privacy["spent"]["pld"] < privacy["spent"]["rdp"]
    assert (privacy["accountant"], privacy["epsilon"]) == ("pld", privacy["spent"]["pld"])
    assert privacy["sensitivity"] == {"grad": 1.0}
    assert [count for _, count in privacy["ledger"]] == [40]
    free = execute(cell("non-private", 40), tmp_path / "free", "kill")
    assert (free["privacy"]["epsilon"], free["privacy"]["spent"]) == (None, {})
    assert free["metrics"]["accuracy"] > 0.8


def test_what_cannot_run_is_a_record_with_a_reason(tmp_path):
    text = SUITE.format(method="dp-sgd", steps=40).replace('"add-or-remove"', '"replace-one"')
    record = execute(suite.parse(text, "kill.toml").cells()[0], tmp_path, "kill")
    assert record["status"] == "skipped"
    assert "analysed for add-or-remove neighbours, and the suite asks for replace-one" in record["reason"]
    wild = SUITE.format(method="non-private", steps=40) + "lr = 3e38\n"
    record = execute(suite.parse(wild, "kill.toml").cells()[0], tmp_path / "wild", "kill")
    assert record["status"] == "diverged" and "not finite" in record["reason"] and record["metrics"] == {}


@pytest.mark.parametrize("relearned", [False, True])
def test_a_claim_is_recorded_with_its_assumptions_and_never_ranks(relearned, tmp_path):
    """ModelMix stands; dp-sgd claims nothing; mixing under momentum is no claim, and says so."""
    mixed = cell("modelmix", 40)
    if relearned:
        file = tmp_path / "mixed.py"
        file.write_text(
            "import dataclasses\n\nfrom harness.dp import SGD\nfrom harness.registry import method\n"
            "from methods.modelmix import modelmix\n\n\n"
            '@method("mixed-momentum", family="path")\ndef mixed_momentum():\n    """ModelMix under momentum."""\n'
            "    return dataclasses.replace(modelmix(), optimizer=SGD(1.0, 0.9))\n"
        )
        registry.add_file(file)
        mixed = dataclasses.replace(cell("mixed-momentum", 40), method_files=[str(file)])
    record = json.loads(json.dumps(execute(mixed, tmp_path / "mixed", "kill")))
    assert [error.message for error in VALIDATOR.iter_errors(record["privacy"])] == []
    privacy, claimed = record["privacy"], record["privacy"]["claimed"]
    assert privacy["epsilon"] == privacy["spent"]["pld"] and privacy["planned"] == privacy["spent"]
    (row,) = read([record])
    assert row.epsilon == privacy["epsilon"]
    assumed = row.claim.partition("assumed, not checked: ")[2]
    unchecked = "the number format resolves" if relearned else "nothing but iterates, and functions of them"
    assert assumed.startswith(unchecked)
    if relearned:
        assert row.claimed is claimed["epsilon"] is None
        assert "failed: no optimizer state made of noisy gradients (SGD(lr=1.0, momentum=0.9" in row.claim
        assert len(claimed["failed"]) == 1 and claimed["failed"][0].startswith("no optimizer state")
    else:
        assert row.claimed == claimed["epsilon"] > 0 and claimed["failed"] == [] and "failed" not in row.claim
        plain = execute(cell("dp-sgd", 40), tmp_path / "plain", "kill")["privacy"]
        assert plain["claimed"] is None and plain["epsilon"] == privacy["epsilon"]
        broken = claimed | {"failed": ["an assumption"]}  # the schema knows that a failed claim has no epsilon
        assert not VALIDATOR.is_valid(privacy | {"claimed": broken})
