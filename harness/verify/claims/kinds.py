"""Kinds of published claims: each a table of `suites/claims.toml` that recomputes its number and judges the claim."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import dp_accounting
from pydantic import Field

from harness.dp.account.mixture import ORDERS as INTEGERS
from harness.dp.account.mixture import amplified, worst
from harness.dp.calibrate import calibrate
from harness.dp.method import Method
from harness.suite.tables import Many, Positive, Size, Text, TomlTable
from harness.verify.claims import accounts
from harness.verify.claims.accounts import Sampled

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


# The kinds ------------------------------------------------------------------------------------------------


class PublishedClaim(TomlTable):
    """What was published (`claim`, and `published` where it is a number), by whom, and where that was read."""

    quantity: ClassVar[str] = "epsilon"
    formula: ClassVar[str]

    id: Text
    title: Text
    source: Text
    read: Text
    claim: Text
    published: Positive
    note: str = ""
    assumptions: Annotated[tuple[Text, ...], Many] = ()

    def objections(self) -> Iterator[tuple[str, str]]:
        """Keys whose values make no sense, each with what is wrong."""
        if not re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", self.id):
            yield ("id", f'"{self.id}": write lower-case letters, digits, dots and dashes, as in "tan-cifar10".')

    def inputs(self) -> dict[str, Any]:
        """What it is recomputed from."""
        written = self.model_dump(exclude=set(PublishedClaim.model_fields))
        return {key: value for key, value in written.items() if value not in (None, False, ())}

    def recompute(self) -> Finding:
        """Raises nothing on a claim without objections."""
        raise NotImplementedError


Fraction = Annotated[float, Field(gt=0, lt=1)]
Temperature = Annotated[float, Field(ge=0.01, le=1e15)]  # e^(2/tau) is a float


class DpSgd(PublishedClaim):
    """``[[dp-sgd]]``: noisy sums of Poisson samples. The rate is batch / n, or 1 / batches an epoch.

    ``classical`` says that the number came from RDP's old conversion, which is then computed too, and once more at
    ``steps_in_code`` where the code takes another number of steps than epochs * n / batch.
    """

    formula: ClassVar[str] = (
        "the Gaussian mechanism on Poisson samples, composed over the steps; add-or-remove neighbours"
    )

    sigma: Positive
    n: Size | None = None
    batch: Size | None = None
    batches: Size | None = None
    epochs: Positive | None = None
    steps: Size | None = None
    delta: Fraction
    classical: bool = False
    steps_in_code: Size | None = None

    def objections(self) -> Iterator[tuple[str, str]]:
        yield from super().objections()
        if (self.n is None) != (self.batch is None) or (self.n is None) == (self.batches is None):
            yield "batches", "write n and batch, or batches (an epoch) alone."
        elif self.n and self.batch and self.batch > self.n:
            yield "batch", f"batch = {self.batch} is more than n = {self.n}."
        if (self.epochs is None) == (self.steps is None):
            yield "steps", "write one of epochs and steps."

    def recompute(self) -> Finding:
        n, batch = (self.n, self.batch) if self.n and self.batch else (self.batches or 1, 1)
        plan = Sampled(self.sigma, batch / n, self.steps or math.floor((self.epochs or 1) * n / batch))
        figures = [Figure("steps", plan.steps), *both(plan, self.delta)]
        if self.classical:
            old = "RDP, classical conversion"
            figures.append(Figure(old, accounts.classical(plan, self.delta), "bound"))
            if self.steps_in_code:
                fewer = plan._replace(steps=self.steps_in_code)
                name = f"{old}, at the {fewer.steps} steps of the code"
                figures.append(Figure(name, accounts.classical(fewer, self.delta)))
        return judge(self.published, figures)


def both(plan: Sampled, delta: float) -> list[Figure]:
    """The bounds of the accountants that this project charges by."""
    names = {"pld": "PLD", "rdp": "RDP"}
    return [Figure(name, accounts.proved(plan, delta, key), "bound") for key, name in names.items()]


class ModelMix(PublishedClaim):
    """``[[modelmix]]``: iterates mixed at random; ``clip`` * ``share`` bounds a coordinate, ``tau`` is the gap."""

    formula: ClassVar[str] = (
        "the accountant of ModelMix's code: Renyi divergence of uniform plus Gaussian noise on 1 / share^2 coordinates,"
        " orders 2 to 19, on Poisson samples, classical conversion"
    )

    sigma: Positive
    clip: Positive
    share: Fraction
    batch: Size
    n: Size
    steps: Size
    delta: Fraction
    tau: Positive

    def recompute(self) -> Finding:
        plan = Sampled(self.sigma, self.batch / self.n, self.steps)
        alike = plan._replace(sigma=accounts.variance_multiplier(self.sigma, self.clip, self.batch, self.tau))
        noise = {
            "sigma": self.sigma, "clip": self.clip, "share": self.share, "batch": float(self.batch), "tau": self.tau,
        }  # fmt: skip
        needed = calibrate(Method(), self.n, self.batch, self.steps, self.published, self.delta)
        figures = [
            Figure("ModelMix's accountant",
                   amplified(n=self.n, steps=self.steps, delta=self.delta, **noise), "assumed"),
            Figure("largest cost found of another gradient or gap, over the one assumed", worst(**noise)),
            *(Figure(f"{f.name} of its Gaussian noise alone", f.value, f.role) for f in both(plan, self.delta)),
            Figure("RDP of integer orders of the same, classical conversion",
                   accounts.classical(plan, self.delta, INTEGERS), "bound"),
            Figure("noise multiplier of a Gaussian of equal variance", alike.sigma),
            *(Figure(f"{f.name} of that", f.value) for f in both(alike, self.delta)),
            Figure(f"noise multiplier of DP-SGD at epsilon {self.published:g} by PLD", needed),
        ]  # fmt: skip
        return judge(self.published, figures)


class Solved(PublishedClaim):
    """``[[solved]]``: an epsilon published without its noise multiplier, solved for under an accountant supposed."""

    formula: ClassVar[str] = (
        "the noise multiplier at which RDP of the orders 2 to 19 and its classical conversion give the number, and what"
        " is proved at that multiplier"
    )

    batch: Size
    n: Size
    steps: Size
    delta: Fraction

    def recompute(self) -> Finding:
        from scipy.optimize import brentq

        def spent(sigma: float) -> float:
            plan = Sampled(sigma, self.batch / self.n, self.steps)
            return math.log(accounts.classical(plan, self.delta, INTEGERS) / self.published)

        sigma = float(brentq(spent, 0.05, 100.0, xtol=1e-9))
        solved = Sampled(sigma, self.batch / self.n, self.steps)
        proved = [Figure(f"{f.name} at that multiplier", f.value, f.role) for f in both(solved, self.delta)]
        return judge(self.published, [Figure("noise multiplier solved for", sigma), *proved])


class Textbook(PublishedClaim):
    """``[[textbook]]``: a noise multiplier for one Gaussian release at an epsilon."""

    quantity: ClassVar[str] = "noise multiplier"
    formula: ClassVar[str] = (
        "the exact privacy of one Gaussian release (Balle and Wang 2018, arXiv:1805.06530), beside"
        " sqrt(2 log(1.25 / delta)) / epsilon"
    )

    epsilon: Positive
    delta: Fraction

    def recompute(self) -> Finding:
        sigma = accounts.textbook_sigma(self.epsilon, self.delta)
        exact = dp_accounting.get_sigma_gaussian(self.epsilon, self.delta)
        figures = [
            Figure("the formula", sigma),
            Figure("the least that suffices (analytic Gaussian)", exact, "bound"),
            Figure(
                "epsilon of the formula's, analytic Gaussian", dp_accounting.get_epsilon_gaussian(sigma, self.delta)
            ),
            *(Figure(f"epsilon of the formula's, {f.name}", f.value) for f in both(Sampled(sigma, 1.0, 1), self.delta)),
        ]
        return judge(self.published, figures)


class Logit(PublishedClaim):
    """``[[logit]]``: a sensitivity of contrastive losses that does not grow with the batch."""

    quantity: ClassVar[str] = "sensitivity / B"
    formula: ClassVar[str] = (
        "2 [1 + (n - 1) e^(2/tau) / (e^(2/tau) + n - 1)] times the clip norm B of a logit's gradient: add or remove one"
        " of n pairs, sum of the losses; 2B more where one is replaced. No sum of n losses is longer than 2nB"
    )

    tau: Temperature
    batch: Annotated[tuple[Size, ...], Many]

    def recompute(self) -> Finding:
        limit = Figure("the bound for any batch", accounts.logit_sensitivity(math.inf, self.tau), "bound")
        each = {n: accounts.logit_sensitivity(n, self.tau) for n in self.batch}
        shares = {n: value / (2 * n) for n, value in each.items()}
        figures = [limit]
        for n, value in each.items():
            figures.append(Figure(f"n = {n}", value))
            figures.append(Figure(f"n = {n}, over 2n", shares[n]))
        found = judge(self.published, figures)
        n = max((n for n in shares if shares[n] > 0.5), default=0)
        if not n or found.verdict not in (AGREES, OVERSTATES):
            return found
        reason = (
            f"it takes n well above e^(2/tau) = {math.exp(2 / self.tau):.4g}: at n = {n} one pair may move the sum by"
            f" {100 * shares[n]:.1f} % of all that it can be"
        )
        return Finding(ASSUMES, reason, found.figures)


class LogitCode(PublishedClaim):
    """``[[logit-code]]``: the sensitivity that Logit-DP's public code scales its noise with."""

    quantity: ClassVar[str] = "sensitivity / B"
    formula: ClassVar[str] = (
        "n times the code's constant for the mean, 1/n + min(2 e^(2/tau) / (n + e^(2/tau) - 1), 2), beside the bound of"
        " [[logit]] over tau, for the code clips the gradient of a similarity and divides it by tau afterwards"
    )

    tau: Temperature
    batch: Size

    def recompute(self) -> Finding:
        bound = accounts.logit_sensitivity(self.batch, self.tau)
        figures = [
            Figure("the code's constant", accounts.logit_code(self.batch, self.tau)),
            Figure("the bound, add or remove a pair", bound / self.tau, "bound"),
            Figure("the bound, replace a pair", (bound + 2) / self.tau),
            Figure("a change that occurs", accounts.logit_attained(self.batch, self.tau) / self.tau),
        ]
        return judge(self.published, figures)


