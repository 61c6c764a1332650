"""Kernels in C for the few loops that PyTorch has no operator for: optional, built on first use and kept.

`library()` compiles the C files of this folder with the system's compiler into one shared object, once for each
machine, compiler and version of the sources, and loads it: never one that another user could have put there. A file
that needs flags of its own has them in a line `#define FLAGS ...`. Where there is no compiler, or `EPSBENCH_NATIVE=0`
is set, it is None and every caller has a way without; `describe()` says which it was, and a run's record repeats it.

The kernels share PyTorch's OpenMP threads: importing torch first puts its runtime in the process, and the loader finds
that one.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch  # noqa: F401 (its OpenMP runtime must be in the process before ours looks for one)

from harness.dp import cache as kept

FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC", "-std=gnu11")
SOURCES = Path(__file__).parent


@cache
def _build() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("EPSBENCH_NATIVE") == "0":
        return None, "none: EPSBENCH_NATIVE=0"
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler or sys.platform != "linux":
        return None, "none: no C compiler" if not compiler else f"none: not tried on {sys.platform}"
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=20, check=True)
        name = version.stdout.splitlines()[0]
        files = sorted(SOURCES.glob("*.c"))
        key = hashlib.sha256("\0".join([name, *FLAGS, platform.machine(), _cpu()]).encode())
        for file in sorted(SOURCES.glob("*.[ch]")):
            key.update(file.read_bytes())
        target = kept.root() / "native" / f"{key.hexdigest()[:16]}.so"
        if kept.trusted(target):  # code of another user's is not run
            with suppress(OSError):
                return ctypes.CDLL(str(target)), name
        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch) / target.name
            objects = [str(made.with_name(f"{file.stem}.o")) for file in files]
            for file, compiled in zip(files, objects, strict=True):
                _run(compiler, *FLAGS, *_own_flags(file), "-c", "-o", compiled, str(file))
            _run(compiler, "-shared", "-fopenmp", "-o", str(made), *objects, "-lm")
            whole = made.read_bytes()
            kept.keep(target, lambda file: file.write(whole))  # whoever comes second replaces the same bytes
            with suppress(OSError):  # for this user alone, so that it is trusted the next time
                target.parent.chmod(0o700)
            return ctypes.CDLL(str(target if kept.trusted(target) else made)), name
    except subprocess.CalledProcessError as error:
        return None, f"none: {compiler} failed: {(error.stderr or '').strip().splitlines()[:1]}"
    except (OSError, subprocess.TimeoutExpired, IndexError) as error:
        return None, f"none: {type(error).__name__} while building"


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def _own_flags(file: Path) -> list[str]:
    """What a C file adds to the flags."""
    found = re.search(r"^#define FLAGS (.*)", file.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1].split() if found else []


def _cpu() -> str:
    """What -march=native looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None."""
    return _build()[0]


def describe() -> str:
    """The compiler that made the kernels, or "none" and why."""
    return _build()[1]
