"""Specs to data: ``load``, and what can be said of a data set without loading it."""

from __future__ import annotations

import inspect
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness import registry
from harness.data.canonical import KEYS, Array, Raw, canonical
from harness.data.dataset import Dataset, Facts
from harness.data.source import (
    DatasetError,
    DatasetMismatch,
    DatasetMissing,
    Derived,
    Places,
    Source,
    kept,
    kept_at,
    places,
)
from harness.dp import cache

# Part of every cache key: raise it when reading, ordering or digests change.
FORMAT = 2


def load(spec: str, root: Path | None = None, *, download: bool | None = None) -> Dataset:
    """The data set ``"name"``, ``"mnist1d?n=10000"``, ``"npz:PATH"`` or ``"features:NAME?..."``, on the CPU.

    ``root`` is where files are looked for (default ``$EPSBENCH_DATA``, else ``~/.cache/epsbench/data``).
    ``download`` allows torchvision to fetch what is missing (default: whether ``EPSBENCH_DOWNLOAD=1``).

    Raises :class:`DatasetMissing` naming every place and the command that supplies the data,
    :class:`DatasetMismatch` where a file of a known name holds something else, :class:`DatasetError` for
    any other fault of the data, and the registry's errors for a misspelt name or option.
    """
    return _open(spec, places(root, download)).load()


def facts(spec: str, root: Path | None = None) -> Facts:
    """What is known of a data set, without loading it where that is constant or in the cache."""
    return _open(spec, places(root)).facts()


def describe(spec: str, root: Path | None = None) -> dict[str, Any]:
    """The fields of :class:`Facts` as a dict, without loading where they are constants or in the cache."""
    return asdict(facts(spec, root))


def missing(spec: str, root: Path | None = None) -> DatasetMissing | None:
    """The error that loading would raise for want of files; None where they are there or may be downloaded.

    Reads no data. Raises the registry's errors for a misspelt name or option.
    """
    return _open(spec, places(root)).missing()


def _open(spec: str, root: Places) -> _Read | Derived:
    entry, arguments = registry.lookup("dataset", spec)
    function = registry.load(entry)
    changed = {
        key: value
        for key, value in arguments.items()
        if key != entry.argument and value != entry.parameters[key].default
    }
    supplied: dict[str, Any] = dict(arguments)
    if "root" in inspect.signature(function).parameters:
        supplied["root"] = root
    source = function(**supplied)
    if isinstance(source, Derived):
        return source
    if not isinstance(source, Source):
        raise DatasetError(
            f'{entry.where}: data set "{entry.name}" returned {type(source).__name__}; return a harness.data.Source'
        )
    name = _name(entry.name, supplied.get(entry.argument or ""), changed)
    constants = None
    if not changed and entry.argument is None and "shape" in entry.meta:
        known: dict[str, Any] = {"digest": "", **entry.meta}
        given = ("digest", "mean", "std", "statistics", "classes", "n_train", "n_test")
        constants = Facts(name=name, input_shape=known["shape"], **{key: known[key] for key in given})
    return _Read(name, source, entry.meta, constants, root.download and ":" not in spec)


