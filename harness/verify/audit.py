"""`epsbench audit`: an empirical lower bound on a method's epsilon, beside the one that its ledger claims.

The method is trained by the loop that all runs go through, with its own engine, clipping rule, noise, sampler and
path, on data with canaries in it (`harness.verify.canary`). What it made public is scored, and the scores are turned
into bounds (`harness.verify.audit_bounds`). A bound above the claim refutes it. docs/verification.md is the manual.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from harness import codehash, measure, registry, store
from harness.cell import canonical_json
from harness.dp.account import Ledger
from harness.dp.method import Method, describe, parts
from harness.dp.random import Stream
from harness.parts import modules
from harness.seeds import derive
from harness.train import Schedule, start, train
from harness.verify.audit_bounds import (
    GRID,
    Profile,
    Sample,
    by_normals,
    by_rates,
    by_tradeoff,
    calibrated,
    chosen,
    guessed,
)
from harness.verify.canary import OWN, SCORES, Observed, Observer, Planted, Refused, Task, plant

SCHEMA = 1
CHOOSING = 0.25  # the share of canaries that thresholds and scores are chosen on
INSTRUMENTS = ("one-run", "error rates", "trade-off")
FOLDER = "audits"
EXAMPLES = """\
examples:
  epsbench audit dp-sgd                                   at epsilon 3, in seconds
  epsbench audit dp-sgd --epsilon 1 8                     at these, one record each
  epsbench audit group-wise?adaptive=false                with parameters of its own
  epsbench audit my.py                                    each method of a file of yours
  epsbench audit dp-sgd --task mnist-5k/tanh-cnn-28 --rate 0.1 --canaries 1000
  epsbench audit dp-sgd --canaries 1 --repeat 500         a run for each canary: no two share one

