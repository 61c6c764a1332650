"""Checks of the noise: its distribution in every coordinate, its independence, and the event that is charged for it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from dp_accounting import GaussianDpEvent, NonPrivateDpEvent
from torch import Tensor

from harness.verify.conformance.evidence import (
    alarm,
    bernstein,
    binomial,
    chi_square,
    deviation_at_most,
    kolmogorov,
    normal,
)
from harness.verify.conformance.subject import N, Noised, Subject, Violation

LAGS = 8
TAILS = (2.0, 3.0, 3.5, 4.0, 4.5, 5.0)  # standard deviations
ALIKE = "noise every coordinate alike"
WIDE, WIDE_DRAWS = 150_000, 10  # coordinates: more than any small model has


def noised(s: Subject) -> None:
    """the noise has its standard deviation, afresh in every step"""
    s.noises()
    tests = 6 * len(s.noise) + 5
    for drawn in s.noise:
        tensors = drawn.tensors()
        for _, label, z in tensors:
            _follows(z.flatten(1), label, len(tensors), tests)
        _whole(drawn.z, drawn.z[::2], "noise", tests)  # every other draw is on zeros, where no digit is lost
    wide = s.wide_noise(WIDE, WIDE_DRAWS)
    draws, width = wide.shape
    label = f"noise on {width} coordinates"
    _whole(wide, wide, label, tests)
    for p, wrong in (
        (chi_square(wide.square().sum(0), draws, width), f"has another standard deviation in some: {ALIKE}"),
        (
            chi_square(wide.sum(1).square().sum() / width, draws),
            "is shared or mirrored among them: draw every one by itself",
        ),
        (
            chi_square(wide.square().sum(), wide.numel()),
            f"has {float(wide.square().mean().sqrt()):.4g} times its deviation",
        ),
    ):
        alarm(p, tests, f"{label} {wrong}")


def _whole(z: Tensor, exact: Tensor, what: str, tests: int) -> None:
    """Judge noise [draws, coordinates] as one sample: how much lies far out, and how many numbers it has.

    Numbers in `exact` come again because floats are few. A float32 is as probable as the density times its spacing,
    3e-8 at most; a size is so of either sign, and two more roundings may each make one of two: 2.4e-7 in all. Given
    those before, a number comes again with at most that probability times their count (Freedman's form of Bernstein's
    inequality).
    """
    far = z.abs().flatten()
    for tail in TAILS:
        p, there = math.erfc(tail / math.sqrt(2)), int((far > tail).sum())
        alarm(
            binomial(there, len(far), p, len(TAILS)), tests,
            f"{what} is not Gaussian: of {len(far)} numbers {there} lie beyond {tail:g} standard deviations, where"
            f" {p * len(far):.0f} should. Do not clamp it",
        )  # fmt: skip
    n = exact.numel()
    again = n - len(exact.abs().float().flatten().unique())
    expected = n * min(1.0, n * 2.4e-7)
    alarm(
        bernstein(again - expected, expected, 1.0) if again > expected else 1.0, tests,
        f"{what} repeats itself: of {n} numbers {again} have the size of another. Draw each afresh, in float32 or"
        " finer: what is rounded coarsely, or taken from a pool, reveals the digits below it",
    )  # fmt: skip


def _follows(z: Tensor, label: str, tensors: int, tests: int) -> None:
    """Judge the noise [draws, coordinates] of one of so many tensors."""
    draws, width = z.shape
    scale, squares, many = float(z.square().mean().sqrt()), z.square(), tensors * width
    for p, wrong in (
        (
            chi_square(squares.sum(), z.numel(), tensors),
            f"has {scale:.4g} times the standard deviation sigma * sensitivity",
        ),
        (kolmogorov(z.flatten(), tensors), "is not Gaussian: its distribution function is another one"),
        (chi_square(squares.sum(0), draws, many), f"has another standard deviation in some coordinates: {ALIKE}"),
        (normal(z.sum(0) / math.sqrt(draws), many), f"has a mean in some coordinates: {ALIKE}"),
    ):
        alarm(p, tests, f"noise on {label} {wrong}")


def independent(s: Subject) -> None:
    """the noise is independent across tensors, rows, coordinates, releases and steps"""
    s.noises()
    tests = (6 + LAGS) * len(s.noise)
    for drawn in s.noise:
        _coordinates(drawn, tests)
        _common(drawn, tests)
        _steps(drawn, tests)


def _coordinates(drawn: Noised, tests: int) -> None:
    """Judge pairs of coordinates. Given one, the other's product with it is normal: z_i . z_j / |z_i| is N(0, 1)."""
    z, names = drawn.z, drawn.names
    # A generator that starts anew gives uncorrelated signs to tensors of other sizes; the sizes of the draws betray it.
    for what, v in (("", z), ("the size of ", _sizes(z))):
        across = _off_diagonal(v.T @ v / v.norm(dim=0).clamp(min=1e-300))
        i, j = divmod(int(across.argmax()), v.shape[1])
        alarm(
            normal(across[i, j], v.shape[1] ** 2), tests,
            f"{what}noise on {names[i]} and on {names[j]} is correlated: draw every coordinate of every"
            " release from the rng handed in, and never seed it anew",
        )  # fmt: skip


