"""Results bundles: the records of a folder as one file, for another laboratory to take in.

A bundle is a zip file of plain text and nothing else::

    manifest.json                    format, schema of the records, size and SHA-256 of every other file
    <suite>/<id>/record.json         what may be published of it
                 trace.jsonl         the same, where there is one
                 env.json            where there is one

What is private of a record and of its trace is left out (:mod:`harness.records.public`), or all goes along as the store
has it, byte for byte, where that is asked for.

The same records give the same bytes on every machine: names are sorted, times are fixed, nothing is compressed. Packing
leaves out, by name, invalid records and what names a place or a machine of the sender. Tracebacks
(``error.txt``) and checkpoints never travel.

Whoever takes a bundle in trusts nothing in it: every name must be one of the above, every size is bounded while it is
read, every file must have the checksum of the manifest, every record must fit the published schema and have the id of
its cell. A bundle with any fault is refused whole, and each fault is named by its file. Of a valid one each record is
then examined: what it says of its privacy is computed again (:mod:`harness.verify.exchange.trust`), and one that lies
is refused by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import socket
import stat
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from harness.records import merge as merging
from harness.records import public, store
from harness.records.files import MOST_BYTES, Broken, StoreError, content, dumps, replace_file
from harness.records.merge import MergeResult
from harness.records.record import SCHEMA
from harness.records.schema import decode, unknown, unreadable

__all__ = ["FORMAT", "BundleError", "Packed", "ineligible", "merge", "pack", "unpack"]

FORMAT = 1
MANIFEST = "manifest.json"
RECORD = "record.json"
SIDES = ("trace.jsonl", "env.json")
LEAST_SEEDS = 2
"""Finished seeds below which there is no interval, and so no rank."""
MOST_FILES = 100_000
MOST_TOTAL = 2 * 2**30
"""Bytes of all files of a bundle together, as they are when unpacked."""

_NAME = re.compile(
    r"[a-z0-9]+(?:-[a-z0-9]+)*/[0-9a-f]{12}(?:\.[1-9][0-9]{0,8})?/(?:record\.json|trace\.jsonl|env\.json)"
)
_ABSOLUTE = re.compile(
    r"""(?:^|[\s"'`(\[{<=,;:|])/(?:[\w.@+~-]{2,}|[^\s/]+/)"""  # /home, but neither "1/s" nor "https://"
    r"|file:/|(?<![A-Za-z0-9])[A-Za-z]:[\\/][^\\/\s]|\\\\\w"
)
_UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError)


class BundleError(StoreError):
    """A bundle is refused. Nothing was added; the message names every file at fault."""

    def __init__(self, bundle: Path, faults: Sequence[Broken]) -> None:
        shown = "".join(f"\n  {one}" for one in faults[:20])
        more = f"\n  and {len(faults) - 20} more" if len(faults) > 20 else ""
        super().__init__(f"{bundle}: refused, nothing of it was added:{shown}{more}")
        self.faults = tuple(faults)


@dataclass(frozen=True)
class Packed:
    """A bundle that was written: its SHA-256, its records (``suite/id``), and what was left out and why."""

    path: Path
    sha256: str
    records: list[str]
    left_out: list[Broken] = field(default_factory=list)


# Packing --------------------------------------------------------------------------------------------------


def pack(results: Path, into: Path, suite: str | None = None, private: bool = False) -> Packed:
    """Write the records under `results` (of one suite where named) as the bundle `into`, `private`: all of them.

    Raises StoreError where there is no record to pack, or where `into` exists and holds something else; Unwritable
    where it cannot be written.
    """
    found = store.load(results, suite)
    left_out = list(found.broken)
    files: dict[str, bytes] = {}
    shared = store.crowded(found)
    left_out += shared
    for record in found:
        if Path(record["path"]) in {one.path for one in shared}:
            continue
        files |= _folder(record, private, left_out)
    if not files:
        why = "".join(f"\n  {one}" for one in left_out[:20])
        place = results / suite if suite else results
        raise StoreError(f"{place}: holds no records that can be packed{why}")
    data = _zip({MANIFEST: _manifest(files), **dict(sorted(files.items()))})
    if into.is_file() and into.read_bytes() != data:
        raise StoreError(f"{into}: exists already and is another bundle; name a new file with -o")
    if not into.is_file():
        replace_file(into, data)
    records = sorted(name.rpartition("/")[0] for name in files if name.endswith(RECORD))
    return Packed(into, hashlib.sha256(data).hexdigest(), records, left_out)