exit codes: 0 no claim is refuted; 1 one is; 2 the request is wrong
"""


@dataclass(frozen=True)
class Setting:
    """How to audit. `rate` is the expected batch over n, `level` the probability of refuting a true claim."""

    epsilon: float = 3.0
    delta: float = 1e-5
    task: str = OWN
    rate: float = 0.25
    steps: int = 16
    canaries: int = 1000
    repeat: int = 8
    seed: int = 0
    level: float = 0.05


@dataclass(frozen=True)
class Verdict:
    """What an audit found. `bounds` are by instrument; all of them hold together, with confidence 1 - level."""

    claimed: float
    accountant: str
    sigma: float
    bounds: dict[str, dict[str, Any]]
    planted: dict[str, Any]

    @property
    def audited(self) -> float:
        """The largest of the bounds."""
        return max(float(bound["epsilon"]) for bound in self.bounds.values())

    @property
    def instrument(self) -> str:
        """Whose it is."""
        return max(self.bounds, key=lambda name: float(self.bounds[name]["epsilon"]))

    @property
    def refuted(self) -> bool:
        """Whether the claim cannot be true."""
        return self.audited > self.claimed


def audit(method: Method, s: Setting, sigma: float | None = None) -> Verdict:
    """Train `method` with canaries `s.repeat` times and bound its epsilon from below.

    `sigma` is the noise multiplier; by default the one at which the plan costs `s.epsilon`. Raises Refused where the
    method claims nothing, cannot be trained with canaries, or writes a ledger that is not its plan.
    """
    if not method.noise.private:
        raise Refused("it trains without noise and claims no epsilon: there is nothing to audit")
    seeds = [derive("audit", describe(method), dataclasses.asdict(s), run) for run in range(s.repeat)]
    task = Task.named(s.task, derive("audit init", s.task, s.seed))
    n = len(task.x) + s.canaries
    batch = max(1, round(s.rate * n))
    relation = method.sampler.relation

    def plan(multiplier: float) -> Ledger:
        return method.plan(multiplier, n, batch, s.steps)

    try:
        if sigma is None:
            sigma = calibrated(plan, relation, s.epsilon, s.delta, method.clip.ceiling)
        claim = Profile(plan(sigma), relation)
    except ValueError as error:
        raise Refused(str(error)) from error
    planted, reach = plant(method, task, torch.ones(s.canaries, dtype=torch.bool))
    scores: dict[str, list[torch.Tensor]] = {name: [] for name in SCORES}
    coins, reaches, engine = [], [], ""
    for seed in seeds:
        one = dataclasses.replace(planted, coins=Stream(seed, "coins", 0).uniform(s.canaries) < 0.5)
        observed, ledger, engine = overhear(method, one, sigma, Schedule(s.steps, batch, s.steps), seed)
        if ledger != plan(sigma):
            raise Refused(f"the run billed {ledger}, its plan said {plan(sigma)}")
        coins.append(one.coins)
        reaches.append(float(observed.lengths.mean()) * method.clip.split(sigma)["grad"])
        for name, score in SCORES.items():
            scores[name].append(score(observed, relation))
    sample = Sample({n: torch.cat(v).double().numpy() for n, v in scores.items()}, torch.cat(coins).numpy())
    bounds = bound(sample, s, plan, sigma, method)
    facts = {
        "count": s.canaries, "layers": planted.layers, "model": "chain" if planted.chained else "gated",
        "reach": round(reach, 4), "mean_reach": round(float(np.mean(reaches)), 4), "in": int(sample.inside.sum()),
        "samples": len(sample), "n": n, "batch": batch, "sampling": method.sampler.law(n, batch), "engine": engine,
        "relation": relation.value,
    }  # fmt: skip
    return Verdict(claim.epsilon(s.delta), claim.accountant, sigma, bounds, facts)


def overhear(
    method: Method, planted: Planted, sigma: float, schedule: Schedule, seed: int
) -> tuple[Observed, Ledger, str]:
    """One training run as an observer sees it, its ledger, and the engine that worked."""
    model = planted.model()
    observer = Observer(planted)
    watched = observer.watched(method)
    secret = SimpleNamespace(
        **{role: derive(f"audit {role}", seed) for role in ("sampling", "noise", "path")}
    )
    progress = start(watched, model, schedule.steps)
    progress = train(watched, model, planted, sigma, schedule, secret, progress)
    if not observer.values:
        raise Refused("no noised gradient was released")
    n = planted.n_train
    draws = [len(method.sampler.draw(n, schedule.batch, t, 0)) / n for t in range(16)]  # its law is public
    seen = Observed(torch.stack(observer.values), torch.stack(observer.lengths), min(1.0, sum(draws) / 16))
    return seen, progress.ledger, progress.engine


def bound(sample: Sample, s: Setting, plan: Any, sigma: float, method: Method) -> dict[str, dict[str, Any]]:
    """The bound of each instrument. They share the level evenly, so that the largest holds too."""
    level = s.level / len(INSTRUMENTS)
    choosing, testing = sample.split(CHOOSING, s.seed)
    if min(int(part.inside.sum()) for part in (choosing, testing)) < 1 or choosing.inside.all():
        raise Refused(
            f"{len(sample)} canaries are too few to choose a threshold and test it: take 64 or more"
        )
    relation, ceiling = method.sampler.relation, method.clip.ceiling
    epsilon, guesses, right, score = guessed(choosing, testing, s.delta, level)
    one_run = {"epsilon": epsilon, "guesses": guesses, "correct": right, "score": score}
    found, score = chosen(choosing, testing, by_rates, s.delta, level)
    apart = {"epsilon": float(by_rates(found, s.delta)[0]), **_shown(found), "score": score}
    found, score = chosen(choosing, testing, by_normals, s.delta, level)
    traded = {
        "epsilon": by_tradeoff(plan, relation, sigma, ceiling, found, s.delta), **_shown(found), "score": score,
    }  # fmt: skip
    return dict(zip(INSTRUMENTS, (one_run, apart, traded), strict=True))


def _shown(found: Any) -> dict[str, float]:
    return {
        "false_positive_below": float(found.false_positive[0]),
        "false_negative_below": float(found.false_negative[0]),
    }


# The record -----------------------------------------------------------------------------------------------


def code_of(method: Method, entry: Any) -> dict[str, Any]:
    """{"hash", "files"} of the source that decides an audit's numbers."""
    rooms = {module for part in parts(method).values() for module in modules(part)}
    named = sorted(rooms | {"harness.train", "harness.verify.audit"})
    starts: list[str | Path] = [*named, Path(entry.file)]
    files = codehash.closure(starts, skip={"harness.measure", "harness.registry", "harness.store"})
    return {"hash": codehash.code_hash(files), "files": codehash.hashes(files)}


