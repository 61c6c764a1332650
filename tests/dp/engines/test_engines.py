"""The fast engines are judged by the naive loop, on a zoo of awkward models."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from harness.dp import (
    Auto,
    Batch,
    BookKeeping,
    CrossEntropy,
    Flat,
    Ghost,
    Loop,
    Plain,
    Relation,
    Tree,
    Unclipped,
    Vmap,
    native,
)
from harness.dp.clip import Clip
from harness.dp.engines import auto
from harness.dp.engines.engine import Engine, Unserved, trainable
from harness.dp.engines.rows import squared_norms
from harness.dp.engines.taped.gradients import Lookup, Outer, gram_squares
from harness.dp.engines.taped.patches import Geometry, Patches
from harness.dp.engines.taped.rules import rule_for
from harness.dp.engines.taped.trial import plan_for
from harness.dp.native import kernels
from tests.support.engines import Halves, error, release
from tests.support.zoo import ZOO, Animal, Mixing, Repeated, Sequence, mlp

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:Using padding='same'")

FAST = [Vmap, Ghost, BookKeeping]
SMOOTH = sorted(set(ZOO) - {"in place"})
sizes = st.integers(1, 3)


def test_no_two_engines_share_their_noise_and_none_changes_it_when_its_file_moves():
    def below(kind):
        return {kind}.union(*map(below, kind.__subclasses__()))

    importlib.import_module("harness.peers")
    kinds = [k for k in below(Engine) if k.__module__.startswith("harness.") and k.role is Engine.role]
    assert len(kinds) > 15
    roles = {object.__new__(kind).role for kind in kinds}
    assert len(roles) == len(kinds)
    moved = type("Loop", (Loop,), {"__module__": "harness.dp.elsewhere", "__qualname__": "Loop"})
    assert moved().role == Loop().role
    mine = [type("Loop", (Loop,), {"__module__": m, "__qualname__": "Loop"})().role for m in ("lab.a", "lab.b")]
    assert len({Loop().role, *mine}) == 3


def test_the_loop_is_plain_autograd():
    model = ZOO["repeated calls"].model()
    x, y = ZOO["repeated calls"].batch(4)
    F.cross_entropy(model(x), y, reduction="sum").backward()
    want = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert error(release(Loop(), model, x, y, Unclipped())[0], want) < 1e-12
    assert error(release(Plain(), model, x, y, Unclipped())[0], want) < 1e-12


@pytest.mark.parametrize("name", ZOO)
def test_fast_engines_equal_the_loop(name):
    model = ZOO[name].model()
    x, y = ZOO[name].batch(5)
    for clip in (Flat(0.3), Halves()):
        want, seen = release(Loop(), model, x, y, clip)
        assert int(seen.clipped) > 0
        for engine in (kind(microbatch=size) for kind in FAST for size in (None, 3)):
            got, observed = release(engine, model, x, y, clip)
            assert error(got, want) < 1e-9, engine
            assert torch.allclose(observed.norms, seen.norms, rtol=1e-9), engine
            assert torch.allclose(observed.losses, seen.losses, rtol=1e-9), engine
            assert int(observed.clipped) == int(seen.clipped)


@pytest.mark.parametrize("name", ["convolutions", "tied head", "norms"])
@pytest.mark.parametrize("kind", FAST)
def test_microbatch_changes_nothing(name, kind):
    model = ZOO[name].model()
    x, y = ZOO[name].batch(7)
    for clip in (Flat(0.3), Halves(), Unclipped()):
        want, _ = release(kind(microbatch=7), model, x, y, clip)
        for size in (None, 1, 3):
            assert error(release(kind(microbatch=size), model, x, y, clip)[0], want) < 1e-12


@pytest.mark.parametrize("name", ["mlp", "convolutions", "tied by function"])
@pytest.mark.parametrize("kind", FAST)
def test_unclipped_is_the_plain_sum(name, kind):
    model = ZOO[name].model()
    x, y = ZOO[name].batch(5)
    want, _ = release(Plain(), model, x, y, Unclipped())
    got, observed = release(kind(), model, x, y, Unclipped())
    assert error(got, want) < 1e-12
    assert observed.norms is None


@dataclass(frozen=True)
class Automatic(Clip):
    """Weights that are no threshold: 1 / (norm + 0.01), for each parameter on its own."""

    def groups(self, layout):
        return {name: i for i, name in enumerate(layout.names)}

    def weights(self, norms, state):
        return 1 / (norms + 0.01)

    def sensitivity(self, state, relation):
        return math.inf  # the number of groups, which a rule is not told; nothing here asks


@pytest.fixture(params=["kernels", "torch alone"])
def way(request, monkeypatch):
    """With the compiled kernels, and without."""
    if request.param == "torch alone":
        monkeypatch.setattr(kernels, "_typed", lambda: None)
    elif native.library() is None:
        pytest.skip(f"no kernels were built ({native.describe()}): install a C compiler, such as Debian's gcc")
    return request.param


@pytest.mark.parametrize("name", SMOOTH)
def test_float32(name, way):
    """To 1e-5 of the loop in float64, for one group and for several, with channels last too."""
    model, (x, y) = ZOO[name].model(torch.float64), ZOO[name].batch(5)
    clips = (Flat(0.3), Halves(), Automatic())
    exact = [release(Loop(), model, x, y, clip)[0] for clip in clips]
    model, (x, y) = model.float(), ZOO[name].batch(5, torch.float32)
    engines = [kind(microbatch=size) for kind in FAST for size in (None, 3)]
    for clip, want in zip(clips, exact, strict=True):
        for engine in (*engines, BookKeeping(channels_last=True), Ghost(channels_last=True)):
            assert error(release(engine, model, x, y, clip)[0], want) < 1e-5, engine


@pytest.mark.parametrize(
    "name", ["mlp", "convolutions", "wide convolution", "norms", "residual", "windows", "class token"]
)
@pytest.mark.parametrize("kind", FAST)
def test_neighbours(name, kind):
    """Removing any example moves the sum by at most the sensitivity, at any scale; broken examples add nothing."""
    model = ZOO[name].model(torch.float32)
    x, y = ZOO[name].batch(7, torch.float32)
    x[0] *= 1e6
    x[1] *= 0
    x[2, 0] = math.nan
    x[3] *= 1e3
    x[4] = math.inf
    x[5] *= 1e-6
    for clip in (Flat(0.5), Halves()):
        whole, observed = release(kind(), model, x, y, clip)
        assert whole.isfinite().all()
        assert int(observed.non_finite) == 2
        sensitivity = clip.sensitivity(None, Relation.ADD_OR_REMOVE)
        for i in range(len(x)):
            rest = [j for j in range(len(x)) if j != i]
            part, _ = release(kind(), model, x[rest], y[rest], clip)
            assert (whole - part).norm() <= sensitivity * (1 + 1e-6)
        if name != "norms":  # normalising an example of zeros magnifies rounding a hundredfold, layer by layer
            good = [0, 1, 3, 5, 6]
            want, _ = release(Loop(), model, x[good], y[good], clip)
            assert error(whole, want) < 1e-5


@pytest.mark.parametrize("kind", FAST)
def test_broken_examples_add_nothing_without_clipping(kind):
    model = ZOO["convolutions"].model()
    x, y = ZOO["convolutions"].batch(5)
    x[1], x[3, 0, 0, 0] = math.inf, math.nan
    want, _ = release(Plain(), model, x[[0, 2, 4]], y[[0, 2, 4]], Unclipped())
    got, observed = release(kind(), model, x, y, Unclipped())
    assert error(got, want) < 1e-12
    assert int(observed.non_finite) == 2
    assert release(kind(), model, x[[1, 3]], y[[1, 3]], Unclipped())[0].eq(0).all()
    assert release(kind(), model, x[[1, 3]], y[[1, 3]], Flat(1.0))[0].eq(0).all()


@pytest.mark.parametrize("kind", FAST)
def test_empty_batch(kind):
    model = mlp()
    for clip in (Flat(1.0), Halves(), Unclipped()):
        total, observed = release(kind(), model, torch.empty(0, 5), torch.empty(0, dtype=torch.long), clip)
        assert total.eq(0).all()
        assert len(observed.losses) == 0 and int(observed.non_finite) == 0


class Faulty(nn.Module):
    """Fails when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.free, self.fails = nn.Linear(5, 3), nn.Parameter(torch.ones(3)), False

    def forward(self, x):
        z = self.inner(x) * self.free
        if self.fails:
            raise ArithmeticError("told to")
        return z


