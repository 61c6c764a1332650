"""Faults that public code had: each is caught, by the instrument that the gallery names."""

import dataclasses

import pytest

from harness.dp import Fixed, Flat, Method, Sharp
from harness.dp.engines.pairs import Pairs
from harness.dp.loss.contrast import InfoNCE
from harness.records.tables import inserted
from harness.verify import conformance as checks
from harness.verify.faults import engines
from harness.verify.faults import gallery as faults

SOUND = {  # the same methods without the fault
    "norms without biases": Method(engine=engines.Naive()),
    "BatchNorm's statistics of the batch": Method(engine=engines.Naive()),
    "examples that are not finite kept": Method(engine=engines.Naive()),
    "DP-SAT's ascent for each microbatch": Method(path=Sharp(0.1), engine=engines.CountsMicrobatches()),
    "temperature left out of Logit-DP's sensitivity": Method(
        loss=InfoNCE(0.2, pad=1), engine=Pairs(), clip=Flat(0.1), sampler=Fixed()
    ),
}


@pytest.mark.parametrize("fault", [f for f in faults.GALLERY if f.check], ids=lambda fault: fault.name)
def test_a_fault_is_caught_by_its_check(fault):
    line = faults.by_check(fault)
    assert line.caught and line.evidence not in ("", "nothing")


@pytest.mark.parametrize("fault", [f for f in faults.GALLERY if f.audit], ids=lambda fault: fault.name)
def test_a_fault_is_refuted_by_an_audit(fault):
    assert faults.by_audit(fault).caught


@pytest.mark.parametrize("name", SOUND)
def test_the_same_method_without_its_fault_passes_that_check(name):
    (fault,) = (f for f in faults.GALLERY if f.name == name)
    assert not faults.by_check(dataclasses.replace(fault, method=SOUND[name])).caught


@pytest.mark.parametrize("one", faults.REFUSED, ids=lambda one: one.name)
def test_what_cannot_be_trained_is_refused(one):
    line = faults.by_refusal(one)
    assert line.caught, line.evidence


def test_faults_are_distinct_and_none_is_registered():
    assert len({fault.name for fault in faults.GALLERY}) == len(faults.GALLERY) >= 16
    assert all(fault.check in checks.CHECKS if fault.check else fault.audit for fault in faults.GALLERY)


def test_the_table_stands_between_its_markers(tmp_path, monkeypatch, capsys):
    manual = tmp_path / "manual.md"
    manual.write_text("before\n<!-- faults -->\nold\n<!-- end of faults -->\nafter\n")
    monkeypatch.setattr(faults, "GALLERY", [f for f in faults.GALLERY if "not accounted" in f.name])
    assert faults.run(manual) == 0
    text = manual.read_text()
    assert text.startswith("before\n<!-- faults -->\n| fault |")
    assert text.endswith("|\n<!-- end of faults -->\nafter\n")
    assert "the count of adaptive clipping not accounted" in text and "\nold\n" not in text
    assert "the ledger is the plan" in capsys.readouterr().out
    with pytest.raises(ValueError, match="each once"):
        inserted(text + "<!-- faults -->", "", "faults")


def test_a_fault_that_is_missed_fails_the_command(tmp_path, monkeypatch, capsys):
    missed = faults.Fault("a sound method", "nowhere", Method(), checks.billed)
    monkeypatch.setattr(faults, "GALLERY", [missed])
    manual = tmp_path / "manual.md"
    manual.write_text("<!-- faults -->\nold\n<!-- end of faults -->")
    assert faults.run(manual) == 1
    assert "not caught: a sound method" in capsys.readouterr().out and "old" in manual.read_text()
