"""`epsbench audit`: an empirical lower bound on a method's epsilon, beside the one that its ledger claims.

The method is trained by the loop that all runs go through, with its own engine, clipping rule, noise, sampler and
path: on data with canaries in it (`harness.verify.audits.canary`), on one or the other of two neighbouring data sets
(`harness.verify.audits.pair`), the same to ask what floats can come out (`harness.verify.audits.support`), or on halves
of a pool (`harness.verify.audits.membership`). What it made public is scored, and the scores are turned into bounds
(`harness.verify.audits.bounds`). A bound above the claim refutes it. docs/audits.md is the manual.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from harness import registry
from harness.dp.method import Method, describe
from harness.dp.random import Stream
from harness.records import audits
from harness.running.seeds import derive
from harness.verify.audits import membership, pair, support
from harness.verify.audits.bounds import Sample
from harness.verify.audits.canary import (
    OWN,
    SCORES,
    AuditTask,
    CanaryObserver,
    Planted,
    Projections,
    Refused,
    plant,
    whitened,
)
from harness.verify.audits.candidates import strongest
from harness.verify.audits.membership import MembershipSetting
from harness.verify.audits.pair import PairSetting
from harness.verify.audits.support import SupportSetting
from harness.verify.audits.verdict import AuditSetting, Claim, Verdict, needs_noise, secrets, seeds, trained
from harness.verify.circumstances import Circumstances, code_of


@dataclass(frozen=True)
class CanarySetting(AuditSetting):
    """How to audit with `canaries`, each in or out by a coin, beside which the examples are trained."""

    instrument: ClassVar[str] = "gradient canaries"

    task: str = OWN
    examples: int = 1000
    rate: float = 0.25
    steps: int = 16
    repeat: int = 8
    canaries: int = 1000

    def targets(self, task: AuditTask) -> int:
        return self.canaries

    def trained(self) -> AuditTask:
        """The task, with a model that depends on nothing but it and the seed."""
        return AuditTask.named(self.task, derive("audit init", self.task, self.seed), self.examples)


def audit(method: Method, s: CanarySetting, sigma: float | None = None, task: AuditTask | None = None) -> Verdict:
    """Train `method` with canaries `s.repeat` times and bound its epsilon from below.

    `sigma` is the noise multiplier; by default the one at which the plan costs `s.epsilon`. `task` is that of `s`.
    Raises Refused where the method claims nothing, cannot be trained with canaries, or writes a ledger that is not
    its plan.
    """
    needs_noise(method)
    if method.loss.coupled:
        raise Refused("the loss of an example depends on the others of its batch: no canary has a gradient of its own")
    planted, reach = plant(method, task or s.trained(), torch.ones(s.canaries, dtype=torch.bool))
    claim = Claim.of(method, s, planted.n_train, sigma)
    scores: dict[str, list[torch.Tensor]] = {name: [] for name in SCORES}
    coins, reaches, engine = [], [], ""
    for seed in seeds("audit", method, s):
        one = dataclasses.replace(planted, coins=Stream(seed, "coins", 0).uniform(planted.count) < 0.5)
        observed, engine = overhear(claim, one, seed)
        coins.append(one.coins)
        reaches.append(float(observed.lengths.mean()) * claim.sigma)
        for name, score in SCORES.items():
            scores[name].append(score(observed, method.sampler.relation))
    sample = Sample({n: torch.cat(v).double().numpy() for n, v in scores.items()}, torch.cat(coins).numpy())
    facts = {
        "count": planted.count, "layers": planted.layers, "model": "chain" if planted.chained else "gated",
        "reach": round(reach, 4), "mean_reach": round(float(np.mean(reaches)), 4), "engine": engine,
    }  # fmt: skip
    return claim.verdict(claim.bounds(sample, s.level), sample.inside, facts)


def overhear(claim: Claim, planted: Planted, seed: int) -> tuple[Projections, str]:
    """One training run as an observer sees it, and the engine that worked."""
    method, n = claim.method, claim.n
    observer = CanaryObserver(planted, method.loss)
    watched = observer.watched(method)
    progress = trained(
        watched, planted.model(), planted, claim.sigma, claim.schedule, secrets(seed), where="with canaries"
    )
    if not observer.values:
        raise Refused("no noised gradient was released")
    claim.check(progress.ledger)
    # The distribution of batches is public.
    draws = [len(method.sampler.draw(n, claim.batch, t, 0)) / n for t in range(16)]
    seen = Projections(torch.stack(observer.values), torch.stack(observer.lengths), min(1.0, sum(draws) / 16))
    return whitened(seen, method, n, claim.batch), progress.engine


# The record -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AuditedMethod:
    """A method to audit: as it was asked for, and what the registry makes of it."""

    label: str
    entry: registry.Entry
    parameters: Mapping[str, Any]
    method: Method

    @classmethod
    def of(cls, label: str, entry: registry.Entry) -> AuditedMethod:
        """The method of a spec. Raises `registry.RegistryError`."""
        parameters = registry.bind(entry, registry.lookup("method", label)[1])
        return cls(label, entry, parameters, registry.load(entry)(**parameters))

    def code(self) -> dict[str, Any]:
        """{"hash", "files"} of the source that decides an audit's numbers, as it is today."""
        return code_of(self.method, self.entry.file, "harness.running.train", "harness.verify.audits.command")

    def facts(self) -> dict[str, Any]:
        """What an audit's record says of the method."""
        return {
            "method": self.entry.name, "label": self.label, "parameters": dict(self.parameters),
            "parts": describe(self.method), "relation": self.method.sampler.relation.value,
        }  # fmt: skip


