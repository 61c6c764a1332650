"""`epsbench faults`: methods with a fault that public code or a paper really had, and the instrument that catches each.

The adapters are as small as the seven parts allow, so that what is caught is the fault alone. They are wrong on
purpose: nothing else may use them, and none is registered. docs/verification.md holds the table.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any, NamedTuple

import torch
from dp_accounting import PoissonSampledDpEvent
from torch import Tensor, nn

from harness.dp import (
    SGD,
    Automatic,
    Batch,
    Bounded,
    Fixed,
    Flat,
    Gaussian,
    Method,
    Poisson,
    Quantile,
    Relation,
    Release,
    Sharp,
    Shuffle,
    Tree,
    Views,
    Vmap,
)
from harness.dp.clip import Clip, State
from harness.dp.contrast import InfoNCE
from harness.dp.engines.engine import Clipped, PerExample, group_norms, losses_of
from harness.dp.engines.pairs import Pairs
from harness.dp.engines.vmap import per_example_gradients
from harness.dp.engines.weights import held
from harness.dp.loss import Loss
from harness.dp.random import Stream
from harness.measure import Clock
from harness.verify import conformance as checks
from harness.verify import support
from harness.verify.audit import Setting, audit
from harness.verify.refusals import Planted, planted

SHOWN = 80  # letters of a refusal in the table
BEGIN, END = "<!-- faults -->", "<!-- end of faults -->"
DOCS = File(__file__).resolve().parents[2] / "docs" / "verification.md"

# Norms and gradients --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Naive(PerExample):
    """Per-example gradients, weighed by norms that subclasses get wrong."""

    def clipped_sum(
        self,
        loss: Loss,
        clip: Clip,
        groups: Mapping[str, int],
        model: nn.Module,
        w: Tree,
        batch: Batch,
        state: State,
    ) -> Clipped:
        grads, losses = self.gradients(loss, model, w, batch)
        norms = group_norms(self.squares(grads), groups, losses)
        weights = clip.weights(norms, state)
        total = [self.weighed(weights[:, groups[name]].to(g.dtype), g).flatten() for name, g in grads.items()]
        return Clipped(w.with_flat(torch.cat(total)), norms, weights, losses.detach())

    def gradients(self, loss: Loss, model: nn.Module, w: Tree, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients [B, *shape] by name, and losses [B]."""
        return per_example_gradients(loss, model, w.views, w.names, batch)

    def squares(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """Squared norms [B] by name."""
        return {name: g.double().flatten(1).square().sum(1) for name, g in grads.items()}

    def weighed(self, weights: Tensor, g: Tensor) -> Tensor:
        """The weighted sum of one parameter's gradients; what is not finite counts as zero."""
        finite = g.flatten(1).isfinite().all(1)
        return torch.tensordot(weights[finite], g[finite], 1)


@dataclass(frozen=True)
class NormsWithoutBias(Naive):
    """Counts weights and forgets biases."""

    def squares(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: square for name, square in super().squares(grads).items() if "bias" not in name}


@dataclass(frozen=True)
class NormsOfMeanLoss(Naive):
    """Differentiates the mean loss, and takes that back in linear layers and not in convolutions."""

    def squares(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        found = super().squares(grads)
        return {name: s / len(s) ** 2 if grads[name].ndim > 3 else s for name, s in found.items()}


@dataclass(frozen=True)
class KeepsNonFinite(Naive):
    """Weighs an example whose gradient is not finite like any other: NaN for all."""

    def weighed(self, weights: Tensor, g: Tensor) -> Tensor:
        return torch.tensordot(weights, g, 1)


@dataclass(frozen=True)
class InBatchStatistics(Naive):
    """Takes each example's loss from one pass of the whole batch, statistics of the batch and all."""

    def gradients(self, loss: Loss, model: nn.Module, w: Tree, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        with held(model, w.views) as own:
            losses = losses_of(loss, model, batch)
            rows = [torch.autograd.grad(one, list(own.values()), retain_graph=True) for one in losses]
        return {name: torch.stack(g) for name, g in zip(own, zip(*rows, strict=True), strict=True)}, losses


@dataclass(frozen=True)
class TwoPasses(Naive):
    """Sums the gradient of the weighted losses: another one than it measured, where a hook changes gradients."""

    def clipped_sum(self, loss: Loss, clip: Clip, groups: Any, model: nn.Module, w: Tree, *rest: Any) -> Clipped:
        out, (batch, _) = super().clipped_sum(loss, clip, groups, model, w, *rest), rest
        assert out.weights is not None
        with held(model, w.views) as own:
            weighted = (out.weights[:, 0].nan_to_num(0).to(out.losses) * losses_of(loss, model, batch)).sum()
            grads = torch.autograd.grad(weighted, list(own.values()), materialize_grads=True)
        return out._replace(total=w.with_flat(torch.cat([g.flatten() for g in grads])))


@dataclass(frozen=True)
class WholeBatch(Vmap):
    """Clips the gradient of the whole batch to C and declares C: it can turn round."""

    def bounded(self, loss: Loss, clip: Clip, model: nn.Module, w: Tree, batch: Batch, *rest: Any) -> Bounded:
        out = super().bounded(loss, Flat(1e6), model, w, batch, *rest)
        grad = out.releases["grad"]
        state, _, relation, *_ = rest
        bound = clip.sensitivity(state, relation)
        short = min(1.0, bound / relation.moves / max(float(grad.value.norm()), 1e-300))
        out.releases["grad"] = grad._replace(value=grad.value * short, sensitivity=bound)
        return out


@dataclass(frozen=True)
class ViewByView(Vmap):
    """Clips each view's gradient and adds them up, so that an example contributes as many as it has views."""

    def bounded(self, loss: Any, clip: Clip, model: nn.Module, w: Tree, batch: Batch, *rest: Any) -> Bounded:
        rows = Batch(batch.x.flatten(0, 1), batch.y.repeat_interleave(loss.views))
        return super().bounded(loss.of_view, clip, model, w, rows, *rest)


@dataclass(frozen=True)
class ClippedBeforeTemperature(Pairs):
    """Clips the gradients of similarities and divides by the temperature later: the noise is that much too small."""

    def bounded(self, loss: Any, clip: Any, *rest: Any) -> Bounded:
        out = super().bounded(loss, Flat(clip.clip / loss.temperature), *rest)
        grad = out.releases["grad"]
        out.releases["grad"] = grad._replace(sensitivity=grad.sensitivity * loss.temperature)
        return out


# Bounds and noise levels ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TooLow(Flat):
    """Declares half of its sensitivity."""

    def sensitivity(self, state: State, relation: Relation) -> float:
        return super().sensitivity(state, relation) / 2


@dataclass(frozen=True)
class NotDoubled(Flat):
    """Forgets that replacing an example moves the sum by two gradients."""

    def sensitivity(self, state: State, relation: Relation) -> float:
        return self.clip


LAST: dict[str, Any] = {}  # what a stateful class would keep in an attribute


@dataclass(frozen=True)
class LargestWeight(Automatic):
    """Weighs by C / x, then clips to that times C, with noise for the largest weight of the batch: of the batch!"""

    def weights(self, norms: Tensor, state: State) -> Tensor:
        bounds = self.clip * super().weights(norms, state)
        LAST["weight"] = float(bounds.max()) if len(bounds) else 1.0
        return (bounds / norms).clamp(max=1.0).nan_to_num(0.0)

    def sensitivity(self, state: State, relation: Relation) -> float:
        return float(LAST.get("weight", 1.0)) * relation.moves


@dataclass(frozen=True)
class MeanOfRawNorms(Flat):
    """Clips to the mean raw norm of the last private batch."""

    def init(self, layout: Any) -> State:
        return {"c": self.clip}

    def weights(self, norms: Tensor, state: State) -> Tensor:
        return Flat(state["c"]).weights(norms, None)

    def sensitivity(self, state: State, relation: Relation) -> float:
        return float(state["c"]) * relation.moves

    def side(self, norms: Tensor, state: State, relation: Relation, sigma: float) -> dict[str, Release]:
        if len(norms):
            state["c"] = float(norms.nan_to_num(0, 0, 0).mean()) + 1e-3
        return {}


@dataclass(frozen=True)
class FreeCounts(Quantile):
    """Releases its counts and does not bill them."""

    def split(self, sigma: float) -> dict[str, float]:
        return {"grad": sigma}

    def side(self, norms: Tensor, state: State, relation: Relation, sigma: float) -> dict[str, Release]:
        return Quantile().side(norms, state, relation, sigma)


@dataclass(frozen=True)
class RealisedBatch(Vmap):
    """Divides sum and noise by the size that the batch turned out to have."""

    def bounded(self, loss: Loss, clip: Clip, model: nn.Module, w: Tree, batch: Batch, *rest: Any) -> Bounded:
        out = super().bounded(loss, clip, model, w, batch, *rest)
        grad, size = out.releases["grad"], max(len(batch), 1)
        out.releases["grad"] = grad._replace(value=grad.value / size, sensitivity=grad.sensitivity / size)
        return out


# Noise ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoisyMicrobatches(Vmap):
    """Adds noise to each microbatch, so that there is more of it where memory is short."""

    def clipped_sum(self, *args: Any) -> Clipped:
        out = super().clipped_sum(*args)
        flat = out.total.flat
        return out._replace(
            total=out.total.with_flat(flat + Stream(len(flat), "noise", 0).normal(len(flat), flat.dtype))
        )


@dataclass(frozen=True)
class OneKey(Gaussian):
    """Draws the noise of every tensor by one key: tensors begin with the same numbers."""

    def add(self, release: Release, rng: Stream) -> Tree:
        key = rng.seed64()
        added = [self._drawn(t, key) * release.sigma * release.sensitivity for _, t in release.value.items()]
        return release.value.with_flat(release.value.flat + torch.cat(added))

    @staticmethod
    def _drawn(t: Tensor, key: int) -> Tensor:
        rng = torch.Generator().manual_seed(key % 2**63)
        return torch.randn(math.ceil(t.numel() / 16) * 16, generator=rng, dtype=t.dtype)[: t.numel()]


@dataclass(frozen=True)
class SharedRows(Gaussian):
    """Draws one row of noise for all classes: differences of rows carry none."""

    def add(self, release: Release, rng: Stream) -> Tree:
        added = [self._drawn(t, rng) * release.sigma * release.sensitivity for _, t in release.value.items()]
        return release.value.with_flat(release.value.flat + torch.cat(added))

    @staticmethod
    def _drawn(t: Tensor, rng: Stream) -> Tensor:
        if t.ndim != 2:
            return rng.normal(t.numel(), t.dtype)
        return rng.normal(t.shape[1], t.dtype).expand_as(t).flatten()


@dataclass(frozen=True)
class Repeated(Gaussian):
    """Adds the same noise in every step, as a key does that is taken when a function is compiled."""

    def add(self, release: Release, rng: Stream) -> Tree:
        return super().add(release, Stream(7, "noise", 0))


@dataclass(frozen=True)
class Reduced(Gaussian):
    """Takes 2 % off the noise that calibration asked for."""

    def add(self, release: Release, rng: Stream) -> Tree:
        return super().add(release._replace(sigma=0.98 * release.sigma), rng)


@dataclass(frozen=True)
class FloatSum(Gaussian):
    """Draws floats, scales them and adds them to floats: which ones can come out depends on the sum."""

    def add(self, release: Release, rng: Stream) -> Tree:
        draws, whole, scale = torch.Generator(), release.sigma * release.sensitivity, release.scale or {}
        draws.manual_seed(rng.seed64() % 2**63)
        noised = [
            t + torch.randn(t.shape, generator=draws, dtype=t.dtype) * (whole * scale.get(name, 1.0))
            for name, t in release.formatted.items()
        ]
        return release.value.with_flat(torch.cat([t.reshape(-1) for t in noised]))


@dataclass(frozen=True)
class QuietWhenEmpty(Gaussian):
    """Leaves an empty batch alone."""

    def add(self, release: Release, rng: Stream) -> Tree:
        return super().add(release, rng) if release.value.flat.any() else release.value


# Samplers and paths ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShuffledAsPoisson(Poisson):
    """Shuffles, and bills Poisson sampling."""

    def draw(self, n: int, batch: int, step: int, seed: int) -> Tensor:
        return Shuffle().draw(n, batch, step, seed)


@dataclass(frozen=True)
class NeverEmpty(Poisson):
    """Draws again where nobody came."""

    def draw(self, n: int, batch: int, step: int, seed: int) -> Tensor:
        attempts = (super(NeverEmpty, self).draw(n, batch, step + again * 10**6, seed) for again in range(1000))
        return next(drawn for drawn in attempts if len(drawn))


@dataclass(frozen=True)
class AmplifiedTwice(Poisson):
    """Bills a rate of q^2, as where sampling is accounted for once by the loader and once more by the accountant."""

    def wrap(self, event: Any, n: int, batch: int, step: int) -> Any:
        return PoissonSampledDpEvent((batch / n) ** 2, event)


@dataclass(frozen=True)
class AscentNeverUndone(Sharp):
    """Goes uphill once for each microbatch, and comes down once."""

    def base(self, w: Tree, state: Tree | None, rng: Stream) -> Tree:
        climbs = int(LAST.get("microbatches", 1)) - 1
        return w if state is None else w + state.unit() * (self.rho * climbs)


@dataclass(frozen=True)
class Counting(Vmap):
    """Counts its microbatches, for the path above."""

    microbatch: int | None = field(default=8, metadata={"speed": True})

    def bounded(self, loss: Loss, clip: Clip, model: nn.Module, w: Tree, batch: Batch, *rest: Any) -> Bounded:
        LAST["microbatches"] = max(1, math.ceil(len(batch) / (self.microbatch or len(batch) or 1)))
        return super().bounded(loss, clip, model, w, batch, *rest)


@dataclass(frozen=True)
class PassedAgain(Naive):
    """Where an example is not finite, passes the others once more, and draws their dropout anew."""

    def gradients(self, loss: Loss, model: nn.Module, w: Tree, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        found, losses = super().gradients(loss, model, w, batch)
        good = torch.stack([g.flatten(1).isfinite().all(1) for g in found.values()]).all(0)
        if not good.all() and good.any():
            again, _ = super().gradients(loss, model, w, Batch(batch.x[good], batch.y[good]))
            for name, g in found.items():
                g[good] = again[name]
        return found, losses


@dataclass(frozen=True)
class LeftOut(Naive):
    """A plan of one random pass, in which the first layer was skipped: it gets no gradient."""

    def gradients(self, loss: Loss, model: nn.Module, w: Tree, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        found, losses = super().gradients(loss, model, w, batch)
        first = w.names[0]
        return found | {first: torch.zeros_like(found[first])}, losses


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
            lambda: Method(engine=RealisedBatch()), checks.within_sensitivity,
        ),
        Fault(
            "shuffled batches billed as Poisson", "De et al.'s loader, Handcrafted-DP, fastDP, Logit-DP and others",
            lambda: Method(sampler=ShuffledAsPoisson()), checks.sampled, ONE_EPOCH, 0.4,
        ),
        Fault(
            "the count of adaptive clipping not billed", "accountants that see the gradient alone",
            lambda: Method(clip=FreeCounts()), checks.billed,
        ),
        Fault(
            "thresholds set to a private batch's mean norm", "Self-Augmented-DP-SGD's code",
            lambda: Method(clip=MeanOfRawNorms()), checks.twins,
        ),
        Fault(
            "noise for each microbatch", "gradient accumulation by hand",
            lambda: Method(engine=NoisyMicrobatches()), checks.microbatch_free,
        ),
        Fault(
            "one noise key for all tensors", "Logit-DP's code",
            lambda: Method(noise=OneKey()), checks.independent,
        ),
        Fault(
            "class rows sharing noise", "DP-FC's and DP-LS's code (dp_transfer)",
            lambda: Method(noise=SharedRows()), checks.independent,
        ),
        Fault(
            "the same noise in every step", "DP-FC's code (a key captured by compilation)",
            lambda: Method(noise=Repeated(), optimizer=SGD(0.1)), checks.independent, SMALL,
        ),
        Fault(
            "2 % off the calibrated noise", "Self-Augmented-DP-SGD's code",
            lambda: Method(noise=Reduced()), checks.noised,
        ),
        Fault(
            "noise in floating point added to the sum", "Opacus, JAX Privacy, TensorFlow Privacy; this harness before",
            lambda: Method(noise=FloatSum()), None, support.Setting(repeat=100),
        ),
        Fault(
            "norms of the mean loss, put right in some layers", "fastgradclip, the code of fast clipping",
            lambda: Method(engine=NormsOfMeanLoss()), checks.adversarial,
        ),
        Fault(
            "norms without biases", "fastgradclip; a library's ghost clipping before a fix",
            lambda: Method(engine=NormsWithoutBias()), checks.adversarial,
        ),
        Fault(
            "sums of gradients that were not measured", "fast clipping in two passes, under hooks and estimators",
            lambda: Method(engine=TwoPasses()), checks.other_models,
        ),
        Fault(
            "noise scaled by the batch's largest weight", "a fork of a library with DP-PSAC",
            lambda: Method(clip=LargestWeight(form="vanilla")), checks.within_sensitivity,
        ),
        Fault(
            "bound larger than declared", "any clipping norm that is not the accountant's",
            lambda: Method(clip=TooLow(), optimizer=SGD(0.1)), checks.within_sensitivity, SMALL,
        ),
        Fault(
            "replaced examples, sensitivity of added ones", "fixed-size batches, with C for 2C",
            lambda: Method(clip=NotDoubled(), sampler=Shuffle()), checks.replaced,
        ),
        Fault(
            "temperature left out of Logit-DP's sensitivity", "Logit-DP's code",
            lambda: Method(
                loss=InfoNCE(0.2, pad=1), engine=ClippedBeforeTemperature(), clip=Flat(0.1), sampler=Fixed()
            ), checks.adversarial,
        ),
        Fault(
            "the whole batch's gradient clipped", "the naive baseline of Logit-DP's code",
            lambda: Method(engine=WholeBatch()), checks.adversarial,
        ),
        Fault(
            "views clipped one by one", "augmentation as more examples",
            lambda: Method(loss=views, engine=ViewByView(), clip=Flat(0.1)), checks.within_sensitivity,
        ),
        Fault(
            "examples that are not finite kept", "weight 0 times infinity",
            lambda: Method(engine=KeepsNonFinite()), checks.within_sensitivity,
        ),
        Fault(
            "BatchNorm's statistics of the batch", "ModelMix's code (batch clipping)",
            lambda: Method(engine=InBatchStatistics()), checks.statistics_refused,
        ),
        Fault(
            "DP-SAT's ascent for each microbatch", "DP-SAT's code",
            lambda: Method(path=AscentNeverUndone(0.1), engine=Counting()), checks.still,
        ),
        Fault(
            "empty batches drawn again", "loaders that cannot hold an empty batch",
            lambda: Method(sampler=NeverEmpty()), checks.sampled,
        ),
        Fault(
            "no noise on an empty batch", "loops that skip it",
            lambda: Method(noise=QuietWhenEmpty()), checks.empty_step,
        ),
        Fault(
            "sampling amplified twice", "one q in the loader's accountant, one in the planner's",
            lambda: Method(sampler=AmplifiedTwice()), checks.sampled, ONE_EPOCH, 1.0,
        ),
        Fault(
            "masks drawn anew beside a non-finite example", "engines that pass the others again",
            lambda: Method(engine=PassedAgain(), clip=Flat(0.1)), checks.steady_draws,
        ),
        Fault(
            "a layer that one random pass skipped", "plans made of one pass (LayerDrop)",
            lambda: Method(engine=LeftOut()), checks.equals_loop,
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
