"""Specs to data: ``load``, and what can be said of a data set without loading it."""

from __future__ import annotations

import hashlib
import inspect
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from harness import registry
from harness.data.arrays import KEYS
from harness.data.canonical import Array, Raw, canonical
from harness.data.dataset import Dataset, Facts
from harness.data.source import DatasetError, DatasetMismatch, DatasetMissing, Derived, Source, places
from harness.dp import cache

# Part of every cache key: raise it when reading, ordering or digests change.
FORMAT = 2


@dataclass(frozen=True)
class _Opened:
    """A spec, resolved: the source, the entry's constants, and whether every option has its default."""

    spec: str
    name: str
    source: Source
    meta: Mapping[str, Any]
    plain: bool


def load(spec: str, root: Path | None = None, *, download: bool | None = None) -> Dataset:
    """The data set ``"name"``, ``"mnist1d?n=10000"``, ``"npz:PATH"`` or ``"features:NAME?..."``, on the CPU.

    ``root`` is where files are looked for (default ``$EPSBENCH_DATA``, else ``~/.cache/epsbench/data``).
    ``download`` allows torchvision to fetch what is missing (default: whether ``EPSBENCH_DOWNLOAD=1``).

    Raises :class:`DatasetMissing` naming every place and the command that supplies the data,
    :class:`DatasetMismatch` where a file of a known name holds something else, :class:`DatasetError` for
    any other fault of the data, and the registry's errors for a misspelt name or option.
    """
    opened = _open(spec, root, download)
    if isinstance(opened, Derived):
        return opened.load()
    raw, facts = _content(opened)
    return _tensors(raw, facts)


def facts(spec: str, root: Path | None = None) -> Facts:
    """What is known of a data set, without loading it where that is constant or in the cache."""
    opened = _open(spec, root, None)
    if isinstance(opened, Derived):
        return opened.facts()
    known = _constants(opened)
    if known is not None and known.digest:
        return known
    try:
        remembered = _remembered(_key(opened))
    except DatasetMissing:
        if not places(root).download:
            raise
        remembered = None  # reading will fetch it
    return remembered or _content(opened)[1]


def describe(spec: str, root: Path | None = None) -> dict[str, Any]:
    """The fields of :class:`Facts` as a dict, without loading where they are constants or in the cache."""
    return asdict(facts(spec, root))


def digest_of(spec: str, root: Path | None = None) -> str:
    """The digest that ``load(spec).digest`` will have: a constant, or from the cache, or by loading."""
    return facts(spec, root).digest


def missing(spec: str, root: Path | None = None) -> DatasetMissing | None:
    """The error that loading would raise for want of files; None where they are there or may be downloaded.

    Reads no data. Raises the registry's errors for a misspelt name or option.
    """
    where = places(root)
    opened = _open(spec, where.root, where.download)
    if isinstance(opened, Derived):
        return opened.missing()
    try:
        opened.source.stamp()
    except DatasetMissing as error:
        return None if where.download and ":" not in spec else error
    return None


# Opening a spec -------------------------------------------------------------------------------------------


def _open(spec: str, root: Path | None, download: bool | None) -> _Opened | Derived:
    entry, arguments = registry.lookup("dataset", spec)
    function = registry.load(entry)
    changed = {
        key: value
        for key, value in arguments.items()
        if key != entry.argument and value != entry.parameters[key].default
    }
    supplied: dict[str, Any] = dict(arguments)
    if "root" in inspect.signature(function).parameters:
        supplied["root"] = places(root, download)
    source = function(**supplied)
    if isinstance(source, Derived):
        return source
    if not isinstance(source, Source):
        raise DatasetError(
            f'{entry.where}: data set "{entry.name}" returned {type(source).__name__}; return a harness.data.Source'
        )
    return _Opened(
        spec=spec,
        name=_name(entry.name, supplied.get(entry.argument or ""), changed),
        source=source,
        meta=entry.meta,
        plain=not changed and entry.argument is None,
    )


def _name(name: str, path: object, changed: Mapping[str, object]) -> str:
    """The canonical name: of a path only its stem (a record does not depend on folders), options sorted."""
    base = f"{name}:{Path(str(path)).stem}" if path is not None else name
    options = "&".join(f"{key}={_text(value)}" for key, value in sorted(changed.items()))
    return f"{base}?{options}" if options else base


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _constants(opened: _Opened) -> Facts | None:
    """The decorator's constants, where they apply: a known data set with default options."""
    meta = opened.meta
    if not opened.plain or "shape" not in meta:
        return None
    return Facts(
        name=opened.name,
        digest=meta.get("digest", ""),
        mean=meta["mean"],
        std=meta["std"],
        statistics=meta["statistics"],
        input_shape=meta["shape"],
        classes=meta["classes"],
        n_train=meta["n_train"],
        n_test=meta["n_test"],
    )


# Reading --------------------------------------------------------------------------------------------------


