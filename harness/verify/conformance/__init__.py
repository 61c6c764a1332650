"""The conformance checks: what every method must pass, ours and yours, on a problem small enough for seconds.

A check returns nothing where the method conforms, raises `Violation` saying what is wrong and what to change, and
`Inapplicable` where the method has nothing for it to look at. Statistical checks fail a correct method once in a
million times (`evidence.ALARM`).
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from harness import registry
from harness.dp.method import Method
from harness.provenance.measure import Clock
from harness.verify.conformance.adversary import adversarial
from harness.verify.conformance.identity import identified
from harness.verify.conformance.ledger import amended, billed, calibrated
from harness.verify.conformance.neighbours import (
    equals_loop,
    replaced,
    statistics_refused,
    within_sensitivity,
    within_sensitivity_float32,
    within_sensitivity_later,
    within_sensitivity_much_later,
    within_sensitivity_sequence,
)
from harness.verify.conformance.noise import independent, noise_billed, noised
from harness.verify.conformance.options import other_options
from harness.verify.conformance.replay import described, empty_step, microbatch_free, resumed, still, thread_free
from harness.verify.conformance.rule import clip_rule
from harness.verify.conformance.sampling import sampled, sampled_at_large
from harness.verify.conformance.secrecy import forgetful, judged, poisoned, separately, twins, twins_later
from harness.verify.conformance.shapes import other_engines, other_models, other_sizes, steady_draws
from harness.verify.conformance.subject import PROBLEMS, Check, Inapplicable, Subject, Violation, subject
from harness.verify.conformance.subject import Toy as Toy
from harness.verify.conformance.subject import toy_model as toy_model

Checking = Callable[[Subject], None]

# Their outcome depends on the seed.
STATISTICAL: tuple[Checking, ...] = (noised, independent, noise_billed, sampled, sampled_at_large)

_BOUND = "Engine.bounded, Clip.weights, Clip.sensitivity"
_DRAWN = "Noise.add"
_STATE = "the states that parts keep, and the rng that they draw from"
WHERE: Mapping[Checking, str] = {
    described: "the fields of the parts", identified: "the fields of the parts", equals_loop: "Engine.bounded",
    microbatch_free: _STATE, thread_free: _STATE, within_sensitivity: _BOUND, within_sensitivity_later: _BOUND,
    within_sensitivity_float32: _BOUND, within_sensitivity_sequence: _BOUND, replaced: _BOUND, adversarial: _BOUND,
    statistics_refused: "Engine.accepts", clip_rule: "Clip.weights, Clip.sensitivity, Clip.side", noised: _DRAWN,
    independent: _DRAWN, noise_billed: "Noise.event", amended: "Path.amend", sampled: "Sampler.draw, Sampler.wrap",
    billed: "Engine.split, Clip.split", calibrated: "Engine.split, Clip.split, Noise.event, Sampler.wrap",
    still: "Path, Optimizer.update", empty_step: "Engine.bounded, Noise.add", twins: _STATE,
    poisoned: "Clip.update, Optimizer.receive, Path", resumed: _STATE, within_sensitivity_much_later: _BOUND,
    twins_later: _STATE, forgetful: _STATE, separately: "Loss.prepare", steady_draws: "Engine.bounded",
    other_engines: "Loss.per_example, Clip.weights", judged: "Loss.scores, Loss.probes",
    other_models: "Engine.bounded",
    other_sizes: "Engine.bounded", other_options: "Clip.sensitivity, Engine.split",
    sampled_at_large: "Sampler.draw, Sampler.wrap, Sampler.relation",
}  # fmt: skip
"""Every check, and what decides its outcome: where to change a method that fails it."""
CHECKS: tuple[Checking, ...] = tuple(WHERE)


class Named(NamedTuple):
    """A registered method to examine."""

    name: str
    file: str  # that registers it
    method: Method


def named(method: str) -> list[Named]:
    """The methods that a name, or a file that registers one or more, stands for.

    Raises registry.RegistryError where there is no such method.
    """
    single = not method.endswith(".py")
    entries = [registry.resolve("method", method)] if single else registry.in_file("method", method)
    return [Named(entry.name, str(Path(entry.file).resolve()), registry.load(entry)()) for entry in entries]


def examine(method: Method, identity: tuple[str, str] | None = None) -> list[Check]:
    """Every check on a method value; `identity` is the name and the file that it is registered by."""
    try:
        s = subject(method)
    except Violation as violation:
        return [refused(violation)]
    s = dataclasses.replace(s, identity=identity)
    return [verdict(each, s) for each in CHECKS]


def refused(violation: Violation) -> Check:
    """The only line of a method that no problem suits."""
    detail = f"{violation}; change Engine.accepts or the parts that it refuses"
    return Check("the engine accepts a small problem", False, detail, function="subject")


def rehearsed(method: Method, repeat: int) -> list[Check]:
    """The statistical checks alone, with the seeds 1 to `repeat`, on the smallest problem accepted.

    One line a check: how many repetitions failed, and the message of the first that did.
    """
    try:
        plain = subject(method, sorted(PROBLEMS, key=lambda problem: math.prod(problem.shape)))
    except Violation as violation:
        return [refused(violation)]
    seeds = range(1, repeat + 1)
    rounds = [[verdict(each, dataclasses.replace(plain, seed=seed)) for each in STATISTICAL] for seed in seeds]
    return [_summed(lines, seeds) for lines in zip(*rounds, strict=True)]


def _summed(lines: Sequence[Check], seeds: Sequence[int]) -> Check:
    """One check's repetitions as one line."""
    failed = [f"seed {seed}: {line.detail}" for seed, line in zip(seeds, lines, strict=True) if not line.ok]
    summary = f"{len(failed)} of {len(lines)} repetitions fail" + (f"; {failed[0]}" if failed else "")
    applies = any(line.applies for line in lines)
    return lines[0]._replace(
        ok=not failed, detail=summary if applies else lines[0].detail, applies=applies,
        seconds=sum(line.seconds for line in lines), failures=len(failed),
    )  # fmt: skip


def verdict(each: Checking, s: Subject) -> Check:
    """The outcome of one check, and how long it took."""
    clock = Clock()
    begun = clock.now()
    ok, detail, applies = _outcome(each, s)
    name = inspect.getdoc(each) or each.__name__
    return Check(name, ok, detail, applies, clock.since(begun), each.__name__)


def _outcome(each: Checking, s: Subject) -> tuple[bool, str, bool]:
    """Whether a check holds, what it says, and whether it applies."""
    where = f" (look at: {WHERE[each]})" if each in WHERE else ""
    try:
        each(s)
    except Violation as violation:
        return False, f"{violation}{where}", True
    except Inapplicable as reason:
        return True, f"does not apply: {reason}", False
    except Exception as error:  # an adapter may fail in any way; the verdict says how, and the other checks still run
        return False, f"{type(error).__name__}: {error}; raised {_place(error)}", True
    return True, "", True


def _place(error: Exception) -> str:
    """Where an error comes from: the innermost line of a method's or this package's code, not of a library."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename] or list(frames)
    return f"in {own[-1].name}, {Path(own[-1].filename).name}:{own[-1].lineno}: mend it there"