def _name(name: str, path: object, changed: Mapping[str, object]) -> str:
    """The canonical name: of a path only its stem (a record does not depend on folders), options sorted."""
    base = f"{name}:{Path(str(path)).stem}" if path is not None else name
    options = "&".join(f"{key}={_text(value)}" for key, value in sorted(changed.items()))
    return f"{base}?{options}" if options else base


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class _Read:
    """A data set that is read from a source.

    ``constants`` are the facts that the decorator of a known data set gives, where all options have their defaults;
    their digest may be empty. ``fetched``: what is missing may be downloaded.
    """

    name: str
    source: Source
    meta: Mapping[str, Any]
    constants: Facts | None
    fetched: bool

    def load(self) -> Dataset:
        raw, facts = self._content()
        return Dataset.of(facts, (getattr(raw, key) for key in KEYS), raw.source)

    def facts(self) -> Facts:
        if self.constants is not None and self.constants.digest:
            return self.constants
        try:
            remembered = kept(self._place(".json"), Facts)
        except DatasetMissing:
            if not self.fetched:
                raise
            remembered = None  # reading will fetch it
        return remembered or self._content()[1]

    def missing(self) -> DatasetMissing | None:
        try:
            self.source.stamp()
        except DatasetMissing as error:
            return None if self.fetched else error
        return None

    def _place(self, suffix: str) -> Path:
        """Changes with the options and with the files' paths, sizes and times. Raises :class:`DatasetMissing`."""
        return kept_at("datasets", f"{FORMAT}\n{self.name}\n{self.source.stamp()}", suffix)

    def _content(self) -> tuple[Raw, Facts]:
        """Arrays in canonical order and their facts, checked against the constants; uses the cache."""
        digest = self.constants.digest if self.constants is not None else ""
        remembered = kept(self._place(".json"), Facts) if self.source.keep else None
        held = _arrays(self._place(".npz")) if remembered is not None else None
        if held is not None:
            raw, facts = self._canonical(held)
            if facts == remembered and digest in ("", facts.digest):
                return raw, facts
        raw, facts = self._canonical(self.source.read())
        if self.constants is not None:
            self._check(facts, self.constants, raw.source)
        # Best effort: without a writable cache everything works, only slower.
        if self.source.keep:
            cache.keep(self._place(".npz"), lambda file: np.savez(file, **vars(raw)))
        if self.source.keep or not digest:
            cache.dump(self._place(".json"), asdict(facts))
        return raw, facts

    def _canonical(self, raw: Raw) -> tuple[Raw, Facts]:
        if self.source.normalise is not None:
            mean, std, statistics = self.source.normalise(raw)
        else:
            mean, std, statistics = (self.meta[key] for key in ("mean", "std", "statistics"))
        raw, digest = canonical(raw, mean, std)
        return raw, Facts(
            name=self.name,
            digest=digest,
            mean=mean,
            std=std,
            statistics=statistics,
            input_shape=tuple(raw.x_train.shape[1:]),
            classes=raw.classes,
            n_train=len(raw.x_train),
            n_test=len(raw.x_test),
            tokens=None if any(mean) or any(one != 1 for one in std) else _tokens(raw.x_train, raw.x_test),
        )

    def _check(self, facts: Facts, constants: Facts, source: str) -> None:
        wrong = [
            f"{field} is {getattr(facts, field)}, not {getattr(constants, field)}"
            for field in ("input_shape", "n_train", "n_test", "classes")
            if getattr(facts, field) != getattr(constants, field)
        ]
        if not wrong and constants.digest and facts.digest != constants.digest:
            wrong = [f"digest is {facts.digest}, not {constants.digest}: some pixel or label differs"]
        if wrong:
            files = ", ".join(line.split("|")[0] for line in self.source.stamp().splitlines())
            raise DatasetMismatch(
                f'data set "{self.name}", read from {source}, is not the published one: {"; ".join(wrong)}. '
                f"It is here: {files}. Replace it by the published data, or train on it as your own "
                'with "npz:PATH".'
            )


def _tokens(*inputs: Array) -> int | None:
    """A number above all inputs, where they are whole numbers from 0, of two values or more."""
    if any(x.dtype == np.uint8 or (x < 0).any() or (x != np.floor(x)).any() for x in inputs):
        return None
    highest = int(max(x.max() for x in inputs))
    return highest + 1 if 1 <= highest < 2**31 else None


def _arrays(place: Path) -> Raw | None:
    held = cache.read(place)
    if held is None:
        return None
    try:
        with np.load(io.BytesIO(held), allow_pickle=False) as file:
            x_train, y_train, x_test, y_test = (file[key] for key in KEYS)
            return Raw(x_train, y_train, x_test, y_test, str(file["source"]), int(file["classes"]))
    except Exception:  # damaged, in whatever way: it is made again
        return None
