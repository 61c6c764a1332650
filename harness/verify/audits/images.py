"""Which floats noise can produce as machines compute it: each "image" is a necessary condition on a released number.

The Gaussian of the theorems can take a value to any other. A program's cannot: `v + s * z`, computed in floating
point, lands only on some floats, and which ones depends on v (Mironov, CCS 2012). Each class here is a hypothesis
about how noise was computed, and `possible` says which released numbers y it could have made of a sum v with
deviation s. It errs to one side only: where the hypothesis holds, what was released is possible. `held` tests the
hypotheses on noise whose sum is known and keeps those that hold and exclude something.

Arrays: y and v of one float type, [..., d]; s in float64, broadcast against them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Mask = NDArray[np.bool_]

EXPECTED = 25  # exclusions that noise which is fine would show: none of so many is seen once in 2^25
MOVED = 128
SLACK = 2.0**-6  # of a step or of a unit in the last place: what a sum may be rounded by before noise is added
FACTORS = (1.0, math.sqrt(2))  # of noise: that of an inverse error function is merged with the deviation
OFFSETS = ((0.0, 0.0), (0.5, 0.0), (0.0, SLACK))  # of lattices, and their slack
FINEST = 40  # steps of lattices that are tried: down to 2^-FINEST deviations
ENDS = {
    np.dtype(np.float32): 6.77,  # Box and Muller from 32 bits end at sqrt(2 log 2^33) = 6.76
    np.dtype(np.float64): 9.50,  # from 64 bits, at sqrt(2 log 2^65) = 9.49
}


class Image(Protocol):
    """A hypothesis about how noise was computed."""

    @property
    def name(self) -> str:
        """In a few words."""

    def possible(self, y: Array, v: Array, s: Array) -> Mask:
        """Whether each y can have come of its v."""


def around(x: Array, k: int) -> Iterator[Array]:
    """`x` and its k neighbours on either side."""
    yield x
    for end in (np.inf, -np.inf):
        there = x
        for _ in range(k):
            there = np.nextafter(there, there.dtype.type(end))
            yield there


def ulp(x: Array) -> Array:
    """The distance to the next float away from zero."""
    return np.spacing(np.abs(x))


def rounded_once(a: Array, b: Array, dtype: Any) -> Array:
    """a + b, of float64, in a shorter float type by one rounding.

    The sum is first rounded to odd: an inexact one to that of its two neighbours whose last bit is set, which leaves a
    shorter type's rounding as it would be.
    """
    total = a + b
    kept = total - a
    error = (a - (total - kept)) + (b - kept)  # exact (Knuth)
    even = total.view(np.int64) & 1 == 0
    odd = np.where((error != 0) & even, np.nextafter(total, np.copysign(np.inf, error)), total)
    return odd.astype(dtype)


def somewhere(close: Mask, y: Array, v: Array, s: Array, found: Any) -> Mask:
    """True but where `close`: there, what `found` says of y, v and s."""
    out = np.ones(close.shape, bool)
    s = np.broadcast_to(s, close.shape)
    out[close] = found(y[close], v[close], s[close])
    return out


@dataclass(frozen=True)
class Sum:
    """y = fl(v + t) for some float t, whatever noise it is. A sum v in a wider format is rounded to y's first.

    t is in the interval of reals that v takes to y's cell. Where its floats are four times as fine as y's or more,
    there are three of them or more. Else it is among the three neighbours of y - v on either side, and they are
    tried.
    """

    @property
    def name(self) -> str:
        """In a few words."""
        return "float sum"

    def possible(self, y: Array, v: Array, s: Array) -> Mask:
        v = v.astype(y.dtype)
        with np.errstate(all="ignore"):
            return somewhere(ulp(y) < 4 * ulp(y - v), y, v, s, self._tried)

    def _tried(self, y: Array, v: Array, s: Array) -> Mask:
        hit = np.zeros(y.shape, bool)
        for t in around(y - v, 3):
            hit |= (v + t == y) & self.reached(t, s)
        return hit

    def reached(self, t: Array, s: Array) -> Mask:
        """Whether the noise can be t: here any float can."""
        return np.ones(t.shape, bool)


@dataclass(frozen=True)
class ScaledSum(Sum):
    """y = fl(v + fl(c z)) for some float z, where c = fl(s) or, with another `factor`, fl(fl(s) fl(factor)).

    Where c z is coarser than floats are, one in two of them is skipped, and never two together.
    """

    factor: float = 1.0
    title: ClassVar[str] = "float sum with a scaled float"

    @property
    def name(self) -> str:
        """With its factor, where that is not 1."""
        return self.title if self.factor == 1 else f"{self.title}, times {self.factor:.4g}"

    def scaled(self, s: Array, dtype: Any) -> Array:
        """The factor c of z, as it is computed in a float type."""
        return s.astype(dtype) * dtype.type(self.factor)

    def reached(self, t: Array, s: Array) -> Mask:
        hit, c = np.zeros(t.shape, bool), self.scaled(s, t.dtype)
        for z in around((t / c).astype(t.dtype), 2):
            hit |= c * z == t
        return hit


@dataclass(frozen=True)
class Fused(ScaledSum):
    """y = fl(v + c z) for some float z, rounded once: a fused multiply-add. In float64 it excludes nothing.

    z is in an interval. Where its floats are fine enough to have one there, it is not looked for.
    """

    title: ClassVar[str] = "fused float sum"

    def possible(self, y: Array, v: Array, s: Array) -> Mask:
        if y.dtype == np.float64:
            return np.ones(y.shape, bool)
        v = v.astype(y.dtype)
        with np.errstate(all="ignore"):
            c = self.scaled(np.asarray(s), y.dtype).astype(float)
            return somewhere(ulp(y) < 2 * c * ulp(self._near(y, v, c)), y, v, c, self._tried)

    @staticmethod
    def _near(y: Array, v: Array, c: Array) -> Array:
        return ((y.astype(float) - v) / c).astype(y.dtype)

    def _tried(self, y: Array, v: Array, c: Array) -> Mask:
        hit = np.zeros(y.shape, bool)
        for z in around(self._near(y, v, c), 3):
            hit |= rounded_once(v.astype(float), c * z, y.dtype) == y  # the product is exact in float64
        return hit


@dataclass(frozen=True)
class Short(ScaledSum):
    """y - v = c z for some z of float32, however they are added: to within `SLACK` of z's ulp, or of that of 1.

    It is what comes of noise that was drawn in single precision and then computed with in integers or in float64. With
    `rounded`, c is rounded to float32 as above, else it is the deviation times the factor.
    """

    rounded: bool = True
    title: ClassVar[str] = "noise of a float32"

    def possible(self, y: Array, v: Array, s: Array) -> Mask:
        s = np.asarray(s)
        c = self.scaled(s, np.dtype(np.float32)).astype(float) if self.rounded else s * self.factor
        t = y.astype(float) - v
        with np.errstate(all="ignore"):
            z = (t / c).astype(np.float32)
            slack = SLACK * c * ulp(np.maximum(np.abs(z), 1))
            possible: Mask = np.abs(t - c * z) <= rounding(y, v) + slack
        return possible


def rounding(y: Array, v: Array) -> Array:
    """How far y - v, in float64, may be from what was added to v before y was rounded to its type."""
    slack: Array = (np.abs(y).astype(float) + np.abs(v)) * 2.0**-50
    return slack + ulp(y).astype(float) / 2


@dataclass(frozen=True)
class Lattice:
    """y - v = (k + offset) * step for some integer k, but for rounding; `relative` steps are in deviations.

    It is what comes of noise on a lattice that is added to a sum which is not: y is of v's coset. With `slack`, a
    part of the step, so does noise on a lattice that is coarser than the one to which the sum is rounded.
    """

    step: float
    offset: float = 0.0
    relative: bool = True
    slack: float = 0.0

    @property
    def name(self) -> str:
        near = "near a" if self.slack else "a"
        return f"{near} lattice of step {self.step:.6g}{' deviations' if self.relative else ''} from the sum"

    def possible(self, y: Array, v: Array, s: Array) -> Mask:
        step = self.step * s if self.relative else np.float64(self.step)
        t = y.astype(float) - v
        k = t / step - self.offset
        off = rounding(y, v) + ulp(t.astype(y.dtype)).astype(float) / 2  # the noise may have been rounded, too
        return np.abs(k - np.rint(k)) <= off / step + self.slack


@dataclass(frozen=True)
class End:
    """|y - v| is at most what a sampler of its type can return: Box and Muller's radius from 32 bits, or from 64.

    Of exact normal noise it excludes 1.3e-11 of float32's numbers, 2e-21 of float64's. No rehearsal can test it.
    """

    name: ClassVar[str] = "end of the sampler"

    def possible(self, y: Array, v: Array, s: Array) -> Mask:
        return np.abs(y.astype(float) - v) <= ENDS[y.dtype] * s + ulp(y)


# Which of them hold ---------------------------------------------------------------------------------------


class Known(NamedTuple):
    """Noised numbers `y` [r, d] of sums `v` [r, d] that are known, with deviations `s` [d]."""

    y: Array
    v: Array
    s: Array


def shaken(y: Array, rng: np.random.Generator) -> Array:
    """`y`, each number moved up or down by one unit in its last place to a `MOVED`th of it, all sizes alike.

    Noise with a smooth density is there about as likely as where it was; noise with holes is not.
    """
    word, most = np.dtype(f"i{y.dtype.itemsize}"), np.finfo(y.dtype).nmant - math.log2(MOVED)
    moved = np.rint(2.0 ** rng.uniform(0, most, y.shape)) * rng.choice((-1, 1), y.shape)
    size = np.maximum(np.abs(y).view(word).astype(np.int64) + moved.astype(np.int64), 0)
    return np.copysign(size.astype(word).view(y.dtype), y)


def held(images: Iterable[Image], known: Known, rng: np.random.Generator) -> list[Image]:
    """Those of `images` that never exclude what was noised, and exclude `EXPECTED` or more of the same numbers shaken.

    A hypothesis that is false excludes as much of the numbers as of the shaken ones, if the noise is fine there: none
    and `EXPECTED` happen by chance once in 2^`EXPECTED`. One that is true and excludes nothing is of no use. Of
    lattices the coarsest: finer ones follow from it.
    """
    moved = shaken(known.y, rng)
    found: list[Image] = []
    for image in sorted(images, key=lambda image: -image.step if isinstance(image, Lattice) else -math.inf):
        if isinstance(image, Lattice) and any(isinstance(i, Lattice) and i.relative == image.relative for i in found):
            continue
        if never_wrong(image, known) and (~image.possible(moved, known.v, known.s)).sum() >= EXPECTED:
            found.append(image)
    return found


def never_wrong(image: Image, known: Known) -> bool:
    """Whether an image excludes nothing of what was noised. Most that are false are so at once."""
    return all(bool(image.possible(known.y[i], known.v[i], known.s).all()) for i in (slice(0, 1), slice(None)))


def guesses(known: Known, step: float | None = None) -> list[Image]:
    """Hypotheses to try: sums of floats, and lattices that the noise may lie on.

    Steps are powers of two, of deviations and of one, with and without half a step; the public `step` of a grid, in
    deviations, and its multiples; and the smallest distance between two values of y - v that rounding does not explain,
    which finds any step that is not much finer than the sample.
    """
    found: list[Image] = [Sum(), *(kind(c) for kind in (ScaledSum, Fused, Short) for c in FACTORS)]
    found += [Short(c, rounded=False) for c in FACTORS]
    top = math.ceil(math.log2(float(known.s.max()))) + 1
    for offset, slack in OFFSETS:
        if step:
            found += [Lattice(step * 2.0**k, offset, slack=slack) for k in range(FINEST // 2)]
        found += [Lattice(2.0**-k, offset, slack=slack) for k in range(FINEST + 1)]
        found += [Lattice(2.0 ** (top - k), offset, False, slack) for k in range(FINEST + 1)]
    t = known.y.astype(float) - known.v
    for relative in (False, True):
        own = spaced(t / known.s if relative else t, known, relative)
        if own:
            found += [Lattice(own, offset, relative, slack) for offset, slack in OFFSETS]
    return found


def spaced(t: Array, known: Known, relative: bool) -> float | None:
    """The step of a lattice through zero, or through half a step, that values may lie on; None where there is none.

    From the smallest distance of two values, made finer by the sizes of all of them.
    """
    rounded = (ulp(known.y).astype(float) + ulp(known.v)) / (known.s if relative else 1.0)
    values, least = np.sort(t.ravel()), 4 * float(rounded.max())
    gaps = np.diff(values)
    gaps = gaps[gaps > least]
    if not len(gaps):
        return None
    step = float(gaps.min())
    reach = np.abs(values - values[len(values) // 2])
    for limit in 10.0 ** np.arange(1, 10):  # of few steps first: their number is certain
        some = reach[reach <= limit * step]
        count = np.rint(some / step)
        if count.any():
            step = float((some * count).sum() / (count * count).sum())
    return step