def _content(opened: _Opened) -> tuple[Raw, Facts]:
    """Arrays in canonical order and their facts, checked against the constants; uses the cache."""
    constants = _constants(opened)
    key = _key(opened) if opened.source.keep else ""
    remembered = _remembered(key) if key else None
    if remembered is not None:
        kept = _kept(key)
        if kept is not None:
            raw, facts = _canonical(opened, kept)
            if facts == remembered and (constants is None or constants.digest in ("", facts.digest)):
                return raw, facts
    raw, facts = _canonical(opened, opened.source.read())
    if constants is not None:
        _check(opened, facts, constants, raw.source)
    if not (constants is not None and constants.digest) or opened.source.keep:
        _remember(key or _key(opened), facts, raw if opened.source.keep else None)
    return raw, facts


def _canonical(opened: _Opened, raw: Raw) -> tuple[Raw, Facts]:
    if opened.source.normalise is not None:
        mean, std, statistics = opened.source.normalise(raw)
    else:
        mean, std, statistics = (opened.meta[key] for key in ("mean", "std", "statistics"))
    raw, digest = canonical(raw, mean, std)
    return raw, Facts(
        name=opened.name,
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


def _tokens(*inputs: Array) -> int | None:
    """A number above all inputs, where they are whole numbers from 0, of two values or more."""
    if any(x.dtype == np.uint8 or (x < 0).any() or (x != np.floor(x)).any() for x in inputs):
        return None
    highest = int(max(x.max() for x in inputs))
    return highest + 1 if 1 <= highest < 2**31 else None


def _check(opened: _Opened, facts: Facts, constants: Facts, source: str) -> None:
    wrong = [
        f"{field} is {getattr(facts, field)}, not {getattr(constants, field)}"
        for field in ("input_shape", "n_train", "n_test", "classes")
        if getattr(facts, field) != getattr(constants, field)
    ]
    if not wrong and constants.digest and facts.digest != constants.digest:
        wrong = [f"digest is {facts.digest}, not {constants.digest}: some pixel or label differs"]
    if wrong:
        raise DatasetMismatch(
            f'data set "{opened.name}", read from {source}, is not the published one: {"; ".join(wrong)}. '
            f"It is here: {_where(opened)}. Replace it by the published data, or train on it as your own "
            'with "npz:PATH".'
        )


def _where(opened: _Opened) -> str:
    return ", ".join(line.split("|")[0] for line in opened.source.stamp().splitlines())


def _tensors(raw: Raw, facts: Facts) -> Dataset:
    import torch

    return Dataset(
        name=facts.name,
        classes=facts.classes,
        x_train=torch.from_numpy(raw.x_train),
        y_train=torch.from_numpy(raw.y_train),
        x_test=torch.from_numpy(raw.x_test),
        y_test=torch.from_numpy(raw.y_test),
        mean=facts.mean,
        std=facts.std,
        digest=facts.digest,
        source=raw.source,
        statistics=facts.statistics,
        public_data=facts.public_data,
        tokens=facts.tokens,
    )


# The cache ------------------------------------------------------------------------------------------------


def _key(opened: _Opened) -> str:
    """Changes with the options and with the files' paths, sizes and times. Raises :class:`DatasetMissing`."""
    text = f"{FORMAT}\n{opened.name}\n{opened.source.stamp()}"
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _cache_file(key: str, suffix: str) -> Path:
    return cache.root() / "datasets" / f"{key}{suffix}"


def _remembered(key: str) -> Facts | None:
    return read_facts(_cache_file(key, ".json"))


def read_facts(file: Path) -> Facts | None:
    """Facts kept as JSON; None where the file is absent or damaged, to be made again."""
    try:
        found = cache.load(file)
        for field in ("mean", "std", "input_shape", "sources"):
            found[field] = tuple(found[field])
        facts = Facts(**found)
        counts = (*facts.input_shape, facts.classes, facts.n_train, facts.n_test)
        sound = isinstance(facts.digest, str) and all(type(count) is int for count in counts)
        return facts if sound else None
    except (KeyError, TypeError):
        return None


def _kept(key: str) -> Raw | None:
    held = cache.read(_cache_file(key, ".npz"))
    if held is None:
        return None
    try:
        with np.load(io.BytesIO(held), allow_pickle=False) as file:
            x_train, y_train, x_test, y_test = (file[key] for key in KEYS)
            return Raw(x_train, y_train, x_test, y_test, str(file["source"]), int(file["classes"]))
    except Exception:  # damaged, in whatever way: it is made again
        return None


def _remember(key: str, facts: Facts, raw: Raw | None) -> None:
    """Best effort: without a writable cache everything works, only slower."""

    def arrays(file: IO[bytes]) -> None:
        assert raw is not None
        np.savez(file, **vars(raw))

    if raw is not None:
        cache.keep(_cache_file(key, ".npz"), arrays)
    cache.dump(_cache_file(key, ".json"), asdict(facts))
