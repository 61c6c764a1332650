"""Per-layer rules for nn.LSTM, nn.GRU and nn.RNN: backward through time by hand, without weight gradients.

A step of a recurrent layer reads its input x_t and the state h_{t-1} through two weights, W_ih and W_hh. With g_t the
gradient at what they give, the per-example gradients are sum_t g_t x_t^T and sum_t g_t h_{t-1}^T: those of linear
layers. Only g has to be found. The forward pass left its output, the states of all times; the gates of all times
follow from one matrix product, their local derivatives from a few passes over memory, and nothing but g_{t+1} W_hh is
left to do step by step.

Equations: those of PyTorch's documentation of the three classes (the GRU's reset gate acts after W_hn and b_hn).
Shapes: T steps, N rows (those of one example next to each other), d inputs, h hidden units, p outputs of a direction
(p = h but with proj_size). Inside, time comes first, in the order in which a direction reads the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from harness.dp.engines.rows import product, wide
from harness.dp.engines.taped.gradients import Gradient, Outer, Rows, placed
from harness.dp.native import kernels


@dataclass
class Steps(Outer):
    """The `Outer` of a weight read at every step, from views [B, T, .] of tensors that lie in memory time first."""

    def _weighted(self, v: Tensor, out: Tensor | None) -> Tensor:
        a, g = self.a.double().transpose(0, 1), self.g.double().transpose(0, 1)
        return placed(g.flatten(0, 1).mT @ (a * v.double().unsqueeze(1)).flatten(0, 1), out)


class Direction(NamedTuple):
    """What one direction of one layer read and gave, and the gradient at what it gave."""

    weights: Mapping[str, Tensor]  # those it has of weight_ih, weight_hh, bias_ih, bias_hh, weight_hr
    x: Tensor  # [T, N, d]
    before: Tensor  # the states h_{t-1} that its steps began with [T, N, p]
    after: Tensor  # and those that they gave [T, N, p]
    cell: Tensor | None  # c_0 [N, h]
    dh: Tensor  # gradient at `after` as an output [T, N, p]; made complete along the way
    dc: Tensor | None  # gradient at the last cell state [N, h]


class Traced(NamedTuple):
    """Gradients at what the weights of one direction give."""

    ih: Tensor  # at W_ih x + b_ih [T, N, gates * h]
    hh: Tensor  # at W_hh h_{t-1} + b_hh [T, N, gates * h]
    unprojected: Tensor | None = None  # what W_hr reads [T, N, h]


def tanh_(t: Tensor) -> Tensor:
    """tanh in place, right to a rounding unit of 1, through the sigmoid: vectorised where tanh may not be."""
    return t.mul_(2).sigmoid_().mul_(2).sub_(1)


def lstm(layer: Direction) -> Traced:
    """i, f, o = sigmoid(.), g = tanh(.); c_t = f c_{t-1} + i g; h_t = W_hr (o tanh(c_t)), or without W_hr."""
    w = layer.weights
    gates = product(
        torch.cat([layer.x, layer.before], 2),
        torch.cat([w["weight_ih"], w["weight_hh"]], 1),
        w["bias_ih"] + w["bias_hh"] if "bias_ih" in w else None,
    ).unflatten(2, (4, -1))
    dc = gates.new_zeros(gates.shape[1:2] + gates.shape[3:])
    cell = dc.clone() if layer.cell is None else layer.cell.clone(memory_format=torch.contiguous_format)
    served = kernels.serve(gates, cell, layer.dh) is not None
    slope, forget, shown = (kernels.lstm_local if served else lstm_local)(gates, cell)

    back, down = w["weight_hh"].mT.contiguous(), w["weight_hr"].mT.contiguous() if "weight_hr" in w else None
    if layer.dc is not None:
        dc += layer.dc
    found = gates.flatten(2)
    steps = zip(found, gates, layer.dh, slope, forget, strict=True)
    later = None
    for now, four, dh, bend, kept in reversed(list(steps)):
        if later is not None:
            total = product(later, back, plus=dh)
            dh = total if down is None else dh.copy_(total)
        if down is not None:
            dh = product(dh, down)
        if served:
            kernels.lstm_step(four, dh, bend, kept, dc)
        else:
            dc.addcmul_(dh, bend)
            four[:, :3].mul_(dc.unsqueeze(1))
            four[:, 3].mul_(dh)
            dc.mul_(kept)
        later = now
    return Traced(found, found, None if down is None else shown)


def lstm_local(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `kernels.lstm_local` computes, of any type and on any device."""
    i, f, g, o = gates.unbind(2)
    g.mul_(2)
    gates.sigmoid_()
    g.mul_(2).sub_(1)  # the sigmoid of twice as much gives tanh
    forget, new = f.clone(), i * g
    cells = torch.empty_like(new)
    before = torch.empty_like(new)
    for t in range(len(gates)):
        before[t] = cell if t == 0 else cells[t - 1]
        torch.addcmul(new[t], forget[t], before[t], out=cells[t])
    tanh = tanh_(cells)
    shown = o * tanh
    slope = torch.addcmul(o, shown, tanh, value=-1)
    torch.addcmul(i, new, g, value=-1, out=g)
    torch.addcmul(new, new, i, value=-1, out=i)
    torch.addcmul(f, f, forget, value=-1, out=f).mul_(before)
    torch.addcmul(shown, shown, o, value=-1, out=o)
    return slope, forget, shown


