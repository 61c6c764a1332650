"""What a search for hyper-parameters on the private data costs, together with the run that it led to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dp_accounting.dp_event import RepeatAndSelectDpEvent

from harness.dp.account import Ledger, epsilons, ranking
from harness.dp.release import Relation

# The shape of the distribution of the number of tries, as Papernot and Steinke 2022 (arXiv:2110.03620) have it.
SHAPES = {"poisson": math.inf, "geometric": 1.0, "logarithmic": 0.0}
DISTRIBUTIONS = ("fixed", *SHAPES)


@dataclass(frozen=True)
class Tuning:
    """A search on the private data: `tries` runs of which the best is told, each with hyper-parameters of its own.

    Where the distribution is "fixed" there are exactly `tries` of them, and all may be published: composition. Else
    their number is drawn, `tries` is its mean, and nothing is published but the best: repeat and select (Liu and Talwar
    2019, arXiv:1811.07971; Papernot and Steinke 2022, arXiv:2110.03620, theorems 2 and 6).

    `retrained`: the run that is charged is one more, with the hyper-parameters found. Else it is the best try itself.
    Raises ValueError where these do not fit each other.
    """

    tries: float
    distribution: str = "fixed"
    retrained: bool = True

    def __post_init__(self) -> None:
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(f"{self.distribution!r} is none of {', '.join(DISTRIBUTIONS)}")
        if not 1 <= self.tries < math.inf:
            raise ValueError(f"{self.tries:g} tries are not 1 or more")
        if self.distribution == "fixed" and self.tries != int(self.tries):
            raise ValueError(f"a fixed number of tries is a whole one, and {self.tries:g} is not")


def tuned(ledger: Ledger, tuning: Tuning) -> Ledger:
    """What the search and the run release together, `ledger` being that of one run.

    Each try is taken to release what the run did: one that costs more is not covered. Neither is the choice among them
    where the scores are of private data that no ledger tells of, such as examples held out.
    """
    if tuning.distribution == "fixed":
        runs = int(tuning.tries) + tuning.retrained
        return Ledger((event, count * runs) for event, count in ledger)
    once = ledger.total()
    search = (RepeatAndSelectDpEvent(once, tuning.tries, SHAPES[tuning.distribution]), 1)
    return Ledger([search, (once, 1)] if tuning.retrained else [search])


def charge(ledger: Ledger, tuning: Tuning, delta: float, relation: Relation) -> dict[str, Any]:
    """{"epsilon", "accountant"} of search and run, as a record has them; None for an infinite epsilon.

    By the first accountant that knows the event: RDP where the number of tries is random.
    """
    whole = tuned(ledger, tuning)
    bounds = epsilons(whole, delta, relation)
    first = ranking(bounds)
    return {"epsilon": bounds[first] if math.isfinite(bounds[first]) else None, "accountant": first}
