"""What happens in a run's own process, and the record of a run that could not write its own."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from multiprocessing import connection
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from harness import registry
from harness.provenance import measure
from harness.records import draw, store
from harness.records.cell import Cell
from harness.records.files import Unwritable, content, dumps, lock, opened, replace_file, sweep, unlock
from harness.records.record import FINAL
from harness.records.schema import blank, fault
from harness.running.jobs import device_of, is_cuda, threads_of

# Exit codes of a run's process: its folder is locked; it has a record meanwhile; it is another cell's.
BUSY, ALREADY, OTHERS = 75, 76, 77
# Exit codes of a run's process that could not write, by reason: the launcher stops, and the run is half done.
NO_PLACE = {errno.ENOSPC: 80, errno.EDQUOT: 81, errno.EROFS: 82, errno.EACCES: 83, errno.EPERM: 84, errno.EIO: 85}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # what no cell can be the cause of, wherever it happened
SERIAL = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
OUTPUT = "output.txt"
_TRAINING = ("train.py", "train")  # file and function below which examples are looked at
_PR_SET_PDEATHSIG = 1


def main(text: str) -> None:
    """Body of a run's process: lock, prepare, execute, write the record; exits with a code if it may not."""
    task = json.loads(text)
    os.setsid()  # Ctrl-C at the terminal is for the launcher, and what this run starts can be killed with it
    _die_with_launcher()
    folder = Path(task["folder"])
    try:
        _locked_child(task, folder)
    except (OSError, Unwritable) as error:
        if error.errno not in NO_PLACE:
            raise
        _mute()
        sys.exit(NO_PLACE[error.errno])


def _locked_child(task: Mapping[str, Any], folder: Path) -> None:
    held = lock(folder)
    if held is None:
        sys.exit(BUSY)
    over, other = (folder / store.RECORD).exists(), draw.stranger(folder, Cell.from_json(task["cell"]))
    if over or other:
        unlock(folder, held)
        sys.exit(ALREADY if over else OTHERS)
    sweep(folder)
    _redirect(folder / OUTPUT)
    record = _execute(task, folder)
    store.write_record(folder, record)
    if record["status"] in FINAL:
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    with contextlib.suppress(OSError):  # the record is there; what was printed matters no more
        sys.stdout.flush()
        sys.stderr.flush()
        drop_empty(folder / OUTPUT)
    unlock(folder, held)


def _execute(task: Mapping[str, Any], folder: Path) -> store.Record:
    """The record of the run; an exception becomes the status crashed or oom, its traceback error.txt.

    Raises OSError or `Unwritable` where the run could not write: that says nothing about the run.
    """
    started, since = now(), time.monotonic()
    cell = Cell.from_json(task["cell"])
    try:
        for file in cell.method_files:
            registry.add_file(file)
        _limit_threads(threads_of(cell))
        execute = resolve_name(task["target"])
        _limit_threads(threads_of(cell))
        _prepare(cell, folder, task["code"])
        record: store.Record = execute(cell, folder, task["suite"], task["jobs"])
        if task["code"]:  # as it was when this process's server loaded it; the files may have changed since
            record["code"] = {**record.get("code", {}), **task["code"]}
        # A record that cannot be written counts as a crash.
        store.encode(record, folder.name)
        return record
    except Exception as error:  # a failed run is a row with a reason, whatever was raised
        if _unwritable(error, folder):
            traceback.print_exc()
            raise
        with opened(folder / "error.txt", "w", encoding="utf-8", errors="backslashreplace") as out:
            out.write(traceback.format_exc())
        status = "oom" if _is_out_of_memory(error) else "crashed"
        if status == "crashed":  # at the same step it would crash again, and corrected code starts anew
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        reason = _reason(error, cell.private)
        return failure(task, folder, status, reason, started, time.monotonic() - since)


def _limit_threads(threads: int) -> None:
    """For libraries still to be loaded by the environment, for torch by its own call."""
    for name in SERIAL:
        os.environ[name] = str(threads)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(threads)


