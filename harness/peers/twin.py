"""The JAX twin of a model: its forward pass in `jax.numpy`, found by walking its modules.

A rule for each class of module, the layers of PyTorch and the blocks of `harness.models`, computes what its `forward`
computes. A rule reads a PyTorch parameter through `read`, which gives the JAX array that stands for it, so that tied
parameters and frozen ones need no thought. Arrays have PyTorch's shapes and order: [B, C, H, W], [B, T, d].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from torch import nn

from harness.models import resnet, sequence
from harness.models.layers import WSConv2d

Read = Callable[[Any], Any]  # a parameter, or None, to its array, or None
Rule = Callable[[Any, Read, Array], Array]
RULES: dict[type[nn.Module], Rule] = {}


def twin_of(*kinds: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Register a rule for exactly these classes, not for classes derived from them."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(kinds, rule))
        return rule

    return register


def run(module: nn.Module, read: Read, x: Array) -> Array:
    """What `module` makes of `x`."""
    return RULES[type(module)](module, read, x)


def lacking(model: nn.Module) -> str | None:
    """Why `model` has no twin: the first module that no rule computes as it is set up."""
    for path, m in model.named_modules():
        where = f"{path or 'the model'} ({type(m).__name__})"
        if type(m) not in RULES:
            return f"{where} has no JAX twin: write its rule in harness/peers/twin.py"
        if m._forward_hooks or m._forward_pre_hooks:
            return f"{where} has hooks, which its JAX twin would not hear"
        if isinstance(m, nn.RNNBase) and (m.proj_size or (m.dropout and m.training) or not m.batch_first):
            return f"{where} has a JAX twin only with batch_first, without projection and without dropout"
        if isinstance(m, nn.MaxPool2d) and (m.ceil_mode or m.return_indices or m.dilation != 1):
            return f"{where} has a JAX twin only without ceil_mode, indices and dilation"
    return None


# --- layers of PyTorch ----------------------------------------------------------------------------------------------


def affine(x: Array, weight: Array, bias: Array | None) -> Array:
    """x W^T + b."""
    z = x @ weight.T
    return z if bias is None else z + bias


@twin_of(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(m: nn.Conv2d, read: Read, x: Array) -> Array:
    before_after = m._reversed_padding_repeated_twice  # last dimension first, as functional.pad wants it
    pads = [(before_after[i], before_after[i + 1]) for i in range(len(before_after) - 2, -1, -2)]
    if m.padding_mode != "zeros":
        mode = {"circular": "wrap", "reflect": "reflect", "replicate": "edge"}[m.padding_mode]
        x, pads = jnp.pad(x, [(0, 0), (0, 0), *pads], mode=mode), [(0, 0)] * len(pads)
    return convolve(x, read(m.weight), read(m.bias), m.stride, pads, m.dilation, m.groups)


def convolve(
    x: Array, weight: Array, bias: Array | None, stride: Any, pads: Any, dilation: Any = None, groups: int = 1
) -> Array:
    """Convolution in PyTorch's layout."""
    # Channels first is JAX's default too.
    z = lax.conv_general_dilated(x, weight, stride, pads, rhs_dilation=dilation, feature_group_count=groups)
    return z if bias is None else z + bias.reshape(-1, *[1] * (z.ndim - 2))


@twin_of(nn.Embedding)
def embedding(m: nn.Embedding, read: Read, x: Array) -> Array:
    weight = read(m.weight)
    if m.padding_idx is not None:  # its entry is looked up, not trained
        weight = weight.at[m.padding_idx].set(lax.stop_gradient(weight[m.padding_idx]))
    return weight[x]


def normalise(x: Array, axes: tuple[int, ...], eps: float) -> Array:
    """x less its mean, over its standard deviation, along `axes`."""
    return (x - x.mean(axes, keepdims=True)) * lax.rsqrt(x.var(axes, keepdims=True) + eps)


@twin_of(nn.GroupNorm)
def group_norm(m: nn.GroupNorm, read: Read, x: Array) -> Array:
    split = x.reshape(x.shape[0], m.num_groups, -1)
    z = normalise(split, (2,), m.eps).reshape(x.shape)
    each = (-1, *[1] * (x.ndim - 2))
    return z * read(m.weight).reshape(each) + read(m.bias).reshape(each) if m.affine else z


@twin_of(nn.LayerNorm)
def layer_norm(m: nn.LayerNorm, read: Read, x: Array) -> Array:
    z = normalise(x, tuple(range(-len(m.normalized_shape), 0)), m.eps)
    if m.elementwise_affine:
        z = z * read(m.weight)
    return z if m.bias is None else z + read(m.bias)


RULES |= {
    nn.Identity: lambda m, read, x: x,
    nn.Flatten: lambda m, read, x: x.reshape(*x.shape[: m.start_dim], -1, *x.shape[m.end_dim % x.ndim + 1 :]),
    nn.Sequential: lambda m, read, x: reduce(lambda y, child: run(child, read, y), m, x),
    nn.Linear: lambda m, read, x: affine(x, read(m.weight), read(m.bias)),
    nn.Tanh: lambda m, read, x: jnp.tanh(x),
    nn.ReLU: lambda m, read, x: jax.nn.relu(x),
    nn.SiLU: lambda m, read, x: jax.nn.silu(x),
    nn.GELU: lambda m, read, x: jax.nn.gelu(x, approximate=m.approximate == "tanh"),
}


@twin_of(nn.MaxPool2d)
def max_pool(m: nn.MaxPool2d, read: Read, x: Array) -> Array:
    size, stride, padding = (pair(v) for v in (m.kernel_size, m.stride, m.padding))
    pads = ((0, 0), (0, 0), *((p, p) for p in padding))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, *size), (1, 1, *stride), pads)


