"""Networks: pinned sizes, seeded weights, per-example gradients for all, and no mixing of examples."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from harness import registry
from harness.dp import Batch, BookKeeping, CrossEntropy, Flat, Loop, Relation, Tree
from harness.dp.engines.vmap import explicit_states
from harness.models import CrossExampleLayer, WSConv2d, build, catalog, check, to_groupnorm
from harness.models.dpnas import CELLS, Cell

IMAGE, GREY, SIGNAL = (3, 32, 32), (1, 28, 28), (1, 40)
SIZES = {
    ("logistic", GREY): 7_850,
    ("mlp", GREY): 269_322,
    ("mlp?hidden=32", SIGNAL): 1_642,
    ("tanh-cnn", GREY): 26_010,
    ("tanh-cnn-28", GREY): 26_010,
    ("tanh-cnn", IMAGE): 550_570,
    ("tanh-cnn-32", IMAGE): 550_570,
    ("cnn1d", SIGNAL): 5_210,
    ("resnet20", IMAGE): 269_722,
    ("wrn-16-4", IMAGE): 2_751_562,
    ("resnet18", IMAGE): 11_173_962,
    ("resnet10", GREY): 4_902_090,  # 4.9021 M in a notebook of DP-SAT's code (MNIST)
    ("dpnas", IMAGE): 529_434,  # .5294 M in its CIFAR-10 notebook
    ("dpnas?cell=fashion", GREY): 214_570,  # .2146 M in its Fashion-MNIST notebook
    ("dpnas?cell=mnist", GREY): 213_418,
    ("cnn4", GREY): 26_010,
    ("transformer", (64,)): 930_570,
    ("lstm", GREY): 82_186,
    ("lstm", (28, 28)): 82_186,
    ("gru", GREY): 161_034,
}


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("spec", "shape"), SIZES)
def test_sizes_are_pinned(spec: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "check", lambda *given: None)  # made of small instances below
    assert size(build(spec, shape, 10, seed=0)) == SIZES[spec, shape]


# Building -------------------------------------------------------------------------------------------------


def test_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build("tanh-cnn", GREY, 10, seed=7)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    again, other = build("tanh-cnn", GREY, 10, seed=7), build("tanh-cnn", GREY, 10, seed=8)
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c), name
        assert a.dtype == torch.float32 and a.requires_grad
    assert first.training


# The smallest instance of every registered name; a new name must be added here.
TINY = {
    "logistic": ("logistic", (1, 8, 8)),
    "linear-head": ("linear-head", (12,)),
    "mlp": ("mlp?hidden=8,4", (1, 8, 8)),
    "cnn1d": ("cnn1d?channels=3", SIGNAL),
    "tanh-cnn": ("tanh-cnn", GREY),
    "tanh-cnn-28": ("tanh-cnn-28", (2, 18, 20)),
    "tanh-cnn-32": ("tanh-cnn-32", (1, 8, 8)),
    "resnet20": ("resnet20?width=4&groups=2", (3, 8, 8)),
    "wrn-16-4": ("wrn-16-4?width=1&ws=true&shortcut=conv-gn-relu", (3, 8, 8)),
    "resnet18": ("resnet18?width=2&groups=2", (3, 8, 8)),
    "resnet10": ("resnet10?width=2&groups=2", (3, 8, 8)),
    "dpnas": ("dpnas?width=8", (3, 8, 8)),
    "cnn4": ("cnn4", (2, 14, 16)),
    "encoder": ("encoder?channels=2,3&width=4", (2, 8, 8)),
    "transformer": ("transformer?vocabulary=4&width=4&heads=2&layers=1&feedforward=6", (5,)),
    "lstm": ("lstm?hidden=3", (2, 5, 4)),
    "gru": ("gru?hidden=3", (5, 4)),
    "timm": ("timm:test_resnet?groupnorm=true", (3, 32, 32)),
}


@pytest.mark.parametrize("name", sorted(registry.index("model")))
def test_every_model_has_per_example_gradients(name: str) -> None:
    spec, shape = TINY[name]
    model = build(spec, shape, 3, seed=0).double()
    weights = {key: p.detach() for key, p in model.named_parameters()}
    x = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 2, 1])

    def loss(w: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, w, (one[None],)), label[None])

    with explicit_states(model):  # of recurrent layers
        per_example = vmap(grad(loss), (None, 0, 0))(weights, x, y)
    total = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), list(model.parameters()))
    for (key, g), t in zip(per_example.items(), total, strict=True):
        torch.testing.assert_close(g.sum(0), t, rtol=1e-8, atol=1e-10, msg=key)
        # timm starts its residual branches at zero.
        assert name == "timm" or (g != 0).any(), f"{key} never gets a gradient"


@pytest.mark.parametrize("model", ["resnet20", "wrn-16-4"])
def test_layout_is_part_of_the_name(model: str) -> None:
    shape, x = (3, 16, 16), torch.randn(2, 3, 16, 16)
    layouts = ["", "order=conv-gn-relu"]
    if model == "wrn-16-4":  # the four orders of arXiv:2508.15141, Table 6
        layouts += ["order=conv-gn-relu&shortcut=conv-relu-gn", "shortcut=conv-gn-relu"]
    nets = [build(f"{model}?width=2&groups=2" + (f"&{text}" if text else ""), shape, 10, 0) for text in layouts]
    outputs = [net(x) for net in nets]
    assert len({size(net) for net in nets}) == 1
    for i, one in enumerate(outputs):
        assert all(not torch.allclose(one, other) for other in outputs[:i])


def test_default_wrn_puts_relu_before_the_norm() -> None:
    kinds = [type(m) for m in build("wrn-16-4?width=1", (3, 8, 8), 10, 0).modules()]
    leaves = [k for k in kinds if k in (nn.ReLU, nn.GroupNorm, nn.Conv2d)]
    for before, norm, after in zip(leaves, leaves[1:], leaves[2:], strict=False):
        if norm is nn.GroupNorm:
            assert before is nn.ReLU and after is nn.Conv2d
    assert leaves[-2:] == [nn.ReLU, nn.GroupNorm]


# As two notebooks of DP-SAT's public code print them: (operation, from, to); 0 is no edge.
PRINTED = {
    "cifar": [(5, 0, 1), (1, 0, 2), (5, 1, 2), (6, 0, 3), (1, 1, 3), (0, 2, 3), (5, 0, 4), (0, 1, 4), (0, 2, 4),
              (3, 3, 4), (5, 0, 5), (5, 1, 5), (6, 2, 5), (1, 3, 5), (6, 4, 5)],
    "fashion": [(3, 0, 1), (0, 0, 2), (5, 1, 2), (4, 0, 3), (5, 1, 3), (3, 2, 3), (0, 0, 4), (0, 1, 4), (6, 2, 4),
                (3, 3, 4), (5, 0, 5), (6, 1, 5), (1, 2, 5), (4, 3, 5), (1, 4, 5)],
}  # fmt: skip


@pytest.mark.parametrize("name", PRINTED)
def test_cells_of_dpnas_are_the_printed_ones(name: str) -> None:
    torch.manual_seed(0)
    cell, x = Cell(CELLS[name], inputs=4, channels=8).double(), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    own = {(source, target): module for (target, source), module in zip(cell.edges, cell.operations, strict=True)}
    values = {0: F.group_norm(F.conv2d(x, cell.before[0].weight), 8)}
    for operation, source, target in PRINTED[name]:
        if operation == 0:
            assert (source, target) not in own
            continue
        module, value = own.pop((source, target)), values[source]
        if operation == 1:
            value = F.max_pool2d(value, 3, stride=1, padding=1)
        elif operation != 3:
            activation = {4: F.relu, 5: F.selu, 6: torch.tanh}[operation]
            value = activation(F.group_norm(F.conv2d(value, module[0].weight, padding=1, groups=8), 8))
        values[target] = values.get(target, 0) + value
    assert not own
    torch.testing.assert_close(cell(x), torch.cat([values[i] for i in range(1, 6)], dim=1))


@pytest.mark.parametrize("name", ["cnn4", "dpnas", "resnet10"])
def test_networks_of_the_papers_are_served_by_book_keeping(name: str) -> None:
    spec, shape = TINY[name]
    model = build(spec, shape, 3, seed=0).double()
    x = torch.randn(4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch, w = Batch(x, torch.tensor([0, 2, 1, 1])), Tree.of(dict(model.named_parameters()))

    def clipped(engine: BookKeeping | Loop) -> Tensor:
        out = engine.bounded(CrossEntropy(), Flat(0.3), model, w, batch, None, 1.0, Relation.ADD_OR_REMOVE)
        assert int(out.observed.clipped) > 0
        return out.releases["grad"].value.flat

    torch.testing.assert_close(clipped(BookKeeping()), clipped(Loop()), rtol=1e-9, atol=1e-12)


def test_weight_standardisation() -> None:
    torch.manual_seed(0)
    conv = WSConv2d(4, 6, 3, padding=1).double()
    with torch.no_grad():
        conv.weight.add_(3.0)
        conv.gain.copy_(torch.arange(1.0, 7.0))
    w = conv.standardised()
    torch.testing.assert_close(w.mean((1, 2, 3)), torch.zeros(6, dtype=torch.float64))
    # Fan-in times variance is 1, so that a unit input gives unit variance, times the gain.
    torch.testing.assert_close(w.flatten(1).norm(dim=1), conv.gain.detach())
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(conv(x), F.conv2d(x, w, conv.bias, padding=1))
    # Engines that recognise nn.Conv2d would meet the wrong weight.
    assert not isinstance(conv, nn.Conv2d)


# Mixing of examples ---------------------------------------------------------------------------------------


class Centre(nn.Module):
    """Not of any known type: subtracts the mean over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class BatchSoftmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(dim=0)


