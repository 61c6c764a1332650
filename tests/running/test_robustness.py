"""Damaged files, full disks, kills and rivals: an error that says so or success, and nothing finished is lost.

Whatever a suite, a record, a side file or a merge source holds, no command may end in a traceback, execute it, or write
outside the folders that it was given.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from harness import cli, report, suite
from harness.records import description, store
from harness.records.files import MOST_BYTES, Unwritable, dumps, lock, replace_file, sweep, unlock
from harness.report import text
from harness.running import child, jobs, launch, progress
from tests.support import ROOT
from tests.support.launching import Place
from tests.support.launching import make_cell as make_fake
from tests.support.records import make_cell, make_record, merge, put

REAL = min((ROOT / "results" / "fashion").glob("*/record.json"))  # a record that a run wrote
SUITE = ROOT / "suites" / "smoke.toml"

# What code does to the machine, seen by the interpreter itself ------------------------------------------------------

_watched: list[tuple[str, str]] | None = None
_EXECUTES = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class", "socket.connect"}
_CHANGES = {"os.remove", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    if event in _EXECUTES:
        _watched.append((event, str(arguments[:1])))
    elif (
        event == "open"
        and isinstance(arguments[0], str | bytes)
        and isinstance(arguments[2], int)
        and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    ):
        _watched.append((event, os.path.abspath(os.fsdecode(arguments[0]))))
    elif event in _CHANGES:
        _watched.extend((event, os.path.abspath(os.fsdecode(p))) for p in arguments[:2] if isinstance(p, str | bytes))


sys.addaudithook(_audit)


@contextmanager
def contained(folder: Path) -> Iterator[None]:
    """Fail where something is executed, unpickled or connected to, or changed outside `folder`."""
    global _watched
    _watched = []
    try:
        yield
    finally:
        seen, _watched = _watched, None
    # Importing torch asks the linker which libraries there are.
    seen = [one for one in seen if "/sbin/ldconfig" not in one[1]]
    caches = ("__pycache__", ".pyc", str(Path.home() / ".cache"), os.environ["EPSBENCH_TESTS_SHARED"], "/dev/null")
    bad = [(e, p) for e, p in seen if e in _EXECUTES or not (p.startswith(str(folder)) or any(c in p for c in caches))]
    assert not bad, bad


def tree(folder: Path) -> dict[str, bytes | str]:
    """Every file under a folder with its bytes, every other thing with its kind."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = "link to " + os.readlink(path)
        else:
            found[name] = path.read_bytes() if path.is_file() else "folder" if path.is_dir() else "special"
    return found


def commands(folder: Path, *requests: str) -> None:
    """Each ends with an exit code; whatever else it raises is a traceback and fails the test."""
    for request in requests:
        assert cli.main([*request.split(), "--results", str(folder)]) in (cli.OK, cli.FAILED, cli.USER_ERROR), request


