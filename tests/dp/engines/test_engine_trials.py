"""What models do that only a trial, or an audit of the steps of a run, can see: each is served rightly or refused."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harness.dp import Auto, Batch, BookKeeping, CrossEntropy, Flat, Ghost, Loop, Method, Relation, Tree, Vmap
from harness.dp.engines.engine import PerExample, Unserved, trainable
from harness.running.train import Schedule, start, train

FAST = [Vmap, Ghost, BookKeeping]
ALL = [Loop, *FAST]
UNLIKE = "another norm inside its batch than by itself"
CHANCE = "another loss beside others than by itself"


def bounded(engine, model, x, y, clip=None, w=None, loss=None):
    """One step's gradient release and what was observed; `w`: other weights than the module's own."""
    model.train()
    w = Tree.of(trainable(model)) if w is None else w
    given = (loss or CrossEntropy(), clip or Flat(0.1), model, w, Batch(x, y), None, 1.0)
    return engine.bounded(*given, Relation.ADD_OR_REMOVE)


def total(*args, **options) -> Tensor:
    return bounded(*args, **options).releases["grad"].value.flat.double()


def data(count: int, width: int = 6) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(count)
    return torch.randn(count, width, generator=rng), torch.randint(0, 3, (count,), generator=rng)


class Net(nn.Module):
    """Two layers; subclasses say what happens between them."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.o = nn.Linear(width, 8), nn.Linear(8, 3)

    def between(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.between(self.a(x)).tanh())


# --- backward passes that are not linear -----------------------------------------------------------------------------


class Hooked(Net):
    def between(self, h: Tensor) -> Tensor:
        if h.requires_grad:
            h.register_hook(self.hook)
        return h

    def hook(self, g: Tensor) -> Tensor:
        return g.clamp(-1e-2, 1e-2)


class Normalised(Hooked):
    def hook(self, g: Tensor) -> Tensor:
        return 0.1 * g / (g.norm(dim=1, keepdim=True) + 1e-12)


class ClampedFarOut(Hooked):
    """Changes nothing in a trial, whose gradients are tame."""

    def hook(self, g: Tensor) -> Tensor:
        return g.clamp(-30, 30)


class Signed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return g.sign() * 1e-2


class StraightThrough(Net):
    def between(self, h: Tensor) -> Tensor:
        return Signed.apply(h)


@pytest.mark.parametrize("build", [Hooked, Normalised, StraightThrough])
def test_gradients_changed_on_their_way_are_measured_as_they_are_summed(build, tmp_path, monkeypatch):
    monkeypatch.setenv("EPSBENCH_CACHE", str(tmp_path))
    x, y = data(10)
    for clip in (Flat(1.0), Flat(1e-3)):
        want = total(Loop(), build(), 5 * x, y, clip)
        for engine in (Ghost(), BookKeeping(), Vmap(), Auto()):
            assert torch.allclose(total(engine, build(), 5 * x, y, clip), want, rtol=1e-4, atol=1e-7)


def test_gradients_changed_in_the_run_alone_are_too():
    model = ClampedFarOut()
    with torch.no_grad():
        model.o.weight.mul_(100)
    x, y = data(10)
    for engine in (Ghost(), BookKeeping()):
        want = total(Loop(), model, x, y, Flat(1e-3))
        assert torch.allclose(total(engine, model, x, y, Flat(1e-3)), want, rtol=1e-4, atol=1e-6)


# --- random numbers are drawn once a step ----------------------------------------------------------------------------


class Dropped(Net):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def between(self, h: Tensor) -> Tensor:
        return self.drop(h)


@pytest.mark.parametrize("kind", FAST)
@pytest.mark.parametrize("microbatch", [None, 4])
def test_an_example_that_is_not_finite_moves_no_others_dropout(kind, microbatch):
    model, (x, y) = Dropped(), data(9)
    broken = torch.cat([x[:8], torch.full((1, 6), float("nan"))])
    total(kind(microbatch), model, x, y)  # planned, and audited once
    sums = []
    for rows in (x[:8], broken):
        torch.manual_seed(5)
        sums.append(total(kind(microbatch), model, rows, y[: len(rows)]))
    assert torch.allclose(*sums, rtol=1e-5, atol=1e-8)
    assert sums[0].norm() > 0.01