class OverBatchSize(nn.Module):
    """No example's value matters, only how many there are."""

    def forward(self, x: Tensor) -> Tensor:
        return x / len(x)


class ZeroGate(nn.Module):
    """A mixing branch that is silent at initialisation."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gate = Centre(), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.inner(x)


class Remembers(nn.Module):
    """Outputs are clean, but a statistic of the data stays in the published state."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return x


def around(module: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Tanh(), module), nn.Dropout(0.1), nn.Linear(8, 2))


@pytest.mark.parametrize(
    ("module", "path", "layer"),
    [
        (Centre(), "1.1", "Centre"),
        (BatchSoftmax(), "1.1", "BatchSoftmax"),
        (ZeroGate(), "1.1.inner", "Centre"),
        (Remembers(), "1.1", "Remembers"),
    ],
)
def test_unknown_mixing_layers_are_found_by_what_they_do(module: nn.Module, path: str, layer: str) -> None:
    model = around(module)
    check(model)  # no known type
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(CrossExampleLayer) as caught:
        check(model, (4,), 2)
    assert (caught.value.path, caught.value.layer) == (path, layer) and f'"{path}"' in str(caught.value)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_a_layer_that_counts_examples_is_found() -> None:
    with pytest.raises(CrossExampleLayer, match=r'"0" .OverBatchSize.*left out'):
        check(nn.Sequential(OverBatchSize(), nn.Linear(4, 2)), (4,), 2)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.BatchNorm1d(8), "BatchNorm1d"),
        (nn.SyncBatchNorm(8), "SyncBatchNorm"),
        (nn.LazyBatchNorm1d(), "LazyBatchNorm1d"),
        (nn.InstanceNorm1d(8, track_running_stats=True), "InstanceNorm1d"),
    ],
)
def test_known_mixing_layers_are_refused_by_path(module: nn.Module, name: str) -> None:
    with pytest.raises(CrossExampleLayer, match=rf'module "1\.1" \({name}\).*(GroupNorm|track_running_stats=False)'):
        check(around(module))


