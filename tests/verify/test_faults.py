"""Faults that public code had: each is caught, by the instrument that the gallery names."""

import dataclasses

import pytest

from harness.dp import Fixed, Flat, Method, Sharp
from harness.dp.engines.pairs import Pairs
from harness.dp.loss.contrast import InfoNCE
from harness.verify import conformance as checks
from harness.verify.faults import adapters
from harness.verify.faults import gallery as faults

GALLERY = faults.gallery()
REPAIRED = {  # the same methods without the fault
    "norms without biases": Method(engine=adapters.Naive()),
    "BatchNorm's statistics of the batch": Method(engine=adapters.Naive()),
    "examples that are not finite kept": Method(engine=adapters.Naive()),
    "DP-SAT's ascent for each microbatch": Method(path=Sharp(0.1), engine=adapters.Counting()),
    "temperature left out of Logit-DP's sensitivity": Method(
        loss=InfoNCE(0.2, pad=1), engine=Pairs(), clip=Flat(0.1), sampler=Fixed()
    ),
}


@pytest.mark.parametrize("fault", [f for f in GALLERY if f.caught], ids=lambda fault: fault.name)
def test_a_fault_is_caught_by_its_check(fault):
    line = faults.by_check(fault)
    assert line.caught and line.evidence not in ("", "nothing")


@pytest.mark.parametrize("fault", [f for f in GALLERY if f.audit], ids=lambda fault: fault.name)
def test_a_fault_is_refuted_by_an_audit(fault):
    assert faults.by_audit(fault).caught


@pytest.mark.parametrize("name", REPAIRED)
def test_the_same_method_without_its_fault_passes_that_check(name):
    (fault,) = (f for f in GALLERY if f.name == name)
    sound = dataclasses.replace(fault, method=lambda: REPAIRED[name])
    assert not faults.by_check(sound).caught


@pytest.mark.parametrize("one", faults.planted(), ids=lambda one: one.name)
def test_what_cannot_be_trained_is_refused(one):
    (line,) = faults.refused([one])
    assert line.caught, line.evidence


def test_faults_are_distinct_and_none_is_registered():
    assert len({fault.name for fault in GALLERY}) == len(GALLERY) >= 16
    assert all(fault.caught in checks.CHECKS if fault.caught else fault.audit for fault in GALLERY)


def test_the_table_stands_between_its_markers(tmp_path, monkeypatch, capsys):
    manual = tmp_path / "manual.md"
    manual.write_text(f"before\n{faults.BEGIN}\nold\n{faults.END}\nafter\n")
    monkeypatch.setattr(faults, "gallery", lambda: [f for f in GALLERY if "not billed" in f.name])
    assert faults.run(manual) == 0
    text = manual.read_text()
    assert text.startswith(f"before\n{faults.BEGIN}\n| fault |") and text.endswith(f"|\n{faults.END}\nafter\n")
    assert "the count of adaptive clipping not billed" in text and "\nold\n" not in text
    assert "the ledger is the plan" in capsys.readouterr().out
    with pytest.raises(ValueError, match="each once"):
        faults.inserted(text + faults.BEGIN, "")


def test_a_fault_that_is_missed_fails_the_command(tmp_path, monkeypatch, capsys):
    missed = faults.Fault("a sound method", "nowhere", Method, checks.billed)
    monkeypatch.setattr(faults, "gallery", lambda: [missed])
    manual = tmp_path / "manual.md"
    manual.write_text(f"{faults.BEGIN}\nold\n{faults.END}")
    assert faults.run(manual) == 1
    assert "not caught: a sound method" in capsys.readouterr().out and "old" in manual.read_text()