def gru(layer: Direction) -> Traced:
    """r, z = sigmoid(.); n = tanh(W_in x + b_in + r (W_hn h + b_hn)); h_t = (1 - z) n + z h_{t-1}."""
    w = layer.weights
    x = product(layer.x, w["weight_ih"], w.get("bias_ih")).unflatten(2, (3, -1))
    h = product(layer.before, w["weight_hh"], w.get("bias_hh")).unflatten(2, (3, -1))
    r, z = x[:, :, :2].add_(h[:, :, :2]).sigmoid_().unbind(2)
    hidden = h[:, :, 2]
    n = tanh_(x[:, :, 2].addcmul_(r, hidden))
    into = 1 - z
    candidate = into.mul(torch.addcmul(n.new_ones(()), n, n, value=-1))  # d h_t / d n, before the tanh
    local = torch.empty_like(h)  # d h_t / d (r, z, W_hn h + b_hn), before the gates' functions
    torch.mul(candidate, r, out=local[:, :, 2])
    torch.mul(local[:, :, 2], hidden.mul(1 - r), out=local[:, :, 0])
    torch.mul(into.mul_(z), layer.before - n, out=local[:, :, 1])
    through_time(layer, local, z)
    ih = local.clone()
    torch.mul(layer.dh, candidate, out=ih[:, :, 2])
    return Traced(ih.flatten(2), local.flatten(2))


def rnn(layer: Direction, relu: bool) -> Traced:
    """h_t = tanh(.) or relu(.) of W_ih x + b_ih + W_hh h_{t-1} + b_hh: the output alone gives the derivative."""
    after = layer.after
    slope = (after > 0).to(after.dtype) if relu else 1 - after.square()
    through_time(layer, slope.unsqueeze(2), None)
    return Traced(slope, slope)


def through_time(layer: Direction, local: Tensor, carry: Tensor | None) -> None:
    """Turn local derivatives d h_t / d a_t [T, N, gates, h] into gradients at a_t, and complete `layer.dh`, in place.

    a_t is what W_hh gives; `carry` [T, N, h] is the part of h_{t-1} that h_t takes over as it is.
    """
    back, flat, dh = layer.weights["weight_hh"].mT.contiguous(), local.flatten(2), layer.dh
    for t in reversed(range(len(dh))):
        local[t].mul_(dh[t].unsqueeze(1))
        if t:
            if carry is not None:
                dh[t - 1].addcmul_(dh[t], carry[t])
            dh[t - 1] = product(flat[t], back, plus=dh[t - 1])


TRACE: dict[str, Callable[[Direction], Traced]] = {
    "LSTM": lstm,
    "GRU": gru,
    "RNN_TANH": lambda layer: rnn(layer, relu=False),
    "RNN_RELU": lambda layer: rnn(layer, relu=True),
}
FORWARD: dict[str, Callable[..., Any]] = {mode: getattr(torch._VF, mode.lower()) for mode in TRACE}


def recurrent(
    module: nn.RNNBase,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    examples: int,
    wanted: Collection[str],
) -> dict[str, Gradient]:
    """Called with (input, hx); outputs and their gradients [output, h_n] or [output, h_n, c_n].

    The module's parameters are those of the pass. The input holds k rows for each example, next to each other, in
    dimension 0 with batch_first and 1 without. Raises LookupError for packed and for unbatched sequences.
    """
    x, states = _arguments(*args, **kwargs)
    if not isinstance(x, Tensor) or x.ndim != 3 or x.is_nested:
        raise LookupError("only batches of sequences of one length have a rule")

    def steps_first(t: Tensor) -> Tensor:
        return wide(t.transpose(0, 1) if module.batch_first else t).to(dtype)

    dtype = wide(outputs[0]).dtype
    state = [wide(t).to(dtype) for t in ((states,) if isinstance(states, Tensor) else states or ())]
    ends = [None if c is None else wide(c).to(dtype) for c in cotangents[1:]]
    weights = layer_weights(module, dtype)
    directions = 1 + module.bidirectional
    lowest = min(int(name.split("_l")[1].split("_")[0]) for name in wanted)

    inputs = [steps_first(x)]
    for layer in range(module.num_layers - 1):
        inputs.append(_forward(module, inputs[-1], state, weights, layer))
    results = [*inputs[1:], steps_first(outputs[0])]
    above = None if cotangents[0] is None else steps_first(cotangents[0])

    found: dict[str, Gradient] = {}
    for layer in reversed(range(lowest, module.num_layers)):
        x, below = inputs[layer], None
        for which, after in enumerate(results[layer].chunk(directions, 2)):
            index = layer * directions + which
            dh = torch.zeros_like(after) if above is None else above.chunk(directions, 2)[which]
            sequences = [x, after, dh]
            if which:
                sequences = [t.flip(0) for t in sequences]
            end = [None if t is None else t[index] for t in ends]
            start = [t[index] for t in state]
            direction = _direction(weights[index], sequences, start, end)
            trace = TRACE[module.mode](direction)
            suffix = f"_l{layer}" + "_reverse" * which
            for kind, gradient in _gradients(direction, trace, examples).items():
                if kind + suffix in wanted:
                    found[kind + suffix] = gradient()
            if layer > lowest:
                dx = product(trace.ih, weights[index]["weight_ih"].mT.contiguous())
                dx = dx.flip(0) if which else dx
                below = dx if below is None else below.add_(dx)
        above = below
    return found


