"""Clipping group by group: a norm, a threshold and a share of the noise for each (He et al., arXiv:2212.01539).

Group k, of d_k coordinates, is clipped to C_k and noised in units of a scale s_k. In those units the whole sum moves by
at most S = sqrt(sum of C_k^2 / s_k^2) between neighbours, so noise of standard deviation sigma * s_k * S on each
coordinate of group k is one Gaussian mechanism with multiplier sigma. Any scales will do; the allocations are

- global: s_k = 1, the same noise everywhere, sigma * sqrt(sum of C_j^2);
- equal: s_k = C_k, noise sigma * C_k * sqrt(K): a group needs to know nothing of the others but how many there are;
- dimension: s_k = C_k / sqrt(d_k), so that every group gets the same sum of squared noise for its C_k^2;
- optimal: s_k = sqrt(C_k / sqrt(d_k)), which minimises the sum of all squared noise, (sum of C_k sqrt(d_k))^2 sigma^2
  (by Cauchy and Schwarz, of (sum of d_k s_k^2) (sum of C_k^2 / s_k^2)).
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from torch import Tensor

from harness.dp.clip.flat import shortened
from harness.dp.clip.rule import LARGEST, SMALLEST, Clip, State, positive, within_reach
from harness.dp.release import Relation, Release
from harness.dp.tree import Layout, Tree

Allocation = Literal["global", "equal", "dimension", "optimal"]
SCALES: dict[str, Callable[[float, int], float]] = {
    "global": lambda c, d: 1.0,
    "equal": lambda c, d: c,
    "dimension": lambda c, d: c / math.sqrt(d),
    "optimal": lambda c, d: math.sqrt(c / math.sqrt(d)),
}
RAMP = 0.1  # of a threshold: how wide the way from not below it to below it is
FURTHEST = 700.0  # exponents of a step of theirs: exp(710) is more than a float holds


@lru_cache(maxsize=64)  # asked for in every step
def partition(by: str, layout: Layout) -> Mapping[str, int]:
    """The group of each parameter: ``by`` is "flat", "parameter", "layer", "block", "shards:4", or patterns.

    A layer is the module that holds a parameter, a block the outermost module with a number for a name (else the
    outermost module). Shards are runs of layers of nearly equal size, as many devices in a pipeline would hold.
    Patterns are shell globs for names, joined by "," within a group and by ";" between groups; the first that matches
    counts. Raises ValueError where a parameter has no group.
    """
    kind, _, number = by.partition(":")
    if kind == "shards":
        if not number.isdecimal() or int(number) < 1:
            raise ValueError(f'groups "{by}": write a number of shards, as in "shards:4"')
        return _shards(int(number), layout)
    key = _KEYS.get(by) or _pattern(by)
    return _numbered([key(name) for name in layout.names], layout.names)


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _block(name: str) -> str:
    path = name.split(".")[:-1]
    end = next((i for i, part in enumerate(path) if part.isdecimal()), 0)
    return ".".join(path[: end + 1])


_KEYS: dict[str, Callable[[str], str]] = {"flat": lambda name: "", "parameter": str, "layer": _layer, "block": _block}


def _pattern(by: str) -> Callable[[str], str]:
    groups = [[glob.strip() for glob in group.split(",")] for group in by.split(";")]

    def key(name: str) -> str:
        for index, globs in enumerate(groups):
            if any(fnmatch.fnmatchcase(name, glob) for glob in globs):
                return str(index)
        raise ValueError(
            f'groups "{by}": parameter "{name}" is in none of them; add "; *" for the rest, or write "flat",'
            ' "parameter", "layer", "block" or "shards:N"'
        )

    return key


def _shards(count: int, layout: Layout) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, size in zip(layout.names, layout.sizes, strict=True):
        sizes[_layer(name)] = sizes.get(_layer(name), 0) + size
    total, before, shard = sum(sizes.values()), 0, {}
    for layer, size in sizes.items():
        shard[layer] = str(int(count * (before + size / 2) / total))
        before += size
    return _numbered([shard[_layer(name)] for name in layout.names], layout.names)


def _numbered(keys: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    order = {key: index for index, key in enumerate(dict.fromkeys(keys))}
    return {name: order[key] for name, key in zip(names, keys, strict=True)}


@dataclass(frozen=True)
class GroupWise(Clip):
    """Weight min(1, C_k / norm_k) on group k (`by`: see `partition`), noise shared out by `allocation`.

    C_k is C / sqrt(K), so that no gradient is longer than C, or given as `thresholds`. The state holds the thresholds
    and the sizes of the groups, both public.
    """

    clip: float = 1.0
    by: str = "layer"
    allocation: Allocation = "global"
    thresholds: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        within_reach(clipping_norm=self.clip)
        for threshold in self.thresholds or ():
            within_reach(threshold=threshold)
        if self.allocation not in SCALES:
            raise ValueError(f'allocation must be one of {", ".join(SCALES)}, not "{self.allocation}"')

    def init(self, layout: Layout) -> State:
        groups = self.groups(layout)
        sizes = [0] * (1 + max(groups.values(), default=0))
        for name, size in zip(layout.names, layout.sizes, strict=True):
            sizes[groups[name]] += size
        given = self.thresholds or (self.clip / math.sqrt(len(sizes)),) * len(sizes)
        if len(given) != len(sizes):
            raise ValueError(f'{len(given)} thresholds for the {len(sizes)} groups that "{self.by}" makes here')
        return {"thresholds": tuple(given), "sizes": tuple(sizes)}

    def groups(self, layout: Layout) -> Mapping[str, int]:
        return partition(self.by, layout)

    def weights(self, norms: Tensor, state: State) -> Tensor:
        return shortened(norms, norms.new_tensor(state["thresholds"]))

    def sensitivity(self, state: State, relation: Relation) -> float:
        pairs = zip(state["thresholds"], self._scales(state), strict=True)
        return math.sqrt(sum((c / s) ** 2 for c, s in pairs)) * relation.moves

    def scale(self, layout: Layout, state: State) -> Mapping[str, float] | None:
        if self.allocation == "global":
            return None
        scales = self._scales(state)
        return {name: scales[group] for name, group in self.groups(layout).items()}

    def _scales(self, state: State) -> list[float]:
        of = SCALES[self.allocation]
        return [of(c, max(d, 1)) for c, d in zip(state["thresholds"], state["sizes"], strict=True)]


@dataclass(frozen=True)
class Quantile(GroupWise):
    """Andrew et al. 2021 (arXiv:1905.03871): thresholds that follow a quantile of the norms, by noisy counts.

    Each step also releases, for each of K groups, how many norms lie below the threshold, less half the batch: one
    vector, which an example moves by at most sqrt(K) / 2. A norm within a twentieth of the threshold counts in part.
    Its noise comes out of the same budget: sigma^-2 is the sum of both multipliers' ^-2. `count_noise` is the
    standard deviation of the noise on a count for K = 1 (the paper takes a twentieth of the batch), sqrt(K) times
    that for K groups and twice it under replace-one; None gives the counts the share `budget` of sigma^-2 (He et
    al.). The threshold is multiplied by exp(-rate * (fraction below - quantile)), and kept between the smallest and
    the largest clipping norm that float32 serves.
    """

    quantile: float = 0.5
    rate: float = 0.2
    count_noise: float | None = None
    budget: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(rate=self.rate, **({} if self.count_noise is None else {"count_noise": self.count_noise}))
        for name in ("quantile", "budget"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie between 0 and 1, and is {getattr(self, name)}")

    @property
    def ceiling(self) -> float:
        return math.inf if self.count_noise is None else 2 * self.count_noise

    def split(self, sigma: float) -> dict[str, float]:
        if self.count_noise is None:
            return {"grad": sigma / math.sqrt(1 - self.budget), "counts": sigma / math.sqrt(self.budget)}
        if not sigma < self.ceiling:
            raise ValueError(
                f"a noise multiplier of {sigma:.4g} leaves nothing for the gradient: it must be below twice"
                f" count_noise, {self.ceiling:g}. Write a count_noise above {sigma / 2:.4g}"
            )
        return {"grad": sigma / math.sqrt(1 - (sigma / self.ceiling) ** 2), "counts": self.ceiling}

    def side(self, norms: Tensor, state: State, relation: Relation, sigma: float) -> dict[str, Release]:
        # Not a step at the threshold: rounding of norms that lie on it, which depends on the batch, would move it all.
        thresholds = norms.new_tensor(state["thresholds"])
        below = ((thresholds - norms) / (RAMP * thresholds)).clamp(-0.5, 0.5)
        counts = below.where(norms.isfinite().all(1, keepdim=True), 0.0).sum(0)
        moved = math.sqrt(len(counts)) / 2 * relation.moves
        return {"counts": Release(Tree.of({"counts": counts}), moved, self.split(sigma)["counts"])}

    def update(self, state: State, public: Mapping[str, Tree]) -> State:
        fractions = (public["counts"].flat + 0.5).clamp(0, 1).tolist()
        moved = [
            min(max(c * math.exp(min(-self.rate * (b - self.quantile), FURTHEST)), SMALLEST), LARGEST)
            for c, b in zip(state["thresholds"], fractions, strict=True)
        ]
        return {**state, "thresholds": tuple(moved)}
