"""What a record from elsewhere says, computed again: what follows from its cell, and from its ledger.

Of a record that was not made here its privacy is recomputed rather than believed: the ledger is the plan of its cell at
its noise multiplier, its epsilons are those of its ledger, they meet the target, and every other field that follows
from the cell is what it must be. The first that is not refuses the record by name. What a run alone can know, its
accuracy first of all, is the word of who made it, and so is what nobody can compute here because its method is not
known: that is reported, and stays beside the record.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from harness import data, registry
from harness.dp.account import ACCOUNTANTS, Ledger, epsilon, explain, ranking
from harness.dp.account.tuning import Tuning, charge
from harness.dp.clip import Clip
from harness.dp.engines.draws import secrecy
from harness.dp.engines.engine import PerExample
from harness.dp.method import Method, Stage, describe, plan
from harness.dp.path import Path as Straight
from harness.dp.release import Relation
from harness.records import public, store
from harness.records.cell import Cell, canonical_json
from harness.registry.parts import SLOTS
from harness.running import run

__all__ = ["Examined", "examine"]

TOLERANCE = 1e-5
"""Relative: by how much an epsilon may differ from that of the same ledger by another version of its accountant."""
LEAST = 0.98
"""The share of its target that a run spends at the least: noise is calibrated to 1e-4, and meets it to a thousandth."""
MOST_STEPS = 10**6
MOST_EPSILON = 200.0
"""By RDP. Above it the other accountants take minutes and gigabytes, which a stranger's record is not worth."""
_NAMED = re.compile(r"[a-z0-9-]+|features:[a-z0-9-]+(\?[\w.=&-]*)?")
"""Data sets of which the spec names no file, and asks for no more of them than there is."""


class _Denied(Exception):
    """The record says what cannot be."""


class _Unknown(Exception):
    """What the record says cannot be computed here."""


@dataclass(frozen=True)
class Examined:
    """`refused`: why a record is not to be believed; empty where nothing speaks against it.

    `unknown`: what could not be computed again and why, in sentences: it is its sender's word, as `metrics measured
    diagnostics weights_sha256 code device` always are, which only the run itself knows.
    """

    refused: str = ""
    unknown: tuple[str, ...] = ()


def examine(record: store.Record) -> Examined:
    """Compute again what can be of a record that :func:`harness.records.store.parse_at` has read."""
    unknown: list[str] = []
    try:
        if reason := store.mismatch(record):
            raise _Denied(reason)
        cell = store.cell_of(record)
        _plain(record, cell)
        for part in (_model, _data, _privacy, _stated):
            try:
                part(record, cell)
            except _Unknown as reason:
                unknown.append(str(reason))
    except _Denied as reason:
        return Examined(str(reason))
    except Exception as error:  # it is a stranger's: whatever it makes fail is its own fault
        return Examined(f"its privacy cannot be computed again: {type(error).__name__}: {str(error)[:200]}")
    return Examined(unknown=tuple(dict.fromkeys(unknown)))


def _demand(name: str, recorded: Any, *expected: Any) -> None:
    """Refuse a field that has a value which is not allowed."""
    if all(canonical_json(recorded) != canonical_json(one) for one in expected):
        wanted = " or ".join(dict.fromkeys(_short(one) for one in expected))
        raise _Denied(f"{name} is {_short(recorded)}, and must be {wanted}")


def _close(name: str, recorded: Any, found: float) -> None:
    """Refuse an epsilon that is not the one computed here. None is infinite: it may stand where more is known today."""
    if recorded is None:
        return
    if (
        isinstance(recorded, bool)
        or not isinstance(recorded, int | float)
        # Nothing differs from infinity by more than a share of it.
        or not math.isfinite(found)
        or abs(recorded - found) > TOLERANCE * found + 1e-9
    ):
        raise _Denied(f"{name} is {_short(recorded)}, and its ledger gives {found:.6g}")


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= 120 else text[:117] + "..."


# What needs no computing ----------------------------------------------------------------------------------


