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
    Banded,
    Batch,
    CrossEntropy,
    Cyclic,
    CyclicPoisson,
    Feedback,
    Flat,
    Full,
    Gaussian,
    Loop,
    Method,
    NoNoise,
    Plain,
    Poisson,
    Relation,
    Shuffle,
    Tree,
    Unclipped,
    Vmap,
)
from harness.dp.clip.grouped import GroupWise
from harness.dp.engines.engine import Unserved, trainable
from harness.dp.engines.whole import Whole
from harness.dp.native import kernels
from harness.dp.random import Stream
from harness.running.train import (
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
        method, model, Toy(), sigma, Schedule(steps, 10, 4, **kwargs.pop("schedule", {})), SEEDS, progress, **kwargs
    )


def streams(seed: int = 0) -> Streams:
    return Streams(Stream(seed, "noise", 0), Stream(seed, "path", 0))


def test_the_ledger_is_the_plan():
    for method in (Method(), Method(optimizer=Adam(), path=EMA()), Method(sampler=Full()), Method(noise=NoNoise())):
        assert run(method, steps=9).ledger == method.plan(1.0, 60, 10, 9)
    assert run(Method(), steps=9).ledger.entries == [(PoissonSampledDpEvent(10 / 60, GaussianDpEvent(1.0)), 9)]


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
        return (p.w - step(method, model, p.w, Batch(*data.batch(torch.arange(n))), p.parts, 0, 10, streams()).w).flat

    assert torch.allclose(moved(1) + (moved(3) - moved(1)), moved(3))
    single = torch.autograd.grad(nn.functional.cross_entropy(model(data.x[:1]), data.y[:1]), list(model.parameters()))
    assert torch.allclose(moved(1) * 10, torch.cat([g.flatten() for g in single]))


def test_what_an_engine_does_not_serve_is_refused_before_anything_is_drawn():
    """`accepts` is asked by the loop itself, not by the harness alone: epsilon would be that of another release."""
    model, data = net(), Toy()
    for engine, clip in ((Plain(), Flat(1.0)), (Whole(), GroupWise(by="parameter", thresholds=(1.0,) * 4))):
        method = Method(engine=engine, clip=clip, sampler=Full())
        with pytest.raises(Unserved):
            train(method, model, data, 1.0, Schedule(2, len(data.x), 2), SEEDS, start(method, model, 2))
        w = Tree.of(trainable(model))
        batch = Batch(*data.batch(torch.arange(3)))
        with pytest.raises(Unserved):
            engine.bounded(method.loss, clip, model, w, batch, clip.init(w.layout), 1.0, Relation.ADD_OR_REMOVE)


def test_learning_rate_zero_leaves_the_weights():
    for microbatch in (None, 1, 3):
        w = run(Method(engine=Vmap(microbatch=microbatch), optimizer=SGD(0.0, 0.9))).w
        assert torch.equal(w.flat, Tree.of(trainable(net())).flat)


@pytest.mark.usefixtures("equal_noise")
def test_the_microbatch_changes_nothing():
    def without_dropout(microbatch):
        method, model = (Method(engine=Vmap(microbatch=microbatch)), net().apply(lambda m: setattr(m, "p", 0.0)))
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
def test_a_run_continued_from_any_checkpoint_is_the_uninterrupted_run(method, compiled, tmp_path, monkeypatch):
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


