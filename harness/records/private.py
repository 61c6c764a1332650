"""Files that hold what no accountant has charged for: they are for the eyes of their owner alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any


def opened(path: Path, mode: str = "wb", **options: Any) -> IO[Any]:
    """Open a file to write it, as :func:`open` does, readable and writable by its owner alone (mode 0600).

    Also where there is a file of this name already, left by a killed run or an older version.
    """
    file = open(path, mode, opener=lambda name, flags: os.open(name, flags, 0o600), **options)  # noqa: SIM115
    os.fchmod(file.fileno(), 0o600)
    return file