KEYS: Mapping[str, tuple[set[str], set[str]]] = {
    "schedule": ({"batch", "steps"}, set()),
    "numerics": ({"dtype", "tf32"}, set()),
    "privacy": ({"accountant", "delta", "epsilon", "relation", "unit"}, {"tuning"}),
    "task": ({"architecture", "dataset", "digest", "evaluate", "mean", "model", "n_train", "name", "std"}, set()),
    "then": ({"name", "parameters", "parts", "schedule", "trains"}, {"task", "with"}),
}
"""The keys that each part of a cell has, and may have. One more would make another id of the same run."""


def _keys(cell: Cell) -> None:
    parts = {"schedule": cell.schedule, "numerics": cell.numerics, "privacy": cell.privacy, "task": cell.task}
    if cell.then:
        parts |= {"then": cell.then, "then.schedule": cell.then["schedule"]}
        parts |= {"then.task": cell.then["task"]} if "task" in cell.then else {}
    for where, part in parts.items():
        needed, allowed = KEYS[where.rpartition(".")[2]]
        for name in sorted(part.keys() - needed - allowed):
            raise _Denied(f"cell.{where}.{name} is {_short(part[name])}, and no cell has such a key")
    for name in sorted(cell.changes.keys() - set(SLOTS)):
        raise _Denied(f"cell.method.with has a part that no method has: {name}")


def _plain(record: store.Record, cell: Cell) -> None:
    """The terms, which are the cell's, and results that are invalid."""
    privacy, asked = record["privacy"], cell.privacy
    _keys(cell)
    if type(cell.seed) is not int or cell.seed < 0:
        raise _Denied(f"cell.seed is {_short(cell.seed)}, and seeds are whole numbers from 0 on")
    if cell.private:
        _demand("cell.privacy.accountant", asked["accountant"], "pld", "rdp")
    for name in ("unit", "delta"):
        _demand(f"privacy.{name}", privacy.get(name), asked[name])
    _demand("cell.privacy.unit", asked["unit"], "example")
    _demand("cell.task.evaluate", cell.task["evaluate"], "test", "validation")
    dtype = cell.numerics["dtype"]
    _demand("cell.numerics.dtype", dtype, *run.DTYPES)
    _demand("cell.numerics.tf32", cell.numerics["tf32"], False, *[True] * (dtype == "float32"))
    ok = record["status"] == "ok"
    if ok and cell.private:
        _demand("privacy.relation", privacy["relation"], asked["relation"])
    accuracy, loss = (record["metrics"].get(name) for name in ("accuracy", "loss"))
    if accuracy is not None and (isinstance(accuracy, bool) or not 0 <= accuracy <= 1):
        raise _Denied(f"metrics.accuracy is {_short(accuracy)}, which is not a fraction")
    examples = record["metrics"].get("examples")
    if accuracy is not None and examples is not None and not 0 < examples < math.inf:
        raise _Denied(f"metrics.examples is {_short(examples)}, which is not a count of examples")
    public_results = (2 if cell.then else 1) not in public.privately_judged(record)
    if ok and public_results and (accuracy is None or loss is None):
        raise _Denied("metrics have no accuracy or no loss, and its status is ok")
    clipped = (record.get("diagnostics") or {}).get("clipped_fraction")
    if clipped is not None and not 0 <= clipped <= 1:
        raise _Denied(f"diagnostics.clipped_fraction is {_short(clipped)}, which is not a fraction")
    started, finished = record.get("started"), record.get("finished")
    if started and finished and finished < started and finished[19:] == started[19:]:
        raise _Denied(f"it finished at {finished}, before it started at {started}")
    made = record.get("randomness")
    if made is not None and "path" in record:
        attempt = store.attempt_of(record)
        if not 1 <= made["attempt"] <= attempt:
            raise _Denied(f"randomness.attempt is {_short(made['attempt'])}, and this is attempt {attempt}")


def _model(record: store.Record, cell: Cell) -> None:
    """The models' names and options, as far as their specs give them; their defaults may have been others."""
    unknown = []
    for where, task in _tasks(cell):
        try:
            given = registry.parse_spec(task["model"])[1]
            entry, arguments = registry.lookup("model", task["model"])
        except registry.RegistryError:
            unknown.append(_short(task["model"]))
            continue
        if entry.argument is None:
            _demand(f"{where}.architecture.name", task["architecture"]["name"], entry.name)
        else:
            unknown.append(_short(task["model"]))
        for name in given:
            options = task["architecture"]["options"]
            _demand(f"{where}.architecture.options.{name}", options.get(name), arguments[name])
    if unknown:
        raise _Unknown(
            f"its model {unknown[0]} is of another library, so that its architecture, and that it keeps its examples "
            "apart, is its word"
        )


