"""Claims: an epsilon that holds only under assumptions, each of which is checked as far as a run can check it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from harness.dp.method import Method


class Run(NamedTuple):
    """What a claim may rest on: the method and the public numbers of a run."""

    method: Method
    sigma: float
    n: int
    batch: int
    steps: int
    delta: float


class Assumption(NamedTuple):
    """One condition: `holds` is None where nothing in a run can decide it, and `why` says what was seen."""

    text: str
    holds: bool | None
    why: str = ""


@dataclass(frozen=True)
class Claim:
    """An epsilon and all that it assumes. One failed assumption turns it off: there is no epsilon then."""

    epsilon: float
    source: str
    assumptions: tuple[Assumption, ...]

    @property
    def failed(self) -> list[Assumption]:
        """The assumptions that do not hold."""
        return [one for one in self.assumptions if one.holds is False]

    def to_json(self) -> dict[str, Any]:
        """For the record; an epsilon of null is no claim at all."""
        stands = not self.failed and math.isfinite(self.epsilon)
        return {
            "epsilon": self.epsilon if stands else None,
            "source": self.source,
            "assumptions": [one._asdict() for one in self.assumptions],
            "failed": [f"{one.text}: {one.why}" for one in self.failed],
        }
