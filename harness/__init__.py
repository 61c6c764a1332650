"""epsbench: a benchmark and reproduction harness for differentially private training."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os

    import pandas

__version__ = "0.1.0"


def load_results(folder: str | os.PathLike[str] = "results") -> pandas.DataFrame:
    """The records under `folder` as a pandas table, one row a record; see
    :func:`harness.records.frame.load_results`."""
    from pathlib import Path

    from harness.records import frame

    return frame.load_results(Path(folder))