def _folder(record: store.Record, private: bool, left_out: list[Broken]) -> dict[str, bytes]:
    """The files of one run that travel, by name in the bundle."""
    files: dict[str, bytes] = {}
    folder = Path(record["path"]).parent
    for name in (RECORD, *SIDES):
        data, reason = _travelling(record, folder / name, private)
        if reason:
            left_out.append(Broken(folder / name, reason))
        if data is not None and not reason:
            files[f"{folder.parent.name}/{folder.name}/{name}"] = data
        elif name == RECORD:
            return {}  # without its record there is nothing to go with
    return files


def _travelling(record: store.Record, path: Path, private: bool) -> tuple[bytes | None, str]:
    """What travels of a file of a run, None where nothing does; and what is wrong with it."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return None, "not a plain file"
        data: bytes | None = content(path)
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        return None, f"cannot be read: {error.strerror}"
    try:
        if not private and path.name == RECORD:
            data = store.encode(public.view(record), path.parent.name)
        elif not private and path.name == "trace.jsonl" and data is not None:
            data = public.trace(record, data)
    except (ValueError, RecursionError, StoreError) as error:
        return None, f"not JSON: {error}"
    # What is private of a file must not decide whether the rest of it is published.
    return data, "" if data is None else _flaw(path, data) or _gives_away(path.name, data)


def _manifest(files: Mapping[str, bytes]) -> bytes:
    listed = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    return dumps({"bundle": FORMAT, "schema": SCHEMA, "files": listed}).encode()


def _zip(files: Mapping[str, bytes]) -> bytes:
    """A zip file that depends on names and contents only. Stored: what deflate gives depends on the library."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, (stat.S_IFREG | 0o644) << 16
            archive.writestr(info, data)
    return out.getvalue()


# What a file must be --------------------------------------------------------------------------------------


def _flaw(path: Path, data: bytes) -> str:
    """What keeps a file, named ``.../<suite>/<id>/<name>``, from being one of a run; empty where nothing does."""
    if len(data) > MOST_BYTES:
        return f"larger than {MOST_BYTES // 2**20} MiB"
    if path.name == RECORD:
        record, reason = store.parse_at(path, data)
        return reason if record is None else store.mismatch(record) or _schema_flaw(record)
    try:
        values = list(_values(path.name, data))
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    if not all(isinstance(value, dict) for value in values):
        return "not a JSON object" if path.name == "env.json" else "a line of it is not a JSON object"
    return next(filter(None, map(unreadable, values)), "")


def _values(name: str, data: bytes) -> Iterator[Any]:
    """The JSON values of a file: one a line in a trace, else one."""
    texts = data.decode().splitlines() if name.endswith(".jsonl") else [data.decode()]
    yield from (decode(text) for text in texts if text.strip() or not name.endswith(".jsonl"))


def _schema_flaw(record: store.Record) -> str:
    """The key of a valid record that no record has; empty where all are known. What it holds may be private."""
    key = unknown(store.written(record))
    return f'"{key}" is a key that no version of a record has: leave it out' if key else ""


def _gives_away(name: str, data: bytes) -> str:
    """Where a file names a place or this machine, which nobody else can use; empty where it does not."""
    hosts = _hosts()
    for value in _values(name, data):
        for where, text in _texts(value, "$"):
            if found := _ABSOLUTE.search(text):
                return f"{where} holds an absolute path: {text[found.start() :].strip()[:60]!r}"
            if hosts and (host := hosts.search(text)):
                return f"{where} holds the name of this machine: {host[0]!r}"
    return ""


def _hosts() -> re.Pattern[str] | None:
    full = socket.gethostname()
    names = {name for name in (full, full.partition(".")[0]) if len(name) > 3 and name != "localhost"}
    words = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.compile(rf"(?<![\w-])(?:{words})(?![\w-])") if names else None


