"""Records of a report, made up but whole, and what tests ask of a board."""

from __future__ import annotations

import json
import random
import re
from typing import Any

from hypothesis import strategies as st

from harness.records.schema import blank
from harness.report import board, text
from harness.report.model.tables import Board, RankedTable
from harness.report.page import html
from harness.report.page import pages as below
from harness.report.page import payload as rows
from tests.support import ROOT

FIXTURE = ROOT / "tests" / "fixtures" / "report_records.json"


QUESTION = "What does each method buy over dp-sgd?"


def record(
    method: str = "dp-sgd",
    accuracy: float | None = 0.9,
    seed: int = 0,
    epsilon: float | None = 3.0,
    *,
    task: str = "mnist-5k/tanh-cnn",
    label: str | None = None,
    status: str = "ok",
    reason: str | None = None,
    rate: float = 5000.0,
    evaluate: str = "test",
    device: str = "Example CPU",
    **parameters: Any,
) -> dict[str, Any]:
    """One record of the schema, whole."""
    label = label or method
    group = f"{hash_(f'{label} {task} {epsilon} {evaluate} {parameters}'):012x}"
    spent = {"pld": None, "rdp": None} if epsilon is None else {"pld": 0.998 * epsilon, "rdp": 1.09 * epsilon}
    ok = status == "ok"
    id = f"{hash_(f'{group} {seed}'):012x}"
    speed = {
        "examples_per_second": {"median": rate, "q1": rate * 0.98, "q3": rate * 1.02}, "train_seconds": 80_000 / rate,
        "peak_memory_mib": 410.5,
    }  # fmt: skip
    return blank(
        id=id, group=group, suite="core", status=status, reason=reason, path=f"results/core/{id}/record.json",
        stale=False,
        cell={
            "method": {
                "name": method, "label": label, "parameters": {"clip": 1.0, "lr": 2.0, **parameters},
                "parts": {"clip": {"type": "Flat", "clip": 1.0}, "noise": {"type": "Gaussian"}},
            },
            "task": {
                "name": task, "dataset": task.partition("/")[0], "digest": "0123456789abcdef",
                "model": task.partition("/")[2], "evaluate": evaluate, "n_train": 4000,
            },
            "privacy": {"epsilon": epsilon, "delta": 1e-5, "relation": "add-or-remove",
                        "unit": "example", "accountant": "pld"},
            "schedule": {"batch": 256, "steps": 312},
            "numerics": {"dtype": "float32", "tf32": False},
            "seed": seed,
        },
        card={
            "paper": "arXiv:1607.00133",
            "family": "baseline" if method in ("dp-sgd", "non-private") else "engine",
            "summary": "Clip every gradient, add noise to the sum.",
        },
        privacy={
            "relation": "add-or-remove", "unit": "example", "sampling": "Poisson, q = 0.064",
            "sensitivity": {"grad": 1.0},
            "noise_multiplier": None if epsilon is None else round(2.5 / epsilon + 0.6, 4),
            "delta": 1e-5, "planned": spent, "spent": spent if ok else {}, "accountant": "pld" if ok else None,
            "epsilon": spent["pld"] if ok else None, "ledger": [[{"type": "Gaussian"}, 312]], "public_data": "none",
        },
        metrics={"accuracy": accuracy, "loss": 0.3} if ok else {},
        measured={"jobs": 2},
        diagnostics={"clipped_fraction": 0.7, **(speed if ok else {})},
        weights_sha256="0" * 64 if ok else None,
        code={"hash": "abcdefabcdef", "commit": "0f" * 20, "dirty": False},
        device={"name": device, "kind": "cpu", "spec": "cpu", "threads": 1,
                "fingerprint": f"{hash_(device):012x}"[:8]},
        environment={"python": "3.11.9", "torch": "2.6.0"},
        started=f"2025-01-0{1 + seed % 9}T10:00:00Z",
        finished=f"2025-01-0{1 + seed % 9}T10:01:00Z",
    )  # fmt: skip


def hash_(words: str) -> int:
    """A number that is the same in every process (`hash` is not)."""
    return random.Random(words.encode("utf-8", "surrogatepass")).getrandbits(48)


def seeds(method: str, accuracies: list[float], **options: Any) -> list[dict[str, Any]]:
    """One record a seed."""
    return [record(method, accuracy, seed, **options) for seed, accuracy in enumerate(accuracies)]


