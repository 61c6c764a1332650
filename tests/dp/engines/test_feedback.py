"""Direct feedback alignment: judged by outer products made by hand, by neighbours, and by backpropagation."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from harness import data, models
from harness.dp import SGD, Batch, CrossEntropy, Feedback, Flat, Method, Plain, Relation, Tree, Unclipped, Views
from harness.dp.engines import feedback
from harness.dp.engines.engine import Unserved, trainable
from harness.running.train import Schedule, evaluate, start, train
from tests.support.zoo import ZOO, Residual, mlp


def release(engine, model, x, y, relation=Relation.ADD_OR_REMOVE):
    """The release of one batch, and what the engine observed."""
    w = Tree.of(trainable(model))
    out = engine.bounded(CrossEntropy(), Unclipped(), model, w, Batch(x, y), None, 1.0, relation)
    return out.releases["grad"], out.observed


def error(got, want):
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


# --- by hand ---


def unfolded(module: nn.Module, a: Tensor) -> Tensor:
    """The input of one example's call as [positions, features]."""
    if isinstance(module, nn.Linear):
        return a.reshape(-1, a.shape[-1])
    k, s, d = module.kernel_size, module.stride, module.dilation
    if module.padding == "same":
        width = [(size - 1) * step for size, step in zip(k, d, strict=True)]
        pads = [(w // 2, w - w // 2) for w in width]
    else:
        pads = [(p, p) for p in module.padding]
    a = F.pad(a, [p for pair in reversed(pads) for p in pair])
    if isinstance(module, nn.Conv1d):
        a, k, s, d = a[:, :, None], (1, *k), (1, *s), (1, *d)
    return F.unfold(a, k, d, 0, s)[0].T


def by_hand(engine: Feedback, model: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    """The sum of each example's clipped delta^T [a, 1], by Jacobians, for a sequence of modules."""
    modules, names = list(model), [name for name, _ in model.named_parameters()]
    products = [i for i, m in enumerate(modules) if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d))]
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    clip = lambda t, bound: t * min(1.0, bound / float(t.norm()))  # noqa: E731
    for xi, yi in zip(x.split(1), y.split(1), strict=True):
        inputs = [xi]
        for m in modules:
            inputs.append(m(inputs[-1].clone()).detach())
        e = inputs[-1].softmax(1)[0] - F.one_hot(yi, inputs[-1].shape[1])[0]
        for piece, i in enumerate(products, 1):
            stop = products[piece] if piece < len(products) else len(modules)
            end = inputs[stop].numel()
            sent = (
                e if stop == len(modules) else feedback.matrix(engine.seed, piece, end, len(e), e.dtype, e.device) @ e
            )
            for j in range(i, stop):
                if not list(modules[j].parameters()):
                    continue
                z = inputs[j + 1]
                tail = nn.Sequential(*modules[j + 1 : stop])
                jacobian = torch.autograd.functional.jacobian(lambda t, tail=tail: tail(t.clone()), z)
                delta = (jacobian.reshape(end, z.numel()).T @ sent).view_as(z)
                conv = z.ndim > 2 and not isinstance(modules[j], nn.Linear)
                d = delta[0].flatten(1).T if conv else delta.reshape(-1, z.shape[-1])  # [T, O]
                d = clip(d, engine.error)
                has_bias = f"{j}.bias" in names
                if isinstance(modules[j], nn.GroupNorm):
                    m = modules[j]
                    a = F.group_norm(inputs[j], m.num_groups)[0].flatten(1).T
                    a = torch.stack([a, torch.ones_like(a)])  # [2, T, C]
                    a = a * min(1.0, engine.activation / float(a.square().sum((0, 1)).max().sqrt()))
                    total[f"{j}.weight"] += (d * a[0]).sum(0)
                    total[f"{j}.bias"] += (d * a[1]).sum(0)
                    continue
                a = unfolded(modules[j], inputs[j])
                a = clip(torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1) if has_bias else a, engine.activation)
                product = d.T @ a
                if has_bias:
                    total[f"{j}.bias"] += product[:, -1]
                    product = product[:, :-1]
                total[f"{j}.weight"] += product.reshape(total[f"{j}.weight"].shape)
    return torch.cat([t.detach().reshape(-1) for t in total.values()])