def _texts(value: object, where: str) -> Iterator[tuple[str, str]]:
    """Every text inside a JSON value, names of fields included, with its place."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield f"a name in {where}", key
            yield from _texts(one, f"{where}.{key}")
    elif isinstance(value, list):
        for i, one in enumerate(value):
            yield from _texts(one, f"{where}[{i}]")


# Taking in ------------------------------------------------------------------------------------------------


def merge(sources: Sequence[Path], into: Path) -> MergeResult:
    """As :func:`harness.records.merge.merge`, where a source may also be a bundle, and no record is believed.

    What can be computed again of a record is (:mod:`harness.verify.exchange.trust`), and one that says otherwise is
    refused by name. Every bundle is checked before anything is added. Raises BundleError.
    """
    from harness.verify.exchange import trust

    def vet(record: store.Record) -> tuple[str, tuple[str, ...]]:
        verdict = trust.examine(record)
        return verdict.refused, verdict.unknown

    called: dict[Path, str] = {}
    with contextlib.ExitStack() as stack:
        folders: list[Path] = []
        for source in sources:
            folder = source
            if source.is_file():
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="epsbench-")))
                unpack(source, folder)
                digest = hashlib.sha256(source.read_bytes()).hexdigest()
                called[folder] = f"{source.name}, SHA-256 {digest[:16]}"
            folders.append(folder)
        result = merging.merge(folders, into, vet, called)
    origin = dict(zip(folders, sources, strict=True))
    for ones in (result.conflicts, result.refused):
        ones[:] = [Broken(_named(one.path, origin), one.reason) for one in ones]
    return result


def _named(path: Path, origin: Mapping[Path, Path]) -> Path:
    """A path below a bundle's temporary folder as one below the bundle."""
    for folder, source in origin.items():
        if path.is_relative_to(folder):
            return source / path.relative_to(folder)
    return path


def unpack(bundle: Path, into: Path) -> list[str]:
    """Check a bundle and write its files below `into`, an empty folder; return its records as ``suite/id``.

    Raises BundleError where anything is wrong with it; what is then in `into` is worth nothing.
    """
    faults: list[Broken] = []
    try:
        with bundle.open("rb") as file, zipfile.ZipFile(file) as archive:
            members = _members(archive, faults)
            listed = _listed(archive, faults) if not faults else {}
            for name in sorted(listed.keys() - members.keys()):
                faults.append(Broken(Path(name), f"listed in {MANIFEST}, but not there"))
            total = 0
            for name, info in members.items():
                data = _read(archive, info, faults)
                total += len(data or b"")
                if total > MOST_TOTAL:
                    faults.append(Broken(Path(name), f"more than {MOST_TOTAL // 2**30} GiB up to here"))
                    break
                reason = "" if data is None else _unlisted(listed.get(name), data) or _flaw(Path(name), data)
                if reason:
                    faults.append(Broken(Path(name), reason))
                if data is not None and not faults:
                    place = into / PurePosixPath(name)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(data)
    except _UNREADABLE as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        faults.append(Broken(bundle, f"not a bundle: {error}"))
    if faults:
        raise BundleError(bundle, faults)
    return sorted(name.rpartition("/")[0] for name in members if name.endswith(RECORD))


def _members(archive: zipfile.ZipFile, faults: list[Broken]) -> dict[str, zipfile.ZipInfo]:
    """The files beside the manifest by name; a name, kind or size that no bundle has is a fault."""
    infos = archive.infolist()
    if len(infos) > MOST_FILES:
        faults.append(Broken(Path(MANIFEST), f"{len(infos)} files, more than {MOST_FILES}"))
        return {}
    times = Counter(info.filename for info in infos)
    for info in infos:
        reason = _odd(info) or ("there twice" if times[info.filename] > 1 else "")
        if reason:
            faults.append(Broken(Path(info.orig_filename), reason))
    if MANIFEST not in times:
        faults.append(Broken(Path(MANIFEST), "missing: epsbench pack did not write this file"))
    for name in sorted(times):
        if name != MANIFEST and f"{name.rpartition('/')[0]}/{RECORD}" not in times:
            faults.append(Broken(Path(name), f"without its {RECORD}"))
    if times.keys() == {MANIFEST}:
        faults.append(Broken(Path(MANIFEST), "the bundle holds no records"))
    return {info.filename: info for info in infos if info.filename != MANIFEST}