def identity(spec: str, method: Method, s: Setting) -> str:
    """12 hex digits of what was audited and how."""
    text = canonical_json([SCHEMA, spec, describe(method), dataclasses.asdict(s)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def record(spec: str, method: Method, entry: Any, s: Setting, v: Verdict, seconds: float) -> dict[str, Any]:
    """The audit as JSON values (docs/verification.md)."""
    environment = measure.environment()
    return {
        "schema": SCHEMA, "kind": "audit", "id": identity(spec, method, s), "method": spec,
        "parts": describe(method), "setting": dataclasses.asdict(s),
        "claimed": {
            "epsilon": v.claimed, "delta": s.delta, "accountant": v.accountant, "grid": GRID,
            "noise_multiplier": v.sigma, "relation": v.planted["relation"],
        },
        "audited": {
            "epsilon": v.audited, "confidence": 1 - s.level, "instrument": v.instrument, "refuted": v.refuted,
        },
        "instruments": v.bounds, "canaries": v.planted, "repetitions": s.repeat, "seed": s.seed,
        "code": code_of(method, entry) | {key: environment.pop(key) for key in ("commit", "dirty")},
        "device": measure.device_info("cpu", torch.get_num_threads()), "environment": environment,
        "seconds": seconds, "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def attempts(results: Path, name: str, epsilon: float, key: str) -> list[Path]:
    """The files of this audit that are there, oldest first, and then the next one's."""
    found = []
    for number in range(1, 1000):
        suffix = "" if number == 1 else f".{number}"
        found.append(results / FOLDER / f"{name}-eps{epsilon:g}-{key}{suffix}.json")
        if not found[-1].exists():
            break
    return found


def kept(spec: str, entry: Any, s: Setting, results: Path) -> tuple[dict[str, Any], bool]:
    """The record of an audit, and whether it was there already: made by today's code, it is not made again."""
    method = registry.load(entry)(**registry.bind(entry, _options(spec)))
    *old, new = attempts(results, entry.name, s.epsilon, identity(spec, method, s))
    for file in reversed(old):
        there: dict[str, Any] = json.loads(file.read_text())
        if there["code"]["hash"] == code_of(method, entry)["hash"]:
            return there, True
    clock = measure.Clock("cpu")
    begun = clock.now()
    found = record(spec, method, entry, s, audit(method, s), 0.0)
    found["seconds"] = round(clock.since(begun), 3)
    new.parent.mkdir(parents=True, exist_ok=True)
    store.write_once(new, store.dumps(found).encode())
    return found, False


def _options(spec: str) -> dict[str, object]:
    return registry.lookup("method", spec)[1]


def line(found: dict[str, Any], there: bool) -> str:
    """Claimed and audited, side by side."""
    claimed, audited = found["claimed"], found["audited"]
    canaries = found["canaries"]
    each = ", ".join(f"{name} {bound['epsilon']:.3g}" for name, bound in found["instruments"].items())
    words = "REFUTED" if audited["refuted"] else "not refuted"
    return (
        f"{found['method']}: claimed {claimed['epsilon']:.4g} ({claimed['accountant']}, delta {claimed['delta']:g},"
        f" {claimed['relation']}), audited at least {audited['epsilon']:.4g} with {100 * audited['confidence']:g} %"
        f" confidence ({audited['instrument']}): {words}\n"
        f"  {each}; {canaries['samples']} canaries in {found['repetitions']} runs, reach"
        f" {canaries['mean_reach']:.2f}, {found['seconds']:.0f} s" + (", recorded before" if there else "")
    )


# The command ----------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] = ()) -> int:
    """Audit what is asked for, print claimed and audited epsilon, and write a record of each."""
    plain = Setting()
    parser = argparse.ArgumentParser(
        prog="epsbench audit", description="Bound a method's epsilon from below, by attacking it with canaries.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "method", metavar="METHOD|METHOD.py", help="as registered, with options: name?key=value"
    )
    parser.add_argument(
        "--epsilon", type=float, nargs="+", default=[plain.epsilon], metavar="E", help="claims"
    )
    parser.add_argument("--delta", type=float, default=plain.delta)
    parser.add_argument(
        "--task", default=plain.task, metavar="DATA/MODEL", help="trained beside the canaries"
    )
    parser.add_argument("--rate", type=float, default=plain.rate, help="expected batch over n")
    for name, what in (
        ("steps", "of each run"), ("canaries", "in each run"), ("repeat", "independent runs"), ("seed", "of all"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=getattr(plain, name), metavar="N", help=what)
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR")
    given = parser.parse_args(list(arguments))
    lowest = {"steps": 1, "canaries": 1, "repeat": 1, "seed": 0}
    if wrong := [
        f"--{name} {getattr(given, name)}" for name, low in lowest.items() if getattr(given, name) < low
    ]:
        parser.error(f"{', '.join(wrong)}: too small")
    if not (0 < given.rate <= 1 and 0 < given.delta < 1 and min(given.epsilon) > 0):
        parser.error("--rate lies in (0, 1], --delta in (0, 1), --epsilon above 0")
    common = {f.name: getattr(given, f.name) for f in dataclasses.fields(Setting) if hasattr(given, f.name)}
    refuted = False
    for spec, entry in _named(given.method):
        for epsilon in dict.fromkeys(given.epsilon):
            setting = Setting(**common | {"epsilon": epsilon})
            try:
                found, there = kept(spec, entry, setting, given.results)
            except Refused as error:
                print(f"epsbench: {spec}: {error}", file=sys.stderr)
                return 2
            print(line(found, there), flush=True)
            refuted |= found["audited"]["refuted"]
    return int(refuted)


def _named(method: str) -> list[tuple[str, Any]]:
    """Specs and registry entries: of one method, or of all in a file."""
    if not method.endswith(".py"):
        return [(method, registry.lookup("method", method)[0])]
    registry.add_file(Path(method))
    here = Path(method).resolve()
    return [(n, e) for n, e in registry.index("method").items() if Path(e.file).resolve() == here]