def takes_canaries(method: Method, task: AuditTask) -> bool:
    """Whether gradient canaries can be planted in what `method` is trained on: its parts are asked.

    A method without noise has nothing to audit, and it does not matter by what.
    """
    if not method.noise.private:
        return True
    if method.loss.coupled:
        return False
    try:
        plant(method, task, torch.ones(1, dtype=torch.bool))
    except Refused:
        return False
    return True


def outline(subject: AuditedMethod, s: AuditSetting, task: AuditTask) -> dict[str, Any]:
    """What of an audit's record is known before it, the id included; where nothing is found it stays so."""
    facts: dict[str, Any] = subject.facts() | {
        "schema": audits.SCHEMA, "kind": "audit", "instrument": s.instrument,
        "task": {"name": s.task, "digest": task.digest, "model": task.model, "examples": len(task.x)},
        "epsilon_target": s.epsilon, "delta": s.delta, "rate": s.rate, "steps": s.steps,
        "canaries": s.targets(task), "trials": s.repeat, "seed": s.seed, "level": s.level, "confidence": 1 - s.level,
        "epsilon_claimed": None, "accountant": None, "noise_multiplier": None, "epsilon_audited": None,
        "strongest": None, "instruments": {}, "facts": {}, "flagged": False, "reason": None,
    }  # fmt: skip
    return facts | {"id": audits.identity(facts)}


def found(subject: AuditedMethod, s: AuditSetting, task: AuditTask) -> dict[str, Any]:
    """What an audit adds to its outline: claimed and audited epsilon, or the reason why it has neither."""
    method = subject.method
    try:
        if isinstance(s, MembershipSetting):
            v = membership.audit(method, s, task)
        elif isinstance(s, SupportSetting):
            v = support.audit(method, s, task=task)
        elif isinstance(s, PairSetting):
            v = pair.audit(method, s, strongest, task=task)
        else:
            assert isinstance(s, CanarySetting)
            v = audit(method, s, task=task)
    except Refused as error:
        return {"reason": f"not auditable by this instrument: {error}"}
    return {
        "epsilon_claimed": v.claimed, "accountant": v.accountant, "noise_multiplier": v.sigma,
        "epsilon_audited": v.audited, "strongest": v.instrument, "instruments": v.bounds, "facts": v.planted,
        "flagged": v.refuted,
    }  # fmt: skip


def kept(subject: AuditedMethod, s: AuditSetting, task: AuditTask, folder: Path) -> tuple[dict[str, Any], bool]:
    """An audit's record, and whether it was there already: made by today's code, it is not made again."""
    made, code = outline(subject, s, task), subject.code()
    there = [a for a in audits.load(folder) if a["id"] == made["id"] and a["code"]["hash"] == code["hash"]]
    if there:
        return there[-1], True
    circumstances = Circumstances(code)
    made |= found(subject, s, task)
    made |= circumstances.facts()
    audits.write(folder, made)
    return made, False