def test_a_batch_that_is_halved_for_memory_draws_the_same_numbers(monkeypatch):
    class Full(BookKeeping):
        """Has no room for more than four examples, which it finds out in the second microbatch."""

        def clipped_sum(self, loss, clip, groups, model, w, batch, state):
            if len(batch) > 4 and bool((batch.x == x[-1]).all(1).any()):
                raise torch.OutOfMemoryError
            return super().clipped_sum(loss, clip, groups, model, w, batch, state)

    model, (x, y) = Dropped(), data(16)
    sums = []
    for engine in (BookKeeping(4), Full(8)):
        torch.manual_seed(5)
        sums.append(total(engine, model, x, y))
    assert torch.equal(*sums)


def test_a_tape_that_must_be_copied_is_made_of_the_same_numbers():
    class Written(Net):
        """Writes into a layer's output after it was taped, and only far out: the pass must be taped anew."""

        def forward(self, x: Tensor) -> Tensor:
            h = F.dropout(x, 0.5, self.training)
            z = self.a(h)
            return self.o((h.mul_(1.0) if float(x.abs().max()) > 50 else h).sum(1, keepdim=True) * z.tanh())

    model, (x, y) = Written(), data(8)
    total(BookKeeping(), model, x, y)
    far = x.clone()
    far[-1] *= 1e3
    norms = []
    for rows in (x, far):
        torch.manual_seed(5)
        norms.append(bounded(BookKeeping(), model, rows, y).observed.norms[:-1])
    assert torch.allclose(*norms, rtol=1e-4)


# --- examples that are mixed in large, or beside an outlier ----------------------------------------------------------


class Large(Net):
    def between(self, h: Tensor) -> Tensor:
        return (h - h.mean(0)) / (h.std(0) + 1e-5) if len(h) >= 32 else h


class Rescue(Net):
    """Against overflow: everything is scaled down by the largest number there is."""

    def between(self, h: Tensor) -> Tensor:
        top = h.detach().abs().max()
        return torch.where(top > 1e4, h * (1e4 / top), h)


class Rescue2(Dropped):
    """The same under dropout."""

    between = Rescue.between

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.drop(x))


class Own(Net):
    """What is far out takes another way, past the layers: its own gradient reads low, and nobody else's."""

    def between(self, h: Tensor) -> Tensor:
        far = h.detach().abs().amax(1, keepdim=True) > 1e4
        return torch.where(far, 1e-9 * (h @ self.o.weight.T @ self.o.weight), h)


class Mixup(Net):
    """Mixes its examples by chance, and in training alone."""

    def between(self, h: Tensor) -> Tensor:
        return 0.7 * h + 0.3 * h[torch.randperm(len(h))] if self.training else h


class Contaminated(Net):
    """One example that is not finite spoils all."""

    def between(self, h: Tensor) -> Tensor:
        return h + 0 * h.detach().sum()


