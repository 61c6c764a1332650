"""Paths: where each differentiates and steps from, against references written out; and ModelMix's claim."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from scipy.stats import kstest
from torch import nn
from torch.func import functional_call

from harness.dp import (
    EMA,
    SGD,
    Adam,
    EverySecond,
    Fixed,
    Flat,
    Full,
    Gaussian,
    LookAhead,
    Method,
    Midpoint,
    Mix,
    NoNoise,
    Path,
    Poisson,
    Quantile,
    Refined,
    Scheduled,
    Sharp,
    Tree,
    Vmap,
)
from harness.dp.account.mixture import amplified
from harness.dp.claim import Run
from harness.dp.engines.engine import trainable
from harness.dp.gaussian import grid
from harness.dp.random import Stream
from harness.running.train import Schedule, read_checkpoint, start, train, write_checkpoint

pytestmark = pytest.mark.usefixtures("equal_noise")
SEEDS = SimpleNamespace(sampling=11, noise=22, path=33)
N, BATCH, SIGMA = 60, 10, 1.0
GAP = 0.01


class Toy:
    """Sixty points of three noisy classes in the plane."""

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(0)
        self.y = torch.arange(N) % 3
        self.x = torch.randn(N, 2, generator=rng, dtype=torch.float64) + torch.eye(3, 2).double()[self.y] * 3

    n_train = n_test = N

    def batch(self, indices: torch.Tensor, split: str = "train") -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[indices], self.y[indices]


def net() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3)).double()


START = Tree.of(trainable(net()))


@dataclasses.dataclass(frozen=True)
class Watched(Path):
    """Another path; notes every probe, and the weights and the gradient of every step."""

    along: Path
    probes: list = dataclasses.field(default_factory=list)
    weights: list = dataclasses.field(default_factory=lambda: [START.flat])
    gradients: list = dataclasses.field(default_factory=list)

    def init(self, w):
        return self.along.init(w)

    def probe(self, w, state):
        self.probes.append(self.along.probe(w, state).flat)
        return self.along.probe(w, state)

    def base(self, w, state, rng):
        return self.along.base(w, state, rng)

    def after(self, old, new, g, state):
        self.weights.append(new.flat)
        self.gradients.append(g.flat)
        return self.along.after(old, new, g, state)


def run(method: Method, steps: int = 12, progress=None, save=lambda p: None):
    model = net()
    progress = progress or start(method, model, steps)
    return train(method, model, Toy(), SIGMA, Schedule(steps, BATCH, 1, -1.0), SEEDS, progress, save=save)


def watched(path: Path, steps: int = 12, **others) -> Watched:
    spy = Watched(path)
    run(Method(engine=Vmap(), path=spy, **others), steps)
    return spy


def gradient(flat: torch.Tensor, step: int, clip: float, cut: float = math.inf) -> torch.Tensor:
    """The privatised gradient at `flat` of logical step `step`, by hand."""
    model, data, leaf = net(), Toy(), flat.clone().requires_grad_()
    total = torch.zeros_like(flat)
    for i in Poisson().draw(N, BATCH, step, SEEDS.sampling):
        outputs = functional_call(model, START.with_flat(leaf).views, (data.x[i : i + 1],))
        (g,) = torch.autograd.grad(nn.functional.cross_entropy(outputs, data.y[i : i + 1]), leaf)
        longest = cut * max(float(g.norm()), clip)
        total += g.clamp(-longest, longest) * min(1.0, clip / float(g.norm()))
    return (
        Stream(SEEDS.noise, f"noise of {Vmap().role}", step)
        .under(f"grad by {Vmap().label}: ")
        .noised(total, grid(SIGMA, clip, len(total)))
        / BATCH
    )


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-12)


MIXED = {"clip": Refined(0.5, 0.3), "optimizer": SGD(0.2)}
METHODS = {
    "dp-sat": Method(path=Sharp(0.05), optimizer=SGD(0.3, 0.9)),
    "dp-sat-step": Method(path=Sharp(0.05, "step"), optimizer=SGD(0.3, 0.9)),
    "dp-sam": Method(path=LookAhead(0.05), optimizer=EverySecond(SGD(0.3, 0.9))),
    "modelmix": Method(path=Mix(GAP), **MIXED),
    "midpoint": Method(path=Midpoint(), **MIXED),
    "ema-mix": Method(path=EMA(0.9, Mix(GAP)), **MIXED),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_microbatch_changes_nothing_and_any_checkpoint_continues_to_the_same_bits(method, tmp_path):
    def at(microbatch, **kwargs):
        return run(dataclasses.replace(method, engine=Vmap(microbatch=microbatch)), 9, **kwargs)

    def save(p):
        write_checkpoint(tmp_path / f"{p.step}", p)

    whole = at(None, save=save)
    for microbatch in (1, 3, 7):
        assert equal(at(microbatch).w.flat, whole.w.flat)
    assert len(list(tmp_path.iterdir())) == 8  # after every step but the last, odd ones too
    for file in tmp_path.iterdir():
        again = at(None, progress=read_checkpoint(file))
        assert torch.equal(again.w.flat, whole.w.flat) and again.ledger == whole.ledger
        kept = [method.path.kept(p.w, p.parts.path).flat for p in (again, whole)]
        assert torch.equal(*kept)


# --- sharpness-aware paths ---


def test_dp_sat_without_a_radius_is_dp_sgd_bit_for_bit():
    for along in ("gradient", "step"):
        assert torch.equal(
            run(Method(path=Sharp(0.0, along), optimizer=SGD(0.3, 0.9))).w.flat,
            run(Method(optimizer=SGD(0.3, 0.9))).w.flat,
        )


def test_dp_sat_steps_from_the_weights_and_not_from_the_probe():
    """With a learning rate of 0 nothing moves, however the batch is cut up (the authors' code drifts)."""
    for path, optimizer in ((Sharp(0.5), SGD(0.0, 0.9)), (LookAhead(0.5), EverySecond(SGD(0.0, 0.9)))):
        for microbatch in (None, 1, 3):
            w = run(Method(engine=Vmap(microbatch=microbatch), path=path, optimizer=optimizer)).w
            assert torch.equal(w.flat, START.flat)


@pytest.mark.parametrize("along", ["gradient", "step"])
def test_dp_sat_equals_its_pseudo_code(along):
    clip, rho, lr, momentum = 0.5, 0.05, 0.3, 0.9
    spy = watched(Sharp(rho, along), clip=Flat(clip), optimizer=SGD(lr, momentum))
    w, v, before, last = START.flat, torch.zeros_like(START.flat), None, None
    for t in range(12):
        direction = last if along == "gradient" else None if before is None else before - w
        probe = w if direction is None else w + rho * direction / direction.norm()
        last = gradient(probe, t, clip)
        v = momentum * v + last
        before, w = w, w - lr * v
        assert equal(spy.probes[t], probe) and equal(spy.weights[t + 1], w)
    assert torch.equal(spy.probes[0], START.flat)
    for t in range(1, 12):
        assert float((spy.probes[t] - spy.weights[t]).norm()) == pytest.approx(rho, rel=1e-9)


def test_dp_sam_equals_its_pseudo_code():
    """The even queries look ahead, at the weights; the odd ones move, on their own batch, and alone enter momentum."""
    clip, rho, lr, momentum = 0.5, 0.05, 0.3, 0.9
    spy = watched(LookAhead(rho), clip=Flat(clip), optimizer=EverySecond(SGD(lr, momentum)))
    w, v = START.flat, torch.zeros_like(START.flat)
    for t in range(0, 12, 2):
        up = gradient(w, t, clip)
        assert equal(spy.probes[t], w) and torch.equal(spy.weights[t + 1], spy.weights[t])
        v = momentum * v + gradient(w + rho * up / up.norm(), t + 1, clip)
        w = w - lr * v
        assert equal(spy.weights[t + 2], w)
    batches = [Poisson().draw(N, BATCH, t, SEEDS.sampling).tolist() for t in range(12)]
    assert len({tuple(b) for b in batches}) == 12


def test_dp_sam_is_billed_for_every_query():
    p = run(METHODS["dp-sam"], 12)
    assert p.ledger.entries == [(PoissonSampledDpEvent(BATCH / N, GaussianDpEvent(SIGMA)), 12)]
    assert p.ledger == METHODS["dp-sam"].plan(SIGMA, N, BATCH, 12)


def test_an_average_along_a_path_is_the_average_of_its_iterates():
    """Of all that are kept, so of an average's averages too."""
    spy = watched(Sharp(0.05), optimizer=SGD(0.3))
    method = Method(engine=Vmap(), path=EMA(0.5, EMA(0.5, Sharp(0.05))), optimizer=SGD(0.3))
    p = run(method)
    assert torch.equal(p.w.flat, spy.weights[-1])
    inner = outer = START.flat
    for t, w in enumerate(spy.weights[1:], 1):
        decay = min(0.5, (1 + t) / (10 + t))
        inner = decay * inner + (1 - decay) * w
        outer = decay * outer + (1 - decay) * inner
    assert equal(method.path.kept(p.w, p.parts.path).flat, outer)


# --- ModelMix ---


class Constant:
    """A stream that is the same number over and over."""

    def __init__(self, value: float) -> None:
        self.value = value

    def uniform(self, n: int) -> torch.Tensor:
        return torch.full((n,), self.value, dtype=torch.float64)


def test_modelmix_equals_its_pseudo_code():
    clip, share, lr = 0.5, 0.3, 0.2
    spy = watched(Mix(GAP), clip=Refined(clip, share), optimizer=SGD(lr))
    before = w = START.flat
    for t in range(12):
        g = gradient(w, t, clip, share)  # at the unmixed iterate
        a, b = torch.minimum(w, before), torch.maximum(w, before)
        short = (GAP - (b - a)).clamp(min=0)
        a, b = a - short / 2, b + short / 2
        mixed = a + Stream(SEEDS.path, "path", t).uniform(len(w)) * (b - a)
        before, w = w, mixed - lr * g  # the unwidened one is remembered
        assert torch.equal(spy.probes[t], spy.weights[t]) and equal(spy.weights[t + 1], w)


def test_the_midpoint_is_modelmix_without_chance():
    spy, lr = watched(Midpoint(), clip=Flat(0.5), optimizer=SGD(0.2)), 0.2
    before = w = START.flat
    for t in range(12):
        before, w = w, (w + before) / 2 - lr * gradient(w, t, 0.5)
        assert equal(spy.weights[t + 1], w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_interval_is_narrower_than_the_gap(dtype):
    """Equal ends, near ends on either side and distant ends; symmetric, and the base is inside of it."""
    rng = torch.Generator().manual_seed(1)
    w = START.with_flat(torch.randn(len(START.flat), generator=rng, dtype=dtype))
    steps = torch.tensor([0.0, 1e-5, -1e-5, GAP, -3 * GAP, 1.0, -1.0], dtype=dtype)
    previous = w.with_flat(w.flat + steps.repeat(len(w.flat))[: len(w.flat)])
    path, eps = Mix(GAP), 4 * torch.finfo(dtype).eps * 4
    low, high = path.interval(w, previous)
    distance = (w.flat - previous.flat).abs()
    assert torch.allclose(high - low, distance.clamp(min=GAP), rtol=0, atol=eps)
    assert torch.allclose((high + low) / 2, (w.flat + previous.flat) / 2, rtol=0, atol=eps)
    state = path.init(w) | {"previous": previous}
    for alpha, end in ((0.0, low), (1.0, high), (0.5, (w.flat + previous.flat) / 2)):
        assert torch.allclose(path.base(w, state, Constant(alpha)).flat, end, rtol=0, atol=eps)
    low, high = path.interval(w, w)  # the first step
    assert (high > low).all()


def test_mixing_is_uniform_and_independent_over_coordinates_and_steps():
    w = Tree.of({"w": torch.zeros(400, dtype=torch.float64)})
    path, state = Mix(1.0), Mix(1.0).init(w)
    draws = torch.stack([path.base(w, state, Stream(7, "path", t)).flat + 0.5 for t in range(400)])
    assert kstest(draws.flatten().numpy(), "uniform").pvalue > 1e-3
    centred = (draws - 0.5) * math.sqrt(12)
    for table in (centred, centred.T):  # steps by coordinates, and the other way round
        correlation = table @ table.T / table.shape[1] - torch.eye(400)
        off = correlation[~torch.eye(400, dtype=torch.bool)]
        assert float(off.abs().max()) < 6 / math.sqrt(400) and float(off.std()) == pytest.approx(0.05, rel=0.05)


def claim_of(method: Method, state=None, sigma: float = SIGMA):
    path = method.path
    state = run(MODELMIX).parts.path if state is None else state
    return path.claim(Run(method, sigma, N, BATCH, 12, 1e-5), state)


MODELMIX = METHODS["modelmix"]
WIDE = {"previous": START, "narrowest": torch.ones(1), "coarsest": torch.zeros(1)}
NARROW = WIDE | {"narrowest": torch.zeros(1)}


def test_the_claim_is_the_amplified_epsilon():
    claim = claim_of(MODELMIX)
    expected = amplified(
        sigma=SIGMA, clip=0.5, share=0.3, batch=BATCH, n=N, steps=12, delta=1e-5, tau=GAP * 0.99 / 0.2
    )  # widths are measured in floating point and rounded down to whole percents of the gap
    assert claim.to_json()["epsilon"] == pytest.approx(expected) and claim.failed == []
    assert [one.text for one in claim.assumptions if one.holds is None] == [
        "nothing but iterates, and functions of them, is released",
        "no worse pair of data sets than one whose gradients differ evenly on 1 / share^2 coordinates",
    ]
    averaged = METHODS["ema-mix"]
    assert averaged.path.claim(Run(averaged, SIGMA, N, BATCH, 12, 1e-5), run(averaged).parts.path) == claim


@pytest.mark.parametrize(
    ("changes", "state", "sigma", "failed"),
    [
        ({"optimizer": SGD(0.2, 0.9)}, None, 1.0, "no optimizer state"),
        ({"optimizer": SGD(0.0)}, None, 1.0, "no optimizer state"),
        ({"optimizer": Adam()}, None, 1.0, "no optimizer state"),
        ({"optimizer": Scheduled(SGD(0.2))}, None, 1.0, "no optimizer state"),
        ({"optimizer": EverySecond(SGD(0.2))}, None, 1.0, "no optimizer state"),
        ({"clip": Flat(0.5)}, None, 1.0, "contributions are bounded"),
        ({"clip": Quantile()}, None, 1.0, "nothing but iterates"),
        ({"sampler": Fixed()}, None, 1.0, "one Poisson draw"),
        ({"sampler": Full()}, None, 1.0, "sums are divided"),
        ({"noise": NoNoise()}, None, 1.0, "Gaussian noise"),
        ({}, None, 0.0, "Gaussian noise"),
        ({}, NARROW, 1.0, "every coordinate"),
        ({}, NARROW | {"narrowest": torch.full((1,), torch.nan)}, 1.0, "every coordinate"),
        ({}, WIDE | {"coarsest": torch.full((1,), 0.1)}, 1.0, "the number format resolves"),
        ({}, WIDE | {"coarsest": torch.full((1,), torch.nan)}, 1.0, "the number format resolves"),
    ],
)  # fmt: skip
def test_an_assumption_that_fails_turns_the_claim_off_and_is_named(changes, state, sigma, failed):
    told = claim_of(dataclasses.replace(MODELMIX, **changes), state, sigma).to_json()
    assert told["epsilon"] is None
    assert any(line.startswith(failed) for line in told["failed"]), told["failed"]


def test_weight_decay_narrows_what_is_mixed_and_the_claim_knows():
    """The decay works on the mixed base, and so shrinks the uniform draw: a claim for the full width would read low."""
    lr, decay = 0.2, 2.0
    path, state = Mix(GAP), Mix(GAP).init(START)
    g = START.zeros_like()
    ends = [SGD(lr, weight_decay=decay).update(g, None, path.base(START, state, Constant(a)))[0] for a in (0.0, 1.0)]
    width = (ends[1] - ends[0]).flat
    assert torch.allclose(width, torch.full_like(width, GAP * (1 - lr * decay)), rtol=0, atol=1e-14)
    decayed = dataclasses.replace(MODELMIX, optimizer=SGD(lr, weight_decay=decay))
    narrower = dataclasses.replace(MODELMIX, path=Mix(GAP * (1 - lr * decay)))
    state = WIDE
    assert claim_of(decayed, state).epsilon == pytest.approx(claim_of(narrower, state).epsilon)
    assert claim_of(decayed, state).epsilon > 1.03 * claim_of(MODELMIX, state).epsilon


def test_an_interval_that_its_number_format_cannot_resolve_is_none():
    """Between 1 and 2 float32 has steps of 1.2e-7: of a gap of 1e-6 a draw has but nine values."""
    w = Tree.of({"w": torch.ones(5)})
    for gap, resolved in ((1e-6, False), (1e-4, True)):
        path = Mix(gap)
        state = path.after(w, w, w, path.init(w))
        assert (float(state["narrowest"]) > 0) is resolved
        assert (claim_of(dataclasses.replace(MODELMIX, path=path), state).failed == []) is resolved


def test_a_narrow_interval_is_remembered():
    path, far = Mix(GAP), START + 1.0
    state = path.after(START, far, far, path.init(START))  # of the first step: equal ends
    first = float(state["narrowest"])
    assert first == pytest.approx(GAP)
    state = path.after(far, START, START, state)  # distant ends
    assert float(state["narrowest"]) == first and state["previous"] is far


def test_paths_say_what_is_wrong_with_their_settings():
    for build, wrong in (
        (lambda: Mix(0.0), "gap must be positive"),
        (lambda: Sharp(-1.0), "rho must not be negative"),
        (lambda: LookAhead(-1.0), "rho must not be negative"),
        (lambda: Sharp(0.1, "up"), 'along must be "gradient" or "step", not "up"'),
        (lambda: EMA(1.0), "decay must lie in"),
    ):
        with pytest.raises(ValueError, match=wrong):
            build()
    assert type(Method().noise) is Gaussian  # what the claim's check of the noise compares with
