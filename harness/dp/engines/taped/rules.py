"""Per-layer rules: from a layer's inputs and output gradient to the per-example gradients of its parameters.

A rule multiplies nothing out: it returns the `Gradient` objects of `harness.dp.engines.taped.gradients`, which engines
ask for norms and sums.

Shapes: B examples, T positions of a layer within one example, fan-in d, outputs p. An input arrives as [B * k, ...],
the k rows of one example next to each other (k is 1 unless a model folds windows or frames into the batch), the output
gradient likewise; it is the gradient of the SUM of the examples' losses, so row i belongs to example i alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.dp.engines.rows import wide
from harness.dp.engines.taped import attention, recurrent
from harness.dp.engines.taped.gradients import Gradient, Lookup, Outer, Rows
from harness.dp.engines.taped.patches import Geometry, Patches
from harness.dp.native import kernels


def positions_summed(g: Tensor, examples: int, keep: int) -> Tensor:
    """`g` [B * k, ..., (keep last dimensions)] summed over all positions of each example: [B, (keep last)]."""
    return g.reshape(examples, -1, *g.shape[g.ndim - keep :]).sum(1)


def channels_summed(g: Tensor, examples: int) -> Tensor:
    """`g` [B * k, C, ...] summed over all positions of each example: [B, C]."""
    return g.reshape(examples, -1, g.shape[1], math.prod(g.shape[2:])).sum((1, 3))


Rule = Callable[[Any, Tensor, Tensor, int, Collection[str]], dict[str, Gradient]]
CallRule = Callable[..., dict[str, Gradient]]  # of a module with all its arguments and results


def linear(module: nn.Linear, x: Tensor, g: Tensor, examples: int, wanted: Collection[str]) -> dict[str, Gradient]:
    """Input [B * k, ..., d], output gradient [B * k, ..., p]."""
    x, g = x.reshape(examples, -1, x.shape[-1]), g.reshape(examples, -1, g.shape[-1])
    found: dict[str, Gradient] = {}
    if "weight" in wanted:
        found["weight"] = Outer(x, g)
    if "bias" in wanted:
        found["bias"] = Rows(wide(g).sum(1) if g.shape[1] > 1 else g[:, 0])
    return found


def convolution(
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, g: Tensor, examples: int, wanted: Collection[str]
) -> dict[str, Gradient]:
    """Input [B * k, C, ...], output gradient [B * k, p, ...]; any stride, padding, dilation and groups."""
    found: dict[str, Gradient] = {}
    if "weight" in wanted:
        padding = module.padding
        if isinstance(padding, str) or module.padding_mode != "zeros":
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
            padding = (0,) * len(module.kernel_size)
        geometry = Geometry(module.kernel_size, module.stride, padding, module.dilation, module.groups)
        found["weight"] = Patches(x.unflatten(0, (examples, -1)), g.unflatten(0, (examples, -1)), geometry)
    if "bias" in wanted:
        found["bias"] = Rows(channels_summed(wide(g), examples))
    return found


def embedding(
    module: nn.Embedding, x: Tensor, g: Tensor, examples: int, wanted: Collection[str]
) -> dict[str, Gradient]:
    """Input indices [B * k, ...], output gradient [B * k, ..., d]; the padding entry gets no gradient."""
    index, g = x.reshape(examples, -1), g.reshape(examples, -1, g.shape[-1])
    if module.padding_idx is not None:
        g = g.masked_fill((index == module.padding_idx)[:, :, None], 0)
    return {"weight": Lookup(index, g, module.num_embeddings)}


def _affine(
    found: tuple[Tensor, Tensor] | None,
    normalised: Callable[[], Tensor],
    g: Tensor,
    summed: Callable[[Tensor], Tensor],
    wanted: Collection[str],
) -> dict[str, Gradient]:
    """Scale and shift of a normalised input, sum_t g_t * x^_t and sum_t g_t: from a kernel, or else in the open."""
    if found is None:
        shift = summed(wide(g))
        scale = summed(wide(g) * wide(normalised())) if "weight" in wanted else shift
        found = scale, shift
    both = dict(zip(("weight", "bias"), found, strict=True))
    return {name: Rows(both[name]) for name in wanted}


def layer_norm(
    module: nn.LayerNorm, x: Tensor, g: Tensor, examples: int, wanted: Collection[str]
) -> dict[str, Gradient]:
    """Input and output gradient [B * k, ..., *normalized_shape]."""
    shape, size = module.normalized_shape, math.prod(module.normalized_shape)
    rows = kernels.layer_norm_rows(x, g, examples, size, module.eps) if kernels.serve(x, g) else None
    return _affine(
        rows and (rows[0].unflatten(1, shape), rows[1].unflatten(1, shape)),
        lambda: F.layer_norm(x, shape, None, None, module.eps),
        g,
        lambda t: positions_summed(t, examples, len(shape)),
        wanted,
    )


def rms_norm(module: nn.RMSNorm, x: Tensor, g: Tensor, examples: int, wanted: Collection[str]) -> dict[str, Gradient]:
    """Input and output gradient [B * k, ..., *normalized_shape]."""
    shape, size = module.normalized_shape, math.prod(module.normalized_shape)
    eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
    rows = kernels.layer_norm_rows(x, g, examples, size, eps, centred=False) if kernels.serve(x, g) else None
    return _affine(
        rows and (rows[0].unflatten(1, shape), rows[1].unflatten(1, shape)),
        lambda: F.rms_norm(x, list(shape), None, module.eps),
        g,
        lambda t: positions_summed(t, examples, len(shape)),
        wanted,
    )


def group_norm(
    module: nn.GroupNorm, x: Tensor, g: Tensor, examples: int, wanted: Collection[str]
) -> dict[str, Gradient]:
    """Input and output gradient [B * k, C, ...]. The scale has one entry per channel, not per group."""
    served = len(x) == examples and kernels.serve(x, g)
    rows = kernels.group_norm_rows(x, g, module.num_groups, module.eps) if served else None
    return _affine(
        rows,
        lambda: F.group_norm(x, module.num_groups, None, None, module.eps),
        g,
        lambda t: channels_summed(t, examples),
        wanted,
    )


def instance_norm(
    module: nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d,
    x: Tensor,
    g: Tensor,
    examples: int,
    wanted: Collection[str],
) -> dict[str, Gradient]:
    """Input and output gradient [B * k, C, ...]."""
    own = module.training or not module.track_running_stats  # statistics of the input itself
    mean, var = (None, None) if own else (module.running_mean, module.running_var)
    served = own and len(x) == examples and kernels.serve(x, g)
    rows = kernels.group_norm_rows(x, g, x.shape[1], module.eps) if served else None
    return _affine(
        rows,
        lambda: F.instance_norm(x, mean, var, None, None, own, 0.0, module.eps),
        g,
        lambda t: channels_summed(t, examples),
        wanted,
    )


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Conv3d: convolution,
    nn.Embedding: embedding,
    nn.LayerNorm: layer_norm,
    nn.RMSNorm: rms_norm,
    nn.GroupNorm: group_norm,
    nn.InstanceNorm1d: instance_norm,
    nn.InstanceNorm2d: instance_norm,
    nn.InstanceNorm3d: instance_norm,
}


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of a module that computes what its class in torch.nn computes; None for any other.

    A subclass keeps the rule as long as it overrides none of the methods that compute, and holds no parameters but
    `weight` and `bias` (weight normalisation and parametrisations hold others).
    """
    if not set(module._parameters.keys()) <= {"weight", "bias"} or "forward" in vars(module):
        return None
    for base, rule in RULES.items():
        if isinstance(module, base):
            same = all(
                getattr(type(module), method, None) is getattr(base, method, None)
                for method in ("forward", "_conv_forward", "_apply_instance_norm")
            )
            return rule if same else None
    return None


def call_rule_for(module: nn.Module) -> CallRule | None:
    """The rule of a recurrent or attention layer, served with all that is inside; None for any other module."""
    if recurrent.accepts(module):
        return recurrent.recurrent
    return attention.attention if attention.accepts(module) else None
