"""The per-layer rule for nn.MultiheadAttention, through its projections.

The projections of queries, keys, values and of the result are linear layers, so their per-example gradients are outer
products. What lies between holds no parameters but `bias_k` and `bias_v`, a key and a value of every example's own;
it is computed again from the projected inputs, and one backward pass through it gives the gradients at all of them.

Shapes: N rows (those of one example next to each other), L queries, S keys and values, E features in H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.dp.engines.rows import wide
from harness.dp.engines.taped.gradients import Costs, Gradient, Outer, Rows

SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
PARAMETERS = {"in_proj_weight", *SEPARATE, "in_proj_bias", "bias_k", "bias_v", "out_proj.weight", "out_proj.bias"}


class Called(NamedTuple):
    """The arguments of nn.MultiheadAttention.forward."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None = None
    need_weights: bool = True
    attn_mask: Tensor | None = None
    average_attn_weights: bool = True
    is_causal: bool = False


@dataclass
class Stacked(Gradient):
    """A weight whose blocks of rows have gradients of their own."""

    parts: tuple[Gradient, ...]

    def __post_init__(self) -> None:
        self.heights = tuple(part.shape[0] for part in self.parts)
        self.shape = torch.Size((sum(self.heights), *self.parts[0].shape[1:]))

    @property
    def held(self) -> bool:
        return all(part.held for part in self.parts)

    @property
    def rows(self) -> Tensor:
        return torch.cat([part.rows for part in self.parts], 1)

    @property
    def footprint(self) -> int:
        return sum(part.footprint for part in self.parts)

    def costs(self) -> Costs:
        return Costs(*map(sum, zip(*(part.costs() for part in self.parts), strict=True)))

    def squares(self, lean: bool = False) -> Tensor:
        return torch.stack([part.squares(lean) for part in self.parts]).sum(0)

    def weighted(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            return torch.cat([part.weighted(v) for part in self.parts])
        for part, block in zip(self.parts, out.split(self.heights), strict=True):
            part.weighted(v, block)
        return out

    def some(self, chosen: Tensor) -> Gradient:
        return Stacked(tuple(part.some(chosen) for part in self.parts))

    def kept(self, chosen: Tensor) -> Gradient:
        return Stacked(tuple(part.kept(chosen) for part in self.parts))

    def __add__(self, other: Gradient) -> Gradient:
        if isinstance(other, Stacked) and self.heights == other.heights:
            return Stacked(tuple(a + b for a, b in zip(self.parts, other.parts, strict=True)))
        return super().__add__(other)


class Projection(NamedTuple):
    """What one input is projected to, as queries, keys or values or as several of these."""

    uses: slice  # which of the three
    x: Tensor  # [N, positions, features]
    y: Tensor  # [N, positions, E for each use], a leaf of the graph of the attention


def attention(
    module: nn.MultiheadAttention,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    examples: int,
    wanted: Collection[str],
) -> dict[str, Gradient]:
    """Called as the module was; outputs and their gradients [attn_output] or [attn_output, attn_weights].

    The module's parameters are those of the pass. Queries, keys and values hold k rows for each example, next to each
    other, in dimension 0 with batch_first and 1 without. Raises LookupError for unbatched and for nested sequences.
    """
    call = Called(*args, **kwargs)
    if call.query.ndim != 3 or call.query.is_nested:
        raise LookupError("only batches of sequences of one length have a rule")
    dtype = wide(outputs[0]).dtype

    def rows_first(t: Tensor) -> Tensor:
        return wide(t if module.batch_first else t.transpose(0, 1)).to(dtype)

    def own(t: Tensor) -> Tensor:
        """[N, positions, .] as [B, positions, .]"""
        return t.detach().reshape(examples, -1, t.shape[2])

    w = {name: wide(p.detach()).to(dtype) for name, p in module.named_parameters()}
    projections = [
        _project(rows_first((call.query, call.key, call.value)[uses.start]), w, uses)
        for uses in _uses(call, "in_proj_weight" in w)
    ]
    biases = [w[name].expand(projections[0].x.shape[0], 1, -1).clone() for name in ("bias_k", "bias_v") if name in w]
    leaves = [t.requires_grad_() for t in (*(p.y for p in projections), *biases)]
    with torch.enable_grad():
        q, k, v = (t for p in projections for t in p.y.chunk(p.uses.stop - p.uses.start, 2))
        if biases:
            k, v = torch.cat([k, biases[0]], 1), torch.cat([v, biases[1]], 1)
        result, shares = attend(q, k, v, call, module.num_heads, module.add_zero_attn)

    g = torch.zeros_like(result) if cotangents[0] is None else rows_first(cotangents[0])
    pairs: list[tuple[Tensor, Tensor]] = [(result, g @ w["out_proj.weight"])]
    if shares is not None and cotangents[1] is not None:
        pairs.append((shares, wide(cotangents[1]).to(dtype)))
    towards, values = zip(*pairs, strict=True)
    gs = torch.autograd.grad(towards, leaves, values, materialize_grads=True)

    weights = [Outer(own(p.x), own(y)) for p, y in zip(projections, gs, strict=False)]
    found: dict[str, Gradient] = {"out_proj.weight": Outer(own(result), own(g)), "out_proj.bias": Rows(own(g).sum(1))}
    if "in_proj_weight" in w:
        found["in_proj_weight"] = weights[0] if len(weights) == 1 else Stacked(tuple(weights))
    else:
        found |= zip(SEPARATE, weights, strict=True)
    found["in_proj_bias"] = Rows(torch.cat([weight.g.sum(1) for weight in weights], 1))
    for name, bias in zip(("bias_k", "bias_v"), gs[len(projections) :], strict=False):
        found[name] = Rows(own(bias).sum(1)[:, None, None])
    return {name: found[name] for name in wanted}


def _uses(call: Called, packed: bool) -> list[slice]:
    """Which of queries, keys and values come from one input, by one product with rows of a packed weight."""

    def same(a: Tensor, b: Tensor) -> bool:
        return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())

    if packed and same(call.key, call.value):
        return [slice(0, 3)] if same(call.query, call.key) else [slice(0, 1), slice(1, 3)]
    return [slice(0, 1), slice(1, 2), slice(2, 3)]