# Malformed input ----------------------------------------------------------------------------------------------------

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from([10**400, -1, "\ud800", "\x1b[2J", "9999-99-99", "../../x", "$(touch x)", "{{ 7 * 7 }}", {}, []])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=2) | st.dictionaries(st.text(max_size=3), v, max_size=2), max_leaves=4
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A real record: fields replaced, removed or added at any depth; or its bytes cut, flipped or replaced."""
    record = json.loads(REAL.read_bytes())
    for _ in range(draw(st.integers(1, 3))):
        at: Any = record
        while True:
            key = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
            if not isinstance(at[key], dict | list) or not at[key] or draw(st.integers(0, 3)) == 0:
                break
            at = at[key]
        kind = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if kind == "remove":
            del at[key]
        elif kind == "add" and isinstance(at, dict):
            at[draw(st.text(max_size=3))] = draw(VALUES)
        else:
            at[key] = draw(VALUES)
        if not record:
            break
    data = bytearray(json.dumps(record).encode())
    if draw(st.integers(0, 3)) == 0:
        for _ in range(draw(st.integers(1, 3))):
            place = draw(st.integers(0, len(data) - 1))
            data[place : place + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
        del data[draw(st.integers(0, 2 * len(data))) :]
    return bytes(data)


def replaced(path: str, value: str) -> bytes:
    """The real record with one value written as this text."""
    record: Any = json.loads(REAL.read_bytes())
    *above, last = path.split(".")
    at = record
    for key in above:
        at = at[key]
    at[last] = "@@"
    return json.dumps(record).replace('"@@"', value).encode()


@settings(max_examples=15)
@given(st.one_of(damaged(), damaged(), st.binary(max_size=40), VALUES.map(lambda v: json.dumps(v).encode())))
@example(replaced("metrics.loss", "1e999"))  # read as infinity, and then no JSON
@example(replaced("cell.method.parameters", '{"lr": 1e999}'))
@example(replaced("cell.method", '"dp-sgd"'))
@example(replaced("reason", '"\\ud800"'))  # JSON, and not UTF-8
@example(replaced("suite", '"../fashion"'))
@example(replaced("started", '"yesterday"'))
@example(replaced("environment", "[" * 900 + "]" * 900))
@example(replaced("privacy.epsilon", "1" + "0" * 400))
def test_a_record_is_used_or_quarantined_and_the_others_are_shown(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    """By every command that reads records; and what is let in has the fields that they look up."""
    home = tmp_path_factory.mktemp("any")
    results, good = home / "results", json.loads(REAL.read_bytes())
    good["cell"]["seed"] += 1
    good["id"] = store.cell_of(good).id
    good = store.read(put(results, good))
    bad = results / "fashion" / REAL.parent.name / "record.json"
    bad.parent.mkdir()
    bad.write_bytes(data)
    (bad.parent / "trace.jsonl").write_bytes(data + b"\n" + data[::-1])
    found = store.load(results)
    assert len(found) + len(found.broken) == 2 and good in found
    with contained(home):
        commands(results, "status", f"show {good['id']}", f"show {bad.parent.name}", f"show {bad.parent.name} --json")
        assert cli.main(["merge", str(results), "--results", str(home / "all")]) in (cli.OK, cli.FAILED)
        assert good["id"] in [r["id"] for r in store.load(home / "all")]
        text.top_rows(report.board("", "", []))
        text.top_rows(report.board("", "", store.current(found)))
        for record in found:
            progress.result_line(progress.Outcome(jobs.Job(make_cell(), bad.parent), record))
            finished = description.Finished.read(Path(record["path"]).parent, private=True)
            assert description.tags(finished) and description.parameters(record["cell"])
            assert description.final_metrics(record)
            description.milliseconds(record.get("started"), 0.0)
    for record in found:
        store.encode(record, record["id"])
        dumps(record).encode()
    assert bad.read_bytes() == data  # quarantined where it is
    assert {str(one.path) for one in found.broken} <= {str(bad)} and all("\n" not in str(o) for o in found.broken)


def test_status_and_report_show_the_quarantine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        path = put(tmp_path / "results", make_record(seed))
    path.write_bytes(path.read_bytes()[:-20])
    expected = f"core/{path.parent.name}/record.json: not JSON"
    assert cli.main(["status"]) == cli.OK and expected in capsys.readouterr().out
    assert cli.main(["report"]) == cli.OK and expected in capsys.readouterr().out
    for name in ("leaderboard.md", "index.html"):
        page = (tmp_path / "reports" / "core" / name).read_text()
        assert re.search(r"Quarantined records.*" + re.escape(expected), page, re.DOTALL), name
    # It does not stand for its cell either: that is run again, beside it.
    chosen = jobs.select([make_cell(0), make_cell(1)], tmp_path / "results", "core")
    assert [job.folder.name for job in chosen.todo] == [f"{make_cell(1).id}.2"]
    assert [one.path.parent.name for one in chosen.broken] == [make_cell(1).id]


@settings(max_examples=40)
@given(st.one_of(st.binary(max_size=60), VALUES.map(lambda v: json.dumps(v).encode()), st.builds(
    lambda **kw: json.dumps(kw).encode(), step=VALUES, device=VALUES, code=VALUES, commit=VALUES)))  # fmt: skip
@example(b"[" * 4000)
@example(b'{"step": 1' + b"0" * 400 + b"}")
@example(b'{"step": NaN}')
@example(b'{"device": "cpu"}')
@example(b'{"commit": "\\udfff"}')
def test_side_files_of_any_content_end_no_launch(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("any") / "core" / make_cell().id
    folder.mkdir(parents=True)
    for name in ("env.json", "trace.jsonl", "output.txt"):
        (folder / name).write_bytes(data + b"\n")
    assert 0 <= jobs.fraction(jobs.Job(make_cell(), folder)) <= 1
    assert isinstance(launch._tail(folder / "output.txt"), str)
    task = {"cell": make_cell().to_json(), "suite": "core", "jobs": 1, "code": None}
    made = child.failure(task, folder, "crashed", "killed", "2026-01-01T00:00:00+00:00", 1.0)
    assert store.read(store.write_record(folder, made))["status"] == "crashed"
    progress.result_line(progress.Outcome(jobs.Job(make_cell(), folder), made))


TOML_VALUES = st.sampled_from(
    ["3", "1e400", "nan", '"x"', "[]", "[[]]", "{a = 1}", "1979-05-27", "9" * 30, '"$(id)"', '"npz:/etc/passwd"',
     '"suite"', '"claims"', '"throughput"', '"__import__(\\"os\\").system(\\"id\\")"']
)  # fmt: skip


@settings(max_examples=25)
@given(st.one_of(st.binary(max_size=60), st.builds(
    lambda at, value: "\n".join(
        re.sub("=.*", f"= {value}", line, count=1) if i % 40 == at else line
        for i, line in enumerate(SUITE.read_text().splitlines())
    ).encode() + b'\n[[method]]\nname = "no-such"\n',  # so that no data is asked for
    st.integers(0, 39), TOML_VALUES)))  # fmt: skip
@example(b"a = " + b"[" * 5000)
@example(b"a" + b".a" * 2000 + b" = 1")
@example(b'kind = "claims"\n')
@example(b'kind = "throughput"\n')
@example(b"kind = [1]\n")
def test_a_file_of_any_content_as_a_suite_is_an_error_with_its_name(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    home = tmp_path_factory.mktemp("any")
    (home / "suites").mkdir()
    file = home / "suites" / "s.toml"
    file.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch, contained(home):
        patch.chdir(home)
        assert cli.main(["ls", "suites"]) == cli.OK
        for verb in ("check", "plan", "run --no-track", "status", "report"):
            assert cli.main([*verb.split(), str(file)]) == cli.USER_ERROR, verb
    assert list(home.rglob("*")) == [file.parent, file]


# Merging ------------------------------------------------------------------------------------------------------------


def test_any_folder_can_be_a_merge_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pipes, sockets, devices, circles of links, odd names: named, left behind, and the good records are added."""
    here, there, secret = tmp_path / "here", tmp_path / "there", tmp_path / "secret"
    secret.write_text("not yours")
    ids = [make_cell(seed).id for seed in range(20)]
    core = there / "core"
    good = put(there, make_record(0)).parent
    (good / "trace.jsonl").symlink_to(secret)
    (good / "env.json").mkdir()
    (good / "error.txt").write_bytes(b"\xff\x00")
    for name in (*ids[1:8], "\x1b[2J", os.fsdecode(b"\xff\xfe"), "x" * 200):
        (core / name).mkdir()
    os.mkfifo(core / ids[1] / "record.json")
    (core / ids[2] / "record.json").symlink_to("/dev/zero")
    (core / ids[3] / "record.json").symlink_to("record.json")
    (core / ids[4] / "record.json").symlink_to("nowhere")
    (core / ids[5] / "record.json").mkdir()
    with (core / ids[6] / "record.json").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(core / ids[7])
        listener.bind("record.json")
        os.chdir(ROOT)
    for name in ("\x1b[2J", os.fsdecode(b"\xff\xfe"), "x" * 200):
        (core / name / "record.json").write_text("{}")
    (core / ids[8]).symlink_to(ids[8])
    (there / "circle").symlink_to("circle")
    (there / os.fsdecode(b"\xff")).mkdir()
    (core / ids[9]).write_text("no folder")
    shutil.copytree(good, there / "other" / ids[0], symlinks=True)  # the suite is not that of the folder
    # What is there already: a damaged record, a folder of that name, a file in the folder's place, another record.
    for seed in (10, 11, 12, 13):
        put(there, make_record(seed))
    put(here, make_record(13, metrics={"accuracy": 0.1}))
    for seed in (10, 11):
        (here / "core" / ids[seed]).mkdir(parents=True)
    (here / "core" / ids[10] / "record.json").write_text("{")
    (here / "core" / ids[11] / "record.json").mkdir()
    (here / "core" / ids[12]).write_text("mine")
    before, outside = tree(here), tree(there)
    with contained(here):
        result = merge([there], here)
    after = tree(here)
    assert result.added == [f"core/{ids[0]}"]
    assert after.pop(f"core/{ids[0]}/origin.json")
    assert {one.path.parent.name for one in result.conflicts} == {ids[n] for n in (10, 11, 12, 13)}
    refused = Counter(one.path.parent.name for one in result.refused)
    assert refused == Counter([*ids[1:8], "\x1b[2J", os.fsdecode(b"\xff\xfe"), "x" * 200, ids[0], ids[0], ids[0]])
    assert after == before | {
        f"core/{ids[0]}": "folder",
        f"core/{ids[0]}/record.json": (good / "record.json").read_bytes(),
        f"core/{ids[0]}/error.txt": b"\xff\x00",
    }
    assert tree(there) == outside
    for one in (*result.refused, *result.conflicts):
        assert str(one).isprintable() and str(one).encode()
    assert cli.main(["merge", str(there), "--results", str(here)]) == cli.FAILED
    commands(there, "status")
    said = capsys.readouterr().out
    assert "\x1b" not in said and said.count("conflict:") == 4 and "remove it and merge again" in said
    os.rename(here / "core" / ids[10] / "record.json", secret)
    assert merge([there], here).added == [f"core/{ids[10]}"]


