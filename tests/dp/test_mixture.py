"""ModelMix's accountant: the numbers of its paper, an independent quadrature, nowhere a reading that is too low."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import erfc

from harness.dp.account.mixture import ORDERS, amplified, log_moment, worst

OFFICIAL = {
    "sigma": 0.335, "clip": 20.0, "share": 0.1, "batch": 1500, "n": 50_000, "steps": 3400, "delta": 1e-5, "tau": 0.15,
}  # fmt: skip


def gaussian_alone(sigma: float, q: float, steps: int, delta: float) -> float:
    """The integer-order Renyi accountant of the sampled Gaussian (Mironov, Talwar and Zhang 2019, section 3.3)."""

    def epsilon(a: int) -> float:
        weights = [math.comb(a, k) * (1 - q) ** (a - k) * q**k for k in range(a + 1)]
        logs = [math.log(w) + k * (k - 1) / 2 / sigma**2 for k, w in enumerate(weights) if w > 0]
        return (steps * np.logaddexp.reduce(logs) - math.log(delta)) / (a - 1)

    return min(map(epsilon, ORDERS))


def density(x, width: float):
    """Of U[-width / 2, width / 2] + N(0, 1); accurate in the tails up to 37 deviations beyond the ends."""
    x, root = np.abs(x), math.sqrt(2)
    return (erfc((x - width / 2) / root) - erfc((x + width / 2) / root)) / (2 * width)


def integral(f, knots) -> float:
    knots = sorted(knots)
    return sum(quad(f, a, b, limit=400, epsabs=0, epsrel=1e-11)[0] for a, b in pairwise(knots))


def test_the_numbers_of_the_paper():
    """Its abstract: 8 for CIFAR-10, at the constants of its code (junwan0224/ModelMix), which are `OFFICIAL`."""
    assert amplified(**OFFICIAL) == pytest.approx(8.0, abs=1e-4)
    widths = {0.05: 21.8, 0.1: 11.1, 0.15: 8.0, 0.2: 6.5, 0.3: 5.0, 0.6: 3.3}
    for tau, expected in widths.items():
        assert amplified(**OFFICIAL | {"tau": tau}) == pytest.approx(expected, abs=0.05)
    for share, expected in {1.0: 450, 1e-3: 7.77}.items():  # without a bound on coordinates; with ever more coordinates
        assert amplified(**OFFICIAL | {"share": share}) == pytest.approx(expected, rel=1.1e-3)
    assert amplified(**OFFICIAL | {"tau": 1e-9}) == pytest.approx(6938, abs=0.5)  # no uniform noise to speak of
    assert amplified(**OFFICIAL | {"tau": 1e-9}) == pytest.approx(gaussian_alone(0.335, 0.03, 3400, 1e-5))
    assert amplified(**OFFICIAL | {"sigma": 0.0}) == math.inf


@pytest.mark.filterwarnings("ignore::scipy.integrate.IntegrationWarning")  # where P = Q, all is rounding
@pytest.mark.parametrize("width", [0.1, 1.0, 5.0, 24.0, 33.6, 200.0, 1e4, 1e6])
@pytest.mark.parametrize("shift", [0.01, 0.3, 1.5])
def test_moments_equal_an_independent_quadrature(shift, width):
    for k in (2, 4, 13):
        edges = (-width / 2, -width / 2 + shift, width / 2, width / 2 + shift, width / 2 + k * shift)
        start, stop = -width / 2 - 15, width / 2 + k * shift + 15
        knots = {start, stop, *(x for edge in edges for x in (edge - 9, edge, edge + 9) if start < x < stop)}

        def excess(x, k=k):  # P^k Q^(1-k) - Q: its integral is the moment less 1, without cancellation
            p, q = density(x - shift, width), density(x, width)
            return q * math.expm1(k * math.log(p / q))

        assert log_moment(k, shift, width) == pytest.approx(math.log1p(integral(excess, knots)), rel=1e-7, abs=1e-13)


@pytest.mark.parametrize("k", [2, 7, 19])
def test_far_moments_are_those_of_the_gaussian_tails(k):
    """The mode lies at a distance d of k * shift above the upper end, where a tail is phi(d) / d by Mills' ratio."""
    shift, width = 61.3, 1e4
    tails = (k - 1) * math.log(k * shift) - k * math.log((k - 1) * shift) - math.log(width)
    assert log_moment(k, shift, width) - k * (k - 1) * shift**2 / 2 == pytest.approx(tails, abs=2e-3)