def _project(x: Tensor, w: Mapping[str, Tensor], uses: slice) -> Projection:
    if "in_proj_weight" in w:
        weight = torch.cat(w["in_proj_weight"].chunk(3)[uses])
    else:
        weight = w[SEPARATE[uses.start]]
    bias = torch.cat(w["in_proj_bias"].chunk(3)[uses]) if "in_proj_bias" in w else None
    return Projection(uses, x, F.linear(x, weight, bias))


def attend(q: Tensor, k: Tensor, v: Tensor, call: Called, heads: int, add_zero: bool) -> tuple[Tensor, Tensor | None]:
    """Attention of projected q [N, L, E] to k and v [N, S', E], S' - S of them added: [N, L, E], and the shares.

    By the same operations as the module's own, so that what is not finite there is not finite here.
    """
    if add_zero:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    causal = call.is_causal and call.key_padding_mask is None and not call.need_weights
    mask = None if causal or call.attn_mask is None else _additive(call.attn_mask, q)
    if mask is not None and mask.ndim == 3:
        mask = mask.unflatten(0, (-1, heads))
    if call.key_padding_mask is not None:
        padding = _additive(call.key_padding_mask, q)[:, None, None]
        mask = padding if mask is None else mask + padding
    if mask is not None:
        mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))
    if not call.need_weights:
        return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal).transpose(1, 2).flatten(2), None
    scores = q * math.sqrt(1 / q.shape[3]) @ k.mT
    shares = (scores if mask is None else scores + mask).softmax(3)
    return (shares @ v).transpose(1, 2).flatten(2), shares.mean(1) if call.average_attn_weights else shares


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -math.inf)
    return mask.to(like.dtype)


ATTENTION_RULES: dict[type[nn.Module], Callable[..., dict[str, Gradient]]] = {nn.MultiheadAttention: attention}


def accepts(module: nn.Module) -> bool:
    """Whether the rule serves this module: it computes what its class computes, and draws no random numbers."""
    if not isinstance(module, nn.MultiheadAttention) or "forward" in vars(module):
        return False
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return (
        type(module).forward is nn.MultiheadAttention.forward
        and parameters.keys() <= PARAMETERS
        and len({id(p) for p in parameters.values()}) == len(parameters)
        and not (module.training and module.dropout)
    )