def test_clean_networks_pass() -> None:
    check(around(nn.Sequential(nn.LayerNorm(8), nn.Dropout(0.5), nn.GroupNorm(2, 8))), (4,), 2)
    attention = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    check(nn.Sequential(attention, nn.Flatten(), nn.Linear(24, 2)), (6, 4), 2)
    check(nn.Sequential(nn.InstanceNorm2d(3, affine=True), nn.Flatten(), nn.Linear(48, 2)), (3, 4, 4), 2)


def test_conversion_to_groupnorm() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6, eps=1e-3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.bias.requires_grad_(False)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.Sequential(nn.Conv2d(6, 7, 3), nn.BatchNorm2d(7, affine=False)))
    new = to_groupnorm(model, groups=4)
    assert model[1] is norm and any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    first, second = new[1], new[2][1]
    assert isinstance(first, nn.GroupNorm) and (first.num_groups, first.eps) == (3, 1e-3)
    assert torch.equal(first.weight, norm.weight) and torch.equal(first.bias, norm.bias)
    assert first.weight is not norm.weight and not first.bias.requires_grad
    assert isinstance(second, nn.GroupNorm) and second.num_groups == 1 and second.weight is None
    check(new, (3, 8, 8))
    assert isinstance(to_groupnorm(norm), nn.GroupNorm)


