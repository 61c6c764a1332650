"""What was measured, on what: a synchronised clock, peak memory, and the environment of a run.

torch is imported inside the functions that need it, so that a command which only asks for the number of
cores or the name of the CPU does not pay for it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

MIB = 1024 * 1024
PACKAGES = ("torch", "torchvision", "opacus", "dp-accounting", "numpy", "scipy", "timm", "mlflow-skinny")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_CBWR", "KMP_AFFINITY")


def cores() -> int:
    """CPU cores this process may use: its affinity mask, and the quota of its cgroup where there is one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            allowed = min(allowed, max(1, math.floor(int(quota) / int(period))))
    return max(1, allowed)


class Clock:
    """A wall clock that waits for the device: `now()` returns only when the work queued so far is done.

    Without the wait, a GPU step seems to take only as long as it takes to queue it.
    """

    def __init__(self, device: str | Any = "cpu") -> None:
        self.device = str(device)
        self.is_cuda = self.device.startswith("cuda")

    def now(self) -> float:
        """Seconds from an arbitrary origin (`time.perf_counter`), after synchronising the device."""
        if self.is_cuda:
            import torch

            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def since(self, start: float) -> float:
        """Seconds since `start`, which an earlier `now()` returned."""
        return self.now() - start

    @contextlib.contextmanager
    def timed(self, into: list[float]) -> Iterator[None]:
        """Append the seconds that the block took to `into`, also when it raises."""
        start = self.now()
        try:
            yield
        finally:
            into.append(self.since(start))


def quartiles(values: Sequence[float]) -> dict[str, float | None]:
    """Median and quartiles (linear interpolation) of `values`; all None when there are none."""
    if not values:
        return {"median": None, "q1": None, "q3": None}
    if len(values) == 1:
        only = float(values[0])
        return {"median": only, "q1": only, "q3": only}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def peak_memory_mib(device: str | Any = "cpu") -> float:
    """Peak memory in MiB since the last reset.

    On a GPU that of torch's tensors, on a CPU the resident set of the whole process.
    """
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(str(device)) / MIB
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # In bytes on macOS, in KiB elsewhere.
    return peak / MIB if sys.platform == "darwin" else peak / 1024


def reset_peak_memory(device: str | Any = "cpu") -> None:
    """Start the peak anew at the current use; where the system cannot, it stays that since the start."""
    if str(device).startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(str(device))
        return
    # proc(5): writing 5 to clear_refs resets VmHWM to the current resident set.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident_mib(pid: int) -> float | None:
    """Resident memory of a process and all that it started, in MiB; None when it is gone or hidden from us."""
    try:
        process = psutil.Process(pid)
        tree = [process, *process.children(recursive=True)]
    except psutil.Error:
        return None
    found = 0.0
    for one in tree:
        with contextlib.suppress(psutil.Error):
            found += one.memory_info().rss / MIB
    return found or None


def cpu_name() -> str:
    """Model name of the CPU as the system reports it, or the architecture where it reports none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def device_info(spec: str = "cpu", threads: int = 1) -> dict[str, Any]:
    """Name, kind, spec, threads and fingerprint of a device ("cpu", "cuda:0").

    The fingerprint (8 hex digits of name, kind and threads) keys throughput: only records that share it are
    compared.
    """
    kind = spec.split(":", 1)[0]
    if kind == "cuda":
        import torch

        name = torch.cuda.get_device_name(spec)
    else:
        name = cpu_name()
    text = f"{name}|{kind}|{threads}"
    fingerprint = hashlib.sha256(text.encode()).hexdigest()[:8]
    return {"name": name, "kind": kind, "spec": spec, "threads": threads, "fingerprint": fingerprint}


@functools.cache
def _checkout() -> dict[str, Any]:
    """{"commit": 40 hex digits or None, "dirty": bool or None} of the checkout that this package runs from.

    None for an installed copy: a repository that merely surrounds the virtual environment is not our source.
    """
    here = Path(__file__).resolve()
    if not _output("git", "-C", str(here.parent), "ls-files", "--error-unmatch", here.name):
        return {"commit": None, "dirty": None}
    commit = _output("git", "-C", str(here.parent), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(here.parent.parent), "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def environment() -> dict[str, Any]:
    """What about this process can change a number or a speed: versions, hardware, threads, commit.

    Settings of torch are in it where torch is loaded; the GPU is, once CUDA has been used. Neither is started
    here.
    """
    return {
        "python": platform.python_version(),
        **{name.replace("-", "_"): _version(name) for name in PACKAGES},
        "os": platform.platform(),
        "cpu": cpu_name(),
        "cores": cores(),
        "memory_mib": psutil.virtual_memory().total // MIB,
        "variables": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        **_torch_settings(),
        **_checkout(),
    }


def _torch_settings() -> dict[str, Any]:
    if "torch" not in sys.modules:
        return {}
    import torch

    settings: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "mkl": torch.backends.mkl.is_available(),
        "onednn": torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gpu": None,
        "cuda": torch.version.cuda,
        "cudnn": None,
        "driver": None,
    }
    if torch.cuda.is_initialized():
        settings["gpu"] = torch.cuda.get_device_name()
        settings["cudnn"] = torch.backends.cudnn.version()
        settings["driver"] = _driver()
    return settings


def _driver() -> str | None:
    with contextlib.suppress(OSError):
        first = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
        return next((word for word in first.split() if word[0].isdigit() and "." in word), first)
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """Standard output of a command, stripped; None when it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
