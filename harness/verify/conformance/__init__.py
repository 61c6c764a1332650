"""The conformance checks: what every method must pass, ours and yours, on a problem small enough for seconds.

A check returns nothing where the method conforms, raises `Violation` saying what is wrong and what to change, and
`Inapplicable` where the method has nothing for it to look at. Statistical checks fail a correct method once in a
million times (`evidence.ALARM`).
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from harness import registry
from harness.dp.method import Method
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
    within_sensitivity_sequence,
)
from harness.verify.conformance.noise import independent, noise_billed, noised
from harness.verify.conformance.replay import (
    described,
    empty_step,
    microbatch_free,
    resumed,
    still,
    thread_free,
)
from harness.verify.conformance.rule import clip_rule
from harness.verify.conformance.sampling import sampled
from harness.verify.conformance.secrecy import poisoned, twins
from harness.verify.conformance.subject import (
    PROBLEMS,
    Check,
    Contrast,
    Inapplicable,
    Problem,
    Subject,
    Toy,
    Violation,
    refusal,
    toy_model,
)

__all__ = [
    "CHECKS", "STATISTICAL", "Check", "Contrast", "Inapplicable", "Subject", "Toy", "Violation", "adversarial",
    "amended", "billed", "calibrated", "check", "clip_rule", "described", "empty_step", "equals_loop", "examine",
    "identified", "independent", "microbatch_free", "noise_billed", "noised", "poisoned", "repeated",
    "replaced",
    "resumed", "sampled", "statistics_refused", "still", "subject", "thread_free", "toy_model", "twins",
    "within_sensitivity", "within_sensitivity_float32", "within_sensitivity_later", "within_sensitivity_sequence",
]  # fmt: skip

Checking = Callable[[Subject], None]

CHECKS: tuple[Checking, ...] = (
    described, identified, equals_loop, microbatch_free, thread_free, within_sensitivity, within_sensitivity_later,
    within_sensitivity_float32, within_sensitivity_sequence, replaced, adversarial, statistics_refused, clip_rule,
    noised, independent, noise_billed, amended, sampled, billed, calibrated, still, empty_step, twins, poisoned,
    resumed,
)  # fmt: skip
STATISTICAL: tuple[Checking, ...] = (
    noised,
    independent,
    noise_billed,
    sampled,
)  # an outcome depends on the seed


class Named(NamedTuple):
    """A registered method to examine."""

    name: str
    file: str  # that registers it
    method: Method


def named(method: str) -> list[Named]:
    """The methods that a name, or a file that registers one or more, stands for.

    Raises registry.RegistryError where there is no such method.
    """
    if not method.endswith(".py"):
        entries = [registry.resolve("method", method)]
    else:
        registry.add_file(Path(method))
        here = Path(method).resolve()
        entries = [e for e in registry.index("method").values() if Path(e.file).resolve() == here]
    return [Named(entry.name, str(Path(entry.file).resolve()), registry.load(entry)()) for entry in entries]


def check(method: str) -> list[Check]:
    """Every check on one method, named as in the registry or by a file that registers one or more.

    Raises registry.RegistryError where there is no such method.
    """
    found = named(method)
    return [
        line._replace(name=f"{one.name}: {line.name}") if len(found) > 1 else line
        for one in found
        for line in examine(one.method, (one.name, one.file))
    ]


def examine(method: Method, identity: tuple[str, str] | None = None) -> list[Check]:
    """Every check on a method value; `identity` is the name and the file that it is registered by."""
    try:
        s = subject(method)
    except Violation as violation:
        return [Check("the engine accepts a small problem", False, str(violation))]
    s = dataclasses.replace(s, identity=identity)
    return [verdict(each, s) for each in CHECKS]


def subject(method: Method, problems: Sequence[Problem] = PROBLEMS) -> Subject:
    """`method` on the first problem that its engine and loss accept. Raises Violation where they accept none."""
    reasons = []
    for problem in problems:
        model, data = problem.model(), Toy(shape=problem.shape)
        reason = refusal(method, model, data)
        if reason is None:
            return Subject(method, problem.model(), data)
        reasons.append(f"{problem.name}: {reason}")
    raise Violation("; ".join(reasons))


def repeated(method: str, repeat: int, first: int = 1) -> list[Check]:
    """The statistical checks alone, `repeat` times with fresh seeds, on the smallest problem that a method accepts.

    One line a method and check: how many repetitions it failed, and what it said of the first.
    """
    found = named(method)
    return [
        line._replace(name=f"{one.name}: {line.name}") if len(found) > 1 else line
        for one in found
        for line in _repeated(one.method, repeat, first)
    ]


def _repeated(method: Method, repeat: int, first: int) -> list[Check]:
    try:
        plain = subject(method, sorted(PROBLEMS, key=lambda problem: math.prod(problem.shape)))
    except Violation as violation:
        return [Check("the engine accepts a small problem", False, str(violation))]
    failed: dict[str, list[str]] = {inspect.getdoc(each) or "": [] for each in STATISTICAL}
    for seed in range(first, first + repeat):
        s = dataclasses.replace(plain, seed=seed)
        for line in (verdict(each, s) for each in STATISTICAL):
            failed[line.name] += [] if line.ok else [f"seed {seed}: {line.detail}"]
    said = {
        name: f"{len(f)} of {repeat} repetitions fail" + (f"; {f[0]}" if f else "")
        for name, f in failed.items()
    }
    return [Check(name, not failed[name], said[name]) for name in failed]


def verdict(each: Checking, s: Subject) -> Check:
    """The outcome of one check."""
    name = inspect.getdoc(each) or each.__name__
    try:
        each(s)
    except Violation as violation:
        return Check(name, False, str(violation))
    except Inapplicable as reason:
        return Check(name, True, f"does not apply: {reason}")
    except (
        Exception
    ) as error:  # an adapter may fail in any way; the verdict says how, and the other checks still run
        return Check(name, False, f"{type(error).__name__}: {error}")
    return Check(name, True, "")
