"""Data sets by name and digest: embedded ones, public ones from files or by download, and a user's own.

Importing this package, describing a data set and asking for its digest do not import torch; :func:`load`
does.
"""

from harness.data.canonical import Raw
from harness.data.catalog import describe, load, missing
from harness.data.dataset import Dataset, validation_size
from harness.data.source import Candidate, DatasetError, DatasetMismatch, DatasetMissing, Places, Source, places

__all__ = [
    "Candidate",
    "Dataset",
    "DatasetError",
    "DatasetMismatch",
    "DatasetMissing",
    "Places",
    "Raw",
    "Source",
    "describe",
    "load",
    "missing",
    "places",
    "validation_size",
]