def outlier(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[5] *= value
    return x


@pytest.mark.parametrize("kind", [Ghost, BookKeeping])
@pytest.mark.parametrize(
    ("build", "value"),
    [(Large, 1.0), (Rescue, 1e9), (Rescue2, 1e9), (Own, 1e9), (Mixup, 1.0), (Contaminated, float("nan"))],
)
def test_what_mixes_in_a_real_batch_alone_stops_the_run(kind, build, value):
    x, y = data(128)
    model = build()
    if build is not Mixup:
        for _ in range(20):
            total(kind(), model, x[:9], y[:9])
    # Chance is tried beforehand.
    why = CHANCE if build is Mixup else UNLIKE
    with pytest.raises(Unserved, match=why) as stopped:
        total(kind(), model, outlier(x, value), y)
    assert not any(character.isdigit() for character in str(stopped.value))  # no norm of anybody's
    with pytest.raises(Unserved, match=why):  # nor is it forgotten
        total(kind(), model, outlier(x, value), y)


@pytest.mark.parametrize(("build", "value"), [(Large, 1.0), (Rescue, 1e9)])
def test_a_run_of_a_model_that_mixes_now_and_then_is_stopped(build, value):
    x, y = data(128)
    x = outlier(x, value)
    rows = SimpleNamespace(n_train=128, n_test=1, batch=lambda i, split="train": (x[i], y[i]))
    method, model = Method(clip=Flat(0.1)), build()
    seeds = SimpleNamespace(sampling=7, noise=8, path=9)
    with pytest.raises(Unserved, match=UNLIKE):
        train(method, model, rows, 1.0, Schedule(600, 64, 50), seeds, start(method, model, 600))


class Deep(nn.Sequential):
    """Kinks, many layers and no normalisation: float32 tells an example from its batch by more than rounding."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [layer for _ in range(12) for layer in (nn.Linear(32, 32), nn.ReLU())]
        super().__init__(nn.Linear(6, 32), *layers, nn.Linear(32, 3))


@pytest.mark.parametrize("kind", FAST)
@pytest.mark.parametrize("build", [Net, Dropped, Deep])
def test_audits_blame_nobody_who_mixes_nothing(kind, build):
    model, (x, y) = build(), data(64)
    for value in (1.0, 1e3, 1e9, 1e30, float("inf"), float("nan"), 0.0):
        for size in (1, 2, 7, 64):
            total(kind(), model, outlier(x, value)[:size] if size > 5 else value * x[:size], y[:size])


# --- vmap rules of one's own -----------------------------------------------------------------------------------------


class Unit(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return UnitBackward.apply(g, *ctx.saved_tensors)

    @staticmethod
    def vmap(info, dims, x: Tensor):
        return Unit.apply(x), 0


class UnitBackward(torch.autograd.Function):
    @staticmethod
    def forward(g: Tensor, x: Tensor, o: Tensor) -> Tensor:
        return (g - o * (g * o).sum(-1, keepdim=True)) / x.norm(dim=-1, keepdim=True)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def vmap(info, dims, g: Tensor, x: Tensor, o: Tensor):
        """Called once for all examples: this norm is the batch's."""
        return (g - o * (g * o).sum(-1, keepdim=True)) / x.norm(), 0


class Unity(Net):
    def between(self, h: Tensor) -> Tensor:
        return Unit.apply(h)


def test_a_vmap_rule_that_looks_along_the_batch_is_refused():
    x, y = data(6)
    with pytest.raises(Unserved, match="vmap rule"):
        total(Vmap(), Unity(), x, y)
    want = total(Loop(), Unity(), x, y)
    assert torch.allclose(total(BookKeeping(), Unity(), x, y), want, rtol=1e-4, atol=1e-7)


# --- weights that a model reads by other ways ------------------------------------------------------------------------


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.o(checkpoint(lambda z: F.gelu(self.a(z)), x, use_reentrant=False))


class Listed(Net):
    """Its first weight is in a plain list too, and used from there."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = [self.a.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.o((x @ self.kept[0].T).tanh())


class Closed(Net):
    """Its first weight is used by a closure as well as by its layer."""

    def __init__(self) -> None:
        super().__init__()
        weight = self.a.weight
        self.back = lambda h: h @ weight

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.a(self.back(self.a(x).tanh())).tanh())


class Doubled(Net):
    """A layer that is registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.d = nn.Linear(8, 8)
        self.e = self.d

    def between(self, h: Tensor) -> Tensor:
        return self.e(self.d(h).tanh())


@pytest.mark.parametrize("build", [Checkpointed, Listed, Closed, Doubled])
@pytest.mark.parametrize("kind", ALL)
def test_weights_of_the_step_are_what_every_way_to_them_reads(build, kind):
    model, (x, y) = build(), data(5)
    w = Tree.of(trainable(model)) * 1.7
    alike = build()
    for name, p in alike.named_parameters():
        p.data.copy_(w[name])
    want = torch.zeros_like(w.flat, dtype=torch.float64)
    for i in range(len(x)):
        alike.zero_grad()
        F.cross_entropy(alike(x[i : i + 1]), y[i : i + 1]).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in alike.parameters()]
        g = torch.cat([grad.flatten() for grad in grads])
        want += g * min(1.0, 0.1 / float(g.norm()))
    before = [p.detach().clone() for p in model.parameters()]
    try:
        got = total(kind(), model, x, y, w=w)
    except Unserved:
        assert kind is not Loop
        assert kind is Vmap or build is not Checkpointed
    else:
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-6)
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


class Memo(Net):
    """Its last weight is used by a transpose that was made once, with its graph or without."""

    def __init__(self, detach: bool) -> None:
        super().__init__()
        self.kept = self.o.weight.detach().t() if detach else self.o.weight.t()

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).tanh() @ self.kept + self.o.bias