def network(dims: int, kernel: int, stride: int, dilation: int, padding: int | str, bias: bool) -> nn.Sequential:
    conv = nn.Conv1d if dims == 1 else nn.Conv2d
    pool = nn.MaxPool1d if dims == 1 else nn.MaxPool2d
    torch.manual_seed(dims + kernel)
    return nn.Sequential(
        conv(2, 4, kernel, stride, padding, dilation, bias=bias),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        pool(2, 1),
        conv(4, 3, 2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.LazyLinear(6),
        nn.Tanh(),
        nn.Linear(6, 3, bias=bias),
    ).double()


@settings(max_examples=30)
@given(
    dims=st.integers(1, 2),
    kernel=st.integers(2, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.sampled_from([0, 1, 2, "same"]),
    bias=st.booleans(),
    thresholds=st.sampled_from([(0.3, 2.0), (1.1, 6.0), (1e6, 1e6)]),
)
def test_equals_outer_products_made_by_hand(dims, kernel, stride, dilation, padding, bias, thresholds):
    """In every geometry, with both thresholds binding for some examples, for all and for none."""
    model = network(dims, kernel, 1 if padding == "same" else stride, dilation, padding, bias)
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(3, 2, *[9] * dims, generator=rng, dtype=torch.float64) * torch.tensor([0.1, 1.0, 5.0]).view(
        -1, *[1] * (dims + 1)
    )
    y = torch.arange(3)
    model(x)
    engine = Feedback(*thresholds, seed=7)
    got, _ = release(engine, model, x, y)
    assert error(got.value.flat, by_hand(engine, model, x, y)) < 1e-10


def test_a_step_of_a_sequence_and_frozen_halves():
    """Positions of a linear layer, a trained LayerNorm, a frozen weight and a frozen bias, for one example."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3)).double()
    model[1].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    x, y = torch.randn(1, 3, 4, dtype=torch.float64), torch.tensor([2])
    got, _ = release(Feedback(0.2, 1.5, seed=3), model, x, y)
    hidden = torch.tanh(model[1](model[0](x))).detach()
    e = (model(x).softmax(1) - F.one_hot(y, 3)).detach()
    clip = lambda t, bound: t * min(1.0, bound / float(t.norm()))  # noqa: E731
    b0, b1 = (feedback.matrix(3, i, rows, 3, e.dtype, e.device) for i, rows in ((0, 12), (1, 15)))
    d0, d1 = (e @ b0.T).view(3, 4), (e @ b1.T).view(3, 5) * (1 - hidden[0] ** 2)
    normal = F.layer_norm(x[0], (4,))
    reach = float((normal.square().sum(0) + 3).max().sqrt())
    s = min(1.0, 0.2 / float(d0.norm())) * min(1.0, 1.5 / reach)
    want = {
        "0.weight": s * (d0 * normal).sum(0),
        "0.bias": s * d0.sum(0),
        "1.bias": (clip(d1, 0.2) * min(1.0, 1.5 / math.sqrt(3))).sum(0),
        "4.weight": clip(e, 0.2).T @ clip(hidden.flatten(1), 1.5),
    }
    assert list(got.value) == list(want)
    for name, value in want.items():
        torch.testing.assert_close(got.value[name], value, rtol=1e-10, atol=1e-14)
    assert got.sensitivity == pytest.approx(math.sqrt(3) * 0.2 * 1.5)


# --- neighbours ---

NETWORKS = {"mlp?hidden=16,16": (1, 6, 6), "tanh-cnn-28": (1, 28, 28), "cnn1d": (1, 40)}


def strange(shape: tuple[int, ...], dtype: torch.dtype) -> list[tuple[Tensor, int]]:
    """Examples that try to add more than their share."""
    rng = torch.Generator().manual_seed(5)
    x = torch.randn(shape, generator=rng).to(dtype)
    pixel, dot = torch.zeros(shape, dtype=dtype), x.clone()
    pixel.view(-1)[-1], dot.view(-1)[0] = 1e4, 1e30
    broken = [x.clone(), x.clone()]
    broken[0].view(-1)[3], broken[1].view(-1)[3] = math.nan, -math.inf
    sizes = [scale * x for scale in (1.0, -1.0, 1e-30, 30.0, 1e4, 1e30, -1e30)]
    return [(t, label) for t in (torch.zeros_like(x), *sizes, pixel, dot, *broken) for label in (0, 3)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("spec", NETWORKS)
def test_no_example_moves_the_sum_by_more_than_the_sensitivity(spec, dtype):
    shape = NETWORKS[spec]
    model = models.build(spec, shape, 4, 0).to(dtype)
    others = torch.randn(4, *shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    labels = torch.arange(4)
    slack = 1 + (1e-9 if dtype is torch.float64 else 1e-4)
    for engine in (Feedback(0.01, 0.5), Feedback(0.5, 40.0), Feedback(1e3, 1e3)):
        without, _ = release(engine, model, others, labels)
        sums, broken = [], 0
        for x, label in strange(shape, dtype):
            y = torch.cat([labels, torch.tensor([label])])
            grad, seen = release(engine, model, torch.cat([others, x[None]]), y)
            broken += int(seen.non_finite)
            sums.append(grad.value.flat.double())
            assert float((sums[-1] - without.value.flat).norm()) <= without.sensitivity * slack
        assert broken == 4  # the examples with a pixel that is no number, and no others
        twice = release(engine, model, others, labels, Relation.REPLACE_ONE)[0].sensitivity
        assert twice == 2 * without.sensitivity
        between = torch.cdist(torch.stack(sums)[None], torch.stack(sums)[None])
        assert float(between.max()) <= twice * slack


def test_the_sensitivity_is_reached():
    """With one position a layer, Cauchy and Schwarz hold with equality: nothing is noised for that cannot happen."""
    model = mlp().double()
    x, y = torch.randn(1, 5, dtype=torch.float64), torch.tensor([1])
    grad, _ = release(Feedback(0.001, 0.5), model, x, y)
    assert float(grad.value.norm()) == pytest.approx(grad.sensitivity, rel=1e-12)
    assert grad.sensitivity == pytest.approx(math.sqrt(3) * 0.001 * 0.5)


def test_the_microbatch_changes_nothing_and_an_empty_batch_is_zero():
    model = models.build("cnn1d", (1, 40), 4, 0).double()
    x = torch.randn(7, 1, 40, dtype=torch.float64)
    x[2, 0, 5] = math.nan
    y = torch.arange(7) % 4
    whole, seen = release(Feedback(0.1, 3.0), model, x, y)
    assert (int(seen.non_finite), int(seen.clipped), len(seen.losses)) == (1, 6, 7)
    for size in (1, 3):
        part, few = release(Feedback(0.1, 3.0, microbatch=size), model, x, y)
        assert error(part.value.flat, whole.value.flat) < 1e-12
        assert (int(few.non_finite), int(few.clipped), few.microbatch) == (1, 6, size)
    none, seen = release(Feedback(0.1, 3.0), model, x[:0], y[:0])
    assert none.value.flat.eq(0).all() and len(seen.losses) == 0
    assert none.sensitivity == whole.sensitivity


# --- what it is, beside backpropagation ---


def test_with_backpropagation_for_feedback_it_is_backpropagation(monkeypatch):
    """A linear net whose B is the transposed weight; and with any B, the last layer's sum is its gradient."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 3
    free = Feedback(1e6, 1e6)
    truth, ours = (release(engine, model, x, y)[0].value for engine in (Plain(), free))
    for name in ("1.weight", "1.bias"):
        torch.testing.assert_close(ours[name], truth[name])
    assert error(ours["0.weight"], truth["0.weight"]) > 0.1
    monkeypatch.setattr(feedback, "matrix", lambda *_: model[1].weight.detach().T)
    assert error(release(free, model, x, y)[0].value.flat, truth.flat) < 1e-12


def test_feedback_is_the_same_in_every_precision_and_keeps_norms():
    cpu = torch.device("cpu")
    b = feedback.matrix(4, 1, 3000, 10, torch.float32, cpu)
    assert torch.equal(b.double(), feedback.matrix(4, 1, 3000, 10, torch.float64, cpu))
    for other in (
        feedback.matrix(5, 1, 3000, 10, torch.float32, cpu),
        feedback.matrix(4, 2, 3000, 10, torch.float32, cpu),
    ):
        assert abs(float((b * other).sum())) < 0.3  # of 10, were they alike
    torch.testing.assert_close(b.norm(dim=0), torch.ones(10), rtol=0.1, atol=0)


SEEDS = SimpleNamespace(sampling=1, noise=2, path=3)


def test_it_learns():
    digits = data.load("digits").validation_split().to(torch.device("cpu"), torch.float32)
    model = models.build("mlp?hidden=64", digits.input_shape, digits.classes, 0)
    method = Method(engine=Feedback(0.1, 1.0), clip=Unclipped(), optimizer=SGD(2.0, 0.9))
    end = train(method, model, digits, 0.7, Schedule(100, 256, 100), SEEDS, start(method, model, 100))
    assert evaluate(model, end.w, method.loss, digits)["accuracy"] > 0.9


# --- refusals ---


class Skip(nn.Module):
    """The output sees the model's input beside the hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.a(x)) + x)


class Shortcut(Skip):
    """The output sees the first hidden layer beside the second."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.out(torch.tanh(self.b(h)) + h)


class Batchwise(Skip):
    """Examples are compared with the mean of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.out(h - h.mean(0))


class Peeking(Skip):
    """A weight is used by a function too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.a(x)) @ self.a.weight)


