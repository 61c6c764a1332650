"""`epsbench faults`: methods with a fault that public code or a paper really had, and the instrument that catches each.

docs/verification.md holds the table.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from harness.dp import SGD, AdamBC, Cyclic, CyclicPoisson, Fixed, Flat, Method, Shuffle, Views
from harness.dp.loss.contrast import InfoNCE
from harness.provenance.measure import Clock
from harness.records.tables import inserted, markdown
from harness.verify import conformance as checks
from harness.verify.audits import support
from harness.verify.audits.command import CanarySetting, audit
from harness.verify.faults import engines, parts
from harness.verify.faults.refusals import REFUSED, Refusal

MARKER = "faults"
# Letters of a refusal in the table.
SHOWN = 80

# The gallery ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """A planted fault: what it is, where it was found, and the check that catches it, if one does.

    `audit` says how an audit is to refute it, with `sigma` in place of the calibrated noise where that is not None.
    """

    name: str
    origin: str
    method: Method
    check: Callable[[checks.Subject], None] | None
    audit: CanarySetting | support.SupportSetting | None = None
    sigma: float | None = None


SMALL = CanarySetting(canaries=500, repeat=4)
ONE_EPOCH = dataclasses.replace(SMALL, steps=4)
LOGIT = InfoNCE(0.2, pad=1)

GALLERY = (
    Fault(
        "sum and noise divided by the realised batch", "ModelMix's code; a library's adaptive clipping",
        Method(engine=engines.RealisedBatch()), checks.within_sensitivity,
    ),
    Fault(
        "shuffled batches accounted as Poisson", "De et al.'s loader, Handcrafted-DP, fastDP, Logit-DP and others",
        Method(sampler=parts.ShuffledAsPoisson()), checks.sampled, ONE_EPOCH, 0.3,
    ),
    Fault(
        "the count of adaptive clipping not accounted", "accountants that see the gradient alone",
        Method(clip=parts.FreeCounts()), checks.billed,
    ),
    Fault(
        "thresholds set to a private batch's mean norm", "Self-Augmented-DP-SGD's code",
        Method(clip=parts.MeanOfRawNorms()), checks.twins,
    ),
    Fault(
        "noise for each microbatch", "gradient accumulation by hand",
        Method(engine=engines.NoisyMicrobatches()), checks.microbatch_free,
    ),
    Fault("one noise key for all tensors", "Logit-DP's code", Method(noise=parts.OneKey()), checks.independent),
    Fault(
        "class rows sharing noise", "DP-FC's and DP-LS's code (dp_transfer)",
        Method(noise=parts.SharedRows()), checks.independent,
    ),
    Fault(
        "the same noise in every step", "DP-FC's code (a key captured by compilation)",
        Method(noise=parts.Repeated(), optimizer=SGD(0.1)), checks.independent, SMALL,
    ),
    Fault(
        "2 % off the calibrated noise", "Self-Augmented-DP-SGD's code",
        Method(noise=parts.Less()), checks.noised,
    ),
    Fault(
        "noise in floating point added to the sum", "Opacus, JAX Privacy, TensorFlow Privacy; this harness before",
        Method(noise=parts.FloatSum()), None, support.SupportSetting(repeat=100),
    ),
    Fault(
        "norms of the mean loss, put right in some layers", "fastgradclip, the code of fast clipping",
        Method(engine=engines.NormsOfMeanLoss()), checks.adversarial,
    ),
    Fault(
        "norms without biases", "fastgradclip; a library's ghost clipping before a fix",
        Method(engine=engines.NormsWithoutBias()), checks.adversarial,
    ),
    Fault(
        "sums of gradients that were not measured", "fast clipping in two passes, under hooks and estimators",
        Method(engine=engines.TwoPasses()), checks.other_models,
    ),
    Fault(
        "noise scaled by the batch's largest weight", "a fork of a library with DP-PSAC",
        Method(clip=parts.LargestWeight(form="vanilla")), checks.within_sensitivity,
    ),
    Fault(
        "bound larger than declared", "any clipping norm that is not the accountant's",
        Method(clip=parts.TooLow(), optimizer=SGD(0.1)), checks.within_sensitivity, SMALL,
    ),
    Fault(
        "replaced examples, sensitivity of added ones", "fixed-size batches, with C for 2C",
        Method(clip=parts.NotDoubled(), sampler=Shuffle()), checks.replaced,
    ),
    Fault(
        "temperature left out of Logit-DP's sensitivity", "Logit-DP's code",
        Method(loss=LOGIT, engine=engines.ClippedBeforeTemperature(), clip=Flat(0.1), sampler=Fixed()),
        checks.adversarial,
    ),
    Fault(
        "the whole batch's gradient clipped", "the naive baseline of Logit-DP's code",
        Method(engine=engines.WholeBatch()), checks.adversarial,
    ),
    Fault(
        "views clipped one by one", "augmentation as more examples",
        Method(loss=Views(views=3, pad=1), engine=engines.ViewByView(), clip=Flat(0.1)), checks.within_sensitivity,
    ),
    Fault(
        "examples that are not finite kept", "weight 0 times infinity",
        Method(engine=engines.KeepsNonFinite()), checks.within_sensitivity,
    ),
    Fault(
        "BatchNorm's statistics of the batch", "ModelMix's code (batch clipping)",
        Method(engine=engines.InBatchStatistics()), checks.statistics_refused,
    ),
    Fault(
        "DP-SAT's ascent for each microbatch", "DP-SAT's code",
        Method(path=parts.AscentNeverUndone(0.1), engine=engines.CountsMicrobatches()), checks.still,
    ),
    Fault(
        "empty batches drawn again", "loaders that cannot hold an empty batch",
        Method(sampler=parts.NeverEmpty()), checks.sampled,
    ),
    Fault(
        "no noise on an empty batch", "loops that skip it", Method(noise=parts.QuietWhenEmpty()), checks.empty_step
    ),
    Fault(
        "sampling amplified twice", "one q in the loader's accountant, one in the planner's",
        Method(sampler=parts.AmplifiedTwice()), checks.sampled, ONE_EPOCH, 1.0,
    ),
    Fault(
        "a past term of correlated noise forgotten", "buffers that are one step too short",
        Method(noise=parts.Forgotten(3), sampler=Cyclic()), checks.independent,
    ),
    Fault(
        "correlated noise scaled as for one step", "columns of the strategy that are not normalised",
        Method(noise=parts.NotNormalised(4), sampler=Cyclic()), checks.noise_billed,
    ),
    Fault(
        "more bands than a cycle has steps", "BandMF under any Poisson sampling",
        Method(noise=parts.AnyCycle(4), sampler=CyclicPoisson(2)), checks.noise_billed,
    ),
    Fault(
        "private sums kept with the noise", "state that is restored from the released value",
        Method(noise=parts.KeepsSums(3), sampler=Cyclic()), checks.twins,
    ),
    Fault(
        "the noise's deviation measured on private gradients", "optimizers that estimate what is public",
        Method(noise=parts.PrivateDeviation(), optimizer=AdamBC(0.01)), checks.twins,
    ),
    Fault(
        "batches cut off, accounted as Poisson", "loaders with a largest batch",
        Method(sampler=parts.CutOffAsPoisson(1.1)), checks.sampled_at_large,
    ),
    Fault(
        "masks drawn anew beside a non-finite example", "engines that pass the others again",
        Method(engine=engines.PassedAgain(), clip=Flat(0.1)), checks.steady_draws,
    ),
    Fault(
        "a layer that one random pass skipped", "plans made of one pass (LayerDrop)",
        Method(engine=engines.LeftOut()), checks.equals_loop,
    ),
)  # fmt: skip


# The table ------------------------------------------------------------------------------------------------


class Caught(NamedTuple):
    """One line of the table; `caught` is False where the instrument saw nothing."""

    fault: str
    origin: str
    instrument: str
    evidence: str
    seconds: float
    caught: bool


def by_check(fault: Fault) -> Caught:
    """What the check finds of a fault that has one."""
    assert fault.check is not None
    clock = Clock("cpu")
    begun, evidence, caught = clock.now(), "nothing", False
    try:
        fault.check(checks.subject(fault.method))
    except checks.Violation as violation:
        evidence, caught = violation.evidence or "a rule broken", True
    instrument = f"check: {inspect.getdoc(fault.check)}"
    return Caught(fault.name, fault.origin, instrument, evidence, clock.since(begun), caught)


def by_audit(fault: Fault) -> Caught:
    """What the audit finds of a fault that has a setting for it."""
    assert fault.audit is not None
    clock = Clock("cpu")
    begun = clock.now()
    if isinstance(fault.audit, support.SupportSetting):
        v = support.audit(fault.method, fault.audit, fault.sigma)
        evidence = support.decisions(v.planted)
    else:
        v = audit(fault.method, fault.audit, fault.sigma)
        evidence = f"epsilon at least {v.audited:.3g}, claimed {v.claimed:.3g}"
    return Caught(fault.name, fault.origin, f"audit: {v.instrument}", evidence, clock.since(begun), v.refuted)


def by_refusal(one: Refusal) -> Caught:
    """What the instrument says of a model or a loss that it must refuse."""
    clock = Clock("cpu")
    begun, message = clock.now(), ""
    try:
        one.refuse()
    except ValueError as error:
        message = str(error)
    evidence = (message if len(message) <= SHOWN else message[: SHOWN - 1] + "…") or "nothing"
    return Caught(one.name, one.origin, one.instrument, evidence, clock.since(begun), one.words in message)


def outcomes(faults: Iterable[Fault], refusals: Iterable[Refusal]) -> list[Caught]:
    """Every fault by its check, where it has one, and by an audit where it has a setting; and every refusal."""
    lines = []
    for fault in faults:
        lines += [by_check(fault)] if fault.check else []
        lines += [by_audit(fault)] if fault.audit else []
    return lines + [by_refusal(one) for one in refusals]


def table(lines: Sequence[Caught]) -> str:
    """The table in Markdown. The first line of a fault names it."""
    rows, last = [], ""
    for line in lines:
        named = (line.fault, line.origin) if line.fault != last else ("", "")
        instrument = line.instrument if line.caught else f"NOT by {line.instrument}"
        rows.append((*named, instrument, line.evidence, f"{line.seconds:.1f}"))
        last = line.fault
    return "\n".join(markdown(("fault", "found in", "caught by", "evidence", "s"), rows))


def run(docs: Path | None) -> int:
    """Run all planted faults, print the table and write it into the manual `docs`; the exit code."""
    lines = outcomes(GALLERY, REFUSED)
    made = table(lines)
    print(made)
    missed = [line.fault for line in lines if not line.caught]
    if missed:
        print(f"not caught: {', '.join(missed)}")
        return 1
    if docs:
        docs.write_text(inserted(docs.read_text(encoding="utf-8"), made, MARKER), encoding="utf-8")
    return 0