class Reentrant(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.o(checkpoint(lambda z: self.a(z).tanh(), x.requires_grad_(), use_reentrant=True))


@pytest.mark.parametrize("build", [lambda: Memo(False), lambda: Memo(True), Reentrant])
@pytest.mark.parametrize("kind", [*ALL, Auto])
def test_engines_refuse_models_that_do_not_follow_their_parameters(kind, build):
    model, (x, y) = build(), data(5)
    with pytest.raises(Unserved, match=r"made of it earlier|made of its parameters|use_reentrant=False"):
        total(kind(), model, x, y, w=Tree.of(trainable(model)) * 1.7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", [*ALL, Auto])
def test_a_part_compiled_by_torch_jit_is_served(kind):
    model, (x, y) = Net(), data(5)
    want = total(Loop(), Net(), x, y)
    model.a = torch.jit.script(nn.Sequential(model.a, nn.Tanh()))
    model.between = lambda h: h.atanh()
    assert torch.allclose(total(kind(), model, x, y), want, rtol=1e-3, atol=1e-5)


# --- losses ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column(CrossEntropy):
    def per_example(self, outputs: Tensor, y: Tensor) -> Tensor:
        return super().per_example(outputs, y)[:, None]


@dataclass(frozen=True)
class Mean(CrossEntropy):
    def per_example(self, outputs: Tensor, y: Tensor) -> Tensor:
        return super().per_example(outputs, y).mean()


@dataclass(frozen=True)
class Square(CrossEntropy):
    def per_example(self, outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs[:, :1] - y) ** 2


@dataclass(frozen=True)
class ByFrequency(CrossEntropy):
    def per_example(self, outputs: Tensor, y: Tensor) -> Tensor:
        return super().per_example(outputs, y) / torch.bincount(y, minlength=3)[y]


@dataclass(frozen=True)
class MeanSquare(CrossEntropy):
    def per_example(self, outputs: Tensor, y: Tensor) -> Tensor:
        return ((outputs[:, :1] - y) ** 2).mean(1)


@dataclass(frozen=True)
class Padded(CrossEntropy):
    """0 / 0 for examples of class 0."""

    def per_example(self, outputs: Tensor, y: Tensor) -> Tensor:
        return super().per_example(outputs, y) * (y > 0) / (y > 0)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("loss", [Column(), Mean(), Square()])
def test_losses_are_one_for_each_example(kind, loss):
    with pytest.raises(Unserved, match=f"{type(loss).__name__} gives losses of shape"):
        total(kind(), Net(), *data(6), loss=loss)


@pytest.mark.parametrize("kind", FAST)
@pytest.mark.parametrize("loss", [ByFrequency(), MeanSquare()])
def test_a_loss_that_couples_is_named(kind, loss):
    x, _ = data(6)
    with pytest.raises(Unserved, match=f"{type(loss).__name__} couples the examples"):
        total(kind(), Net(), x, torch.tensor([0, 1, 2, 1, 1, 0]), loss=loss)


@pytest.mark.parametrize("kind", FAST)
@pytest.mark.parametrize("labels", [[1, 2, 1, 1, 0, 0], [0, 0, 0, 1, 2, 1], [0, 1, 0, 2, 0, 0], [0, 0, 0, 0, 0, 0]])
def test_a_loss_that_is_not_a_number_adds_nothing_wherever_it_is(kind, labels):
    (x, _), y = data(6), torch.tensor(labels)
    want = total(Loop(), Net(), x[y > 0], y[y > 0])
    assert torch.allclose(total(kind(), Net(), x, y, loss=Padded()), want, rtol=1e-4, atol=1e-7)


# --- layers that are not always used ---------------------------------------------------------------------------------


class LayerDrop(Net):
    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p, self.d, self.e = p, nn.Linear(8, 8), nn.Linear(8, 8)

    def between(self, h: Tensor) -> Tensor:
        for layer in (self.d, self.e):
            if not self.training or torch.rand([]) >= self.p:
                h = h + layer(h).tanh()
        return h


@pytest.mark.parametrize("kind", [Ghost, BookKeeping])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_layers_that_chance_skips_are_trained(kind, p):
    x, y = data(8)
    for seed in range(2):
        torch.manual_seed(seed)
        model, got = LayerDrop(p), torch.zeros(2)
        for step in range(60):
            torch.manual_seed(1000 * seed + step)
            out = bounded(kind(), model, x, y)
            views = out.releases["grad"].value.views
            got += torch.tensor([float(views[f"{name}.weight"].norm()) > 0 for name in "de"])
            assert float(out.releases["grad"].value.norm()) <= 0.8 * (1 + 1e-5)
        assert ((got / 60 - (1 - p)).abs() < 0.3).all()


def test_a_layer_that_wakes_up_later_is_no_silent_zero():
    class Branch(Net):
        def __init__(self) -> None:
            super().__init__()
            self.rare = nn.Linear(8, 8)

        def between(self, h: Tensor) -> Tensor:
            return self.rare(h) if float(h.detach().abs().max()) > 50 else h

    model, (x, y) = Branch(), data(8)
    total(BookKeeping(), model, x, y)
    with pytest.raises(Unserved, match=r"rare\.bias, rare\.weight has a gradient for some batches"):
        total(BookKeeping(), model, 100 * x, y)


# --- what an engine cannot take apart --------------------------------------------------------------------------------


class Experts(Net):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 2), nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def between(self, h: Tensor) -> Tensor:
        shares = self.gate(h).softmax(-1)
        out = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            rows = (shares.argmax(-1) == i).nonzero()[:, 0]
            if len(rows):
                out = out.index_put((rows,), expert(h[rows]) * shares[rows, i : i + 1])
        return out


class PackedGru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g, self.o = nn.GRU(2, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 3, 2)
        lengths = (x[:, :, 0] > -0.5).sum(1).clamp(min=1)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.o(self.g(packed)[1][-1])


class LearnedState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g, self.o, self.h = (nn.GRU(2, 5, batch_first=True), nn.Linear(5, 3), nn.Parameter(torch.ones(1, 1, 5)))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.g(x.view(-1, 3, 2), self.h.expand(-1, len(x), -1).contiguous())[1][-1])


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", FAST)
@pytest.mark.parametrize(
    "build",
    [
        Experts,
        PackedGru,
        LearnedState,
        lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3)),
    ],
)
def test_what_cannot_be_taken_apart_is_right_or_refused_with_a_way_out(kind: type[PerExample], build):
    torch.manual_seed(0)
    model, (x, y) = build(), data(7)
    want = total(Loop(), model, x, y)
    try:
        got = total(kind(), model, x, y)
    except Unserved as refusal:
        assert 'engine = "loop"' in str(refusal)
    else:
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-7)