class Severed(Skip):
    """Nothing comes back from the output to the hidden layer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.a(x).sign().detach())


class Turned(Skip):
    """Positions first: what a layer takes for an example is a position of all."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.a(x.transpose(0, 1)))).transpose(0, 1).mean(1)


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        (Residual(), (2, 6, 6), "the input of short depends on"),
        (Shortcut(), (5,), "the input of out depends on the output of a"),
        (Skip(), (5,), "depends on the model's input"),
        (Peeking(), (5,), "depends on a.weight"),
        (Severed(), (5,), "does not depend on the output of a"),
        (ZOO["repeated calls"].build(), (3, 6, 6), "conv is called 3 times"),
        (ZOO["borrowed parameters"].build(), (5,), "child is called 0 times"),
        (Batchwise(), (5,), "when others are left out"),
        (Turned(), (4, 5), "first dimension is that of the examples"),
    ],
    ids=lambda case: type(case).__name__ if isinstance(case, nn.Module) else "",
)
def test_what_is_no_chain_is_refused_before_it_is_used(model, shape, reason):
    assert Feedback().accepts(CrossEntropy(), Unclipped(), model) is None
    with pytest.raises(ValueError, match=reason):
        release(Feedback(), model, torch.randn(4, *shape), torch.zeros(4, dtype=torch.long))
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (ZOO["tied linear"].build(), "one parameter"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "2 groups"),
        (nn.Sequential(nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular")), "circular"),
        (ZOO["standardised weights"].build(), "Standardised"),
        (ZOO["lstm"].build(), "Embedding"),
        (ZOO["class token"].build(), "ClassToken"),
        (nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3, affine=False)), "mixes examples"),
        (nn.Linear(5, 3).requires_grad_(False), "no trained parameter"),
    ],
    ids=lambda case: case.replace(" ", "-") if isinstance(case, str) else "",
)
def test_layers_it_cannot_serve_are_refused(model, reason):
    assert reason in str(Feedback().accepts(CrossEntropy(), Unclipped(), model))


