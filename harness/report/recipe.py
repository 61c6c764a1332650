"""Writes the commands that repeat a run: the checkout that it was made with, and the suite that asked for it."""

from __future__ import annotations

import shlex
from pathlib import Path

from harness.report.model.runs import Run

__all__ = ["commands"]


def commands(run: Run, suite: str, reduced: bool = False, installed: bool = True) -> list[str]:
    """What to type to make `run` again, into a folder where it has no record yet.

    `suite` is the path of the suite's file, empty where it is unknown; `reduced` says that the run is of its reduced
    profile, `installed` that its method needs no file of the user. A path outside the working directory is given by its
    name alone: it means nothing elsewhere.
    """
    lines = []
    if run.commit:
        unknown = "    # and the changes it was run with, which git does not know" if run.dirty else ""
        lines.append(f"git checkout {shlex.quote(run.commit)}{unknown}")
    path = Path(suite)
    here = bool(suite) and not path.is_absolute() and ".." not in path.parts
    file = (suite if here else path.name) or "SUITE.toml"
    words = ["epsbench", "run", file, *(["--reduced"] if reduced else []), "--only", run.id]
    words += ["--attempt", str(run.attempt)] if run.attempt != 1 else []
    words += ["--results", "again", "--no-track"]
    if not installed:  # files outside the packages are known by their bare names
        words += [word for name in run.files or ("FILE.py",) for word in ("--method", name)]
    own = "" if installed and here else "    # with the files of your own that it was run from"
    return [*lines, shlex.join(words) + own]