@pytest.mark.parametrize("kind", FAST)
def test_engines_leave_no_trace(kind):
    model = Faulty()
    model.register_buffer("untouched", torch.ones(2))
    model.inner.bias.requires_grad_(False)
    x, y = torch.randn(4, 5), torch.randint(0, 3, (4,))

    def traces():
        hooks = [
            len(h)
            for m in model.modules()
            for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        ]
        own = [(n, id(p), p.requires_grad, p.grad, p._version) for n, p in model.named_parameters()]
        return hooks, own, [id(m) for m in model.modules()], model.training, torch.get_rng_state().tolist()

    before = traces()
    release(kind(), model, x, y, Flat(0.1))
    assert traces() == before
    model.fails = True
    with pytest.raises(ArithmeticError):
        release(kind(), model, x, y, Flat(0.1))
    assert traces() == before
    with pytest.raises(ArithmeticError):  # the first thing that happens to a model: planning
        release(kind(), model, x[:, :5].double().float(), y, Halves())
    assert traces() == before


def test_planning_touches_no_buffers():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("passes", torch.zeros(()))

        def forward(self, x):
            self.passes += 1
            return x

    model = nn.Sequential(Counter(), nn.Linear(5, 3))
    release(Ghost(), model, torch.randn(3, 5), torch.tensor([0, 1, 2]), Flat(1.0))
    assert model[0].passes == 1