def fixture_records() -> list[dict[str, Any]]:
    """A small suite with everything in it: ties, failures, a search, a claim, a stale run, no privacy."""
    speeds = {"dp-sgd": 5200.0, "fast-clipping": 9800.0, "dp-adam": 4900.0}
    out: list[dict[str, Any]] = []
    for task, top in (("mnist-5k/tanh-cnn", 0.93), ("mnist1d/cnn-1d", 0.71)):
        for target, loss in ((1.0, 0.14), (3.0, 0.06), (8.0, 0.03)):
            for method, gain in (("dp-sgd", 0.0), ("fast-clipping", 0.001), ("dp-adam", -0.021)):
                rng = random.Random(f"{task} {target} {method}")
                values = [top - loss + gain + luck + rng.gauss(0, 0.003) for luck in (0.004, -0.003, 0.001)]
                out += seeds(method, [round(v, 4) for v in values], epsilon=target, task=task, rate=speeds[method])
        out += seeds("non-private", [top + 0.02, top + 0.022, top + 0.019], epsilon=None, task=task, rate=21_000.0)
    out += [
        *seeds("automatic", [0.874, 0.871], label="automatic (gamma=0.01)", gamma=0.01),
        record("automatic", seed=2, label="automatic (gamma=0.01)", gamma=0.01, status="diverged",
               reason="the loss is not finite at step 118"),
        *[record("group-wise", seed=s, status="skipped", reason="engine ghost has no group-wise clipping")
          for s in range(3)],
        record("dp-lamb", 0.88, seed=0),
        *seeds("dp-sgd", [0.80, 0.82], evaluate="validation", label="dp-sgd (lr=1)", lr=1.0),
        *seeds("dp-sgd", [0.84, 0.85], evaluate="validation", label="dp-sgd (lr=2)", lr=2.0),
    ]  # fmt: skip
    mix = seeds("modelmix", [0.861, 0.868, 0.872], claimed=True)
    for entry in mix:
        entry["privacy"]["claimed"] = {"epsilon": 1.9, "assumes": "coordinates differ by at least tau"}
    mix[0]["stale"] = True
    return out + mix


TUNING = {"data": "a fifth of the training data", "protocol": "6 settings a method"}


EVIL = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>'",
    "</script><!-- \u2028\u202etxt.exe",
    '=HYPERLINK("http://x")',
    "a|b `c` [d](javascript:e) $f_1^{",
    "\x1b[31mred\x1b[0m \ud800",
]


def make(records: list[dict[str, Any]], **options: Any) -> Board:
    return board("core", QUESTION, records, **options)


def table(model: Board, epsilon: float = 3.0, task: str = "mnist-5k/tanh-cnn", split: str = "test") -> RankedTable:
    wanted = (task, epsilon, split)
    (found,) = [t for t in model.tables if (t.setting.task, t.setting.epsilon, t.setting.split) == wanted]
    return found


def claim(value: float = 0.90, **changes: Any) -> dict[str, Any]:
    """A published accuracy of dp-sgd at epsilon 3."""
    return {"method": "dp-sgd", "task": "mnist-5k/tanh-cnn", "epsilon": 3.0, "metric": "accuracy", "value": value,
            "source": "table 1", "note": ""} | changes  # fmt: skip


def verdict(records: list[dict[str, Any]], said: dict[str, Any], **options: Any) -> tuple[str, str]:
    """The verdict on one published value, and what the table says."""
    (found,) = make(records, published=[said], **options).published
    return found.verdict, text.outcome(found)


THREE = [0.88, 0.90, 0.92]


def hostile(name: str) -> list[dict[str, Any]]:
    """Records with `name` wherever a text can be."""
    records = [*seeds("dp-sgd", [0.8, 0.81]), *seeds("non-private", [0.9, 0.91], epsilon=None)]
    evil = [
        *seeds(name, [0.7, 0.72], label=name, value=name),
        record(name, seed=2, label=name, value=name, status="crashed", reason=name),
    ]
    for r in evil:
        r["card"] = {"paper": name, "family": name, "summary": name}
        r["privacy"] |= {"sampling": name, "public_data": name, "claimed": {"epsilon": 1.0, name: name}}
        r["device"]["name"] = r["environment"]["torch"] = r["code"]["commit"] = name
        r["path"] = f"core/{name}/record.json"
        r["cell"]["method"]["parts"] = {name: {"type": name, name: name}}
    evil[0]["id"] = evil[0]["group"] = name
    return records + evil


