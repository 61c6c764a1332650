"""Rows computed once and kept in files: chunk by chunk, resumed after a kill, by one process at a time."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from harness.data.canonical import Array
from harness.data.dataset import Split
from harness.dp.cache import load, own, write_whole
from harness.records import screen

CHUNK = 256  # rows between two notes of progress; chunks always start at a multiple
SPEAK = 30.0  # seconds between two lines where there is no terminal

Rows = Callable[[Split, int, int], Array]


def finished(folder: Path, sizes: Mapping[Split, int], width: int) -> bool:
    """Whether all rows are there."""
    return _done(folder, sizes, width) == dict(sizes)


def fill(folder: Path, sizes: Mapping[Split, int], width: int, prepare: Callable[[], Rows], what: str) -> None:
    """Have ``train.npy`` and ``test.npy``, float32 ``[sizes[split], width]``, in ``folder``.

    ``prepare`` is called only where rows are missing; it returns the function that computes the rows from one
    number to another. A second process waits for the first. What a killed process had written is kept.
    """
    if finished(folder, sizes, width):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder, what):
        done = _done(folder, sizes, width)
        if done == dict(sizes):
            return
        rows = prepare()
        with _progress(what, sum(sizes.values())) as tell:
            for split, n in sizes.items():
                for stop in _append(folder / f"{split}.npy", split, done[split], n, width, rows):
                    done[split] = stop
                    _note(folder, done, width)
                    tell(sum(done.values()))


def _append(file: Path, split: Split, done: int, n: int, width: int, rows: Rows) -> Iterator[int]:
    """Write the rows from ``done`` to ``n`` behind those that are there; yields how many are safely on disk.

    By writing, not into mapped memory: on a full disk that is an error, and not the death of the process.
    """
    head = _header(n, width)
    with open(file, "r+b" if done else "w+b") as opened:
        if not done:
            opened.write(head)
        opened.truncate(len(head) + 4 * width * done)
        opened.seek(0, os.SEEK_END)
        for start in range(done, n, CHUNK):
            stop = min(start + CHUNK, n)
            opened.write(np.ascontiguousarray(rows(split, start, stop), dtype="<f4").data)
            opened.flush()
            os.fsync(opened.fileno())
            yield stop


def mapped(file: Path) -> Array:
    """The array in ``file``, read from disk as it is used. What is written to it stays in this process."""
    found: Array = np.load(file, mmap_mode="c", allow_pickle=False)
    return found


def _header(n: int, width: int) -> bytes:
    """The head of an .npy file of float32 ``[n, width]``."""
    head = BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (n, width)})
    return head.getvalue()


def _note(folder: Path, done: Mapping[Split, int], width: int) -> None:
    text = json.dumps({"width": width, "rows": done}).encode()
    write_whole(folder / "progress.json", lambda file: file.write(text))


def _done(folder: Path, sizes: Mapping[Split, int], width: int) -> dict[Split, int]:
    """How many rows of each split are safely there: noted, and in a file that is long enough."""
    noted = load(folder / "progress.json")
    fits = isinstance(noted, dict) and noted.get("width") == width
    rows = noted.get("rows") if fits else None
    rows = rows if isinstance(rows, dict) else {}
    found: dict[Split, int] = {}
    for split, n in sizes.items():
        file, count = folder / f"{split}.npy", rows.get(split, 0)
        count = count if type(count) is int and count >= 0 else 0
        long = file.stat().st_size if own(file) else 0
        found[split] = count if len(_header(n, width)) + 4 * width * count <= long and count <= n else 0
    return found


def _alone(folder: Path, what: str) -> AbstractContextManager[Any]:
    """Hold the folder's lock; the death of its holder frees it."""
    lock = FileLock(folder / "lock", thread_local=False)
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        print(f"{what}: another process computes it; waiting", file=sys.stderr, flush=True)
        return lock.acquire()


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; elsewhere a line at the end and now and then, on stderr."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(file=screen.raw(sys.stderr))) as bar:
            task = bar.add_task(screen.plain(what), total=total)
            yield lambda done: bar.update(task, completed=done)
        return
    spoken = time.monotonic()

    def tell(done: int) -> None:
        nonlocal spoken
        if done == total or time.monotonic() - spoken > SPEAK:
            spoken = time.monotonic()
            print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)

    yield tell