def test_other_peoples_hooks_are_heard():
    model = ZOO["mlp"].model()
    model[0].register_forward_hook(lambda m, args, out: out * 2)
    model[2].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    x, y = ZOO["mlp"].batch(4)
    want, _ = release(Loop(), model, x, y, Flat(0.2))
    assert error(release(Ghost(), model, x, y, Flat(0.2))[0], want) < 1e-9


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)),
        lambda: nn.Sequential(nn.Unflatten(1, (5, 1)), nn.LSTM(1, 4, 2, batch_first=True, dropout=0.5), First()),
    ],
)
@pytest.mark.parametrize("kind", FAST)
def test_what_is_weighed_is_what_is_summed_where_numbers_are_drawn(build, kind):
    torch.manual_seed(0)
    model, x, y = build(), torch.randn(1, 5), torch.tensor([1])
    for _ in range(3):
        total, observed = release(kind(), model, x, y, Flat(0.05))
        assert abs(float(total.norm()) / min(0.05, float(observed.norms)) - 1) < 1e-5


class First(nn.Module):
    def forward(self, x):
        return x[0][:, -1, :3]


def test_a_model_that_mixes_examples_is_refused():
    x, y = ZOO["attention"].batch(4)
    with pytest.raises(ValueError, match="mixes examples"):
        release(Ghost(), Animal(Mixing, (6,)).model(), x, y, Flat(1.0))


def test_a_model_whose_calls_depend_on_data_is_refused():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.b(self.a(x) if x.sum() > 0 else self.a(self.a(x)))

    model = Sometimes()
    y = torch.zeros(3, dtype=torch.long)
    release(Ghost(), model, torch.ones(3, 5), y, Flat(1.0))
    with pytest.raises(Unserved, match="another number of times"):
        release(Ghost(), model, -torch.ones(3, 5), y, Flat(1.0))


# Where each animal's parameters need more than a rule: modules by vmap, copied parameters, copied outputs.
BEYOND_RULES = {
    "transposed convolution": ({"0"}, (), set()),
    "tied by function": ({""}, (), set()),
    "borrowed parameters": ({""}, (), set()),
    "time first": ({"body.body.3"}, (), set()),
    "time first transformer": (set(), (), {"positions"}),
    "gru": (set(), (), {"positions"}),
    "class token": (set(), ("token", "place"), set()),
    "windows": ({"scale", ""}, (), set()),
    "layer scale": ({"1"}, (), set()),
    "unheard of": ({"pair", "mix"}, (), set()),
    "in place": ({"shift"}, (), set()),
    "standardised weights": ({"0"}, (), set()),
    "weight norm": ({"0"}, (), set()),
    "batch norm in eval mode": ({"1"}, (), set()),
}


@pytest.mark.parametrize("name", ZOO)
def test_plans_fall_back_no_further_than_they_must(name):
    model = ZOO[name].model()
    plan = plan_for(CrossEntropy(), model, Tree.of(trainable(model)).views, Batch(*ZOO[name].batch(1)))
    modules, free, spread = BEYOND_RULES.get(name, (set(), (), set()))
    assert (set(plan.modules), plan.free, set(plan.spread), plan.whole) == (modules, free, spread, ())
    assert plan.copy == (name == "in place")


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
@pytest.mark.parametrize("kind", FAST)
def test_embeddings_that_look_at_the_batch_are_refused(option, kind):
    model = nn.Sequential(nn.Linear(2, 2), nn.Embedding(5, 3, **option))
    assert next(iter(option)) in kind().accepts(CrossEntropy(), Flat(1.0), model)
    assert "1 (Embedding)" in kind().accepts(CrossEntropy(), Flat(1.0), model)
    assert kind().accepts(CrossEntropy(), Flat(1.0), mlp()) is None