def _tasks(cell: Cell) -> list[tuple[str, Mapping[str, Any]]]:
    """The task of each stage that names one, and where it stands."""
    then = [("cell.then.task", cell.then["task"])] if "task" in cell.then else []
    return [("cell.task", cell.task), *then]


def _data(record: store.Record, cell: Cell) -> None:
    """The data set and the model, where their names alone say what they are: no path of a stranger is followed."""
    tasks = _tasks(cell)
    made_of, digests = [], []
    for where, task in tasks:
        spec = task["dataset"]
        known = _facts(spec) if _NAMED.fullmatch(spec) else None
        if known is None:
            raise _Unknown(f"its data set {_short(spec)} is not here, so that n_train and its digest are its word")
        _demand(f"{where}.digest", task["digest"], known["digest"])
        n = known["n_train"]
        _demand(f"{where}.n_train", task["n_train"], data.validation_size(n) if task["evaluate"] == "validation" else n)
        for name in ("mean", "std"):
            _demand(f"{where}.{name}", task[name], list(known[name]))
        made_of.append(known["public_data"])
        digests.append({known["digest"], *known["sources"]})
        judged = record["metrics"].get("examples")
        if judged is not None and task is tasks[-1][1]:  # the last stage's data judge it
            rest = n - data.validation_size(n)
            _demand("metrics.examples", judged, rest if task["evaluate"] == "validation" else known["n_test"])
    if len(digests) > 1 and digests[0] & digests[1]:
        raise _Denied(f"cell.then.task is {_short(tasks[1][1]['dataset'])}, which is the private data and not public")
    recorded = record["privacy"].get("public_data")
    if recorded is not None or record["status"] == "ok":
        _demand("privacy.public_data", recorded, run.public_data(made_of[0], cell))


@lru_cache(maxsize=256)
def _facts(spec: str) -> Mapping[str, Any] | None:
    try:
        return data.describe(spec)
    except (registry.RegistryError, data.DatasetError, OSError, ImportError):
        return None


# What the cell and the ledger decide ----------------------------------------------------------------------


def _privacy(record: store.Record, cell: Cell) -> None:
    """Plan, ledger, epsilons and target. Raises _Unknown where its method cannot be built as it was."""
    privacy, ok = record["privacy"], record["status"] == "ok"
    ledger = Ledger.from_json(privacy["ledger"])
    relation = Relation(privacy["relation"]) if privacy["relation"] is not None else None
    unknown: _Unknown | None = None
    try:
        methods = _methods(cell)
        _planned(record, cell, methods, ledger)
    except _Unknown as error:  # what the ledger alone says is still to be true
        unknown = error
    target = run.Target.of(cell)
    _spent("privacy", privacy, "spent", ledger, cell, relation)
    if ok and target.epsilon is not None:
        if not privacy["spent"]:
            raise _Denied("privacy.spent is empty, and its status is ok")
        if target.accountant not in privacy["spent"]:
            raise _Denied(f"privacy.spent lacks {target.accountant}, which its noise was calibrated by")
        if over := run.excess(target, privacy):
            raise _Denied(f"{over}, and its status is ok: its noise multiplier is too small")
        used = privacy["spent"][target.accountant]
        used = privacy["epsilon"] if used is None else used
        if used < LEAST * target.epsilon:
            raise _Denied(
                f"it spent {used:g} of its target {target.epsilon:g}: its noise multiplier is not the one that is "
                "calibrated for it, which is the smallest"
            )
        _demand("privacy.planned", privacy["planned"], privacy["spent"])
    if (tuned := privacy.get("epsilon_with_tuning")) is not None and relation is not None:
        _searched(tuned, cell, ledger, relation, complete=ok)
    elif ok and cell.privacy.get("tuning"):
        raise _Denied("privacy.epsilon_with_tuning is missing, and the suite charges its search")
    if unknown is not None:
        raise unknown


