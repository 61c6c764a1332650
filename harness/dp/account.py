"""From a ledger of events to epsilon, by several accountants."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import attrs
import dp_accounting
from dp_accounting import ComposedDpEvent, DpEvent, NeighboringRelation, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from harness.dp.release import Relation


class Ledger:
    """What was released, in order, run-length encoded: a list of (event, how often in a row)."""

    def __init__(self, entries: Iterable[tuple[DpEvent, int]] = ()) -> None:
        self.entries: list[tuple[DpEvent, int]] = list(entries)

    def add(self, event: DpEvent) -> None:
        """Write one step's event."""
        if self.entries and self.entries[-1][0] == event:
            self.entries[-1] = (event, self.entries[-1][1] + 1)
        else:
            self.entries.append((event, 1))

    def __iter__(self) -> Iterator[tuple[DpEvent, int]]:
        return iter(self.entries)

    def __len__(self) -> int:
        return sum(count for _, count in self.entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ledger) and self.entries == other.entries

    def __repr__(self) -> str:
        return f"Ledger({self.entries})"

    def composed(self) -> list[tuple[DpEvent, int]]:
        """Equal events gathered: composition commutes, and an accountant is fast on few distinct events."""
        counts: Counter[str] = Counter()
        first: dict[str, DpEvent] = {}
        for event, count in self.entries:
            key = repr(event)
            counts[key] += count
            first.setdefault(key, event)
        return [(first[key], counts[key]) for key in sorted(counts)]

    def total(self) -> DpEvent:
        """The whole ledger as one event."""
        return ComposedDpEvent([SelfComposedDpEvent(event, count) for event, count in self.composed()])

    def to_json(self) -> list[list[Any]]:
        """Entries as [event, count], an event being a dictionary of its dp_accounting class name and fields."""
        return [[_to_json(event), count] for event, count in self.entries]

    @classmethod
    def from_json(cls, entries: Iterable[Any]) -> Ledger:
        """The inverse of `to_json`. Raises ValueError on an event that dp_accounting does not have."""
        return cls((_from_json(event), int(count)) for event, count in entries)


def _to_json(value: Any) -> Any:
    if isinstance(value, DpEvent):
        fields = {f.name: _to_json(getattr(value, f.name)) for f in attrs.fields(type(value))}
        return {"type": type(value).__name__, **fields}
    return [_to_json(item) for item in value] if isinstance(value, (list, tuple)) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        kind = getattr(dp_accounting, str(value.get("type")), None)
        if not (isinstance(kind, type) and issubclass(kind, DpEvent)):
            raise ValueError(
                f"a ledger names the event {value.get('type')!r}, which dp_accounting does not have"
            )
        return kind(**{key: _from_json(item) for key, item in value.items() if key != "type"})
    return [_from_json(item) for item in value] if isinstance(value, list) else value


_NEIGHBOURS = {
    Relation.ADD_OR_REMOVE: NeighboringRelation.ADD_OR_REMOVE_ONE,
    Relation.REPLACE_ONE: NeighboringRelation.REPLACE_ONE,
}


class _Pld(PLDAccountant):
    """PLD with our reading of a noise multiplier: standard deviation over the sensitivity *under the relation stated*.

    dp_accounting's own PLD code doubles the sensitivity of a Gaussian itself under replace-one (its RDP code does not);
    our releases carry 2C there already. So a plain Gaussian is accounted as one of sensitivity 1 under either relation,
    and sampled events, whose analysis does depend on the relation, are refused outside add-or-remove.
    """

    def __init__(self, relation: Relation) -> None:
        super().__init__(NeighboringRelation.ADD_OR_REMOVE_ONE)
        self._stated = relation

    def _maybe_compose(self, event: DpEvent, count: int, do_compose: bool) -> Any:
        sampled = isinstance(
            event, (dp_accounting.PoissonSampledDpEvent, dp_accounting.TruncatedSubsampledGaussianDpEvent)
        )
        if sampled and self._stated is not Relation.ADD_OR_REMOVE:
            return self.CompositionErrorDetails(
                invalid_event=event, error_message="Poisson sampling needs add-or-remove"
            )
        return super()._maybe_compose(event, count, do_compose)


def _rdp(relation: Relation) -> RdpAccountant:
    return RdpAccountant(neighboring_relation=_NEIGHBOURS[relation])


# In order of rank: where the first knows every event, its epsilon is the one that counts; the others cross-check it.
ACCOUNTANTS: dict[str, Callable[[Relation], dp_accounting.PrivacyAccountant]] = {"pld": _Pld, "rdp": _rdp}


@contextmanager
def quiet() -> Iterator[None]:
    """Silence dp_accounting's warnings about RDP orders that overflow: such an order does not bind."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def epsilon(ledger: Ledger, delta: float, relation: Relation, accountant: str) -> float:
    """The smallest epsilon that `accountant` ("pld", "rdp") proves for `ledger`; inf if it does not know an event."""
    return _epsilon(json.dumps(Ledger(ledger.composed()).to_json()), delta, relation, accountant)


@lru_cache(maxsize=4096)
def _epsilon(entries: str, delta: float, relation: Relation, accountant: str) -> float:
    account = ACCOUNTANTS[accountant](relation)
    event = Ledger.from_json(json.loads(entries)).total()
    if not account.supports(event):
        return math.inf
    with quiet():
        return float(account.compose(event).get_epsilon(delta))


def epsilons(ledger: Ledger, delta: float, relation: Relation) -> dict[str, float]:
    """Epsilon by every accountant."""
    return {name: epsilon(ledger, delta, relation, name) for name in ACCOUNTANTS}


def ranking(bounds: dict[str, float]) -> str:
    """Whose epsilon ranks: the first accountant that knows every event of the ledger."""
    return next((name for name in ACCOUNTANTS if math.isfinite(bounds[name])), next(iter(ACCOUNTANTS)))