def _sizes(z: Tensor) -> Tensor:
    """The sizes of standard normal numbers, as standard normal numbers: the same quantiles."""
    f = torch.erf(z.abs() / math.sqrt(2)).clamp(1e-300, 1 - 2**-53)
    return torch.special.ndtri(f)


def _common(drawn: Noised, tests: int) -> None:
    """Judge sums over all coordinates, over the rows of a tensor and over what is in a row: do they share noise?"""
    z = drawn.z
    together = z.sum(1).square() / z.shape[1]
    alarm(
        chi_square(together.sum(), len(z)), tests,
        f"coordinates share a part of their noise: their sum has {float(together.mean()):.3g} times its variance",
    )  # fmt: skip
    matrices = [(label, t.flatten(2)) for _, label, t in drawn.tensors() if t.ndim > 2]
    for axis, what in ((1, "rows"), (2, "columns")):
        for label, t in matrices:
            shared = t.sum(axis).square() / t.shape[axis]
            alarm(
                chi_square(shared.sum(), shared.numel(), max(1, len(matrices))), tests,
                f"the {what} of {label} share a part of their noise: their sum has {float(shared.mean()):.3g} times"
                " its variance; draw every entry by itself",
            )  # fmt: skip


def _steps(drawn: Noised, tests: int) -> None:
    """Judge pairs of steps, and the sequence of them."""
    z = drawn.z
    steps, width = z.shape
    between = z @ z.T / z.norm(dim=1).clamp(min=1e-300)
    repeated = _off_diagonal(between)
    i, j = divmod(int(repeated.argmax()), steps)
    alarm(
        normal(repeated[i, j], steps**2), tests,
        f"the noise of step {j} is close to a multiple of that of step {i}: draw it from the rng handed in",
    )  # fmt: skip
    for lag in range(1, LAGS + 1):
        along = float((z[lag:] * z[:-lag]).sum()) / math.sqrt(width * (steps - lag))
        alarm(
            normal(along),
            tests,
            f"noise {lag} steps apart is correlated, by {along / math.sqrt(width * (steps - lag)):.2g}: draw it afresh",
        )


def _off_diagonal(square: Tensor) -> Tensor:
    return (square - square.diagonal().diag()).abs()


def noise_billed(s: Subject) -> None:
    """the event claims no more noise than there is"""
    s.noises()
    for drawn in s.noise:
        found = []
        for release, r in drawn.releases.items():
            mine = torch.cat([z.flatten() for name, _, z in drawn.tensors() if name == release])
            found.append(r.sigma * deviation_at_most(float(mine.square().sum()), mine.numel()))
        declared = [r.sigma for r in drawn.releases.values()]
        _billed(s, declared, found)
    for sigmas in ([0.7], [3.0, 0.9], [2.0] * 3):
        _billed(s, sigmas, sigmas)
    if s.method.noise.remembers:
        _cycles(s)


def _cycles(s: Subject) -> None:
    """Whether an example that is used once in a cycle costs what a cycle is charged, by the covariance of the noise."""
    apart, uses = s.apart, 6
    precision = np.linalg.inv(s.method.noise.covariance(uses * apart, apart))
    for first in range(apart):
        used = precision[first::apart, first::apart]
        worst = max(float(signs @ used @ signs) for signs in map(np.array, itertools.product((1.0, -1.0), repeat=uses)))
        if not worst <= uses * (1 + 1e-9):
            raise Violation(
                f"{uses} uses of an example, {apart} steps apart from step {first}, cost as much as {worst:.4g}"
                f" Gaussians of the noise multiplier, and {uses} are charged: scale the noise by what uses move C x",
                evidence=f"{worst / uses:.3g} times the charge",
            )
        if s.method.sampler.amplifies(N, s.batch) and np.abs(used - np.diag(np.diag(used))).max() > 1e-9:
            raise Violation(
                f"uses of an example {apart} steps apart have noise in common, and each is charged as amplified by"
                " itself: take no more bands than a cycle has steps",
                evidence="noise in common",
            )


def _billed(s: Subject, sigmas: list[float], there: list[float]) -> None:
    event, joint = s.method.noise.event(sigmas), sum(sigma**-2 for sigma in there) ** -0.5
    if isinstance(event, NonPrivateDpEvent):
        return
    if not isinstance(event, GaussianDpEvent):
        raise Violation(
            f"noise is charged as {event}, which no check knows: charge a GaussianDpEvent, or state it as a claim"
        )
    if not event.noise_multiplier <= joint * (1 + 1e-9):
        raise Violation(
            f"releases with multipliers {sigmas} are charged as one of {event.noise_multiplier:.6g}, there is"
            f" noise for {joint:.6g}: the joint multiplier is (sum of sigma**-2)**-0.5",
            evidence=f"multiplier {event.noise_multiplier / joint:.3g} times too large",
        )