@lru_cache(maxsize=1024)
def _built(text: str) -> tuple[Method, ...]:
    """The methods of a cell (as JSON), with the parts that they have here."""
    try:
        return tuple(run.methods_of(Cell.from_json(text)))
    except Exception as error:  # a stranger's cell may name anything, and its parts may refuse anything
        line = (str(error).splitlines() or [""])[0][:200]
        raise _Unknown(
            f"its method cannot be built here ({line or type(error).__name__}), so that its ledger is its word"
        ) from error


def _methods(cell: Cell) -> tuple[Method, ...]:
    methods = _built(Cell(
        **{name: getattr(cell, name) for name in ("method", "parameters", "parts", "changes", "then", "privacy")},
        suite="", label="", task={}, schedule={}, numerics={}, seed=0,
    ).to_json())  # fmt: skip
    recorded = [cell.parts, *([cell.then["parts"]] if cell.then else [])]
    for one, parts in zip(methods, recorded, strict=True):
        here = describe(one)
        for slot in sorted(here.keys() | parts.keys()):
            if canonical_json(here.get(slot)) != canonical_json(parts.get(slot)):
                raise _Unknown(
                    f"its method has another {slot} here ({_short(here.get(slot))}, in the record "
                    f"{_short(parts.get(slot))}), so that its ledger is its word"
                )
    return methods


def _schedules(cell: Cell) -> list[dict[str, int]]:
    return [cell.schedule, *([cell.then["schedule"]] if cell.then else [])]


def _cell_stages(cell: Cell, methods: Sequence[Method]) -> tuple[list[Stage], list[Stage]]:
    """The stages of a cell, and those of them on private data."""
    stages = [Stage(m, one["batch"], one["steps"]) for m, one in zip(methods, _schedules(cell), strict=True)]
    return stages, stages[:1] if "task" in cell.then else stages


def _planned(record: store.Record, cell: Cell, methods: Sequence[Method], ledger: Ledger) -> None:
    """The ledger, and all else that the methods say of a run."""
    privacy, n = record["privacy"], cell.task["n_train"]
    for one in _schedules(cell):
        if type(one["batch"]) is not int or type(one["steps"]) is not int or min(one.values()) < 1:
            raise _Denied(f"its schedule {_short(one)} is invalid")
    if sum(one["steps"] for one in _schedules(cell)) > MOST_STEPS:
        raise _Unknown(f"it has more than {MOST_STEPS} steps, so that its ledger is its word")
    stages, private = _cell_stages(cell, methods)
    relations = {stage.method.sampler.relation.value for stage in private}
    recorded, ok = privacy["relation"], record["status"] == "ok"
    if len(relations) != 1 and ok:
        raise _Denied("its stages are analysed for different neighbours, and its status is ok")
    _demand("privacy.relation", recorded, *relations, *(() if ok else (cell.privacy["relation"],)))
    sampling = [stage.method.sampler.distribution(n, stage.batch) for stage in private]
    # Older records say how the first stage draws its batches, and nothing of the others.
    older = [sampling[0]] if cell.then else []
    _demand("privacy.sampling", privacy["sampling"], run.joined(sampling), *older, *([] if ok else [None]))
    sigma = privacy.get("noise_multiplier")
    if sigma is not None and not 0 < sigma < math.inf:
        raise _Denied(f"privacy.noise_multiplier is {_short(sigma)}, which is invalid")
    if ok and cell.private and sigma is None:
        raise _Denied("privacy.noise_multiplier is null, and its status is ok")
    if sigma is not None and not cell.private:
        raise _Denied(f"privacy.noise_multiplier is {_short(sigma)}, and it trains without privacy")
    if ok and not cell.then:
        _bounded("privacy", privacy, stages[0])
    if (claimed := privacy.get("claimed")) is not None:
        silent = type(methods[0].path).claim is Straight.claim
        if silent or cell.then or not cell.private:
            raise _Denied(f"privacy.claimed is {_short(claimed)}, and its method claims nothing")
    if not ledger.entries and not privacy["planned"] and not ok:
        return  # nothing was released, or nobody could say
    whole = plan(private, sigma or 0.0, n)
    if (ok and ledger != whole) or (not ok and not _begins(ledger, whole)):
        raise _Denied(
            f"privacy.ledger is {_short(privacy['ledger'])}, and the plan of its cell at its noise multiplier is "
            f"{_short(whole.to_json())}"
        )
    if privacy["planned"]:
        _spent("privacy", privacy, "planned", whole, cell, Relation(recorded))
    if cell.then:
        _stages(record, cell, stages, private, sigma or 0.0, Relation(recorded))


