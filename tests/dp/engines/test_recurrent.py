"""The rules of recurrent layers and of attention, against gradients taken one example at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_flatten

from harness.dp.engines.taped import attention, recurrent
from harness.dp.engines.taped.gradients import Rows
from harness.dp.native import describe, kernels, library

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")

B = 3
flags = st.booleans()
thorough = settings(max_examples=24, deadline=None, derandomize=True)


def check(rule, module, args, kwargs, dims, used, k=1, dtype=torch.float64, tolerance=1e-10):
    """A rule's gradients are those of each example's own loss: a random projection of the `used` outputs.

    `dims`: the examples' dimension in every output, k entries for each example.
    """
    outputs = [t for t in tree_flatten(module(*args, **kwargs))[0] if t is not None]
    used = [i for i in range(len(outputs)) if i in used] or [0]
    cotangents = [torch.randn_like(t) if i in used else None for i, t in enumerate(outputs)]
    names = dict(module.named_parameters())
    rows = []
    for example in range(B):
        masked = []
        for i in used:
            keep = torch.zeros_like(outputs[i])
            keep.narrow(dims[i], example * k, k).fill_(1)
            masked.append(cotangents[i] * keep)
        each = [outputs[i] for i in used], list(names.values()), masked
        rows.append(torch.autograd.grad(*each, retain_graph=True, materialize_grads=True))
    detached = [t.detach() for t in outputs]
    found = rule(module, args, kwargs, detached, cotangents, B, set(names))
    assert found.keys() == names.keys()
    v = torch.rand(B, dtype=dtype)
    for name, want in zip(names, zip(*rows, strict=True), strict=True):
        want = torch.stack(want).to(dtype)
        size = want.norm() + 1
        assert found[name].shape == names[name].shape, name
        squares = want.square().flatten(1).sum(1)
        assert ((found[name].squares() - squares).abs() <= tolerance * size**2).all(), name
        total = torch.tensordot(v, want, 1)
        assert (found[name].weighted(v) - total).norm() <= tolerance * size, name
        assert (found[name].weighted(v, torch.empty_like(total)) - total).norm() <= tolerance * size, name
        assert (found[name].rows - want).norm() <= tolerance * size, name
        some = rule(module, args, kwargs, detached, cotangents, B, {name})
        assert some.keys() == {name}
        assert (some[name].rows - want).norm() <= tolerance * size, name
        twice = some[name] + rule(module, args, kwargs, detached, cotangents, B, {name})[name]
        assert (twice.rows - 2 * want).norm() <= 2 * tolerance * size, name


def build(make, dtype=torch.float64, **options):
    """A module off its initial symmetries, zero biases among them."""
    module = make(**options).to(dtype)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.5 * torch.randn_like(p))
    return module


CELLS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}


@thorough
@given(
    st.sampled_from(sorted(CELLS)), st.integers(1, 3), flags, flags, flags, flags, flags,
    st.sampled_from([1, 1, 2]), st.sampled_from([1, 5]), st.sets(st.integers(0, 2)), st.integers(0, 99),
)  # fmt: skip
def test_recurrent(cell, layers, bidirectional, bias, batch_first, given_states, project, k, steps, used, seed):
    torch.manual_seed(seed)
    project = project and cell == "lstm"
    options = {"proj_size": 2} if project else {}
    module = build(
        CELLS[cell],
        input_size=3, hidden_size=4, num_layers=layers, bidirectional=bidirectional, bias=bias, batch_first=batch_first,
        **options,
    )  # fmt: skip
    n, places = B * k, layers * (1 + bidirectional)
    x = torch.randn(*((n, steps) if batch_first else (steps, n)), 3, dtype=torch.float64)
    h = torch.randn(places, n, 2 if project else 4, dtype=torch.float64)
    state = (h, torch.randn(places, n, 4, dtype=torch.float64)) if cell == "lstm" else h
    kwargs = {"hx": state} if given_states else {}
    assert recurrent.accepts(module)
    check(recurrent.recurrent, module, (x,), kwargs, (0 if batch_first else 1, 1, 1), used, k)


@thorough
@given(
    flags, flags, flags, flags, flags, flags, flags,
    st.sampled_from(["self", "memory", "other"]), st.sampled_from([1, 1, 2]),
    st.sampled_from([None, "bool", "float", "each"]), st.sampled_from([None, "bool", "float"]),
    st.sets(st.integers(0, 1)), st.integers(0, 99),
)  # fmt: skip
def test_attention(bias, added, zero, batch_first, need_weights, average, causal, kind, k, mask, padding, used, seed):
    torch.manual_seed(seed)
    sizes = {"kdim": 3, "vdim": 5} if kind == "other" and seed % 2 else {}
    module = build(
        nn.MultiheadAttention,
        embed_dim=4, num_heads=2, bias=bias, add_bias_kv=added, add_zero_attn=zero, batch_first=batch_first, **sizes,
    )  # fmt: skip
    n, queries = B * k, 4
    keys = queries if kind == "self" else 3

    def sequence(length, width):
        return torch.randn(*((n, length) if batch_first else (length, n)), width, dtype=torch.float64)

    query = sequence(queries, 4)
    key = query if kind == "self" else sequence(keys, sizes.get("kdim", 4))
    value = key if kind != "other" else sequence(keys, sizes.get("vdim", 4))
    kwargs = {"need_weights": need_weights, "average_attn_weights": average}
    if mask or causal:
        blocked = torch.ones(queries, keys).triu(1).bool()
        if mask == "each":
            kwargs["attn_mask"] = (torch.rand(n * 2, queries, keys) < 0.4).index_fill(2, torch.tensor([0]), 0)
        else:
            kwargs["attn_mask"] = torch.where(blocked, -torch.inf, 0.0).double() if mask == "float" else blocked
        kwargs["is_causal"] = causal and mask != "each"
    if padding:
        hidden = torch.zeros(n, keys).bool()
        hidden[::2, -1] = True
        kwargs["key_padding_mask"] = torch.where(hidden, -1.5, 0.3).double() if padding == "float" else hidden
    assert attention.accepts(module)
    dims = (0 if batch_first else 1, 0)
    check(attention.attention, module, (query, key, value), kwargs, dims, used, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN, nn.MultiheadAttention])
def test_narrow_numbers_are_computed_in_float32(make, dtype):
    torch.manual_seed(0)
    attends = make is nn.MultiheadAttention
    rule = attention.attention if attends else recurrent.recurrent
    options = {"embed_dim": 8, "num_heads": 2} if attends else {"input_size": 8, "hidden_size": 8}
    module = build(make, dtype, **options)
    args = (torch.randn(6, B, 8, dtype=dtype),) * (3 if attends else 1)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    check(rule, module, args, {}, (1, 0 if attends else 1, 1), {0}, 1, torch.float32, tolerance)
    outputs = [t.detach() for t in tree_flatten(module(*args))[0]]
    found = rule(module, args, {}, outputs, outputs, B, {name for name, _ in module.named_parameters()})
    assert all(g.rows.dtype == torch.float32 for g in found.values())
    assert all(g.weighted(torch.ones(B)).dtype == torch.float64 for g in found.values())


@pytest.mark.skipif(
    library() is None, reason=f"native kernels: {describe()}; install a C compiler (apt-get install gcc)"
)
@pytest.mark.parametrize("h", [1, 5, 16, 37])
def test_kernels_compute_what_torch_computes(h):
    torch.manual_seed(h)
    gates, cell, dh, dc = torch.randn(3, 7, 4, h), torch.randn(7, h), torch.randn(7, h), torch.randn(7, h)
    gates[0, 1] *= 1e3  # saturated
    gates[1, 2] = torch.inf
    gates[1, 3] = torch.nan
    ours, theirs = gates.clone(), gates.double()
    results = [*kernels.lstm_local(ours, cell.clone()), ours]
    expected = [*recurrent.lstm_local(theirs, cell.double()), theirs]
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(got, want.float(), rtol=0, atol=2e-6, equal_nan=True)
    slope, forget, _, four = (t[0] for t in results)
    whole = dc + dh * slope
    want = torch.cat([four[:, :3] * whole[:, None], four[:, 3:] * dh[:, None]], 1)
    kernels.lstm_step(four, dh, slope, forget, dc)
    torch.testing.assert_close(four, want)
    torch.testing.assert_close(dc, whole * forget)


class Own(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(2 * input, hx)


class OwnAttention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)


class Named(nn.GRU):
    pass


def tied():
    module = nn.RNN(4, 4, 2)
    module.weight_hh_l1 = module.weight_hh_l0
    return module


def test_refusals():
    dropping = nn.LSTM(4, 4, 2, dropout=0.5)
    weighted = nn.utils.parametrizations.weight_norm(nn.GRU(4, 4), "weight_hh_l0")
    assert not any(map(recurrent.accepts, [dropping, weighted, Own(4, 4), tied(), nn.LSTMCell(4, 4)]))
    assert recurrent.accepts(dropping.eval()) and recurrent.accepts(Named(4, 4))
    forgetful = nn.MultiheadAttention(4, 2, dropout=0.5)
    assert not any(map(attention.accepts, [forgetful, OwnAttention(4, 2), nn.Linear(4, 4)]))
    assert attention.accepts(forgetful.eval())

    module, x = nn.LSTM(4, 4), torch.randn(5, 4)
    for given_input in (x, pack_sequence([x, x[:3]])):
        outputs = [t.detach() for t in tree_flatten(module(given_input))[0][:1]]
        with pytest.raises(LookupError):
            recurrent.recurrent(module, (given_input,), {}, outputs, outputs, 1, {"weight_ih_l0"})
    with pytest.raises(LookupError):
        attention.attention(forgetful, (x, x, x), {}, [x], [x], 1, {"in_proj_weight"})


def test_one_input_in_three_uses_is_one_product():
    """And blocks of rows whose inputs differ stay apart."""
    module, x, other = nn.MultiheadAttention(4, 2), torch.randn(5, B, 4), torch.randn(5, B, 4)
    for args, parts in (((x, x, x), 1), ((x, other, other), 2), ((x, x, other), 3)):
        outputs = [t.detach() for t in module(*args)]
        found = attention.attention(module, args, {}, outputs, [outputs[0], None], B, {"in_proj_weight"})
        gradient = found["in_proj_weight"]
        assert len(getattr(gradient, "parts", [gradient])) == parts
        assert (gradient + Rows(gradient.rows)).shape == (12, 4)