# Full and read-only disks -------------------------------------------------------------------------------------------


class Disk:
    """Counts what asks the file system for room or for a change, and refuses the n-th request."""

    def __init__(self, patch: pytest.MonkeyPatch, refused: int, number: int) -> None:
        self.refused, self.number, self.asked = refused, number, 0
        for owner, name in ((os, "fsync"), (os, "link"), (os, "rename"), (os, "replace"), (os, "mkdir")):
            patch.setattr(owner, name, self.guard(getattr(owner, name)))
        opened = Path.open
        patch.setattr(Path, "open", lambda p, mode="r", *a, **k: self.opened(opened(p, mode, *a, **k), mode))

    def ask(self) -> None:
        self.asked += 1
        if self.asked == self.refused:
            raise OSError(self.number, os.strerror(self.number))

    def guard(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any, **more: Any) -> Any:
            self.ask()
            return call(*arguments, **more)

        return guarded

    def opened(self, file: Any, mode: str) -> Any:
        if "x" not in mode and "w" not in mode:
            return file
        write = file.write

        def part(data: bytes) -> int:  # half of it fits
            try:
                self.ask()
            except OSError:
                write(data[: len(data) // 2])
                raise
            return int(write(data))

        return _File(file, part)


class _File:
    """An open file whose `write` is another one."""

    def __init__(self, file: Any, write: Callable[[bytes], int]) -> None:
        self.file, self.write = file, write

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def _half_done(results: Path) -> Path:
    folder = results / "core" / make_cell(0).id
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "checkpoint" / "checkpoint.safetensors").write_bytes(b"half way")
    (folder / "trace.jsonl").write_text('{"step": 1}\n')
    (folder / "env.json").write_text("{}\n")
    return folder


def _merge(home: Path) -> None:
    merge([home / "there"], home / "results")


def _write(home: Path) -> None:
    folder = home / "results" / "core" / make_cell(0).id
    replace_file(folder / "env.json", b"{}\n")
    store.write_record(folder, make_record(0))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("act", [_merge, _write])
def test_a_disk_that_is_full_at_any_moment_loses_nothing(
    tmp_path: Path, act: Callable[[Path], None], number: int
) -> None:
    """For each request in turn: one error that names the place and the cause, and all that was there is there."""
    for refused in range(1, 100):
        home = tmp_path / str(refused)
        folder = _half_done(home / "results")
        put(home / "results", make_record(1))
        source = put(home / "there", make_record(0)).parent
        (source / "trace.jsonl").write_text('{"step": 33}\n')
        (source / "env.json").write_text('{"a": 1}\n')
        before = tree(home)
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, refused, number)
            try:
                act(home)
                failed = False
            except Unwritable as error:
                failed = True
                assert error.errno == number and str(folder) in str(error) and os.strerror(number) in str(error)
        record = folder / "record.json"
        if failed:
            assert tree(home) == before, refused
            act(home)
        # Where the refusal did no harm (the folder's own fsync), all is as it should be.
        assert json.loads(record.read_bytes())["id"] == make_cell(0).id
        assert not list(home.rglob("*.tmp")) and not list(home.rglob(".lock"))
        assert act is not _merge or (folder / "trace.jsonl").read_text() == '{"step": 33}\n'
        assert act is not _merge or not (folder / "checkpoint").exists()
        if disk.asked < refused:
            break
    assert 4 < refused < 99