def _stated(record: store.Record, cell: Cell) -> None:
    """What else a record says of its privacy: compared where it follows from the cell, and their word where not."""
    privacy, ok = record["privacy"], record["status"] == "ok"
    if (bits := (record.get("randomness") or {}).get("dropout_bits")) is not None:
        _demand("randomness.dropout_bits", bits, secrecy(torch.device((record.get("device") or {})["kind"])))
    private, held_out = _cell_stages(cell, _methods(cell))[1], cell.task["evaluate"] == "validation"
    judged = [k for k, stage in enumerate(private, 1) if held_out or stage.method.loss.probes]
    _demand("privacy.privately_judged", privacy.get("privately_judged", judged), judged)
    words: list[str] = []
    places = (record["stages"][: len(private)] if cell.then else [privacy]) if ok else []
    for k, (recorded, stage) in enumerate(zip(places, private, strict=False), 1):
        where, method, none = f"stages.{k}" if cell.then else "privacy", stage.method, not recorded.get("sensitivity")
        if none and not cell.then:
            raise _Denied("privacy.sensitivity is null, and its status is ok")
        if none or not cell.private:
            continue
        releases = method.engine.split(method.clip, privacy["noise_multiplier"], stage.steps - 1)
        _demand(f"the names in {where}.sensitivity", sorted(recorded["sensitivity"]), sorted(releases))
        note = method.engine.note(method.loss, method.clip, stage.batch, method.sampler.relation)
        # An engine may have a bound of its own, and so has what is released beside gradients.
        exact = isinstance(method.engine, PerExample) and _rule_bound(stage) is not None and len(releases) == 1
        words += [f"{where}.sensitivity"] * (not exact)
        words += [f"{where}.sensitivity_note"] * (recorded.get("sensitivity_note") != note)
    if privacy.get("accounting"):
        terms = cell.privacy["delta"], Relation(privacy["relation"])
        ledger = plan(private, privacy.get("noise_multiplier") or 0.0, cell.task["n_train"])
        quick = not MOST_EPSILON < epsilon(ledger, *terms, "rdp") < math.inf
        words += ["privacy.accounting"] * (not quick or privacy["accounting"] != explain(ledger, *terms))
    if words := words + ["privacy.claimed"] * (privacy.get("claimed") is not None):
        raise _Unknown(f"what stands in {', '.join(words)} cannot be computed again here, and is its word")


def _begins(part: Ledger, whole: Ledger) -> bool:
    """Whether `part` is how `whole` begins."""
    for n, (event, count) in enumerate(part.entries):
        if n >= len(whole.entries) or whole.entries[n][0] != event or count > whole.entries[n][1]:
            return False
        if count < whole.entries[n][1] and n + 1 < len(part.entries):
            return False
    return True


def _stages(
    record: store.Record, cell: Cell, stages: Sequence[Stage], private: Sequence[Stage], sigma: float,
    relation: Relation,
) -> None:  # fmt: skip
    """What a record says of each of its stages."""
    recorded, ok, n = record.get("stages"), record["status"] == "ok", cell.task["n_train"]
    if not isinstance(recorded, list) or len(recorded) != len(stages):
        raise _Denied("stages are not one for each stage of its cell")
    names = [cell.method, cell.then["name"]]
    tasks = [cell.task, cell.then.get("task", cell.task)]
    for k, (one, stage) in enumerate(zip(recorded, stages, strict=True)):
        public, where = k >= len(private), f"stages.{k + 1}"
        known = {
            "method": names[k], "data": tasks[k]["dataset"], "public": public, "batch": stage.batch,
            "steps": stage.steps, "trains": "all" if k == 0 else cell.then["trains"],
            "epochs": stage.batch * stage.steps / tasks[k]["n_train"],
            "sampling": stage.method.sampler.distribution(tasks[k]["n_train"], stage.batch),
            "relation": None if public else stage.method.sampler.relation.value,
        }  # fmt: skip
        for name, value in known.items():
            if name in one:  # an older record knows fewer
                _demand(f"{where}.{name}", one[name], value)
        if ok:
            _spent(where, one, "spent", plan(private[: k + 1], sigma, n), cell, relation)
        if ok and "sensitivity" in one and public:
            _demand(f"{where}.sensitivity", one["sensitivity"], None)
        elif ok and "sensitivity" in one:
            _bounded(where, one, stage)


