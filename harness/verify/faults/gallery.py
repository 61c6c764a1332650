"""`epsbench faults`: methods with a fault that public code or a paper really had, and the instrument that catches each.

docs/verification.md holds the table.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import NamedTuple

from harness.dp import SGD, Fixed, Flat, Method, Shuffle, Views
from harness.dp.loss.contrast import InfoNCE
from harness.provenance.measure import Clock
from harness.verify import conformance as checks
from harness.verify.audits import support
from harness.verify.audits.command import Setting, audit
from harness.verify.faults import adapters
from harness.verify.faults.refusals import Planted, planted

SHOWN = 80  # letters of a refusal in the table
BEGIN, END = "<!-- faults -->", "<!-- end of faults -->"
DOCS = File(__file__).resolve().parents[3] / "docs" / "verification.md"


# The gallery ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """A planted fault: what it is, where it was found, and the check that catches it, if one does.

    `audit` says how an audit is to refute it, with `sigma` in place of the calibrated noise where that is not None.
    """

    name: str
    found: str
    method: Callable[[], Method]
    caught: Callable[[checks.Subject], None] | None
    audit: Setting | support.Setting | None = None
    sigma: float | None = None


SMALL = Setting(canaries=500, repeat=4)
ONE_EPOCH = dataclasses.replace(SMALL, steps=4)


def gallery() -> list[Fault]:
    """All planted faults."""
    views = Views(views=3, pad=1)
    return [
        Fault(
            "sum and noise divided by the realised batch", "ModelMix's code; a library's adaptive clipping",
            lambda: Method(engine=adapters.RealisedBatch()), checks.within_sensitivity,
        ),
        Fault(
            "shuffled batches billed as Poisson", "De et al.'s loader, Handcrafted-DP, fastDP, Logit-DP and others",
            lambda: Method(sampler=adapters.ShuffledAsPoisson()), checks.sampled, ONE_EPOCH, 0.4,
        ),
        Fault(
            "the count of adaptive clipping not billed", "accountants that see the gradient alone",
            lambda: Method(clip=adapters.FreeCounts()), checks.billed,
        ),
        Fault(
            "thresholds set to a private batch's mean norm", "Self-Augmented-DP-SGD's code",
            lambda: Method(clip=adapters.MeanOfRawNorms()), checks.twins,
        ),
        Fault(
            "noise for each microbatch", "gradient accumulation by hand",
            lambda: Method(engine=adapters.NoisyMicrobatches()), checks.microbatch_free,
        ),
        Fault(
            "one noise key for all tensors", "Logit-DP's code",
            lambda: Method(noise=adapters.OneKey()), checks.independent,
        ),
        Fault(
            "class rows sharing noise", "DP-FC's and DP-LS's code (dp_transfer)",
            lambda: Method(noise=adapters.SharedRows()), checks.independent,
        ),
        Fault(
            "the same noise in every step", "DP-FC's code (a key captured by compilation)",
            lambda: Method(noise=adapters.Repeated(), optimizer=SGD(0.1)), checks.independent, SMALL,
        ),
        Fault(
            "2 % off the calibrated noise", "Self-Augmented-DP-SGD's code",
            lambda: Method(noise=adapters.Reduced()), checks.noised,
        ),
        Fault(
            "noise in floating point added to the sum", "Opacus, JAX Privacy, TensorFlow Privacy; this harness before",
            lambda: Method(noise=adapters.FloatSum()), None, support.Setting(repeat=100),
        ),
        Fault(
            "norms of the mean loss, put right in some layers", "fastgradclip, the code of fast clipping",
            lambda: Method(engine=adapters.NormsOfMeanLoss()), checks.adversarial,
        ),
        Fault(
            "norms without biases", "fastgradclip; a library's ghost clipping before a fix",
            lambda: Method(engine=adapters.NormsWithoutBias()), checks.adversarial,
        ),
        Fault(
            "sums of gradients that were not measured", "fast clipping in two passes, under hooks and estimators",
            lambda: Method(engine=adapters.TwoPasses()), checks.other_models,
        ),
        Fault(
            "noise scaled by the batch's largest weight", "a fork of a library with DP-PSAC",
            lambda: Method(clip=adapters.LargestWeight(form="vanilla")), checks.within_sensitivity,
        ),
        Fault(
            "bound larger than declared", "any clipping norm that is not the accountant's",
            lambda: Method(clip=adapters.TooLow(), optimizer=SGD(0.1)), checks.within_sensitivity, SMALL,
        ),
        Fault(
            "replaced examples, sensitivity of added ones", "fixed-size batches, with C for 2C",
            lambda: Method(clip=adapters.NotDoubled(), sampler=Shuffle()), checks.replaced,
        ),
        Fault(
            "temperature left out of Logit-DP's sensitivity", "Logit-DP's code",
            lambda: Method(
                loss=InfoNCE(0.2, pad=1), engine=adapters.ClippedBeforeTemperature(), clip=Flat(0.1), sampler=Fixed()
            ), checks.adversarial,
        ),
        Fault(
            "the whole batch's gradient clipped", "the naive baseline of Logit-DP's code",
            lambda: Method(engine=adapters.WholeBatch()), checks.adversarial,
        ),
        Fault(
            "views clipped one by one", "augmentation as more examples",
            lambda: Method(loss=views, engine=adapters.ViewByView(), clip=Flat(0.1)), checks.within_sensitivity,
        ),
        Fault(
            "examples that are not finite kept", "weight 0 times infinity",
            lambda: Method(engine=adapters.KeepsNonFinite()), checks.within_sensitivity,
        ),
        Fault(
            "BatchNorm's statistics of the batch", "ModelMix's code (batch clipping)",
            lambda: Method(engine=adapters.InBatchStatistics()), checks.statistics_refused,
        ),
        Fault(
            "DP-SAT's ascent for each microbatch", "DP-SAT's code",
            lambda: Method(path=adapters.AscentNeverUndone(0.1), engine=adapters.Counting()), checks.still,
        ),
        Fault(
            "empty batches drawn again", "loaders that cannot hold an empty batch",
            lambda: Method(sampler=adapters.NeverEmpty()), checks.sampled,
        ),
        Fault(
            "no noise on an empty batch", "loops that skip it",
            lambda: Method(noise=adapters.QuietWhenEmpty()), checks.empty_step,
        ),
        Fault(
            "sampling amplified twice", "one q in the loader's accountant, one in the planner's",
            lambda: Method(sampler=adapters.AmplifiedTwice()), checks.sampled, ONE_EPOCH, 1.0,
        ),
        Fault(
            "masks drawn anew beside a non-finite example", "engines that pass the others again",
            lambda: Method(engine=adapters.PassedAgain(), clip=Flat(0.1)), checks.steady_draws,
        ),
        Fault(
            "a layer that one random pass skipped", "plans made of one pass (LayerDrop)",
            lambda: Method(engine=adapters.LeftOut()), checks.equals_loop,
        ),
    ]  # fmt: skip


# The table ------------------------------------------------------------------------------------------------


class Caught(NamedTuple):
    """One line of the table; `caught` is False where the instrument saw nothing."""

    fault: str
    found: str
    instrument: str
    evidence: str
    seconds: float
    caught: bool


def by_check(fault: Fault) -> Caught:
    """What the check finds of a fault that has one."""
    assert fault.caught is not None
    clock = Clock("cpu")
    begun = clock.now()
    evidence, caught = "nothing", False
    try:
        fault.caught(checks.subject(fault.method()))
    except checks.Violation as violation:
        evidence, caught = violation.evidence or "a rule broken", True
    what = inspect.getdoc(fault.caught) or ""
    return Caught(fault.name, fault.found, f"check: {what}", evidence, clock.since(begun), caught)


def by_audit(fault: Fault) -> Caught:
    """What the audit finds of a fault that has a setting for it."""
    assert fault.audit is not None
    clock = Clock("cpu")
    begun = clock.now()
    if isinstance(fault.audit, support.Setting):
        v = support.audit(fault.method(), fault.audit, fault.sigma)
        evidence = support.told(v.planted)
    else:
        v = audit(fault.method(), fault.audit, fault.sigma)
        evidence = f"epsilon at least {v.audited:.3g}, claimed {v.claimed:.3g}"
    return Caught(fault.name, fault.found, f"audit: {v.instrument}", evidence, clock.since(begun), v.refuted)


def caught(faults: Iterable[Fault]) -> list[Caught]:
    """Every fault by its check, where it has one, and by an audit where it has a setting."""
    lines = []
    for fault in faults:
        if fault.caught:
            lines.append(by_check(fault))
        if fault.audit:
            lines.append(by_audit(fault))
    return lines


def refused(planted: Iterable[Planted]) -> list[Caught]:
    """Every model or loss by the instrument that refuses it."""
    lines = []
    for one in planted:
        clock = Clock("cpu")
        begun = clock.now()
        said = "nothing"
        try:
            one.refuse()
        except ValueError as error:
            said = str(error)
        evidence = said if len(said) <= SHOWN else said[: SHOWN - 1] + "…"
        caught = said != "nothing" and one.words in said
        lines.append(Caught(one.name, one.found, one.instrument, evidence, clock.since(begun), caught))
    return lines


def table(lines: Sequence[Caught]) -> str:
    """The table in Markdown. The first line of a fault names it."""
    head = ["| fault | found in | caught by | evidence | s |", "|---|---|---|---|---|"]
    rows, last = [], ""
    for line in lines:
        name, found = (line.fault, line.found) if line.fault != last else ("", "")
        instrument = line.instrument if line.caught else f"NOT by {line.instrument}"
        rows.append(f"| {name} | {found} | {instrument} | {line.evidence} | {line.seconds:.1f} |")
        last = line.fault
    return "\n".join([*head, *rows])


def inserted(text: str, made: str, begin: str = BEGIN, end: str = END) -> str:
    """`text` with `made` between the two markers. Raises ValueError where they are not there."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the text must hold {begin} and then {end}, each once")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{made}\n{end}{rest.split(end)[1]}"


def run(docs: File | None) -> int:
    """Run all planted faults, print the table and write it into the manual `docs`; the exit code."""
    lines = caught(gallery()) + refused(planted())
    made = table(lines)
    print(made)
    missed = [line.fault for line in lines if not line.caught]
    if missed:
        print(f"not caught: {', '.join(missed)}")
        return 1
    if docs:
        docs.write_text(inserted(docs.read_text(encoding="utf-8"), made), encoding="utf-8")
    return 0