def test_timm_is_refused_with_a_remedy_that_works() -> None:
    message = r'module "conv1\.1" \(BatchNorm2d\).*norm_layer=groupnorm.*groupnorm=true'
    with pytest.raises(CrossExampleLayer, match=message):
        build("timm:test_resnet", IMAGE, 10, 0)
    net = build("timm:test_efficientnet?groupnorm=true", IMAGE, 10, 0)
    # timm's BatchNorm holds its activation, which must survive the conversion.
    assert sum(isinstance(m, nn.SiLU | nn.ReLU) for m in net.modules()) > 0
    assert not any(getattr(m, "inplace", False) for m in net.modules())


# Errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        ("tanhcnn", GREY, 'Did you mean "tanh-cnn"'),
        ("mlp?hiden=3", GREY, 'Did you mean "hidden"'),
        ("mlp?hidden=a", GREY, "hidden=256,256"),
        ("mlp?activation=tan", GREY, "tanh"),
        ("cnn1d", GREY, 'Use "tanh-cnn" for images'),
        ("tanh-cnn", SIGNAL, 'Use "cnn1d"'),
        ("tanh-cnn-28", (1, 8, 8), "at least 18x18"),
        ("resnet20?groups=5", IMAGE, "does not divide"),
        ("resnet10?groups=5", IMAGE, "does not divide"),
        ("dpnas?width=12", IMAGE, "multiple of 8"),
        ("dpnas?cell=svhn", IMAGE, "fashion"),
        ("cnn4", (1, 13, 14), "at least 14x14"),
        ("timm:test_resnt", IMAGE, 'Did you mean "test_resnet"'),
        ("timm:test_resnet?more=nonsense:1", IMAGE, "does not take"),
        ("timm:test_vit", (3, 8, 8), "does not run on examples of shape"),
    ],
)
def test_mistyped_specs_say_what_to_write(spec: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(spec, shape, 10, 0)


class Large(nn.Module):
    """Statistics of the batch, "once they are reliable"."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0) if len(x) >= 32 else x


class Rescue(nn.Module):
    """Scales all examples down where the largest would overflow."""

    def __init__(self, beyond: float) -> None:
        super().__init__()
        self.beyond = beyond

    def forward(self, x: Tensor) -> Tensor:
        top = x.detach().abs().max()
        return x * (self.beyond / top) if top > self.beyond else x


class Unless(nn.Module):
    """Gives up on a batch that holds what is not a number."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0 if x.isnan().any() else x


class Remembering(nn.Module):
    """Keeps the last batch in an attribute that no state shows."""

    last: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        y, self.last = x + self.last, x.detach().mean(0)
        return y


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Large(), r'module "1\.1" \(Large\).*batch of \d+'), (Rescue(1e3), "Rescue"), (Rescue(1e6), "Rescue"),
        (Unless(), "Unless"), (Remembering(), "second pass"),
        (nn.RReLU(), r'"1\.1" .RReLU. draws random numbers'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_mixes_only_at_times_is_found(module: nn.Module, message: str, dropout: float) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Identity(), module), nn.Dropout(dropout), nn.Linear(8, 2))
    with pytest.raises(CrossExampleLayer, match=message):
        check(model, (4,), 2)