def test_plans_follow_modes_and_shapes():
    model, animal = ZOO["norms"].model(), ZOO["norms"]
    x, y = animal.batch(4)
    for mode in (True, False, True):
        model.train(mode)
        want, _ = release(Loop(), model, x, y, Flat(0.2))
        assert error(release(Ghost(), model, x, y, Flat(0.2))[0], want) < 1e-9
    model = Sequence(nn.Tanh()).double()
    for length in (3, 6, 2):
        x = torch.randint(0, 11, (4, length))
        want, _ = release(Loop(), model, x, y, Flat(0.2))
        assert error(release(Ghost(), model, x, y, Flat(0.2))[0], want) < 1e-9


def test_norms_of_long_vectors_do_not_read_low():
    """A float32 norm over millions of elements loses the small ones; a bound computed from it does not hold."""
    rng = torch.Generator().manual_seed(0)
    rows = torch.rand(2, 4_000_000, generator=rng) + 0.5
    want = rows.double().square().sum(1)
    assert ((squared_norms(rows) / want - 1).abs() < 1e-7).all()
    assert (
        squared_norms(rows[:, :700].bfloat16()) / rows[:, :700].bfloat16().double().square().sum(1) - 1
    ).abs().max() < 1e-7
    model = nn.Linear(1200, 1000)
    x, y = torch.rand(2, 1200, generator=rng) * 20, torch.tensor([0, 1])
    for kind in FAST:
        total, observed = release(kind(), model, x[:1], y[:1], Flat(1.0))
        assert float(observed.norms) > 1
        assert abs(float(total.norm()) - 1) < 1e-6


@pytest.mark.parametrize("kind", [Loop, *FAST])
def test_no_example_exceeds_its_bound(kind, way):
    """Of 1e7 elements, and of a convolution's: the sum over one example is never longer than C (1 + 1e-6)."""
    rng = torch.Generator().manual_seed(0)
    wide = nn.Linear(5000, 2000), torch.rand(3, 5000, generator=rng) * 20, 1e7
    deep = nn.Sequential(nn.Conv2d(8, 40, 5), nn.Tanh(), nn.Flatten(), nn.Linear(40 * 12 * 12, 900))
    for model, x, size in (wide, (deep, torch.rand(3, 8, 16, 16, generator=rng) * 9, 5e6)):
        assert sum(p.numel() for p in model.parameters()) >= size
        for i in range(len(x)):
            total, observed = release(kind(), model, x[i : i + 1], torch.tensor([i]), Flat(0.5))
            assert float(observed.norms) > 0.5
            assert float(total.norm()) <= 0.5 * (1 + 1e-6)


@given(
    data=st.data(),
    channels=st.integers(1, 40),
    outputs=st.integers(1, 40),
    examples=sizes,
    dims=st.integers(1, 2),
    last=st.booleans(),
)
@settings(max_examples=24, deadline=None)
def test_kernels_of_convolutions(data, channels, outputs, examples, dims, last):
    """Tiles of every height and width, either memory layout, images wide and narrow: against torch in float64."""
    if native.library() is None:
        pytest.skip(f"no kernels were built ({native.describe()}): install a C compiler, such as Debian's gcc")

    def each(low, high):
        return tuple(data.draw(st.integers(low, high)) for _ in range(dims))

    geometry = Geometry(each(1, 3), each(1, 2), each(0, 2), each(1, 2), 1)
    extent = tuple(1 + d * (k - 1) + e for d, k, e in zip(geometry.dilation, geometry.kernel, each(0, 19), strict=True))
    x = torch.randn(examples, channels, *extent)
    convolve = (F.conv1d, F.conv2d)[dims - 1]
    options = geometry.stride, geometry.padding, geometry.dilation
    g = torch.randn_like(convolve(x, torch.zeros(outputs, channels, *geometry.kernel), None, *options))
    if last and dims == 2:
        x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    ours = Patches(x[:, None], g[:, None], geometry)
    want = Patches(x[:, None].double(), g[:, None].double(), geometry)
    scale = want.rows.flatten(1).norm(dim=1).max()
    assert ours.served and not want.served
    excess = ours._gram()[0] - want.squares()  # Gram matrices cancel, and the margin for it makes them err upwards
    assert (excess >= -1e-5 * want.squares()).all()
    assert (excess <= 1e-5 * math.prod(geometry.kernel) * x.double().square().sum() * g.double().square().sum()).all()
    assert (ours.rows - want.rows).abs().max() <= 1e-5 * scale
    assert torch.allclose(ours.squares(), want.squares(), rtol=1e-5)
    v = torch.rand(examples)
    assert (ours.weighted(v) - want.weighted(v.double())).norm() <= 1e-5 * scale * examples


