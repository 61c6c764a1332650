"""One logical step and the loop around it: what moves, what is billed, what a kill may cost (nothing)."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from torch import nn

from harness.dp import (
    EMA,
    SGD,
    Adam,
    Batch,
    Flat,
    Full,
    Gaussian,
    Loop,
    Method,
    NoNoise,
    Plain,
    Poisson,
    Tree,
    Unclipped,
    Vmap,
)
from harness.dp.engines.engine import trainable
from harness.dp.native import kernels
from harness.dp.random import Stream
from harness.train import (
    Diverged,
    Schedule,
    Streams,
    evaluate,
    read_checkpoint,
    start,
    step,
    train,
    write_checkpoint,
)

SEEDS = SimpleNamespace(sampling=11, noise=22, path=33)


class Toy:
    """Sixty points of three noisy classes in the plane."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        rng = torch.Generator().manual_seed(0)
        self.y = torch.arange(60) % 3
        self.x = torch.randn(60, 2, generator=rng, dtype=dtype) + torch.eye(3, 2, dtype=dtype)[self.y] * 3

    n_train = n_test = 60

    def batch(self, indices: torch.Tensor, split: str = "train") -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[indices], self.y[indices]


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3)).to(dtype)


def run(method: Method, steps: int = 12, sigma: float = 1.0, **kwargs):
    model = net()
    progress = kwargs.pop("progress", None) or start(method, model, 12)
    return train(
        method,
        model,
        Toy(),
        sigma,
        Schedule(steps, 10, 4, **kwargs.pop("schedule", {})),
        SEEDS,
        progress,
        **kwargs,
    )


def streams(seed: int = 0) -> Streams:
    return Streams(Stream(seed, "noise", 0), Stream(seed, "path", 0))


def test_the_ledger_is_the_plan():
    for method in (
        Method(),
        Method(optimizer=Adam(), path=EMA()),
        Method(sampler=Full()),
        Method(noise=NoNoise()),
    ):
        assert run(method, steps=9).ledger == method.plan(1.0, 60, 10, 9)
    assert run(Method(), steps=9).ledger.entries == [
        (PoissonSampledDpEvent(10 / 60, GaussianDpEvent(1.0)), 9)
    ]


def test_an_empty_batch_is_a_step_with_noise_and_a_bill():
    method, model = Method(clip=Flat(0.5), optimizer=SGD(1.0)), net()
    p = start(method, model, 12)
    empty = Batch(torch.zeros(0, 2, dtype=torch.float64), torch.zeros(0, dtype=torch.long))
    done = step(method, model, p.w, empty, p.parts, 2.0, 10, streams())
    assert done.sigmas == (2.0,)
    moved = (p.w - done.w).flat * 10  # lr 1: the privatised sum itself, pure noise
    assert moved.abs().min() > 0
    assert float(moved.std()) == pytest.approx(2.0 * 0.5, rel=0.4)


def test_the_denominator_is_public():
    """The same sum divides by the same number, whoever was drawn."""
    method, model, data = (
        Method(engine=Plain(), clip=Unclipped(), noise=NoNoise(), optimizer=SGD(1.0)),
        net().eval(),
        Toy(),
    )
    p = start(method, model, 12)

    def moved(n: int) -> torch.Tensor:
        return (
            p.w - step(method, model, p.w, Batch(*data.batch(torch.arange(n))), p.parts, 0, 10, streams()).w
        ).flat

    assert torch.allclose(moved(1) + (moved(3) - moved(1)), moved(3))
    single = torch.autograd.grad(
        nn.functional.cross_entropy(model(data.x[:1]), data.y[:1]), list(model.parameters())
    )
    assert torch.allclose(moved(1) * 10, torch.cat([g.flatten() for g in single]))


def test_learning_rate_zero_leaves_the_weights():
    for microbatch in (None, 1, 3):
        w = run(Method(engine=Vmap(microbatch=microbatch), optimizer=SGD(0.0, 0.9))).w
        assert torch.equal(w.flat, Tree.of(trainable(net())).flat)


def test_the_microbatch_changes_nothing():
    def without_dropout(microbatch):
        method, model = (
            Method(engine=Vmap(microbatch=microbatch)),
            net().apply(lambda m: setattr(m, "p", 0.0)),
        )
        return train(method, model, Toy(), 1.0, Schedule(12, 10, 4), SEEDS, start(method, model, 12)).w.flat

    reference = without_dropout(None)
    for microbatch in (1, 4, 7):
        assert torch.allclose(without_dropout(microbatch), reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "method",
    [
        Method(optimizer=SGD(0.1, 0.9, weight_decay=1e-3)),
        Method(optimizer=Adam(), path=EMA(0.9)),
        Method(engine=Plain(), clip=Unclipped(), noise=NoNoise(), sampler=Full()),
    ],
    ids=["sgd", "adam-ema", "plain"],
)
@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "no-kernels"])
def test_a_run_continued_from_any_checkpoint_is_the_uninterrupted_run(
    method, compiled, tmp_path, monkeypatch
):
    if not compiled:
        monkeypatch.setattr(kernels, "serve", lambda *tensors: None)
    whole = run(method, steps=20)
    saved = []

    def save(p):
        saved.append(tmp_path / f"{p.step}.safetensors")
        write_checkpoint(saved[-1], p)

    run(method, steps=20, save=save, schedule={"save_seconds": -1.0})
    assert [f.stem for f in saved] == ["4", "8", "12", "16"]
    for file in saved:
        again = run(method, steps=20, progress=read_checkpoint(file))
        assert torch.equal(again.w.flat, whole.w.flat)
        assert again.ledger == whole.ledger
        assert (again.seen, again.clipped, again.non_finite, again.loss) == (
            whole.seen, whole.clipped, whole.non_finite, whole.loss,
        )  # fmt: skip
        kept = [method.path.kept(p.w, p.parts.path).flat for p in (again, whole)]
        assert torch.equal(*kept)
        assert again.sessions == 2
    assert not list(tmp_path.glob("*.tmp"))


def test_divergence_is_noticed():
    with pytest.raises(Diverged, match="not finite"):
        run(Method(optimizer=SGD(1e305), clip=Flat(1e6)), steps=8)


def test_it_learns_and_evaluates():
    method, model = Method(clip=Flat(1.0), optimizer=SGD(0.5, 0.9)), net()
    p = train(method, model, Toy(), 0.3, Schedule(60, 20, 60), SEEDS, start(method, model, 12))
    assert evaluate(model, p.w, method.loss, Toy())["accuracy"] > 0.85


@dataclasses.dataclass(frozen=True)
class Spy(Gaussian):
    """Gaussian noise that remembers what it was asked to make public."""

    seen: list = dataclasses.field(default_factory=list)

    def add(self, release, rng):
        self.seen.append(release)
        return super().add(release, rng)


def test_noise_is_added_once_per_logical_step_whatever_the_microbatch():
    for microbatch in (1, 4, None):
        spy = Spy()
        run(Method(engine=Loop(microbatch=microbatch), noise=spy, sampler=Poisson()), steps=5)
        assert len(spy.seen) == 5
        assert {(r.sensitivity, r.sigma) for r in spy.seen} == {(1.0, 1.0)}