def forked(body: Callable[[], None]) -> str:
    """What `body` raised in a process of its own, empty where it returned."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            body()
            said = ""
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


def test_a_really_full_disk(tmp_path: Path) -> None:
    """A file system of 64 KiB, in a process that alone sees it."""

    def body() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        namespaces = 0x00020000 | (0 if os.geteuid() == 0 else 0x10000000)
        if libc.unshare(namespaces) or libc.mount(b"none", b"/", None, 0x44000, None):
            raise InterruptedError("no namespaces")
        place = str(tmp_path).encode()
        if libc.mount(b"none", place, b"tmpfs", 0, b"size=64k"):
            raise InterruptedError("no tmpfs")
        kept = put(tmp_path, make_record(0)).read_bytes()
        size = 40_000
        while size:  # until nothing fits
            try:
                with (tmp_path / "filler").open("ab") as file:
                    file.write(b"x" * size)
            except OSError:
                size //= 2
        with pytest.raises(Unwritable, match="No space left on device"):
            put(tmp_path, make_record(1))
        assert store.load(tmp_path)[0]["id"] == make_cell(0).id and len(store.load(tmp_path)) == 1
        assert not store.load(tmp_path).broken and not list(tmp_path.rglob("*.tmp"))
        (tmp_path / "filler").unlink()
        put(tmp_path, make_record(1))
        assert len(store.load(tmp_path)) == 2
        assert (tmp_path / "core" / make_cell(0).id / "record.json").read_bytes() == kept

    said = forked(body)
    if said.startswith("InterruptedError"):
        pytest.skip(said)
    assert said == ""


def test_a_folder_that_may_not_be_written_or_read(tmp_path: Path) -> None:
    """As a user who has no leave: root would be let in everywhere."""
    put(tmp_path / "there", make_record(1))
    put(tmp_path / "results", make_record(0))
    hidden = put(tmp_path / "results", make_record(2))
    before = tree(tmp_path)
    for folder in (tmp_path, *(p for p in tmp_path.rglob("*") if p.is_dir())):
        folder.chmod(0o555)
    hidden.chmod(0)

    def body() -> None:
        os.chdir(tmp_path)
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        found = store.load(Path("results"))
        assert len(found) == 1 and [one.reason for one in found.broken] == ["cannot be read: Permission denied"]
        for act in (
            lambda: merge([Path("there")], Path("results")),
            lambda: merge([Path("there")], Path("new")),
            lambda: put(Path("results"), make_record(3)),
            lambda: lock(Path("results/core/x")),
        ):
            with pytest.raises(Unwritable, match=r"results|new") as caught:
                act()
            assert "Permission denied" in str(caught.value)
        for request in (["status"], ["merge", "there"]):
            assert cli.main(request) == (cli.OK if request == ["status"] else cli.USER_ERROR)

    said = forked(body)
    for folder in (tmp_path, *(p for p in tmp_path.rglob("*") if p.is_dir())):
        folder.chmod(0o755)
    hidden.chmod(0o644)
    assert said == ""
    assert tree(tmp_path) == before


FULL = """
def full(cell, folder, suite):
    if (folder.parents[2] / "full").exists():
        STEPS_BEFORE = globals()["STEPS"]
        globals()["STEPS"] = 10
        steps(cell, folder, suite)
        raise OSError(28, "No space left on device")
    return steps(cell, folder, suite)