def _rule_bound(stage: Stage) -> float | None:
    """The sensitivity of the clipped sum where the rule alone decides it; None where its state or the engine does."""
    method = stage.method
    clip, relation = method.clip, method.sampler.relation
    if type(clip).init is not Clip.init or method.engine.note(method.loss, clip, stage.batch, relation):
        return None
    bound = clip.sensitivity(None, relation)
    return bound if math.isfinite(bound) or isinstance(method.engine, PerExample) else None


def _bounded(where: str, recorded: Mapping[str, Any], stage: Stage) -> None:
    """The recorded sensitivity is the rule's where that decides it; of an engine that adds to it, no less."""
    if (bound := _rule_bound(stage)) is None:
        return
    grad = (recorded["sensitivity"] or {}).get("grad", 0.0)
    found, exact = math.inf if grad is None else grad, isinstance(stage.method.engine, PerExample)
    if found < bound or (exact and found > bound * (1 + 1e-9)):
        raise _Denied(f"{where}.sensitivity.grad is {_short(grad)}, and its clipping rule bounds by {bound:g}")


def _spent(
    where: str, recorded: Mapping[str, Any], name: str, ledger: Ledger, cell: Cell, relation: Relation | None
) -> None:
    """The epsilons of a ledger by accountant, and the one of them that ranks."""
    bounds, delta = recorded.get(name) or {}, cell.privacy["delta"]
    if delta is None or not bounds:
        for key in ("epsilon", "accountant"):
            _demand(f"{where}.{key}", recorded.get(key), None)
        if delta is None:
            _demand(f"{where}.{name}", bounds, {})
        return
    if relation is None:
        raise _Denied(f"{where}.{name} has epsilons, and no relation")
    strangers = sorted(bounds.keys() - ACCOUNTANTS.keys())
    if strangers:
        raise _Denied(f"{where}.{name} names {', '.join(strangers)}, which are not accountants here")
    by_rdp = epsilon(ledger, delta, relation, "rdp")
    for accountant, value in bounds.items():
        if accountant != "rdp" and MOST_EPSILON < by_rdp < math.inf:
            raise _Unknown(f"its epsilon is {by_rdp:.4g} by RDP: by {accountant} it takes too long, and is its word")
        _close(f"{where}.{name}.{accountant}", value, epsilon(ledger, delta, relation, accountant))
    if name == "spent":
        finite = {one: math.inf if bounds.get(one) is None else bounds[one] for one in ACCOUNTANTS}
        _demand(f"{where}.accountant", recorded.get("accountant"), ranking(finite))
        _demand(f"{where}.epsilon", recorded.get("epsilon"), bounds.get(recorded["accountant"]))


def _searched(recorded: Mapping[str, Any], cell: Cell, ledger: Ledger, relation: Relation, complete: bool) -> None:
    """What the search for hyper-parameters costs."""
    tuning = cell.privacy.get("tuning")
    if tuning is None:
        raise _Denied("privacy.epsilon_with_tuning is there, and the suite charges no search")
    for name, value in tuning.items():
        _demand(f"privacy.epsilon_with_tuning.{name}", recorded.get(name), value)
    if complete:
        found = charge(ledger, Tuning(**tuning), cell.privacy["delta"], relation)
        _demand("privacy.epsilon_with_tuning.accountant", recorded["accountant"], found["accountant"])
        if found["epsilon"] is not None or recorded["epsilon"] is not None:
            expected = math.inf if found["epsilon"] is None else found["epsilon"]
            _close("privacy.epsilon_with_tuning.epsilon", recorded["epsilon"], expected)