def _odd(info: zipfile.ZipInfo) -> str:
    """What about an entry of a zip file no bundle has; empty where nothing is."""
    name, mode = info.filename, info.external_attr >> 16
    if info.orig_filename != name or not (name == MANIFEST or _NAME.fullmatch(name)):
        return f"not a name that a bundle holds (<suite>/<id>/{RECORD}, {', '.join(SIDES)})"
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG) or info.is_dir():
        return "not a plain file"
    if info.flag_bits & 1:
        return "encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "compressed in a way that bundles are not"
    if info.file_size > MOST_BYTES:
        return f"larger than {MOST_BYTES // 2**20} MiB"
    return ""


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, faults: list[Broken]) -> bytes | None:
    """The bytes of an entry, no more than a file may have whatever its header says; None after a fault."""
    try:
        with archive.open(info) as file:
            return file.read(MOST_BYTES + 1)
    except _UNREADABLE as error:
        faults.append(Broken(Path(info.filename), f"damaged: {error}"))
        return None


def _listed(archive: zipfile.ZipFile, faults: list[Broken]) -> dict[str, Any]:
    """The manifest's list of files, empty after a fault."""
    data = _read(archive, archive.getinfo(MANIFEST), faults)
    if data is None:
        return {}
    reason = ""
    try:
        manifest = decode(data)
        if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
            reason = 'holds no list of "files"'
        elif manifest.get("bundle") != FORMAT:
            reason = f"format {manifest.get('bundle')!r}, this version reads {FORMAT}"
    except (ValueError, RecursionError) as error:
        reason = f"not JSON: {error}"
    if reason:
        faults.append(Broken(Path(MANIFEST), reason))
        return {}
    return manifest["files"]


def _unlisted(listed: object, data: bytes) -> str:
    """How a file differs from its line in the manifest; empty where it does not."""
    if not isinstance(listed, dict):
        return f"not listed in {MANIFEST}"
    if listed.get("bytes") != len(data):
        return f"has {len(data)} bytes, {MANIFEST} says {listed.get('bytes')!r}"
    if listed.get("sha256") != hashlib.sha256(data).hexdigest():
        return f"its SHA-256 is not that of {MANIFEST}: it was changed after it was packed"
    return ""


# What may stand on a leaderboard --------------------------------------------------------------------------


def ineligible(records: Iterable[store.Record], codes: Mapping[str, Mapping[str, Any] | str]) -> list[tuple[str, str]]:
    """(``suite/id``, why) of each current record that cannot be ranked as it is; docs/submitting.md lists the reasons.

    `records` are all records of the suites in question: the seeds of a setting are counted among them. `codes` gives
    today's code by id (``{"hash"}``), or as text why it cannot be known here. One line a record: the first reason.
    """
    current = store.current(records)
    seeds: dict[tuple[str, str], set[int]] = {}
    for record in current:
        if record["status"] == "ok":
            seeds.setdefault((record["suite"], record["group"]), set()).add(record["cell"]["seed"])
    found = []
    for record in current:
        reason = _obstacle(record, codes.get(record["id"]), seeds.get((record["suite"], record["group"]), set()))
        if reason:
            found.append((f"{record['suite']}/{Path(record['path']).parent.name}", reason))
    return found


def _obstacle(record: store.Record, code: Mapping[str, Any] | str | None, seeds: set[int]) -> str:
    made = record["code"]
    if record["status"] != "ok":
        return f"no result: it ended as {record['status']}"
    if record["cell"]["task"].get("evaluate") == "validation":
        return "a search: it was evaluated on held-out training data"
    if made.get("dirty") or not made.get("commit") or not made.get("hash"):
        what = "with uncommitted changes" if made.get("dirty") else "by code whose commit is not known"
        return f"unverified: it was made {what}"
    if not isinstance(code, Mapping):
        return f"unverified: {code or 'its code cannot be compared with the code here'}"
    if store.stale(record, code):
        return f"stale: it was made by code {made['hash']}, here that is {code.get('hash')}"
    if unknown := (record.get("origin") or {}).get("unknown"):
        return f"unverified: {unknown[0]}"
    if len(seeds) < LEAST_SEEDS:
        return f"missing interval: {len(seeds)} finished seed, at least {LEAST_SEEDS} are needed"
    return ""