"""


def test_a_run_on_a_full_disk_is_half_done_and_goes_on(tmp_path: Path) -> None:
    """It is no crash of the run: no record says so, and its checkpoint is kept."""
    place = Place(tmp_path)
    with (tmp_path / "fakes.py").open("a") as file:
        file.write(FULL)
    (tmp_path / "full").touch()
    cell = make_fake("full")
    said = place.launch([cell])
    folder = place.results / "core" / cell.id
    assert re.search(rf"Unwritable: .*{cell.id}: cannot be written: No space left on device", said), said
    assert not (folder / "record.json").exists() and (folder / "checkpoint" / "step").read_text() == "10"
    (tmp_path / "full").unlink()
    assert "over 1 0" in place.launch([cell])
    steps = Counter(word for _, _, word in place.journal() if word.startswith("step"))
    assert len(steps) == 30 and set(steps.values()) == {1}


# Kills and rivals ---------------------------------------------------------------------------------------------------

CELLS = 120


def _worker(home: Path, seed: int) -> None:
    """Makes and merges records in its own order for ever, as a launcher's processes would."""
    choice = random.Random(seed)
    results = home / "results"
    while True:
        number = choice.randrange(CELLS)
        record = make_record(number)
        if number % 4 == 0:
            merge([home / f"there-{number}"], results)
            continue
        place = store.Folder(results, "core", record["id"])
        folder = place.attempt(1)
        held = lock(folder)
        if held is None:
            continue
        guard = home / "guards" / record["id"]  # who is in there: the lock says that nobody else is
        guard.write_text(str(os.getpid()))
        if not (folder / "record.json").exists():
            sweep(folder)
            replace_file(folder / "env.json", dumps({"n": number}).encode())
            store.write_record(folder, record)
            with (home / "journal").open("a") as journal:
                journal.write(record["id"] + "\n")
        if guard.read_text() != str(os.getpid()):
            (home / "rivals").touch()
        unlock(folder, held)