COLUMNS = "{:<28} {:>6} {:>9} {:>9}  {:<12} {:>6}  {}"
HEADER = COLUMNS.format("method", "target", "claimed", "audited", "instrument", "time", "verdict")


def line(made: Mapping[str, Any], there: bool) -> str:
    """Claimed and audited, side by side."""
    words = "REFUTED" if made["flagged"] else made["reason"] or "not refuted"
    if made["instrument"] == SupportSetting.instrument and made["facts"]:
        words += f": {support.decisions(made['facts'])}"

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    return COLUMNS.format(
        made["label"], number(made["epsilon_target"]), number(made["epsilon_claimed"]),
        number(made["epsilon_audited"]), made.get("strongest") or "-", f"{made['wall_seconds']:.0f} s",
        words + (" (recorded before)" if there else ""),
    )  # fmt: skip


# The command ----------------------------------------------------------------------------------------------


def run(given: argparse.Namespace) -> int:
    """Audit what is asked for, print claimed and audited epsilon, and write a record of each."""
    by_flag: dict[str, type[AuditSetting]] = {
        "membership": MembershipSetting, "neighbours": PairSetting, "support": SupportSetting,
    }  # fmt: skip
    flags = [name for name in by_flag if getattr(given, name)]
    for flag in flags:
        if given.canaries is not None:
            looked = "the examples of the task are" if flag == "membership" else "the one example that differs is"
            given.error(f"--canaries: with --{flag}, {looked} what is looked for")
    if given.support and given.rate not in (None, 1.0):
        given.error("--rate: with --support the observer knows the batches, and all examples are in each")
    lowest = {"steps": 1, "canaries": 1, "repeat": 1, "seed": 0, "examples": 0}
    wrong = [f"--{k} {getattr(given, k)}" for k, low in lowest.items() if (getattr(given, k) or low) < low]
    if wrong:
        given.error(f"{', '.join(wrong)}: too small")
    if len(flags) > 1:
        given.error(f"{' and '.join(f'--{flag}' for flag in flags)}: one of them at a time")
    subjects = [AuditedMethod.of(label, entry) for text in given.method for label, entry in _named(text)]
    kind = by_flag[flags[0]] if flags else CanarySetting
    asked, flagged = _Asked(given), False
    for s in asked.settings(kind):
        if not (0 < s.rate <= 1 and 0 < s.delta < 1 and 0 < s.level < 1 and s.epsilon > 0):
            given.error("--rate lies in (0, 1], --delta and --level in (0, 1), --epsilon above 0")
    try:
        task = asked.task(kind)
    except Refused as error:
        given.error(str(error))
    print(HEADER)
    for subject in subjects:
        takes = kind is not CanarySetting or given.canaries is not None or takes_canaries(subject.method, task)
        serves = kind if takes else PairSetting
        for s in asked.settings(serves):
            made, there = kept(subject, s, asked.task(serves), given.results / audits.FOLDER)
            print(line(made, there), flush=True)
            flagged |= made["flagged"]
    return int(flagged)


@dataclass(frozen=True)
class _Asked:
    """What the command line asks for, by instrument. What it leaves out is the instrument's own default."""

    given: argparse.Namespace
    tasks: dict[type, AuditTask] = dataclasses.field(default_factory=dict)

    def settings(self, kind: type[AuditSetting]) -> list[AuditSetting]:
        """One for each epsilon."""
        named = {f.name for f in dataclasses.fields(kind)} - {"epsilon"}
        common = {name: value for name in named if (value := getattr(self.given, name, None)) is not None}
        return [kind(epsilon=epsilon, **common) for epsilon in dict.fromkeys(self.given.epsilon)]

    def task(self, kind: type[AuditSetting]) -> AuditTask:
        """What is trained. Raises Refused for a name that says no task."""
        if kind not in self.tasks:
            self.tasks[kind] = self.settings(kind)[0].trained()
        return self.tasks[kind]


def _named(method: str) -> list[tuple[str, registry.Entry]]:
    """Specs and registry entries: of one method, of all in a file, or of all whose names match a pattern."""
    if method.endswith(".py"):
        return [(one.name, one) for one in registry.in_file("method", method)]
    if "*" in method:
        return [(n, e) for n, e in sorted(registry.index("method").items()) if fnmatchcase(n, method)]
    return [(method, registry.lookup("method", method)[0])]