@given(
    sigma=st.floats(0.05, 20), share=st.floats(0.01, 1), rate=st.floats(1e-3, 1), steps=st.integers(1, 5000),
    width=st.floats(-4, 9),
)  # fmt: skip
@settings(max_examples=16)
def test_it_never_exceeds_the_gaussian_alone_and_wider_is_never_worse(sigma, share, rate, steps, width):
    """`width` is the decimal logarithm of that of the uniform draws, in standard deviations."""
    run = {"sigma": sigma, "clip": 2.0, "share": share, "batch": 1000 * rate, "n": 1000, "steps": steps, "delta": 1e-6}
    unit = sigma * 2.0 / run["batch"]
    claimed, narrower = (amplified(**run, tau=unit * w) for w in (10**width, 10**width / 2))
    assert math.log(1e6) / 18 <= claimed <= narrower * (1 + 1e-9)
    assert narrower <= gaussian_alone(sigma, rate, steps, 1e-6) * (1 + 1e-9)


@given(sigma=st.floats(0.3, 3), share=st.floats(0.05, 1), ratio=st.floats(-1, 4))
@settings(max_examples=6)
def test_no_smaller_shift_and_no_wider_draw_was_found_that_costs_more(sigma, share, ratio):
    assert 0.999 < worst(sigma=sigma, clip=1.0, share=share, batch=10, tau=sigma / 10 * 10**ratio) <= 1 + 1e-9


@pytest.mark.filterwarnings("ignore::scipy.integrate.IntegrationWarning")
@pytest.mark.parametrize("rate", [1.0, 0.1])
@pytest.mark.parametrize(("sigma", "width"), [(0.5, 0.1), (0.5, 4.0), (2.0, 1.0), (2.0, 10.0), (2.0, 300.0)])
def test_one_step_on_one_coordinate_hides_what_it_claims_to(sigma, width, rate):
    """The exact delta at the claimed epsilon, of adding and of removing an example, is at most the one asked for."""
    delta = 1e-3
    epsilon = amplified(
        sigma=sigma, clip=1.0, share=1.0, batch=rate, n=1, steps=1, delta=delta, tau=width * sigma / rate
    )
    shift = 1 / sigma
    edges = (-width / 2, -width / 2 + shift, width / 2, width / 2 + shift)
    grid = {e + d for e in edges for d in np.linspace(-10, 10, 41)}

    def excess(x: float, sign: int) -> float:
        without, with_it = density(x, width), density(x - shift, width)
        mixed = (1 - rate) * without + rate * with_it
        first, second = (mixed, without) if sign > 0 else (without, mixed)
        return max(first - math.exp(epsilon) * second, 0.0)

    for sign in (1, -1):
        exact = sum(quad(excess, a, b, (sign,))[0] for a, b in pairwise(sorted(grid)))
        assert exact <= delta


def test_the_order_at_the_constants_of_the_paper():
    """It is 4, so neither end of `ORDERS` binds; by the formula, written out."""

    def at(a: int) -> float:
        q, p = 0.03, 100
        logs = [0.0, 0.0] + [p * log_moment(k, 0.1 / 0.335, 0.15 * 1500 / (0.335 * 20)) for k in range(2, a + 1)]
        terms = [math.log(math.comb(a, k) * (1 - q) ** (a - k) * q**k) + v for k, v in enumerate(logs)]
        return (3400 * np.logaddexp.reduce(terms) + math.log(1e5)) / (a - 1)

    best = min(ORDERS, key=at)
    assert best == 4 and at(4) == pytest.approx(amplified(**OFFICIAL))
