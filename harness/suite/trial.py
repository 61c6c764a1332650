"""Builds models and tries them on examples of the shape of their data, before anything runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from harness.records.cell import canonical_json
from harness.registry import LoadError
from harness.suite.toml.lines import KeyPath
from harness.suite.toml.problems import Problems
from harness.suite.values import Second, Variant


def refuse_models(variants: Iterable[Variant], report: Problems, refused: Collection[Path] = ()) -> None:
    """Report models that cannot be built, do not fit the data, or mix examples, and second stages on other shapes.

    One architecture is built once for each shape. What has been reported already is passed over: data that is missing,
    and files that cannot be imported, which are ``refused``.
    """
    known: dict[str, str | None] = {}
    for variant in variants:
        task, then = variant.task, variant.then
        seen = _facts(task.dataset)
        if seen is None:
            continue
        key = canonical_json([task.architecture, seen])
        if key not in known:
            known[key] = _fault(task.model, seen, refused)
        if known[key]:
            report.bad((*task.path, "model"), f'task "{task.name}": {known[key]}')
            continue
        other = _facts(then.table.dataset) if then and then.table.dataset else seen
        if then is None or other is None:
            continue
        key = canonical_json([task.architecture, seen, other, then.table.trains])
        if key not in known:
            known[key] = _second(task.model, seen, other, then)
        if known[key]:
            place: KeyPath = ("method", variant.index, "then", "dataset")
            place = place if report.lines.has(place) else place[:-1]
            report.bad(place, f'"then" on task "{task.name}": {known[key]}')


def _facts(spec: str) -> dict[str, Any] | None:
    """What a model is given of a data set; None where the data is missing."""
    from harness import data

    try:
        known = data.describe(spec)
    except (ValueError, OSError, ImportError):  # which is reported where its digest is asked for
        return None
    return {key: known[key] for key in ("input_shape", "classes", "tokens")}


def _fault(model: str, seen: dict[str, Any], refused: Collection[Path]) -> str | None:
    """Why a model cannot be trained on such data, or None."""
    from harness import models, registry

    try:
        models.build(model, tuple(seen["input_shape"]), seen["classes"], 0, seen["tokens"])
    except LoadError as error:
        file = registry.resolve("model", registry.parse_spec(model)[0]).file
        return None if file in refused else str(error)
    except Exception as error:  # the function may be a user's: whatever it raises has a line
        return str(error) if isinstance(error, ValueError) else f'model "{model}": {_words(error)}'
    return None


def _second(model: str, seen: dict[str, Any], other: dict[str, Any], then: Second) -> str | None:
    """Why a second stage cannot go on with the network of the first, or None."""
    from harness import models

    shape, classes = tuple(other["input_shape"]), other["classes"]
    try:
        body = models.build(model, tuple(seen["input_shape"]), seen["classes"], 0, seen["tokens"])
        models.Headed(body, shape, classes, then.table.trains == "head")
    except Exception as error:
        return (
            f"the network {model}, made for examples of shape {list(seen['input_shape'])}, does not take those of"
            f" {then.table.dataset or 'the same data'}, {list(shape)}: {_words(error)}"
        )
    return None


def _words(error: Exception) -> str:
    text = str(error).strip() or "no reason given"
    return f"{type(error).__name__}: {text.splitlines()[0]}"
