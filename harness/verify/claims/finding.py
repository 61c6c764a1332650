"""Verdicts on published numbers: how one compares with what is proved or measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

AGREES, OVERSTATES, UNDERSTATES = "agrees", "overstates", "understates"
ASSUMES = "holds only under assumptions"
NEAR = 0.02  # settings are printed with two or three digits, which is worth about so much of an epsilon
ROUNDED = 0.005  # a claim that is lower than every bound by more than this is not a matter of digits


@dataclass(frozen=True)
class Figure:
    """One recomputed number: what it is, and what it says about the claim.

    A "bound" is proved without further assumptions, a "measured" value occurs, so that no smaller one is true; an
    "assumed" bound needs what the claim lists, and the rest is for comparison.
    """

    name: str
    value: float
    role: Literal["bound", "measured", "assumed", ""] = ""


@dataclass(frozen=True)
class Finding:
    """What became of a claim: a verdict, the reason for it in words, and the figures, that of the claim left out."""

    verdict: str
    reason: str
    figures: tuple[Figure, ...]


def judge(published: float, figures: Sequence[Figure]) -> Finding:
    """Compare a published number, of which the smaller is the stronger claim, with what is proved.

    It understates where it is below every bound by more than `ROUNDED`: nothing here proves it. It agrees where it is
    within `NEAR` of a bound, and overstates where a bound says less.
    """
    bounds = [f for f in figures if f.role in ("bound", "measured")]
    assumed = [f for f in figures if f.role == "assumed" and abs(f.value / published - 1) <= NEAR]
    least = min(bounds, key=lambda f: f.value)
    nearest = min(bounds, key=lambda f: abs(f.value / published - 1))
    if published < least.value * (1 - ROUNDED):
        by = f"{100 * (1 - published / least.value):.3g} % below {least.name}"
        if assumed:
            return Finding(ASSUMES, f"{assumed[0].name} gives it; {by}", tuple(figures))
        return Finding(UNDERSTATES, by, tuple(figures))
    by = f"{100 * (published / least.value - 1):.3g} % above {least.name}"
    if abs(nearest.value / published - 1) > NEAR:
        return Finding(OVERSTATES, by, tuple(figures))
    also = "" if published <= least.value * (1 + NEAR) else f"; {by}"
    return Finding(AGREES, f"with {nearest.name}{also}", tuple(figures))
