"""What published settings cost: accountants and bounds that claims are compared with.

Those that this project charges by are in `harness.dp.account`. Here are also the ones that published numbers came
from, to show which accountant is behind a number, and bounds on sensitivities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.rdp import RdpAccountant
from numpy.typing import NDArray
from torch import nn
from torch.func import functional_call, grad, vmap

from harness import data
from harness.dp.account import Ledger, epsilon, quiet
from harness.dp.release import Relation

# The orders of Opacus 0.x and of code built on it, for the classical conversion.
ORDERS = (*(1 + x / 10 for x in range(1, 100)), *range(12, 64))


class Sampled(NamedTuple):
    """`steps` Gaussian releases of noise multiplier `sigma`, each of a Poisson sample of rate `rate`; add-or-remove."""

    sigma: float
    rate: float
    steps: int

    def event(self) -> SelfComposedDpEvent:
        return SelfComposedDpEvent(PoissonSampledDpEvent(self.rate, GaussianDpEvent(self.sigma)), self.steps)


def proved(plan: Sampled, delta: float, accountant: str) -> float:
    """Epsilon by an accountant of `harness.dp.account`: "pld" (on a grid of 1e-4), "rdp"."""
    return epsilon(Ledger([(plan.event().event, plan.steps)]), delta, Relation.ADD_OR_REMOVE, accountant)


def classical(plan: Sampled, delta: float, orders: Sequence[float] = ORDERS) -> float:
    """Epsilon by RDP and the conversion of Mironov 2017 (arXiv:1702.07476, proposition 3).

    The least RDP(a) + log(1 / delta) / (a - 1) over `orders`: a bound, of which today's conversion gives a smaller one.
    """
    account = RdpAccountant(list(orders))
    with quiet():
        account.compose(plan.event())
    return min(float(rdp) + math.log(1 / delta) / (order - 1) for rdp, order in zip(account.rdp, orders, strict=True))


def floor(plan: Sampled, delta: float, interval: float = 1e-4) -> float:
    """An epsilon below which none holds: PLD whose grid is rounded the other way, in favour of the claim."""
    found = privacy_loss_distribution.from_gaussian_mechanism(
        plan.sigma, pessimistic_estimate=False, value_discretization_interval=interval,
        sampling_prob=plan.rate, use_connect_dots=False,
    )  # fmt: skip
    return float(found.self_compose(plan.steps).get_epsilon_for_delta(delta))


def textbook_sigma(epsilon: float, delta: float) -> float:
    """sqrt(2 log(1.25 / delta)) / epsilon: a theorem for epsilon < 1 (Dwork and Roth 2014, theorem 3.22)."""
    return math.sqrt(2 * math.log(1.25 / delta)) / epsilon


def variance_multiplier(sigma: float, clip: float, batch: float, tau: float) -> float:
    """The noise multiplier of a Gaussian with the variance of ModelMix's Gaussian and uniform noise together.

    On one coordinate and in units of the mean gradient, they have (sigma * clip / batch)^2 and tau^2 / 12.
    """
    return math.hypot(sigma, tau / math.sqrt(12) * batch / clip)


def gradient_multiplier(sigma: float, count_sigma: float) -> float:
    """The multiplier of the gradient's noise where gradient and count cost as one Gaussian of `sigma` together.

    (sigma^-2 - (2 count_sigma)^-2)^(-1/2), `count_sigma` the deviation of the count's noise, and a count minus one half
    moves by one half (Andrew et al. 2021, arXiv:1905.03871, theorem 1). Needs sigma < 2 count_sigma.
    """
    return float((sigma**-2 - (2 * count_sigma) ** -2) ** -0.5)


# Contrastive losses ---------------------------------------------------------------------------------------


def logit_sensitivity(n: float, tau: float) -> float:
    """How far one pair of `n` moves the sum of InfoNCE's clipped logit gradients, over their clip norm: add-or-remove.

    2 [1 + (n - 1) e^(2/tau) / (e^(2/tau) + n - 1)]: the pair's own row weighs at most 2, and its column takes weight
    p <= e^(2/tau) / (e^(2/tau) + n - 1) in each other row, from entries that may point the other way. Logits are
    similarities in [-1, 1] over `tau`, and what is clipped is the gradient of a logit. `n` may be infinite.
    """
    if math.isinf(n):
        return 2 * (1 + math.exp(2 / tau))
    return 2 * (1 + (n - 1) / (1 + (n - 1) * math.exp(-2 / tau)))


def logit_attained(n: int, tau: float) -> float:
    """How far a pair does move that sum, in a case that is close to the worst.

    Embeddings are u or -u: every x_i meets the new x'_n at 1 and all others at -1, the new x_n the other way round. All
    clipped gradients are of clip norm and parallel, with the signs of the changes of their weights.
    """
    cosines = np.full((n, n), -1.0)
    cosines[:, -1], cosines[-1, :], cosines[-1, -1] = 1.0, 1.0, -1.0
    after = _weights(cosines / tau)
    change = after.copy()
    change[:-1, :-1] -= _weights(cosines[:-1, :-1] / tau)
    return float(np.abs(change).sum())


def _weights(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Derivatives of the sum of InfoNCE losses by its logits [n, n]: softmax of the rows minus the identity."""
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True) - np.eye(len(logits))


