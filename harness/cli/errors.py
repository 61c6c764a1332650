"""Exit codes, and the errors that are reported to a user by their message alone."""

from __future__ import annotations

import sys
from collections.abc import Iterable

OK, FAILED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130
CODES = "exit codes: 0 all is well; 1 some runs or checks failed; 2 the request is wrong; 130 stopped"

# Exceptions of other packages that say what a user should change. Looked up only where the package is loaded.
_USER_ERRORS = {
    "harness.registry": ("RegistryError",),
    "harness.suite": ("SuiteError",),
    "harness.records.store": ("StoreError",),
    "harness.data": ("DatasetError",),
    "harness.models": ("CrossExampleLayer",),
    "harness.records.mlflow": ("TrackingError",),
}


class UserError(Exception):
    """A request cannot be met; the message says what is wrong, where, and what to write instead."""


def message_of(error: Exception) -> str | None:
    """The message for the user; None for an error of this program, which needs its traceback."""
    if isinstance(error, UserError):
        return f"epsbench: {error}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"epsbench: {error.filename}: {error.strerror}"
    for module, names in _USER_ERRORS.items():
        loaded = sys.modules.get(module)
        kinds = tuple(kind for name in names if (kind := getattr(loaded, name, None)) is not None)
        if kinds and isinstance(error, kinds):
            return f"epsbench: {error}" if "\n" not in str(error) else str(error)
    return None


def hint(word: str, candidates: Iterable[str]) -> str:
    """A sentence on the candidate that is nearest to the word; empty where no candidate is near."""
    from harness.registry import did_you_mean

    near = did_you_mean(word, candidates)
    return f' Did you mean "{near}"?' if near else ""