RECURRENT_RULES: dict[type[nn.RNNBase], Callable[..., dict[str, Gradient]]] = {
    nn.LSTM: recurrent,
    nn.GRU: recurrent,
    nn.RNN: recurrent,
}


def accepts(module: nn.Module) -> bool:
    """Whether the rule serves this module: it computes what its class computes, and draws no random numbers."""
    base = next((base for base in RECURRENT_RULES if isinstance(module, base)), None)
    if base is None or not isinstance(module, nn.RNNBase) or "forward" in vars(module):
        return False
    names = [name for names in module._all_weights for name in names]
    return (
        type(module).forward is base.forward
        and type(module).permute_hidden is base.permute_hidden
        and set(module._parameters) == set(names)
        and len({id(p) for p in module._parameters.values()}) == len(names)
        and not (module.training and module.dropout and module.num_layers > 1)
    )


def _arguments(input: Any, hx: Any = None) -> tuple[Any, Any]:
    return input, hx


def layer_weights(module: nn.RNNBase, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """For each layer and direction, in PyTorch's order, its weights by their names without the layer's number."""
    return [
        {name.split("_l")[0]: wide(getattr(module, name).detach()).to(dtype) for name in names}
        for names in module._all_weights
    ]


def _forward(
    module: nn.RNNBase, x: Tensor, state: Sequence[Tensor], weights: Sequence[Mapping[str, Tensor]], layer: int
) -> Tensor:
    """The output [T, N, directions * p] of one layer of a stack, from its input."""
    directions = 1 + module.bidirectional
    own = slice(layer * directions, (layer + 1) * directions)
    lstm = module.mode == "LSTM"
    if not state:
        some = weights[layer * directions]["weight_hh"]
        widths = (some.shape[1], module.hidden_size) if lstm else (some.shape[1],)
        start = [some.new_zeros(directions, x.shape[1], width) for width in widths]
    else:
        start = [t[own].contiguous() for t in state]
    flat = [w for each in weights[own] for w in each.values()]
    hx = start if lstm else start[0]
    return FORWARD[module.mode](x, hx, flat, module.bias, 1, 0.0, False, module.bidirectional, False)[0]


def _direction(
    weights: Mapping[str, Tensor], sequences: Sequence[Tensor], start: Sequence[Tensor], end: Sequence[Tensor | None]
) -> Direction:
    """From its input, its output and the gradient there, the states it began with and the gradients at its last."""
    x, after, dh = sequences
    first = start[0] if start else torch.zeros_like(after[0])
    dh = dh.clone(memory_format=torch.contiguous_format)
    if end[0] is not None:
        dh[-1] += end[0]
    before = torch.cat([first.unsqueeze(0), after[:-1]])
    return Direction(
        weights, x, before, after, start[1] if len(start) > 1 else None, dh, end[1] if len(end) > 1 else None
    )


def _gradients(layer: Direction, trace: Traced, examples: int) -> dict[str, Callable[[], Gradient]]:
    """By kind of parameter, what gives its gradient."""

    def own(t: Tensor) -> Tensor:
        """[T, N, .] as [B, positions, .]"""
        return t.unflatten(1, (examples, -1)).transpose(0, 1).flatten(1, 2)

    @cache
    def summed(t: Tensor) -> Tensor:
        return t.sum(0).unflatten(0, (examples, -1)).sum(1)

    def weight(a: Tensor, g: Tensor) -> Callable[[], Gradient]:
        return lambda: Steps(own(a), own(g))

    found = {
        "weight_ih": weight(layer.x, trace.ih),
        "weight_hh": weight(layer.before, trace.hh),
        "bias_ih": lambda: Rows(summed(trace.ih)),
        "bias_hh": lambda: Rows(summed(trace.hh)),
    }
    if trace.unprojected is not None:
        found["weight_hr"] = weight(trace.unprojected, layer.dh)
    return found
