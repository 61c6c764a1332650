"""From a ledger of events to epsilon, by several accountants."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

from dp_accounting import PrivacyAccountant

from harness.dp.account.accountants import Gdp, Pld, Prv, Rdp, Unproved
from harness.dp.account.ledger import Ledger
from harness.dp.release import Relation

__all__ = ["ACCOUNTANTS", "Ledger", "epsilon", "epsilons", "explain", "quiet", "ranking"]

# In order of rank: where the first knows every event, its epsilon is the one that counts; the others cross-check it.
# The last two know nothing that the first does not.
ACCOUNTANTS: dict[str, Callable[[Relation], PrivacyAccountant]] = {"pld": Pld, "rdp": Rdp, "prv": Prv, "gdp": Gdp}


@contextmanager
def quiet() -> Iterator[None]:
    """Silence dp_accounting's warnings about RDP orders that overflow: such an order does not bind. `explain` tells."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def epsilon(ledger: Ledger, delta: float, relation: Relation, accountant: str) -> float:
    """The smallest epsilon that an accountant of `ACCOUNTANTS` proves for `ledger`.

    inf where it does not know an event, or has no number for them all; `explain` says which.
    """
    return _answer(_key(ledger), delta, relation, accountant).epsilon


def epsilons(ledger: Ledger, delta: float, relation: Relation) -> dict[str, float]:
    """Epsilon by every accountant."""
    return {name: epsilon(ledger, delta, relation, name) for name in ACCOUNTANTS}


def explain(ledger: Ledger, delta: float, relation: Relation) -> dict[str, str]:
    """Why an accountant has no finite epsilon, by accountant; of RDP the order that binds, and those that overflowed.

    What `epsilons` computed is not computed again.
    """
    key = _key(ledger)
    notes = {name: _answer(key, delta, relation, name).note for name in ACCOUNTANTS}
    return {name: note for name, note in notes.items() if note}


def ranking(bounds: dict[str, float]) -> str:
    """Whose epsilon ranks: the first accountant that knows every event of the ledger."""
    return next((name for name in ACCOUNTANTS if math.isfinite(bounds[name])), next(iter(ACCOUNTANTS)))


class _Answer(NamedTuple):
    epsilon: float
    note: str


def _key(ledger: Ledger) -> str:
    return json.dumps(Ledger(ledger.composed()).to_json())


@lru_cache(maxsize=4096)
def _answer(entries: str, delta: float, relation: Relation, accountant: str) -> _Answer:
    account = ACCOUNTANTS[accountant](relation)
    event = Ledger.from_json(json.loads(entries)).total()
    error = account._maybe_compose(event, 1, False)
    if error is not None:
        return _Answer(math.inf, f"{type(error.invalid_event).__name__}: {error.error_message.rstrip('.')}")
    with quiet():
        try:
            found = float(account.compose(event).get_epsilon(delta))
        except Unproved as reason:
            return _Answer(math.inf, str(reason))
        if isinstance(account, Rdp):
            return _Answer(found, account.note(delta))
    return _Answer(found, "" if math.isfinite(found) else "a value is released without noise")