def lines(model: Board, audits: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """The rows of the page's JSON, each as a mapping."""
    shown = (
        html.page(rows.Content(model, audits=rows.audits(audits or [])))
        .partition(below.DATA)[2]
        .partition("</script>")[0]
    )
    assert not re.search(r"[<>&\u2028]", shown), "nothing in the data can be markup"
    data = json.loads(shown)
    return [dict(zip(data["fields"], row, strict=True)) | {"at": data["tables"][row[0]]} for row in data["rows"]]


def audit(**changes: Any) -> dict[str, Any]:
    return {"method": "dp-sgd", "epsilon_target": 3.0, "epsilon_claimed": 2.998, "epsilon_audited": 1.2,
            "confidence": 0.95, "instrument": "canaries", "task": {"name": "mnist-5k/tanh-cnn"}} | changes  # fmt: skip


def traced(one: dict[str, Any], accuracies: list[float]) -> dict[str, Any]:
    """The record with a trace: a log point a second, epsilon and the clipped fraction growing by a tenth."""
    points = [
        {"step": 10 * i, "seconds": float(i), "accuracy": a, "epsilon": i / 10, "clipped_fraction": i / 10}
        for i, a in enumerate(accuracies, 1)
    ]
    return one | {"trace": points}


ADDED = ("trains", "batch", "epochs", "sampling", "relation", "sensitivity", "examples_per_second", "train_seconds",
         "engine", "microbatch", "train_loss", "clipped_fraction", "non_finite")  # fmt: skip


MIXED = 4567.8125


def stage(method: str, rate: float, bound: float, epsilon: float, **more: Any) -> dict[str, Any]:
    return {
        "method": method, "data": "mnist-5k", "public": False, "trains": "all", "batch": 256, "steps": 40,
        "epochs": 2.56, "sampling": "Poisson, q = 0.064", "relation": "add-or-remove", "sensitivity": {"grad": bound},
        "examples_per_second": {"median": rate, "q1": rate, "q3": rate}, "train_seconds": 10240 / rate,
        "engine": "Pairs", "microbatch": 256, "train_loss": 5.0, "clipped_fraction": 0.125, "non_finite": 0,
        "spent": {"pld": epsilon}, "accountant": "pld", "epsilon": epsilon,
    } | more  # fmt: skip


def staged(seed: int = 0) -> dict[str, Any]:
    """A run of 40 steps, then 60 of another method in other batches, on the head."""
    one = record("logit-dp", 0.8, seed, label="logit-dp, then dp-adam", rate=123.0)
    one["cell"]["schedule"] = {"batch": 256, "steps": 40}
    one["cell"]["then"] = {
        "name": "dp-adam", "parameters": {"lr": 0.02}, "parts": {"clip": {"type": "Flat", "clip": 0.25}},
        "schedule": {"batch": 512, "steps": 60}, "trains": "head",
    }  # fmt: skip
    law = "Poisson, q = 0.128"
    one["stages"] = [
        stage("logit-dp", 123.0, 16.78, 1.75),
        stage("dp-adam", 9876.0, 0.25, 2.994, trains="head", batch=512, steps=60, epochs=7.68, sampling=law,
              engine="BookKeeping"),
    ]  # fmt: skip
    one["privacy"] |= {"sampling": f"Poisson, q = 0.064 (stage 1); {law} (stage 2)", "sensitivity": None}
    one["diagnostics"] = {"train_seconds": one["diagnostics"]["train_seconds"]}
    one["trace"] = [
        {"step": 10 * i, "seconds": float(i), "accuracy": a, "epsilon": i / 10, "clipped_fraction": a / 2}
        for i, a in enumerate([0.95, 0.96, 0.97, 0.98, 0.1, 0.3, 0.5, 0.6, 0.7, 0.8], 1)
    ]
    return one


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(one, sort_keys=True) for one in fixture_records())
    FIXTURE.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


PUBLISHED: list[dict[str, Any]] = [
    {"method": "dp-sgd", "task": "mnist-5k/tanh-cnn", "epsilon": 3.0, "metric": "accuracy", "value": 0.871,
     "source": "arXiv:2011.11660", "note": "all of MNIST"},
    {"method": "dp-adam", "task": "mnist-5k", "epsilon": 3, "metric": "accuracy", "value": 98.1,
     "source": "table 2", "note": ""},
    {"method": "dp-sat", "task": "mnist-5k/tanh-cnn", "epsilon": 3.0, "metric": "accuracy", "value": 0.9,
     "source": "https://example.org/paper", "note": ""},
]  # fmt: skip


def pages(model: Board, audits: list[dict[str, Any]] | None = None) -> dict[str, str]:
    """Everything but the figures' files; the rows' pages and the methods' cards each as one text."""
    content = rows.Content(model, audits=rows.audits(audits or []))
    return {"html": html.page(content),
            "runs": "\n".join(below.run_pages(content).values()),
            "cards": "\n".join(below.cards(content).values()),
            "md": text.markdown(model), "csv": text.table_csv(model),
            "published": text.published_csv(model), "txt": text.top_rows(model)}  # fmt: skip


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.just(10**400), st.text(max_size=8), st.just([]),
    st.just({}), st.just({"epsilon": None}),
)  # fmt: skip