def logit_code(n: int, tau: float) -> float:
    """The constant of the authors' code over its clip norm: n (1/n + min(2 e^(2/tau) / (n + e^(2/tau) - 1), 2)).

    `compute_contrastive_loss_gradient_sensitivity` has it for the mean of n losses; this is for their sum. The code
    clips gradients of similarities and divides them by tau afterwards, of which the constant does not know.
    """
    return 1 + n * min(2 / (1 + (n - 1) * math.exp(-2 / tau)), 2)


# Norms that are underestimated --------------------------------------------------------------------------------------


class Contribution(NamedTuple):
    """Of a batch of examples: read over true norms, the least and the largest; and the largest contribution over C."""

    low: float
    high: float
    largest: float


def underread(batch: int, seed: int) -> Contribution:
    """What clipping does where the gradients of convolutions are read `batch` times too short.

    Norms read from a loss that is a *mean* are too short by the size of the batch. The square of the norm read here is
    the sum of the exact squares of the linear layers' gradients and of 1 / batch^2 times those of the convolutions',
    which is a layer by layer correction that convolutions were left out of. Examples are weighed by C over the norm
    read, C half the shortest true norm, so that each is clipped; the contribution of one is its weight times its true
    norm. Exact norms are those of one backward pass for each example, in float64.

    The model is a CNN with convolutions of 20 and 50 channels, 5x5, max-pooling and a hidden layer of 128, as it is
    initialised; the data are `batch` random digits of mnist-5k; `seed` draws both.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(800, 128), nn.ReLU(), nn.Linear(128, 10),
        ).double()  # fmt: skip
        digits = data.load("mnist-5k")
        x, y = digits.batch(torch.randperm(digits.n_train)[:batch])

    def loss(w: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(functional_call(model, w, (x[None],)), y[None])

    w = {name: parameter.detach() for name, parameter in model.named_parameters()}
    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(w, x.double(), y)
    squares = {name: g.flatten(1).square().sum(1) for name, g in gradients.items()}
    zero = torch.zeros(batch, dtype=torch.float64)
    convolutions = sum((s for name, s in squares.items() if name[0] in "03"), zero)
    linear = sum((s for name, s in squares.items() if name[0] not in "03"), zero)
    true, read = (convolutions + linear).sqrt(), (convolutions / batch**2 + linear).sqrt()
    clip = true.min() / 2
    contribution = (clip / read).clamp(max=1) * true / clip
    ratio = read / true
    return Contribution(float(ratio.min()), float(ratio.max()), float(contribution.max()))