class AdaptiveClipping(PublishedClaim):
    """``[[adaptive-clipping]]``: the accountant is given the gradient's own multiplier and not the count's release."""

    formula: ClassVar[str] = (
        "gradient and count together are one Gaussian of the multiplier asked for; the gradient's own, (sigma^-2 -"
        " (2 count_sigma)^-2)^(-1/2), is larger, and alone it is not what was released"
    )

    sigma: Positive
    count_sigma: Positive
    n: Size
    batch: Size
    steps: Size
    delta: Fraction
    others: Annotated[tuple[Positive, ...], Many] = ()

    def objections(self) -> Iterator[tuple[str, str]]:
        yield from super().objections()
        for value in (self.count_sigma, *self.others):
            if self.sigma >= 2 * value:
                yield "count_sigma", f"{value:g}: sigma must be below twice it, and is {self.sigma:g}."

    def recompute(self) -> Finding:
        plan = Sampled(self.sigma, self.batch / self.n, self.steps)
        figures = [Figure("multiplier fed", accounts.gradient_multiplier(self.sigma, self.count_sigma))]
        for deviation in (self.count_sigma, *self.others):
            fed = plan._replace(sigma=accounts.gradient_multiplier(self.sigma, deviation))
            name = f"as found, count_sigma {deviation:g}: RDP of the multiplier fed"
            figures.append(Figure(name, accounts.proved(fed, self.delta, "rdp")))
        figures += both(plan, self.delta)
        figures.append(Figure("no epsilon below this one holds", accounts.floor(plan, self.delta)))
        return judge(self.published, figures)


