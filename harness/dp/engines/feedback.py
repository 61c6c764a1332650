"""Direct feedback alignment: a private sum of outer products that are no gradients, and a bound that needs none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import CheckpointError

from harness.dp.clip import Clip, State, Unclipped
from harness.dp.clip.flat import shortened
from harness.dp.clip.rule import within_reach
from harness.dp.engines.chain import PRODUCTS, SCALINGS, Layer, Tape, cut, layers_of
from harness.dp.engines.engine import SPEED, Engine, Unserved, joined, losses_of, trainable
from harness.dp.engines.memory import refuse_memory_once
from harness.dp.engines.rows import full_precision
from harness.dp.engines.survey import modes, moved, probe_batch, refuse_mixing, untouched, watching
from harness.dp.engines.weights import held
from harness.dp.loss import Batch, Loss
from harness.dp.native.memory import keep_freed_memory
from harness.dp.random import Stream
from harness.dp.release import Bounded, Observed, Relation, Release
from harness.dp.tree import Tree

MICROBATCH = 1024
# Examples in the two passes of a survey: two, lest a length be taken for the number of examples.
PROBES = (5, 3)


@dataclass(frozen=True)
class Feedback(Engine):
    """Direct feedback alignment (Noekland 2016, arXiv:1609.01596), as Lee and Kifer make it private (arXiv:2010.03701).

    The network is cut at the inputs of its trained products (linear layers and convolutions). What reaches the end
    of a piece is the output error e of an example, the gradient of its loss with respect to the model's outputs: as it
    is in the last piece, and times a fixed random matrix B in the others. From there it is taken back through the piece
    (activation, pooling, normalisation) to the layer's output, where it is delta [positions, outputs].

    With a [positions, features] the layer's input, windows unfolded and a one for the bias, an example adds
    delta'^T a' to the layer: delta' is delta shortened to the norm `error`, a' is a shortened to `activation`, both
    norms over all positions. By Cauchy and Schwarz |delta'^T a'| <= |delta'| |a'| <= error * activation, whatever the
    data, and over L layers an example adds at most sqrt(L) * error * activation. No gradient of an example, nor a norm
    of one, is computed. docs/feedback-alignment.md has the argument in full.

    `seed` draws B, which is public and the same in every step, on every device and in every precision. An entry has
    variance 1 / (entries of the piece's end), so that B keeps the expected norm of e. The microbatch changes memory and
    speed alone.
    """

    error: float = 1.0
    activation: float = 1.0
    seed: int = 0
    microbatch: int | None = field(default=None, metadata=SPEED)

    def __post_init__(self) -> None:
        within_reach(error=self.error, activation=self.activation)
        if self.microbatch is not None and self.microbatch < 1:
            raise ValueError(f"a microbatch holds at least one example, not {self.microbatch}")

    def accepts(self, loss: Loss, clip: Clip, model: nn.Module) -> str | None:
        """None, or the reason. What only a pass can show, `bounded` shows before it uses a model: see `survey`."""
        if type(clip) is not Unclipped:
            return f"feedback alignment bounds each example itself: write Unclipped() for {type(clip).__name__}"
        if loss.rows != 1:
            return f"{type(loss).__name__} makes an example of {loss.rows} rows, and feedback alignment takes one"
        return unserved(model)

    def bounded(
        self,
        loss: Loss,
        clip: Clip,
        model: nn.Module,
        w: Tree,
        batch: Batch,
        state: State,
        sigma: float,
        relation: Relation,
        step: int = 0,
    ) -> Bounded:
        """The release "grad" of one logical step.

        Raises ValueError for a model that is no chain of layers, or whose examples depend on each other.
        """
        # A rule would be ignored, and a claim might rest on it.
        if type(clip) is not Unclipped or loss.rows != 1:
            raise Unserved(str(self.accepts(loss, clip, model)))
        keep_freed_memory()
        layers = layers_of(model, w)
        chunk = self.microbatch or min(max(len(batch), 1), MICROBATCH)
        while True:
            try:
                total, parts = self._summed(chunk, layers, loss, model, w, batch)
                break
            except torch.OutOfMemoryError:  # an accelerator says when it is full: half as many may fit
                if chunk == 1:
                    raise
                chunk //= 2
        bound = math.sqrt(len(layers)) * self.error * self.activation * relation.moves
        none = w.flat.new_zeros(0)
        losses, clipped, non_finite = (
            joined([part[i] for part in parts]) if parts else none for i in range(3)
        )  # fmt: skip
        observed = Observed(losses, None, clipped.sum(), non_finite.sum(), type(self).__name__, chunk)
        release = Release(w.with_flat(total), bound, clip.split(sigma)["grad"])
        return Bounded({"grad": release}, observed)

    def _summed(
        self, chunk: int, layers: Mapping[str, Layer], loss: Loss, model: nn.Module, w: Tree, batch: Batch
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        """The flat sum of a logical batch, `chunk` examples at a time; for each, what `_add` returns."""
        total = torch.zeros_like(w.flat, dtype=torch.float64)
        views = w.layout.views(total)
        if not len(batch):
            return total, []
        order = order_for(layers, model, w, batch.x)
        refuse_memory_once(loss, model, w.views, batch)
        if due(model):
            with untouched(model, batch.x.device):
                refuse_mixed_examples(loss, model, w, batch)
        chunks = zip(batch.x.split(chunk), batch.y.split(chunk), strict=True)
        return total, [self._add(views, layers, order, loss, model, w, Batch(x, y)) for x, y in chunks]

    def _add(
        self,
        total: Mapping[str, Tensor],
        layers: Mapping[str, Layer],
        order: tuple[str, ...],
        loss: Loss,
        model: nn.Module,
        w: Tree,
        batch: Batch,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add a microbatch's contributions to `total`; losses [B], and whether each was shortened or not finite [B]."""
        with torch.enable_grad(), held(model, w.views):
            with cut(layers) as tape:
                outputs: list[Tensor] = []

                def forward(x: Tensor) -> Tensor:
                    tape.close(model(x))
                    outputs.append(tape.ends[-1].detach().requires_grad_())
                    return outputs[-1]

                losses = losses_of(loss, forward, batch)
            if tuple(call.layer.path for call in tape.calls) != order or len(outputs) != 1:
                raise RuntimeError("the model calls other layers than in the pass that it was accepted for")
            (error,) = torch.autograd.grad(losses.sum(), outputs)
            deltas = self._deltas(tape, error.flatten(1))
        with torch.no_grad(), full_precision(batch.x.device):
            sizes = torch.stack([d.double().flatten(1).square().sum(1).sqrt() for d in deltas])  # [L, B]
            reach = torch.stack([call.reach() for call in tape.calls])
            finite = (sizes.isfinite() & reach.isfinite()).all(0)
            back, ahead = shortened(sizes, self.error), shortened(reach, self.activation)
            for call, delta, v in zip(tape.calls, deltas, back * ahead, strict=True):
                # 0 * inf would not be zero.
                call.add(total, delta[finite], call.a[finite], v[finite])
        short = ((back < 1) | (ahead < 1)).any(0) & finite
        return losses.detach(), short, ~finite

    def _deltas(self, tape: Tape, error: Tensor) -> list[Tensor]:
        """The errors at the outputs of the called layers, [B, ...] each, from the outputs' error [B, K]."""
        deltas: list[Tensor] = []
        last = len(tape.ends) - 1
        for piece, end in enumerate(tape.ends):
            points = [call.z for call in tape.calls if call.piece == piece]
            if points:
                sent = error
                if piece < last:
                    shape = end[0].numel(), error.shape[1]
                    sent = error @ matrix(self.seed, piece, *shape, error.dtype, error.device).T
                deltas += torch.autograd.grad(end, points, sent.view_as(end))
        return deltas


@lru_cache(maxsize=64)
def matrix(seed: int, piece: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """B of a piece of the network, [rows, columns]: independent normal entries of variance 1 / rows."""
    # On the CPU in float32, the same everywhere.
    drawn = Stream(seed, "feedback", piece).normal(rows * columns)
    return drawn.view(rows, columns).div(math.sqrt(rows)).to(device, dtype)


def unserved(model: nn.Module) -> str | None:
    """Why this model's layers cannot be trained by feedback alignment; None if their types do not forbid it."""
    names: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if p.requires_grad and id(p) in names:
            return f"{name} and {names[id(p)]} are one parameter: feedback alignment serves no tied weights"
        names[id(p)] = name
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            return f"{path} ({type(module).__name__}) mixes examples"
    layers = layers_of(model, trainable(model))
    for path, module, *_ in layers.values():
        what = f"{path or 'the model'} ({type(module).__name__})"
        if extra := {name for name, _ in module.named_parameters(recurse=False)} - {"weight", "bias"}:
            return f"{what} has parameters of other names than weight and bias: {', '.join(sorted(extra))}"
        if type(module) not in (*PRODUCTS, *SCALINGS):  # a subclass may compute something else
            return (
                f"{what} has trained parameters, and feedback alignment serves those of Linear, Conv1d, Conv2d,"
                " GroupNorm and LayerNorm alone"
            )
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            if module.groups != 1:
                return f"{what} has {module.groups} groups, and feedback alignment serves convolutions of one"
            if module.padding_mode != "zeros":
                return f"{what} pads by {module.padding_mode}, and feedback alignment serves padding by zeros"
    return None if layers else "the model has no trained parameter"


# --- what only a pass can show ---

_orders: WeakKeyDictionary[nn.Module, dict[Any, tuple[str, ...]]] = WeakKeyDictionary()


def order_for(layers: Mapping[str, Layer], model: nn.Module, w: Tree, x: Tensor) -> tuple[str, ...]:
    """The paths of the layers in the order of their calls, surveyed on first use and kept while the model lives."""
    key = (x.shape[1:], x.dtype, x.device.type, w.names, modes(model))
    orders = _orders.setdefault(model, {})
    if key not in orders:
        with untouched(model, x.device):
            orders[key] = survey(layers, model, w, x)
    return orders[key]


def survey(layers: Mapping[str, Layer], model: nn.Module, w: Tree, x: Tensor) -> tuple[str, ...]:
    """Run `model` on random examples of the shape of `x`; return the paths of its layers in the order of their calls.

    Raises ValueError where a layer is not called exactly once, where a piece depends on more than its own beginning,
    where parameters are used outside their layer, and where examples are not the first dimension throughout or depend
    on each other. No private value is looked at, so a refusal tells nothing.
    """
    given = torch.zeros(max(PROBES), *x.shape[1:], dtype=x.dtype)
    if given.is_floating_point():
        given.normal_(generator=torch.Generator().manual_seed(0))
    given = given.to(x.device).requires_grad_(given.is_floating_point())
    training = [module for module in model.modules() if module.training]
    with held(model, w.views) as own:
        try:
            for module in training:
                module.training = False  # no dropout: the two passes are compared
            tapes: list[Tape] = []
            for size in PROBES:
                with torch.enable_grad(), cut(layers) as tape:
                    tape.close(model(given[:size].clone()))
                tapes.append(tape)
        finally:
            for module in training:
                module.training = True
        order = tuple(call.layer.path for call in tapes[0].calls)
        for path in layers:
            if order.count(path) != 1:
                raise Unserved(f"{path} is called {order.count(path)} times, and feedback alignment serves one call")
        try:
            refuse_branches(tapes[0], given, own)
        except CheckpointError as error:
            raise Unserved(
                "feedback alignment cannot cut a network between layers that are computed once more in the backward"
                " pass: leave activation checkpointing out"
            ) from error
        refuse_uneven(*tapes)
    return order


_seen: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def due(model: nn.Module) -> bool:
    """Whether this batch is examined: a model's first, second, fourth, and so on."""
    seen = _seen.get(model, 0)
    _seen[model] = seen + 1
    return seen & (seen - 1) == 0


def refuse_mixed_examples(loss: Loss, model: nn.Module, w: Tree, batch: Batch) -> None:
    """Raise where an example's gradient depends on others, at these weights or near them, in the mode of training.

    A few examples of the batch are taken together and apart, by backpropagation: whoever mixes them shows there too. As
    in the engines that read tapes, this is a test and not a proof.
    """
    few = probe_batch(batch)
    random: set[str] = set()
    with watching(model, random), torch.no_grad(), held(model, w.views):
        model(few.x)
    for distance in (0.0, 1.0):
        state = {name: t.requires_grad_() for name, t in moved(w.views, distance).items()}
        try:
            refuse_mixing(loss, model, state, few, random)
        except ValueError as error:
            raise Unserved(str(error)) from error


def refuse_branches(tape: Tape, given: Tensor, leaves: Mapping[str, Tensor]) -> None:
    """Raise ValueError where the end of a piece depends on more than the piece, or not on its beginning."""
    inner = {call.layer.path for call in tape.calls if type(call.layer.module) in SCALINGS}
    starts = [call for call in tape.calls if call.layer.path not in inner]
    sources: list[tuple[str, int, Tensor]] = [("the model's input", 0, given)] if given.requires_grad else []
    sources += [(f"the output of {call.layer.path}", call.piece, call.z) for call in starts]
    for name, leaf in leaves.items():
        within = [call.piece for call in tape.calls if name in call.layer[2:] and call.layer.path in inner]
        sources.append((name, within[0] if within else -1, leaf))
    names = [f"the input of {call.layer.path}" for call in starts] + ["the output"]
    for piece, (end, name) in enumerate(zip(tape.ends, names, strict=True)):
        tensors = [tensor for _, _, tensor in sources]
        grads: tuple[Tensor | None, ...] = (None,) * len(tensors)
        if end.requires_grad:
            grads = torch.autograd.grad(end.sum(), tensors, retain_graph=True, allow_unused=True)
        for (label, at, source), g in zip(sources, grads, strict=True):
            if g is not None and at != piece:
                raise Unserved(
                    f"{name} depends on {label}, which lies outside its piece of the network: feedback alignment"
                    " serves layers in a chain, without shortcuts or parameters used elsewhere"
                )
            if g is None and at == piece and source is not given:
                raise Unserved(f"{name} does not depend on {label}: feedback alignment serves layers in a chain")


def refuse_uneven(many: Tape, few: Tape) -> None:
    """Raise ValueError where a tensor's first dimension is not that of the examples, or a row depends on others."""
    here, there = (
        [(call.layer.path, t) for call in tape.calls for t in (call.a, call.z)] + [("the output", tape.ends[-1])]
        for tape in (many, few)
    )
    for (path, a), (_, b) in zip(here, there, strict=True):
        if (len(a), len(b)) != PROBES or a.shape[1:] != b.shape[1:]:
            raise Unserved(
                f"{path} sees shapes {list(a.shape)} and {list(b.shape)} for {PROBES[0]} and {PROBES[1]} examples:"
                " feedback alignment serves layers whose first dimension is that of the examples"
            )
        a, b = a.detach()[: PROBES[1]].double(), b.detach().double()
        slack = 1e-3 * a.abs().amax().nan_to_num(0.0, 0.0, 0.0)
        if not torch.allclose(a, b, rtol=0.0, atol=float(slack), equal_nan=True):
            raise Unserved(f"{path} gives another result for an example when others are left out of the batch")