class Reading(nn.Module):
    """A linear layer that comes by its weight in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4))
        self.weight2 = nn.Parameter(torch.randn(2, 2))
        self.way, self.kept, self.bare = way, self.weight.t(), self.weight.detach()
        self.twice = 2 * self.weight
        w = self.weight
        self.of = {"list": [w], "closure": lambda: w}[way] if way in ("list", "closure") else None

    def train(self, mode: bool = True) -> nn.Module:
        if not mode and self.way == "folded":
            self.bare = self.weight.detach().clone()
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        w: Tensor = self.weight
        if self.way == "list":
            w = self.of[0]
        elif self.way == "closure":
            w = self.of()
        elif self.way == "kept":
            w = self.kept.t()
        elif self.way == "product":
            w = self.twice
        elif self.way == "view":
            w = self.bare
        elif self.way == "detached":
            w = w.detach()
        elif self.way == "folded" and not self.training:
            w = self.bare
        elif self.way == "stuck" and hasattr(self, "cache"):
            w = self.cache
        if self.way == "stuck" and not self.training:
            self.cache = w.detach().clone()
        h = F.linear(x, w)
        if "checkpoint" in self.way:
            return checkpoint(lambda z: (z @ self.weight2).tanh(), h, use_reentrant=self.way == "checkpoint, old")
        return (h @ self.weight2).tanh()


@pytest.mark.parametrize("way", ["plain", "list", "closure", "folded", "checkpoint, new"])
def test_whatever_reads_the_weights_of_the_run_passes_and_is_left_as_it_was(way: str) -> None:
    model = Reading(way).eval()
    tensors = [(p, p.data_ptr(), p.detach().clone()) for p in model.parameters()]
    rng = torch.get_rng_state()
    check(model, (4,), 2)
    assert not model.training and torch.equal(rng, torch.get_rng_state())
    for (p, place, value), q in zip(tensors, model.parameters(), strict=True):
        assert p is q and p.data_ptr() == place and torch.equal(p, value)


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("kept", "made of"), ("product", "before the pass"), ("view", 'training mode does not compute.*"weight"'),
        ("detached", 'uses "weight", and no gradient reaches it'), ("stuck", "gradients depend on what came before"),
        ("checkpoint, old", "use_reentrant=False"),
    ],
)  # fmt: skip
def test_whatever_reads_other_weights_is_refused(way: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(Reading(way), (4,), 2)


def test_parameters_must_be_real_and_there() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    model.register_parameter("spectrum", nn.Parameter(torch.ones(3, dtype=torch.cfloat)))
    with pytest.raises(ValueError, match=r'"spectrum" is complex.*view_as_real'):
        check(model)
    with pytest.raises(ValueError, match=r'"0\.weight" has no shape yet'):
        check(nn.Sequential(nn.LazyLinear(2)), (4,), 2)


class Tokens(nn.Module):
    """A table without a clamp, as public language models have."""

    def __init__(self, mixing: bool = False) -> None:
        super().__init__()
        self.table, self.out, self.mixing = nn.Embedding(5000, 4), nn.Linear(4, 2), mixing

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x.long()).mean(1)
        return self.out(h - h.mean(0) if self.mixing else h)


def test_models_of_tokens_are_tried_on_whole_numbers() -> None:
    check(Tokens(), (7,), 2, tokens=5000)
    with pytest.raises(ValueError, match="tokens=N"):
        check(Tokens(), (7,), 2)
    with pytest.raises(ValueError, match="an entry for each"):
        check(Tokens(), (7,), 2, tokens=50_000)
    with pytest.raises(CrossExampleLayer, match="another one"):
        check(Tokens(mixing=True), (7,), 2, tokens=5000)
    with pytest.raises(ValueError, match=r"x\.long\(\) first"):
        check(nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2)), (3,), 2, tokens=9)


def test_output_must_be_one_tensor() -> None:
    class Two(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x), x

    with pytest.raises(ValueError, match="a tuple of 2; it should return one tensor"):
        check(Two(4, 2), (4,), 2)


def test_output_must_fit_the_classes() -> None:
    with pytest.raises(ValueError, match=r"one row per example, \[5, 3\]"):
        check(nn.Linear(4, 2), (4,), 3)


def test_what_a_pass_changes_in_a_network_is_refused():
    """An embedding that renormalises the rows it looks up, and power iterations that go on with every pass."""
    looked_up = nn.Sequential(nn.Embedding(9, 4, max_norm=1.0), nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(CrossExampleLayer, match="rewrites the rows"):
        check(looked_up)
    looked_up[0].weight.requires_grad_(False)
    with pytest.raises(CrossExampleLayer, match="rewrites the rows"):
        check(looked_up)
    normed = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
    with pytest.raises(CrossExampleLayer, match="in every pass"):
        check(normed, (4,), 2)