def pair(v: Any) -> tuple[int, int]:
    """One number for both dimensions, or one for each."""
    return (v, v) if isinstance(v, int) else tuple(v)


@twin_of(nn.AdaptiveAvgPool2d)
def adaptive_average_pool(m: nn.AdaptiveAvgPool2d, read: Read, x: Array) -> Array:
    for axis, count in zip((2, 3), pair(m.output_size), strict=True):
        n = x.shape[axis]
        bins = [(i * n // count, -(-(i + 1) * n // count)) for i in range(count)]
        x = jnp.stack([lax.slice_in_dim(x, a, b, axis=axis).mean(axis) for a, b in bins], axis)
    return x


Step = Callable[[Array, Any], Any]  # the gates' input [B, gates] and a state, to the next state


def lstm_step(weight: Array, bias: Array | None, gates: Array, state: Any) -> Any:
    hidden, cell = state
    i, f, g, o = jnp.split(gates + affine(hidden, weight, bias), 4, -1)
    cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(cell), cell


def gru_step(weight: Array, bias: Array | None, gates: Array, state: Any) -> Any:
    (hidden,) = state
    (r, z, n), (hr, hz, hn) = jnp.split(gates, 3, -1), jnp.split(affine(hidden, weight, bias), 3, -1)
    z = jax.nn.sigmoid(z + hz)
    return ((1 - z) * jnp.tanh(n + jax.nn.sigmoid(r + hr) * hn) + z * hidden,)


@twin_of(nn.LSTM, nn.GRU)
def recurrent(m: nn.RNNBase, read: Read, x: Array) -> Array:
    """The outputs [B, T, directions * hidden] only, not the last states."""
    step, states = (lstm_step, 2) if isinstance(m, nn.LSTM) else (gru_step, 1)
    for layer in range(m.num_layers):
        outputs = []
        for reverse in (False, True)[: 1 + m.bidirectional]:
            end = f"_l{layer}" + "_reverse" * reverse
            w_in, w_hidden, b_in, b_hidden = (
                read(getattr(m, name + end, None)) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            gates = affine(x, w_in, b_in).swapaxes(0, 1)
            zero = (jnp.zeros((x.shape[0], m.hidden_size), x.dtype),) * states

            def scanned(state: Any, g: Array, step: Any = partial(step, w_hidden, b_hidden)) -> Any:
                state = step(g, state)
                return state, state[0]

            outputs.append(lax.scan(scanned, zero, gates, reverse=reverse)[1].swapaxes(0, 1))
        x = jnp.concatenate(outputs, -1)
    return x


# Blocks of harness.models ---------------------------------------------------------------------------------


@twin_of(WSConv2d)
def standardised_convolution(m: WSConv2d, read: Read, x: Array) -> Array:
    weight = read(m.weight)
    fan_in = weight[0].size
    variance = weight.var((1, 2, 3), keepdims=True)
    scale = lax.rsqrt(jnp.maximum(variance * fan_in, m.epsilon)) * read(m.gain).reshape(-1, 1, 1, 1)
    weight = (weight - weight.mean((1, 2, 3), keepdims=True)) * scale
    return convolve(x, weight, read(m.bias), pair(m.stride), [(m.padding, m.padding)] * 2)


RULES |= {
    resnet.WideBlock: lambda m, read, x: run(m.skip, read, x) + run(m.branch, read, x),
    sequence.Mean: lambda m, read, x: x.mean(1),
    resnet.ProjectedBlock: lambda m, read, x: jax.nn.relu(run(m.skip, read, x) + run(m.branch, read, x)),
}


@twin_of(resnet.BasicBlock)
def basic_block(m: resnet.BasicBlock, read: Read, x: Array) -> Array:
    skip = x[:, :, :: m.stride, :: m.stride]
    if m.extra:
        skip = jnp.pad(skip, ((0, 0), (m.extra // 2, m.extra - m.extra // 2), (0, 0), (0, 0)))
    if m.order == "conv-relu-gn":
        out = run(m.norm1, read, jax.nn.relu(run(m.conv1, read, x)))
        return skip + run(m.norm2, read, jax.nn.relu(run(m.conv2, read, out)))
    out = jax.nn.relu(run(m.norm1, read, run(m.conv1, read, x)))
    return jax.nn.relu(skip + run(m.norm2, read, run(m.conv2, read, out)))


@twin_of(sequence.Attention)
def attention(m: sequence.Attention, read: Read, x: Array) -> Array:
    heads = (*x.shape[:2], m.heads, -1)
    q, k, v = (t.reshape(heads) for t in jnp.split(run(m.qkv, read, x), 3, -1))
    scores = jnp.einsum("bshd,bthd->bhst", q, k) / jnp.sqrt(jnp.asarray(q.shape[-1], q.dtype))
    mixed = jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(scores, -1), v)
    return run(m.out, read, mixed.reshape(x.shape))


@twin_of(sequence.EncoderLayer)
def encoder_layer(m: sequence.EncoderLayer, read: Read, x: Array) -> Array:
    x = x + run(m.attend, read, x)
    return x + run(m.think, read, x)


@twin_of(sequence.Embedded)
def embedded(m: sequence.Embedded, read: Read, x: Array) -> Array:
    numbers = jnp.clip(x.astype(jnp.int32), 0, m.tokens.num_embeddings - 1)
    return run(m.tokens, read, numbers) + run(m.positions, read, jnp.arange(x.shape[1]))


@twin_of(sequence.Recurrent)
def last_step(m: sequence.Recurrent, read: Read, x: Array) -> Array:
    if x.ndim == 4:
        x = x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)
    return run(m.head, read, run(m.rnn, read, x)[:, -1])