@given(
    groups=st.integers(1, 4),
    channels=st.integers(1, 9),
    extent=st.integers(1, 700),
    examples=sizes,
    last=st.booleans(),
    rms=st.booleans(),
)
@settings(max_examples=16, deadline=None)
def test_kernels_of_norms(groups, channels, extent, examples, last, rms):
    if native.library() is None:
        pytest.skip(f"no kernels were built ({native.describe()}): install a C compiler, such as Debian's gcc")
    width = groups * channels
    x, g = torch.randn(2, examples, width, extent, 1) + 3
    if last:
        x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    tokens = (nn.RMSNorm if rms else nn.LayerNorm)(width), x.squeeze(3).mT, g.squeeze(3).mT
    for layer, a, b in ((nn.GroupNorm(groups, width), x, g), tokens):
        if isinstance(layer, nn.GroupNorm) and channels * extent == 1:
            continue
        names = dict(layer.named_parameters())
        got = rule_for(layer)(layer, a, b, examples, names)
        want = rule_for(layer)(layer.double(), a.double(), b.double(), examples, names)
        for name in names:
            off = (got[name].rows - want[name].rows).abs().max()
            assert off <= 2e-5 * (1 + want[name].rows.abs().max()) * extent**0.5, name


@given(seed=st.integers(0, 99), positions=st.integers(2, 40))
@settings(max_examples=12, deadline=None)
def test_gram_norms_err_upwards(seed, positions):
    """Where positions cancel, rounding must not make a gradient look smaller than it is."""
    rng = torch.Generator().manual_seed(seed)
    a, g = torch.randn(3, positions, 5, generator=rng), torch.randn(3, positions, 4, generator=rng)
    a[:, 1::2] = a[:, ::2][:, : positions // 2]
    g[:, 1::2] = -g[:, ::2][:, : positions // 2] * (1 + 1e-4)
    want = torch.bmm(g.double().mT, a.double()).square().sum((1, 2))
    assert (gram_squares(a, g)[0] >= want * (1 - 1e-6)).all()


def agree(gradient, want):
    """All that a gradient tells about itself, against its rows."""
    v = torch.rand(len(want), dtype=torch.float64)
    total = (v.view(-1, *[1] * (want.ndim - 1)) * want).sum(0)
    scale = want.square().sum()
    assert torch.allclose(gradient.weighted(v), total, rtol=1e-9, atol=1e-12 * float(scale.sqrt()))
    for again in (False, True):
        squares = gradient.squares(again)
        assert torch.allclose(squares, want.flatten(1).square().sum(1), rtol=1e-9, atol=1e-12 * float(scale))
    assert torch.allclose(gradient.rows, want, rtol=1e-9, atol=1e-12 * float(scale.sqrt()))
    assert gradient.shape == want.shape[1:]
    assert torch.allclose(gradient.weighted(v), total, rtol=1e-9, atol=1e-12 * float(scale.sqrt()))  # now from rows


@given(
    data=st.data(),
    dims=st.integers(1, 2),
    groups=sizes,
    channels=sizes,
    outputs=sizes,
    examples=sizes,
    rows=st.integers(1, 2),
    padding=st.one_of(st.just("same"), st.integers(0, 2)),
    mode=st.sampled_from(["zeros", "zeros", "circular", "replicate"]),
    bias=st.booleans(),
)
@settings(max_examples=24, deadline=None)
def test_any_convolution(data, dims, groups, channels, outputs, examples, rows, padding, mode, bias):
    def each(low, high):
        return tuple(data.draw(st.integers(low, high)) for _ in range(dims))

    kernel, dilation = each(1, 3), each(1, 2)
    stride = (1,) * dims if padding == "same" else each(1, 3)
    extent = tuple(max(2, 1 + d * (k - 1)) + e for d, k, e in zip(dilation, kernel, each(0, 3), strict=True))
    kind = (nn.Conv1d, nn.Conv2d)[dims - 1]
    layer = kind(groups * channels, groups * outputs, kernel, stride, padding, dilation, groups, bias, mode).double()
    x = torch.randn(examples * rows, groups * channels, *extent, dtype=torch.float64)
    z = layer(x)
    g = torch.randn_like(z)
    wanted = dict(layer.named_parameters())
    want = {
        name: torch.stack(
            [
                torch.autograd.grad(z[i : i + rows], p, g[i : i + rows], retain_graph=True)[0]
                for i in range(0, examples * rows, rows)
            ]
        )
        for name, p in wanted.items()
    }
    found = rule_for(layer)(layer, x, g, examples, wanted)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        agree(gradient, want[name])
    weight = found["weight"]
    assert torch.allclose(weight._gram()[0], want["weight"].flatten(1).square().sum(1), rtol=1e-9)


@given(examples=sizes, positions=st.integers(0, 3), d=st.integers(1, 5), p=st.integers(1, 5), extra=sizes)
@settings(max_examples=12, deadline=None)
def test_any_linear_layer_and_its_sums(examples, positions, d, p, extra):
    layer = nn.Linear(d, p).double()
    shape = (examples, *(2,) * positions)
    x = torch.randn(*shape, d, dtype=torch.float64)
    g = torch.randn(*shape, p, dtype=torch.float64)
    found = rule_for(layer)(layer, x, g, examples, {"weight", "bias"})
    a, b = x.reshape(examples, -1, d), g.reshape(examples, -1, p)
    agree(found["bias"], b.sum(1))
    agree(found["weight"], torch.einsum("btp,btd->bpd", b, a))
    c, e = torch.randn(examples, extra, d).double(), torch.randn(examples, extra, p).double()
    both = Outer(a, b) + Outer(c, e)  # a layer called twice
    agree(both, torch.einsum("btp,btd->bpd", b, a) + torch.einsum("btp,btd->bpd", e, c))
    index = torch.randint(0, p, (examples, extra))
    onehot = F.one_hot(index, p).double()
    agree(
        Outer(a, b) + Lookup(index, c, p), torch.einsum("btp,btd->bpd", b, a) + torch.einsum("btp,btd->bpd", onehot, c)
    )
    agree(Lookup(index, c, p) + Lookup(index, c, p), 2 * torch.einsum("btp,btd->bpd", onehot, c))


def test_convolutions_called_twice_add_before_they_are_squared():
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
    x, g = torch.randn(2, 1, 2, 5, 5).double(), torch.randn(2, 1, 3, 5, 5).double()
    one, two, other = (
        Patches(x, g, geometry),
        Patches(x.sin(), g.cos(), geometry),
        Patches(x[..., :3], g[..., :3], geometry),
    )
    agree(one + two, one.rows + two.rows)
    agree(Patches(x, g, geometry) + other, one.rows + other.rows)


@pytest.mark.parametrize("kind", FAST)
def test_bfloat16(kind):
    model = ZOO["mlp"].model(torch.bfloat16)
    x, y = ZOO["mlp"].batch(4, torch.bfloat16)
    got, observed = release(kind(), model, x, y, Flat(0.3))
    want, seen = release(Loop(), model.float(), x.float(), y, Flat(0.3))
    assert observed.norms.dtype in (torch.float32, torch.float64)
    assert error(got, want) < 0.05
    assert torch.allclose(observed.norms.double(), seen.norms.double(), rtol=0.05)


def test_repeated_calls_need_no_rows_of_their_own():
    """A module called twice is one module with twice the positions; the tape follows that."""
    model = Repeated().double()
    x, y = ZOO["repeated calls"].batch(3)
    got, _ = release(Ghost(), model, x, y, Flat(0.1))
    assert error(got, release(Loop(), model, x, y, Flat(0.1))[0]) < 1e-9


class Difference(nn.Module):
    """Two positions through one layer, and what differs between them: their gradients nearly cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(64, 64), nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.layer(x)
        return self.head(h[:, 0] - h[:, 1])


def moved_by(engine, model, x, y, who, clip):
    """How far the sum moves when an example leaves, in units of the bound."""
    rest = torch.arange(len(x)) != who
    with_it, without = (release(engine, model, *data, clip)[0] for data in ((x, y), (x[rest], y[rest])))
    return float((with_it - without).norm()) / clip.clip


class Summed(nn.Module):
    """A layer over positions and the sum of what it makes; `deep` is a second layer that the first may precede."""

    def __init__(self, layer: nn.Module, outputs: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(outputs, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.layer(x)
        z = z[0] if isinstance(z, tuple) else z
        return self.head(torch.tanh(z if x.ndim < 4 else z.flatten(2).transpose(1, 2)).sum(1))


@pytest.mark.parametrize("kind", [Ghost, BookKeeping])
@pytest.mark.parametrize("layer", ["linear", "convolution", "rnn"])
@pytest.mark.parametrize("scale", [10.0, 1e3, 1e6])
def test_what_cancels_is_added_as_it_was_weighed(scale, layer, kind, way):
    """Positions of one feature that cancel to a small gradient, through sums of numbers 2^24 times as large.

    The layer does not see that feature. From Gram matrices alone, one example moved the sum by 20,000 bounds.
    """
    torch.manual_seed(0)
    if layer == "linear":
        made, column = nn.Linear(64, 64), (slice(None), 0)
    elif layer == "convolution":
        made, column = nn.Conv2d(64, 64, 1), (slice(None), 0)
    else:
        made, column = nn.RNN(64, 64, batch_first=True), (slice(None), 0)
    model = Summed(made, 64)
    with torch.no_grad():
        (made.weight_ih_l0 if layer == "rnn" else made.weight)[column] = 0
    x = torch.randn(6, 8, 64) * 0.1
    x[2, :, 1:] = x[2, :1, 1:]
    x[2, :, 0] = scale * torch.tensor([2.0**24, 1, 1, 1, 1, -(2.0**24), -4, 0])
    if layer == "convolution":
        x = x.transpose(1, 2).reshape(6, 64, 2, 4)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    assert moved_by(kind(), model, x, y, 2, Flat(1.0)) <= 1 + 1e-5


@pytest.mark.parametrize("kind", [Ghost, BookKeeping])
def test_one_examples_lookups_do_not_wipe_out_anothers(kind):
    class Difference(nn.Module):
        """Adds up tokens with weights of their place: two places of one token cancel to nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 8), nn.Linear(8, 3)

        def forward(self, x):
            z = self.embed(x)
            return self.head(z[:, 0] + torch.where(x[:, :1] == 4, 1e9, 0.0) * (z[:, 1] - z[:, 2]))

    torch.manual_seed(0)
    model = Difference()
    x = torch.randint(0, 4, (12, 3))
    x[:, 1], x[7] = 1, torch.tensor([4, 1, 1])
    y = torch.arange(12) % 3
    got, want = (release(engine, model, x, y, Flat(1.0))[0] for engine in (kind(), Loop()))
    assert error(got, want) < 1e-5


@pytest.mark.parametrize("kind", [Ghost, BookKeeping])
def test_small_factors_do_not_vanish_from_a_norm(kind, way):
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 3, bias=False))
    with torch.no_grad():
        model[1].weight.mul_(1e18)
    x, y = 1e-24 * torch.rand(2, 64), torch.tensor([0, 1])
    ours, theirs = (release(engine, model, x, y, Flat(1e-3))[1].norms for engine in (kind(), Loop()))
    assert torch.allclose(ours, theirs, rtol=1e-4)
    assert float(ours.max()) > 0


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("kind", [Ghost, BookKeeping])
def test_recurrent_outputs_that_are_written_to_later(cell, kind):
    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = cell(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            h = self.cell(x.transpose(0, 1))[0]
            h.clamp_(-0.3, 0.3)
            return self.head(h.mean(0))

    torch.manual_seed(0)
    model, y = Clamped().double(), torch.tensor([0, 1, 2, 0])
    release(kind(), model, 1e-2 * torch.randn(4, 5, 4).double(), y, Flat(0.1))  # planned where nothing is clamped
    x = 9 * torch.randn(4, 5, 4).double()
    got, want = (release(engine, model, x, y, Flat(0.1))[0] for engine in (kind(), Loop()))
    assert error(got, want) < 1e-9


class Detached(nn.Module):
    """Weighs each example by all of them, where no gradient shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(h * (1 + h.detach().square().sum(0)))


class Rolled(nn.Module):
    """Takes its neighbour's input."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        return self.last(x.roll(1, 0))


class Remembering(nn.Module):
    """Subtracts what it remembers of the batches before."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(5, 3)
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x):
        z = x - self.mean
        self.mean.lerp_(x.mean(0).to(self.mean.dtype), 0.9)
        return self.last(z)


@pytest.mark.parametrize("kind", [Ghost, BookKeeping])
@pytest.mark.parametrize(
    "build",
    [
        Detached,
        Rolled,
        Remembering,
        lambda: nn.Sequential(nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3)),
        lambda: nn.Sequential(nn.Dropout(0.2), nn.BatchNorm1d(5), nn.Linear(5, 3)),
    ],
)
def test_models_whose_examples_depend_on_each_other_are_refused(build, kind):
    torch.manual_seed(0)
    x, y = torch.randn(6, 5), torch.arange(6) % 3
    with pytest.raises(ValueError, match=r"mixes examples|leave traces"):
        release(kind(), build(), x, y, Flat(1.0))


def test_auto_leaves_out_who_cannot_and_audits_as_usual(tmp_path, monkeypatch):
    class Asking(nn.Module):
        """Looks at a value, which vmap has no answer to."""

        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(5, 3)

        def forward(self, x):
            return self.last(x if float(x.sum()) < 1e9 else -x)

    monkeypatch.setenv("EPSBENCH_CACHE", str(tmp_path))
    model, x, y = Asking(), torch.randn(6, 5), torch.arange(6) % 3
    got, observed = release(Auto(), model, x, y, Flat(0.1))
    assert error(got, release(Loop(), model, x, y, Flat(0.1))[0]) < 1e-5
    assert observed.engine.split(",")[0] in ("BookKeeping", "Ghost")
    (kept,) = (tmp_path / "engines").iterdir()
    release(Auto(), Asking(), x, y, Flat(0.1))  # another model of this kind: the choice is read, not made
    assert list((tmp_path / "engines").iterdir()) == [kept]


def test_norms_do_not_read_low_where_positions_cancel():
    """From Gram matrices alone a norm of 16 read 1 here, and the example contributed fifteen times its bound."""
    torch.manual_seed(0)
    model, rng = Difference(), torch.Generator().manual_seed(47)
    x = (torch.randn(64, 1, 64, generator=rng) * 1e4).repeat(1, 2, 1)
    x[:, 1] += 3 * torch.randn(64, 64, generator=rng)
    batch, w = Batch(x, torch.randint(3, (64,), generator=rng)), Tree.of(dict(model.named_parameters()))
    sums = [
        engine.bounded(CrossEntropy(), Flat(1.0), model, w, batch, None, 1.0, Relation.ADD_OR_REMOVE)
        for engine in (Ghost(), Loop())
    ]
    ours, theirs = (bounded.observed.norms for bounded in sums)
    assert torch.allclose(ours, theirs, rtol=1e-2)  # the loop rounds in float32 too
    for one in batch.x.split(1):
        single = Batch(one, batch.y[:1])
        alone = Ghost().bounded(CrossEntropy(), Flat(1.0), model, w, single, None, 1.0, Relation.ADD_OR_REMOVE)
        assert float(alone.releases["grad"].value.norm()) <= 1 + 1e-4


class Sorted(nn.Module):
    """Sorts its examples by length, works, and puts them back: no example's output depends on another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        order = (x != 0).sum(1).argsort(descending=True, stable=True)
        return self.head(torch.sin(self.layer(x[order]))[order.argsort()])


class Packed(nn.Module):
    """Works on the tokens that are there: another number of rows for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = (x != 0).any(2)
        h = x.new_zeros(*x.shape[:2], 6)
        h[mask] = torch.sin(self.layer(x[mask]))
        return self.head(h.sum(1))


def test_a_model_that_regroups_its_examples_is_stopped():
    torch.manual_seed(0)
    cases = []
    x = torch.randn(8, 6)
    x[0, 1:] = 0
    cases.append((Sorted(), x * torch.tensor([20.0, *[1.0] * 7])[:, None]))
    tokens = torch.randn(8, 5, 4)
    for i, length in enumerate((1, 5, 3, 3, 2, 4, 3, 3)):
        tokens[i, length:] = 0
    cases.append((Packed(), tokens))
    for model, x in cases:
        batch, w = Batch(x, torch.arange(8) % 3), Tree.of(dict(model.named_parameters()))
        with pytest.raises(Unserved, match=r"regroups them|another number of rows"):
            Ghost().bounded(CrossEntropy(), Flat(1.0), model, w, batch, None, 1.0, Relation.ADD_OR_REMOVE)


def test_auto_is_the_same_engine_whatever_the_examples_are(tmp_path, monkeypatch):
    """Also for an empty batch, which a record must not tell from others, and its trial looks at no example."""
    monkeypatch.setenv("EPSBENCH_CACHE", str(tmp_path))
    tried: list[Batch] = []
    monkeypatch.setattr(auto, "_fastest", lambda engines, arguments: tried.append(arguments[4]) or "ghost")
    for x in (torch.randn(6, 5), torch.full((1, 5), 7.0), torch.empty(0, 5)):
        model = nn.Linear(5, 3)
        found, observed = release(Auto(), model, x, torch.full((len(x),), 2), Flat(0.1))
        assert observed.engine == "Ghost" and bool(found.any()) == bool(len(x))
        next((tmp_path / "engines").iterdir()).unlink()
    assert all(torch.equal(a, b) for one in tried for a, b in zip(one, tried[0], strict=True))