# --- beside an example that is not finite ----------------------------------------------------------------------------


class Frames(nn.Module):
    """A convolution over frames whose gradients cancel, nearly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.c = nn.Conv3d(1, 3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z = self.c(x)
        return (z[:, :, :1] - z[:, :, 1:]).sum((2, 3, 4))


def test_what_is_added_beside_others_that_are_not_finite_is_what_was_measured():
    """Made again for another batch, a gradient that cancels is rounded otherwise."""
    model = Frames()
    torch.manual_seed(0)
    x = 1e6 * (1 + 1e-7 * torch.randn(6, 1, 1, 5, 5)).unsqueeze(2).expand(6, 1, 3, 1, 5, 5)[:, :, :, 0]
    x = torch.cat([x, torch.full_like(x[:1], torch.nan)])
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    for engine in (BookKeeping(), Ghost(), Vmap()):
        for i in range(6):
            done = bounded(engine, model, x[[i, 6]], y[[i, 6]], Flat(1e-3))
            assert float(done.releases["grad"].value.norm()) <= 1e-3 * (1 + 1e-6)


class Scalar(nn.Module):
    """A parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x[:, :3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_without_dimensions_are_served(dtype):
    x, y = data(8)
    model, x = Scalar().to(dtype), x.to(dtype)
    want = total(Loop(), model, x, y)
    for kind in FAST:
        assert torch.allclose(total(kind(), model, x, y), want, rtol=1e-5)


# --- rows that lie position by position -------------------------------------------------------------------------------


class PositionFirst(nn.Module):
    """A layer over positions, whose rows are those of the first position, then those of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.layer(x.to(self.layer.weight.dtype).transpose(0, 1).reshape(-1, 1))
        return rows.view(2, len(x)).sum(0).unsqueeze(1)


class Turned(CrossEntropy):
    def per_example(self, outputs: Tensor, y: Tensor) -> Tensor:
        return outputs.flatten() * (1.0 - 2.0 * y)


@pytest.mark.parametrize("dtype", [torch.long, torch.float32])
def test_rows_are_found_to_be_mixed_up_on_examples_that_are_alike(dtype):
    """The first three, on which a plan is tried, have norms that no exchange of their rows would show."""
    x, y = torch.ones(6, 2, 1, dtype=dtype), torch.tensor([0, 0, 0, 0, 1, 1])
    x[3:, 0, 0] = torch.tensor([50, 7, 11]).to(dtype)
    for engine in (BookKeeping(), Ghost()):
        model = PositionFirst()
        whole = total(engine, model, x, y, Flat(1.0), loss=Turned())
        assert torch.allclose(whole, total(Loop(), model, x, y, Flat(1.0), loss=Turned()), atol=1e-6)