def test_rules_and_losses_it_cannot_serve_are_refused():
    assert "Flat" in str(Feedback().accepts(CrossEntropy(), Flat(), mlp()))
    assert "4 rows" in str(Feedback().accepts(Views(), Unclipped(), mlp()))
    for fault in ({"error": 0.0}, {"activation": math.inf}, {"microbatch": 0}):
        with pytest.raises(ValueError, match=r"must be positive|at least one"):
            Feedback(**fault)


class Centred(nn.Module):
    """Subtracts the mean of the batch: in training, or always."""

    def __init__(self, only_in_training: bool) -> None:
        super().__init__()
        self.only_in_training = only_in_training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0) if self.training or not self.only_in_training else x


class AcrossExamples(nn.Module):
    """Frozen attention over tokens that takes examples for positions, as a forgotten batch_first does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend, self.head = nn.Embedding(50, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 3)
        for p in (*self.embed.parameters(), *self.attend.parameters()):
            p.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = 5 * self.embed(x)
        return self.head(self.attend(h, h, h, need_weights=False)[0].mean(1))


@pytest.mark.parametrize("kind", ["in training", "behind zeros", "across tokens"])
def test_models_that_mix_examples_are_refused(kind):
    torch.manual_seed(0)
    if kind == "across tokens":
        model, x = AcrossExamples(), torch.randint(0, 50, (16, 6))
    else:
        first = nn.Linear(10, 8)
        if kind == "behind zeros":
            nn.init.zeros_(first.weight)
            nn.init.zeros_(first.bias)
        model = nn.Sequential(first, Centred(kind == "in training"), nn.Tanh(), nn.Linear(8, 3))
        x = torch.randn(16, 10)
    w, batch = Tree.of(trainable(model)), Batch(x, torch.arange(16) % 3)
    with pytest.raises(Unserved):
        Feedback().bounded(CrossEntropy(), Unclipped(), model.train(), w, batch, None, 1.0, Relation.ADD_OR_REMOVE)


def test_a_rule_that_would_be_ignored_is_refused():
    model = nn.Sequential(nn.Linear(4, 3))
    w, batch = Tree.of(trainable(model)), Batch(torch.randn(2, 4), torch.tensor([0, 1]))
    with pytest.raises(Unserved, match="bounds each example itself"):
        Feedback().bounded(CrossEntropy(), Flat(), model, w, batch, None, 1.0, Relation.ADD_OR_REMOVE)