def _prepare(cell: Cell, folder: Path, code: Mapping[str, Any] | None) -> None:
    """Forget what other code began, note where the run happens, and hold a GPU to the memory budget.

    The memory of a CPU run is watched from outside.
    """
    today = (code or {}).get("hash")
    if today is not None and _place(folder).get("code", today) != today:
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        (folder / "trace.jsonl").unlink(missing_ok=True)
    device = measure.device_info(device_of(cell), threads_of(cell))
    place = {**measure.environment(), "device": device, "code": today}
    replace_file(folder / "env.json", dumps(place).encode())
    memory = cell.budget.get("memory_mib")
    if is_cuda(cell) and memory is not None:
        import torch

        total = torch.cuda.get_device_properties(device_of(cell)).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory * measure.MIB / total), device_of(cell))


def _is_out_of_memory(error: BaseException) -> bool:
    """Python's own, torch's on a GPU, and the plain RuntimeError of torch's allocator on a CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _unwritable(error: Exception, folder: Path) -> bool:
    """Whether there is no room to write, or no leave to write in the run's folder."""
    if isinstance(error, Unwritable):
        return True
    if not isinstance(error, OSError):
        return False
    inside = isinstance(error.filename, str | os.PathLike) and Path(error.filename).is_relative_to(folder)
    return error.errno in _FULL or (inside and error.errno in NO_PLACE)


def _reason(error: BaseException, private: bool) -> str:
    """What to say of a crash, and where it was.

    What an exception says that was raised over examples of private data may be their labels, their norms or the size of
    a batch. A record is passed on, so it names the exception alone; error.txt, which stays here, has all of it.
    """
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    where = f"at {Path(last.filename).name}:{last.lineno}"
    if private and any((Path(frame.filename).name, frame.name) == _TRAINING for frame in frames):
        hidden = "what it says may tell of private data, and is in error.txt"
        return f"{type(error).__name__} in training ({where}; {hidden})"
    text = "".join(traceback.format_exception_only(error)).strip()
    text = text.encode(errors="backslashreplace").decode()  # names of files need not be UTF-8
    return f"{text[-800:]} ({where}; the traceback is in error.txt)"


def _redirect(path: Path) -> None:
    """Send what the run prints to a file: the terminal belongs to the launcher's progress."""
    sys.stdout.flush()
    sys.stderr.flush()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # the file is UTF-8 whatever the terminal was
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    with opened(path, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()


def _mute() -> None:
    """Drop what is still to be printed: where there is no room for it, it would raise once more at the exit."""
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _die_with_launcher() -> None:
    """The kernel ends this process with the server that forked it, a thread ends it with the launcher."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def follow() -> None:
        connection.wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=follow, name="die-with-launcher", daemon=True).start()


def drop_empty(path: Path) -> None:
    """Delete a file that nothing was written to."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size == 0:
            path.unlink()


def now() -> str:
    """This moment in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def failure(
    task: Mapping[str, Any], folder: Path, status: str, reason: str, started: str, seconds: float
) -> store.Record:
    """A record with what is known of a failed run: its identity, its status and why, where and how long."""
    cell, code = Cell.from_json(task["cell"]), task["code"] or {}

    def made(place: dict[str, Any]) -> store.Record:
        commit = {key: place.pop(key, None) for key in ("commit", "dirty")}
        place.pop("code", None)
        return blank(
            id=cell.id, group=cell.group, suite=task["suite"], status=status, reason=reason, cell=cell.canonical(),
            card=_card(cell.method),
            privacy={key: cell.privacy[key] for key in ("relation", "unit", "delta")} | {"sensitivity": {}},
            measured={"jobs": task["jobs"]}, diagnostics={"wall_seconds": seconds}, code={**code, **commit},
            device=place.pop("device", None) or {
                "kind": "cuda" if is_cuda(cell) else "cpu", "spec": device_of(cell), "threads": threads_of(cell),
            },
            environment=place, started=started, finished=now(),
        )  # fmt: skip

    record = made(_place(folder))
    # A damaged env.json may hold what no record can.
    return record if fault(record) is None else made({})


def _place(folder: Path) -> dict[str, Any]:
    """The env.json that the run wrote when it started; empty where it did not come so far, or where it is no object."""
    try:
        found = json.loads(content(folder / "env.json"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _card(method: str) -> dict[str, object]:
    try:
        return registry.resolve("method", method).card
    except registry.RegistryError:  # a crash may be just this; the card is not worth a second one
        return {"paper": None, "family": None, "summary": None}