class Masked(nn.Module):
    """Notes what dropout is about to draw from."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen = net(), []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen.append(torch.default_generator.get_state()[24:5016].view(torch.int64))
        return self.net(x)


def test_masks_are_as_secret_as_their_stream():
    """PyTorch seeds its CPU generator with 32 bits, from which all of its state follows: they can be tried one by one.

    The state is 624 words of the stream instead, another one in each step.
    """
    model, method = Masked(), Method(engine=Plain(), clip=Unclipped(), noise=NoNoise())
    progress = start(method, model, 3)
    model.seen.clear()
    train(method, model, Toy(), 0.0, Schedule(3, 10, 3), SEEDS, progress)
    assert len(model.seen) == 3
    for number, state in enumerate(model.seen):
        assert state.tolist() == Stream(SEEDS.path, "dropout", number).words(624).tolist()
        assert state[1] != (1812433253 * (int(state[0]) ^ int(state[0]) >> 30) + 1) % 2**32  # a seed's expansion


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_continued_run_draws_the_masks_of_one_that_was_not_interrupted(tmp_path, dropout):
    def end(stop: int | None) -> torch.Tensor:
        model = net()
        model[2].p = dropout
        method = Method(engine=Loop(), clip=Flat(1.0))
        p = start(method, model, 9)
        for steps in (stop, 9) if stop else (9,):
            write_checkpoint(tmp_path / "c", p)
            torch.manual_seed(stop or 0)  # another process
            torch.randn(stop or 2)
            p = train(method, model, Toy(), 1.0, Schedule(steps, 10, 3), SEEDS, read_checkpoint(tmp_path / "c"))
        return p.w.flat

    whole = end(None)
    assert all(torch.equal(end(stop), whole) for stop in (1, 4, 8))


class Paced(Loop):
    """Releases with multipliers of its own."""

    def bounded(self, loss, clip, model, w, batch, state, sigma, relation, step=0):
        own = self.split(clip, sigma, step)["grad"]
        return super().bounded(loss, clip, model, w, batch, state, own, relation, step)


class Decays(Paced):
    """Releases with less and less noise."""

    def split(self, clip, sigma, step=0):
        return {"grad": sigma * 0.9**step}


class Later(Paced):
    """Releases what costs more only where the noise is large: a multiplier that does not scale."""

    def split(self, clip, sigma, step=0):
        return {"grad": sigma if step % 2 == 0 else (0.5 * sigma**-2 + 0.5) ** -0.5}


@pytest.mark.parametrize("engine", [Decays(), Later()], ids=lambda engine: type(engine).__name__)
@pytest.mark.parametrize("sampler", [Shuffle(), Cyclic(), CyclicPoisson(3)], ids=lambda one: type(one).__name__)
def test_a_cycle_is_charged_what_its_costliest_step_releases(engine, sampler):
    method, n, batch = Method(engine=engine, sampler=sampler), 60, 20
    for sigma in (0.5, 4.0):
        plan = [event for event, count in method.plan(sigma, n, batch, 6) for _ in range(count)]
        for first in (0, 3):
            event = getattr(plan[first], "event", plan[first])
            least = min(engine.split(None, sigma, t)["grad"] for t in range(first, first + 3))
            assert event == GaussianDpEvent(least)
    p = run(method, steps=6, sigma=2.0)
    assert p.ledger == method.plan(2.0, 60, 10, 6)


def test_what_correlated_noise_was_not_begun_for_is_refused():
    """Other multipliers, releases that come and go, and more steps than what its uses cost is known for."""
    method = Method(noise=Banded(3), sampler=Cyclic())
    assert "afresh in every step" in Method(engine=Decays(), noise=Banded(3), sampler=Cyclic()).unfit(60, 20, 6)
    model = net()
    p = train(method, model, Toy(), 1.0, Schedule(6, 20, 6), SEEDS, start(method, model, 6, 3))
    with pytest.raises(ValueError, match="begun for 6 steps"):
        train(method, model, Toy(), 1.0, Schedule(9, 20, 9), SEEDS, p)
    half = train(method, model, Toy(), 1.0, Schedule(3, 20, 3), SEEDS, start(method, model, 6, 3))
    with pytest.raises(ValueError, match=r"with a multiplier of 1\.0, cannot go on"):
        train(method, model, Toy(), 2.0, Schedule(6, 20, 6), SEEDS, half)


class Idle(Shuffle):
    """Does not say for how many steps it charges."""

    def cycle(self, n, batch):
        return 1

    def draw(self, n, batch, step, seed):
        return Shuffle().draw(n, batch, step, seed)

    def wrap(self, event, n, batch, step):
        return Shuffle().wrap(event, n, batch, step)


def test_a_sampler_that_leaves_steps_free_says_how_long_its_cycles_are():
    assert "leaves steps free" in Method(sampler=Idle()).unfit(60, 20, 6)


class Peeks(CrossEntropy):
    """Judges by training examples."""

    how = "batch"

    def scores(self, model, data, device, split="test"):
        x = data.batch(torch.arange(3))[0] if self.how == "batch" else data.x
        return {"accuracy": float(model(x).mean()), "loss": 0.0}


class Says(Peeks):
    """And says so."""

    @property
    def probes(self):
        return True


@pytest.mark.parametrize("how", ["batch", "attribute"])
def test_scores_can_read_no_training_example_unless_they_say_so(how, monkeypatch):
    monkeypatch.setattr(Peeks, "how", how)
    model = net()
    w = start(Method(), model, 1).w
    with pytest.raises(PermissionError, match=r"let Peeks\.probes be True"):
        evaluate(model, w, Peeks(), Toy())
    assert evaluate(model, w, Says(), Toy())["loss"] == 0.0


class Remembers(nn.Module):
    """Keeps the largest input that it saw in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.register_buffer("top", torch.zeros((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.top.copy_(torch.maximum(self.top, x.abs().max()))
        return self.net(x)


@pytest.mark.parametrize("engine", [Whole(), Feedback(), Loop(), Vmap()], ids=lambda engine: type(engine).__name__)
def test_every_engine_refuses_a_model_that_remembers_examples(engine):
    method, model = Method(engine=engine, clip=Unclipped() if type(engine) is Feedback else Flat()), Remembers()
    with pytest.raises(Unserved, match='"top"'):
        train(method, model, Toy(), 1.0, Schedule(4, 20, 4), SEEDS, start(method, model, 4))