def _start(body: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            body()
        finally:
            os._exit(1)
    return child


def test_kill_9_at_60_moments_of_writing_with_three_writers(tmp_path: Path) -> None:
    """What is there is whole, stays, and is what one undisturbed writer would have made; and nobody does it twice."""
    (tmp_path / "guards").mkdir()
    expected = {make_cell(n).id: store.encode(make_record(n), make_cell(n).id) for n in range(CELLS)}
    for n in range(0, CELLS, 4):
        source = put(tmp_path / f"there-{n}", make_record(n)).parent
        (source / "env.json").write_text(f'{{"n": {n}}}')
    results, choice = tmp_path / "results", random.Random(5)
    seen: set[str] = set()
    workers: list[int] = []
    kills = 0
    while kills < 60:
        while len(workers) < 3:
            workers.append(_start(lambda seed=kills: _worker(tmp_path, seed)))  # type: ignore[misc]
        time.sleep(choice.uniform(0, 0.01))
        one = workers.pop(choice.randrange(3))
        os.kill(one, signal.SIGKILL)
        assert os.waitpid(one, 0)[1] == signal.SIGKILL  # it had met no error of its own
        kills += 1
        if kills % 5 == 0:
            found = store.load(results)
            assert not found.broken
            now = {record["id"] for record in found}
            assert seen <= now
            seen = now
            if len(seen) > CELLS * 3 // 4 and kills < 50:  # begin anew, else there is nothing left to write
                for two in workers:
                    os.kill(two, signal.SIGKILL)
                    assert os.waitpid(two, 0)[1] == signal.SIGKILL
                workers, seen = [], set()
                for path in (results, tmp_path / "guards"):
                    shutil.rmtree(path)
                    path.mkdir()
                (tmp_path / "journal").unlink(missing_ok=True)
    deadline = time.monotonic() + 60
    while len(store.load(results)) < CELLS and time.monotonic() < deadline:
        while len(workers) < 3:
            workers.append(_start(lambda: _worker(tmp_path, kills + len(workers))))
        time.sleep(0.05)
    for one in workers:
        os.kill(one, signal.SIGKILL)
        assert os.waitpid(one, 0)[1] == signal.SIGKILL
    found = store.load(results)
    assert {r["id"]: Path(r["path"]).read_bytes() for r in found} == expected and not found.broken
    assert not (tmp_path / "rivals").exists()
    written = Counter((tmp_path / "journal").read_text().split())
    assert written and set(written.values()) == {1}


TINY = """
[suite]
name = "tiny"
question = "?"
[privacy]
epsilon = 3.0
delta = 1e-5
[train]
batch = 128
steps = 60
[[task]]
dataset = "digits"
model = "mlp?hidden=64"
[[method]]
name = "dp-adam"
"""


def lasting(record: store.Record) -> store.Record:
    """All but times, and what somebody may commit or edit between two runs."""
    timed = ("environment", "started", "finished", "path", "code", "diagnostics")
    steady = ("train_loss", "clipped_fraction", "non_finite", "microbatch")
    return {key: value for key, value in record.items() if key not in timed} | {
        "code": {key: record["code"][key] for key in ("hash", "files")},
        "diagnostics": {key: record["diagnostics"].get(key) for key in steady},
        "measured": {**record["measured"], "sessions": None},
    }


def run_and_save_always(cell: Any, folder: Path, suite: str, jobs: int) -> store.Record:
    """A run that saves a checkpoint at every log point."""
    from harness.running import run

    return run.execute(cell, folder, suite, jobs, save_seconds=0.0)


def test_kill_9_at_seven_moments_of_a_run_ends_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the checkpoints it leaves are tensors and JSON: nothing in them can be executed."""
    from harness.running import run  # noqa: F401 (loaded once, for all processes)

    (cell,) = suite.parse(TINY).cells()
    monkeypatch.setattr(child, "resolve_name", lambda target: run_and_save_always)

    def begun(results: Path) -> tuple[int, Path]:
        folder = results / "tiny" / cell.id
        task = {"cell": cell.to_json(), "folder": str(folder), "suite": "tiny", "jobs": 1, "target": "", "code": None}
        return _start(lambda: child._locked_child(task, folder)), folder

    whole, there = begun(tmp_path / "whole")
    os.waitpid(whole, 0)
    expected = store.read(there / "record.json")
    assert expected["status"] == "ok", (there / "error.txt").read_text()

    choice, kills, sessions = random.Random(1), 0, 0
    while True:
        number, folder = begun(tmp_path / "killed")
        sessions += 1
        trace = folder / "trace.jsonl"
        size = trace.stat().st_size if trace.exists() else 0
        ahead = choice.choice([0, 1, 150, 500])  # bytes of the trace to wait for, then a little more
        deadline = time.monotonic() + 60
        while os.waitpid(number, os.WNOHANG) == (0, 0):
            grown = (trace.stat().st_size if trace.exists() else 0) - size
            if (kills < 7 and (grown >= ahead or grown < 0)) or time.monotonic() > deadline:
                time.sleep(choice.uniform(0, 0.02))
                os.kill(number, signal.SIGKILL)
                kills += os.waitpid(number, 0)[1] == signal.SIGKILL
                break
            time.sleep(0.001)
        for file in folder.glob("checkpoint/*.safetensors"):
            data = file.read_bytes()
            head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            assert json.loads(head.pop("__metadata__")["progress"])["step"] <= 60
            assert max(one["data_offsets"][1] for one in head.values()) == len(data) - 8 - int.from_bytes(
                data[:8], "little"
            )
        if (folder / "record.json").exists():
            break
        assert sessions < 40
    found = store.read(folder / "record.json")
    assert kills >= 4
    assert found["measured"]["sessions"] > 1 and lasting(found) == lasting(expected)

    def points(place: Path) -> list[dict[str, Any]]:
        timed = ("seconds", "examples_per_second")
        lines = [json.loads(line) for line in (place / "trace.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key not in timed} for line in lines]

    assert points(folder) == points(there)


def test_stopping_records_what_finished_and_nothing_of_what_was_killed(tmp_path: Path) -> None:
    """Of two runs that are stopped together one had just written its record: the other is half done, not crashed."""
    both = [jobs.Job(make_cell(n), store.Folder(tmp_path, "core", make_cell(n).id).attempt(1)) for n in (0, 1)]
    for job in both:
        job.folder.mkdir(parents=True)
    put(tmp_path, make_record(0))
    dead = SimpleNamespace(pid=2**22 + 1, exitcode=-9, join=lambda seconds: None, kill=lambda: None)
    launcher: Any = launch._Launcher.__new__(launch._Launcher)
    launcher.running = [launch.Running(job, dead, {}, 0.0, "2026-01-01T00:00:00", None) for job in both]
    launcher.summary, launcher.total, launcher.began, launcher.before = launch.Summary(), 2, 0.0, 0.0
    launcher.reporter, launcher.codes, launcher.suite, launcher.slots = (
        progress.Lines(lambda text: None),
        {},
        "core",
        2,
    )
    launcher.kill_all()
    assert [outcome.job for outcome in launcher.summary.outcomes] == both[:1]
    assert [run.job for run in launcher.running] == both[1:]
    assert not (both[1].folder / "record.json").exists()


def test_several_launchers_that_die_and_return_do_nothing_twice(tmp_path: Path) -> None:
    place = Place(tmp_path)
    cells = [make_fake("quick", seed=n) for n in range(24)]
    launchers = [place.start(cells, jobs=2) for _ in range(3)]
    deadline = time.monotonic() + 60
    while len(place.journal()) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    launchers[0].kill()
    launchers[0].communicate()
    outputs = [launcher.communicate(timeout=120)[0] for launcher in launchers[1:]]
    assert all("over " in output for output in outputs), outputs
    begun = Counter(name for name, _, word in place.journal() if word == "begins")
    assert set(begun) == {cell.id for cell in cells} == set(place.records())
    assert sum(begun.values()) <= len(cells) + 2  # only what the killed one was at


# Nothing is unpickled -----------------------------------------------------------------------------------------------


def test_the_sources_unpickle_and_evaluate_nothing() -> None:
    files = [*(ROOT / "harness").rglob("*.py"), *(ROOT / "methods").rglob("*.py")]
    forbidden = re.compile(
        r"\b(pickle|dill|joblib|shelve|marshal)\b(?!=False)|torch\.(load|save|hub)\b|(?<![.\w])(eval|exec)\(|"
        r"yaml\.(unsafe_)?load\(|os\.system|shell=True"
    )
    assert len(files) > 60
    restricted = re.compile(r"torch\.load\([^\n]*weights_only=True")  # reads tensors, and builds nothing else
    for file in files:
        text = restricted.sub("", file.read_text().replace("allow_pickle=False", ""))
        found = [line for line in text.splitlines() if forbidden.search(line)]
        assert not found, (file, found)
        assert all("allow_pickle=False" in line for line in file.read_text().splitlines() if "np.load(" in line), file
