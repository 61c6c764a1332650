"""Gaussian noise that is correlated from step to step, so that its sums over steps are small.

The noise of step t is s (C^-1 Z)_t: `harness.dp.noise.strategy` has the matrices. s is such that a use of an example
costs what the noise multiplier says: a sampler charges one Gaussian for every `separation` steps, in which an example
is used once, as for independent noise.

*Exactly.* Noise on a grid must not be a sum of products of floats: the digits below the grid would tell earlier
noise, and with it earlier sums. What is released at step t is k_t + w_t, integers: k_t the sum on its grid, w_t the
noise. Each kind below has a w_t for which the release is a function of the Gaussian mechanism on C k, and says why.
Rounding a sum moves it, and is charged, as for independent noise (`harness.dp.gaussian`).

*What is kept.* From one step to the next a state is kept from which past noise follows. It is as secret as the private
sums: what was released less its noise is the private sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.dp.gaussian import FINE, Grid, grid, on_grid
from harness.dp.noise import strategy
from harness.dp.noise.noise import Array, Gaussian
from harness.dp.noise.strategy import UNIT
from harness.dp.random import Stream, blocks
from harness.dp.release import Release
from harness.dp.tree import Tree

BITS = UNIT.bit_length() - 1
FINEST = FINE - BITS
"""Bits of a grid: so that its step times 2^-10 is no finer than the numbers that are drawn."""


@dataclass(frozen=True)
class Correlated(Gaussian):
    """What kinds of correlated noise share. A state is {"t", "cost", ...}; `cost`: s over sigma * sensitivity."""

    @property
    def remembers(self) -> bool:
        return True

    def noising(self, steps: int, separation: int) -> Array:
        """C^-1, or a matrix of more columns [steps, K] that noise is drawn through likewise; costs are left out."""
        raise NotImplementedError

    def cost(self, steps: int, separation: int) -> float:
        """By how much an example moves C x, over the square root of how often it is used: s / (sigma * sensitivity)."""
        raise NotImplementedError

    def init(self, steps: int, separation: int) -> dict[str, Any]:
        # Of a run that no example comes twice to, all steps are apart.
        separation = min(separation, steps)
        return {"t": 0, "steps": steps, "separation": separation, "cost": self.cost(steps, separation)}

    def covariance(self, steps: int, separation: int) -> Array:
        separation = min(separation, steps)
        factor = self.noising(steps, separation) * self.cost(steps, separation)
        return factor @ factor.T

    def deviation(self, release: Release, state: dict[str, Any] | None = None) -> dict[str, float]:
        if state is None:
            return super().deviation(release)
        wider = state["cost"] * self.spread(state["t"], state["steps"], state["separation"])
        return {name: wider * one for name, one in super().deviation(release).items()}

    def spread(self, t: int, steps: int, separation: int) -> float:
        """The standard deviation of (C^-1 Z)_t, the noise of step t."""
        raise NotImplementedError

    def add(self, release: Release, rng: Stream) -> Tree:
        raise TypeError(f"{type(self).__name__} noise goes on from a state: call publish")

    def publish(self, release: Release, rng: Stream, state: dict[str, Any] | None) -> tuple[Tree, dict[str, Any]]:
        if state is None:
            raise ValueError("a release that the first step did not have cannot have noise in common with it")
        if state["t"] >= state["steps"] or release.sigma != state.get("sigma", release.sigma):
            raise ValueError(
                f"noise that was begun for {state['steps']} steps, with a multiplier of {state.get('sigma')}, cannot go"
                f" on in step {state['t']} with {release.sigma}: what its uses of an example cost is known for those"
            )
        value = release.value
        points = grid(release.sigma * state["cost"], release.sensitivity, value.layout.numel, FINEST)
        numbers, after = self.drawn(rng, state, value.layout.numel, points.bits, value.flat.device)
        return noised(release, numbers, points), {**state, **after, "t": state["t"] + 1, "sigma": release.sigma}

    def drawn(
        self, rng: Stream, state: dict[str, Any], size: int, bits: int, device: torch.device
    ) -> tuple[Tensor, dict[str, Any]]:
        """w_t as int64 [size], in units of 2^-bits deviations, and what changes in the state."""
        raise NotImplementedError


def noised(release: Release, numbers: Tensor, points: Grid) -> Tree:
    """The release on its grid, plus whole numbers of its steps."""
    value, dtype = release.value, release.dtype or release.value.flat.dtype
    if release.scale is None:
        return value.with_flat(on_grid(value.flat, numbers, points).to(dtype))
    pieces = zip(value.items(), numbers.split(value.layout.sizes), strict=True)
    units = [(t.reshape(-1), piece, points.in_units(release.scale[name])) for (name, t), piece in pieces]
    return value.with_flat(torch.cat([on_grid(t, piece, own).to(dtype) for t, piece, own in units]))


@dataclass(frozen=True)
class Banded(Correlated):
    """BandMF: C has `bands` diagonals, chosen for the length of the run (arXiv:2306.08153, arXiv:2405.15913).

    An example must not come again within `bands` steps. Then its columns of C have no row in common: each use costs
    the norm of one column, and a sampler that draws at random within cycles amplifies.

    The state holds the noise of the last `bands` - 1 steps: as many integers as there are weights, for each.

    *Exactly.* With a C of multiples of 2^-10, C k lies on a grid that is no finer than that of the numbers Z' =
    floor(2^38 Z) 2^-38. So M = C k + Z' is a function of C k + Z. The noise is w_t = floor(Z'_t - sum_i C_i w_{t-i}).
    Put y = k + w: then y_t = floor(M_t - sum_i C_i y_{t-i}), a function of M and of earlier y, hence of M alone.
    """

    bands: int = 8

    def __post_init__(self) -> None:
        if self.bands < 1:
            raise ValueError(f"bands must be 1 or more, and is {self.bands}")

    def separate(self, steps: int, separation: int) -> bool:
        return min(self.bands, steps) <= separation

    @property
    def separation(self) -> int:
        return self.bands

    def noising(self, steps: int, separation: int) -> Array:
        return _toeplitz(_inverse(strategy.banded(self.bands, steps), steps))

    def spread(self, t: int, steps: int, separation: int) -> float:
        return float(np.linalg.norm(_inverse(strategy.banded(self.bands, steps), steps)[: t + 1]))

    def cost(self, steps: int, separation: int) -> float:
        return math.sqrt(sum(c * c for c in strategy.banded(self.bands, steps))) / UNIT

    def init(self, steps: int, separation: int) -> dict[str, Any]:
        return {**super().init(steps, separation), "c": strategy.banded(self.bands, steps), "past": ()}

    def drawn(
        self, rng: Stream, state: dict[str, Any], size: int, bits: int, device: torch.device
    ) -> tuple[Tensor, dict[str, Any]]:
        numbers = rng.integers(size, device)
        for c, earlier in zip(state["c"][1:], state["past"], strict=False):
            numbers -= (c << FINEST - bits) * earlier
        numbers >>= FINE - bits
        return numbers, {"past": (numbers, *state["past"])[: len(state["c"]) - 1]}


@dataclass(frozen=True)
class BandedInverse(Correlated):
    """BISR: C^-1 has `bands` diagonals, those of the inverse square root of prefix sums (arXiv:2505.12128).

    The noise is a sum of the numbers of the last `bands` steps, and these are drawn again from their streams: the state
    holds their keys, and no numbers. C is full, so it costs what a whole run's uses of an example amount to, and no
    sampling amplifies it.

    *Exactly.* w_t = floor(sum_i c_i Z_{t-i}) for real numbers Z; then k_t + w_t = floor((C^-1 (C k + Z))_t), a function
    of C k + Z. Of Z only floor(2^38 Z) is drawn. Where that does not decide the floor, once in some hundred
    numbers, more digits of Z are drawn, as many as do (`_decided`).
    """

    bands: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.bands <= 64:
            raise ValueError(f"bands must lie between 1 and 64, and is {self.bands}")

    def separate(self, steps: int, separation: int) -> bool:
        return steps <= separation

    def noising(self, steps: int, separation: int) -> Array:
        return _toeplitz(_column(strategy.square_root(self.bands), steps))

    def spread(self, t: int, steps: int, separation: int) -> float:
        return float(np.linalg.norm(_column(strategy.square_root(self.bands), t + 1)))

    def cost(self, steps: int, separation: int) -> float:
        column = _inverse(strategy.square_root(self.bands), steps)
        # A last cycle that is cut short adds a whole use and moves little: before it, uses cost more by charge.
        whole = steps // separation * separation or steps
        costs = (
            strategy.sensitivity(column[:t], t, separation) / math.sqrt(-(-t // separation)) for t in (steps, whole)
        )
        return max(costs) * (1 + 1e-12)

    def init(self, steps: int, separation: int) -> dict[str, Any]:
        return {**super().init(steps, separation), "keys": ()}

    def drawn(
        self, rng: Stream, state: dict[str, Any], size: int, bits: int, device: torch.device
    ) -> tuple[Tensor, dict[str, Any]]:
        keys = (rng.key, *state["keys"])[: self.bands]
        c = strategy.square_root(self.bands)[: len(keys)]
        numbers = [Stream.of(key).integers(size, device) for key in keys]
        total = torch.zeros(size, dtype=torch.int64, device=device)
        for one, z in zip(c, numbers, strict=True):
            total += one * z
        shift = FINE + BITS - bits
        # What lies below the numbers that were drawn moves the total by less than this, down and up.
        down, up = (sum(abs(one) for one in c if sign * one > 0) for sign in (-1, 1))
        found = total - down >> shift
        open_ = (found != total + up >> shift).nonzero().squeeze(1)
        if len(open_):
            given = [z[open_] for z in numbers]
            found[open_] = _decided(c, keys, given, open_, shift)
        return found, {"keys": keys[: self.bands - 1]}


def _decided(c: Sequence[int], keys: Sequence[str], numbers: Sequence[Tensor], places: Tensor, shift: int) -> Tensor:
    """floor(sum_i c_i (N_i + u_i) / 2^shift) at some places of streams, for whole `numbers` N and what is below them.

    That is u. 48 bits of each u are compared first, and all 512 where these do not decide.
    """
    below = blocks([Stream.of(key).under("below").key for key in keys], places)
    total = torch.zeros_like(places)
    for one, n in zip(c, numbers, strict=True):
        total += one * n
    near = total + (1 << shift - 1) >> shift
    # By how much the total exceeds the boundary next to it, in units of 2^-48: below 2^61.
    above = (total - (near << shift)) << PART
    for one, n, words in zip(c, numbers, below, strict=True):
        above += one * _first(words, n)
    found = torch.where(above < 0, near - 1, near)
    for i in (above.abs() <= 2 * sum(abs(one) for one in c)).nonzero().flatten().tolist():
        digits = [exact(words[i].tolist(), int(n[i])) for n, words in zip(numbers, below, strict=True)]
        found[i] = math.floor(sum(one * digit for one, digit in zip(c, digits, strict=True)) / (1 << shift))
    return found


PART = 48


def _first(words: Tensor, numbers: Tensor) -> Tensor:
    """u of whole numbers, to one unit or so of 2^-48, from the first words of blocks [N, 16]."""
    first, second = (words[:, i].long() & 0xFFFFFFFF for i in (0, 1))
    bits = first << PART - 32 | second >> 64 - PART
    u = bits.double() * 2.0**-PART
    tilt = (2 * numbers + 1).double() * 2.0 ** (PART - 2 - 2 * FINE)
    return bits - (tilt * u * (1 - u)).round().long()


def exact(words: Sequence[int], number: int) -> Fraction:
    """number + u, u what is below a whole number of 2^-38, in these units, from a block of words.

    Within such an interval the normal density falls along a line, to one part in 2^76: by a share of number 2^-76.
    Uniform digits U become U - number 2^-77 U (1 - U), which has that density to one part in 2^68.
    """
    drawn = 0
    for word in words:
        drawn = drawn << 32 | word & 0xFFFFFFFF
    u = Fraction(2 * drawn + 1, 2 << 32 * len(words))
    return number + u - Fraction(2 * number + 1, 4 << 2 * FINE) * u * (1 - u)


@dataclass(frozen=True)
class TreeAggregation(Correlated):
    """DP-FTRL: the noise of a prefix sum is that of the nodes of a binary tree it consists of (arXiv:2103.00039).

    A tree covers `separation` steps, in which an example is used once, and another one begins after it.

    The state holds the keys of the nodes that the last prefix sum consists of.

    *Exactly.* Nodes are whole numbers of the grid's steps, k's sums over them too, and so is all that is released: sums
    and differences of nodes and their noise.
    """

    def separate(self, steps: int, separation: int) -> bool:
        return True

    def noising(self, steps: int, separation: int) -> Array:
        columns: dict[tuple[int, int, int], int] = {}
        rows: list[dict[int, float]] = []
        for t in range(steps):
            tree, place = divmod(t, separation)
            new, old = _nodes(place + 1), _nodes(place)
            row = {}
            for sign, nodes in ((1.0, new - old), (-1.0, old - new)):
                for node in nodes:
                    row[columns.setdefault((tree, *node), len(columns))] = sign
            rows.append(row)
        found = np.zeros((steps, len(columns)))
        for t, row in enumerate(rows):
            found[t, list(row)] = list(row.values())
        return found

    def spread(self, t: int, steps: int, separation: int) -> float:
        place = t % separation + 1
        return math.sqrt((place & -place).bit_length())

    def cost(self, steps: int, separation: int) -> float:
        return strategy.tree_sensitivity(separation, separation)

    def init(self, steps: int, separation: int) -> dict[str, Any]:
        return {**super().init(steps, separation), "nodes": {}}

    def drawn(
        self, rng: Stream, state: dict[str, Any], size: int, bits: int, device: torch.device
    ) -> tuple[Tensor, dict[str, Any]]:
        place = state["t"] % state["separation"] + 1
        nodes = dict(state["nodes"]) if place > 1 else {}
        level = (place & -place).bit_length() - 1
        numbers = rng.integers(size, device) >> FINE - bits
        for below in range(level):
            numbers -= Stream.of(nodes.pop(str(below))).integers(size, device) >> FINE - bits
        return numbers, {"nodes": nodes | {str(level): rng.key}}


def _nodes(steps: int) -> set[tuple[int, int]]:
    """The nodes that the sum of the first `steps` steps consists of, as levels and last steps."""
    return {(level, steps >> level << level) for level in range(steps.bit_length()) if steps >> level & 1}


@lru_cache(maxsize=64)
def _inverse(units: tuple[int, ...], steps: int) -> Array:
    """The first column [steps] of the inverse of the Toeplitz matrix with this first column."""
    return strategy.inverse(_column(units, steps), steps)


def _column(units: Sequence[int], steps: int) -> Array:
    """A first column [steps] from its first entries, in units of 2^-10."""
    column = np.zeros(steps)
    column[: len(units)] = np.array(units[:steps]) / UNIT
    return column


def _toeplitz(column: Array) -> Array:
    """The lower triangular Toeplitz matrix with this first column."""
    from scipy.linalg import toeplitz

    found: Array = toeplitz(column, np.zeros_like(column))
    return found