class Underread(PublishedClaim):
    """``[[underread]]``: the largest contribution of an example over C, where norms of convolutions are too small."""

    quantity: ClassVar[str] = "contribution / C"
    formula: ClassVar[str] = (
        "norms with the convolutions' gradients read `batch` times too short, all else exact, on a CNN (20 and 50"
        " channels 5x5, hidden layer 128) as initialised and random digits of mnist-5k: our statement of the fault,"
        " not the authors' code"
    )

    batch: Size
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**53)], ...], Many]

    def recompute(self) -> Finding:
        found = {seed: accounts.underread(self.batch, seed) for seed in self.seeds}
        figures = [
            Figure("largest contribution found", max(f.largest for f in found.values()), "measured"),
            *(Figure(f"seed {seed}: largest contribution", f.largest) for seed, f in found.items()),
            Figure("norm read over true norm, least", min(f.low for f in found.values())),
            Figure("norm read over true norm, largest", max(f.high for f in found.values())),
        ]
        return judge(self.published, figures)


KINDS: dict[str, type[PublishedClaim]] = {
    "dp-sgd": DpSgd, "modelmix": ModelMix, "solved": Solved, "textbook": Textbook, "logit": Logit,
    "logit-code": LogitCode, "adaptive-clipping": AdaptiveClipping, "underread": Underread,
}  # fmt: skip
