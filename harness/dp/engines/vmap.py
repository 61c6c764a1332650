"""Per-example gradients by vectorisation: `torch.func.vmap` over `grad`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.dp.clip import Clip, State
from harness.dp.engines.audit import audit
from harness.dp.engines.engine import Clipped, PerExample, Unserved, Used, group_norms, losses_of
from harness.dp.engines.loop import Loop
from harness.dp.engines.memory import refuse_memory
from harness.dp.engines.reads import refuse_strangers
from harness.dp.engines.rows import full_precision, squared_norms, weighted_rows
from harness.dp.engines.survey import (
    NoProbe,
    drawing,
    finite_probe,
    moved,
    refuse_coupling,
    refuse_traces,
    rounding,
    row_by_row,
    served,
    signature,
    silenced,
    singles,
    squares_of,
)
from harness.dp.engines.weights import held, replaced
from harness.dp.loss import Batch, Loss
from harness.dp.native.memory import keep_freed_memory
from harness.dp.tree import Tree


def per_example_gradients(
    loss: Loss, model: nn.Module, w: Mapping[str, Tensor], names: Iterable[str], batch: Batch
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients [B, *shape] at `w` of each example's loss, for the parameters in `names`, and the losses [B]."""
    chosen = set(names)

    def one(free: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        with replaced(model, free):
            return losses_of(loss, model, Batch(x[None], y[None])).sum()

    each = vmap(grad_and_value(one), in_dims=(None, 0, 0), randomness="different")
    # The fused attention of a CPU has no rule for vmap, and would be called example by example.
    # The model's other parameters require gradients, and nobody asks for theirs.
    with held(model, w), explicit_states(model), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        return each({name: t.detach() for name, t in w.items() if name in chosen}, batch.x, batch.y)


@contextmanager
def explicit_states(model: nn.Module) -> Iterator[None]:
    """Have recurrent layers start from zeros made of their input, so that vmap sees a state for each example.

    Left to themselves they start all examples from one state, and add to it in place what belongs to each: vmap has
    no room for that.
    """

    def supply(layer: nn.RNNBase, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) != 1 or kwargs.get("hx") is not None or not isinstance(args[0], Tensor):
            return None
        x, layers = args[0], layer.num_layers * (2 if layer.bidirectional else 1)
        rows = (x.shape[0 if layer.batch_first else 1],) if x.ndim == 3 else ()
        hidden = x.new_zeros(layers, *rows, layer.proj_size or layer.hidden_size)
        state = (hidden, x.new_zeros(layers, *rows, layer.hidden_size)) if isinstance(layer, nn.LSTM) else hidden
        return args, {**kwargs, "hx": state}

    handles = [
        module.register_forward_pre_hook(supply, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, nn.RNNBase)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_tried: WeakKeyDictionary[nn.Module, dict[Any, frozenset[str]]] = WeakKeyDictionary()


def tried(loss: Loss, model: nn.Module, w: Mapping[str, Tensor], batch: Batch) -> frozenset[str]:
    """The modules of `model` that draw random numbers, once its gradients by vmap have stood a trial.

    Raises Unserved where they are not those of single examples: a function of one's own may bring a rule for vmap that
    looks along the batch, and a parameter held in a closure has no gradient. `NoProbe` where this batch shows nothing.
    """
    known, key = _tried.setdefault(model, {}), signature(loss, model, w, batch)
    if key not in known:
        known[key] = served(compare, loss, model, w, batch)
    return known[key]


def compare(loss: Loss, model: nn.Module, w: Mapping[str, Tensor], batch: Batch) -> frozenset[str]:
    """The trial: a few examples by vmap and one by one, at moved weights, modules silenced that draw random numbers."""
    with held(model, w):
        refuse_coupling(loss, model, batch)
        batch = finite_probe(loss, model, batch)
    refuse_strangers(loss, model, moved(w, 1.0), batch)
    with held(model, w):
        random, _ = drawing(loss, model, batch)
    with silenced(model, random):
        with held(model, w):
            steady = refuse_traces(loss, model, batch) is not None
            refuse_memory(loss, model, batch)
        for distance in (1.0, 0.0):
            values = moved(w, distance)
            with held(model, values) as leaves:
                rows = [row_by_row(losses_of(loss, model, one), leaves)[0] for one in singles(batch)]
            if all(g is None or g.isfinite().all() for row in rows for g in row):
                break
        else:
            raise NoProbe("the model's gradients are not finite even on tame inputs, so vmap cannot be tried")
        found = per_example_gradients(loss, model, values, values, batch)[0]
    if random:
        # Whether vmap knows what to do with what is drawn shows only here.
        per_example_gradients(loss, model, w, w, batch)
    if not steady:  # even silenced: other numbers have other gradients, and there is nothing to compare
        return random
    squares = squares_of(rows, values)
    everything = torch.stack(list(squares.values())).sum(0) if squares else torch.zeros(len(batch))
    for name, column in zip(values, zip(*rows, strict=True), strict=True):
        pairs = zip(found[name], column, strict=True)
        off = torch.cat([squared_norms((g if own is None else g - own)[None]) for g, own in pairs])
        if not (off <= rounding(found[name].dtype) * everything.to(off)).all():
            raise Unserved(
                f"by vmap the gradient of {name} is not that of a single example: a function of the model's own has a"
                " vmap rule that looks along the batch, or the parameter is used where vmap does not see it. Use engine"
                ' = "bookkeeping" or "loop"'
            )
    return random


def plain_sum(loss: Loss, model: nn.Module, w: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
    """The unweighted sum of gradients, flat, and the losses [B]: one backward pass."""
    with held(model, w.views) as leaves:
        losses = losses_of(loss, model, batch)
        grads = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return torch.cat([g.reshape(-1) for g in grads]), losses.detach()


def cut(rows: Tensor, limit: Tensor) -> Tensor:
    """Per-example gradients [B, ...], the coordinates of each cut off at plus and minus its `limit` [B]."""
    most = limit.to(rows.dtype).view(-1, *(1,) * (rows.ndim - 1))
    return torch.minimum(torch.maximum(rows, -most), most)


def refusal(model: nn.Module) -> str | None:
    """Why no engine but the loop may serve `model`: an embedding whose gradient depends on the rest of the batch."""
    for path, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.weight.requires_grad:
            for option in ("max_norm", "scale_grad_by_freq", "sparse"):
                if getattr(module, option):
                    return f"{path or 'the model'} ({type(module).__name__}) has {option} set: leave it out"
    return None


def chunk_within(count: int, device: torch.device, footprints: Sequence[int], activations: int = 0) -> int:
    """How many of `count` examples to take at once, given the bytes per example of each tensor held for them.

    As many as fit in a quarter of a GPU's memory, or on a CPU in 512 MiB (measured: more brings nothing). Where a CPU's
    allocator insists on returning memory to the system, tensors must stay small enough for it to keep them: below 24
    MiB each and 64 MiB together. Depends on nothing but shapes and the machine, so a resumed run chunks alike.
    """
    held, largest = max(1, sum(footprints)), max(1, *footprints, 1)
    if device.type == "cuda":
        most = torch.cuda.get_device_properties(device).total_memory // 4 // (held + activations)
    else:
        fitting = (512 << 20) // held if keep_freed_memory() else min((64 << 20) // held, (24 << 20) // largest)
        most = min(fitting, (2 << 30) // max(1, activations))
    chunks = -(-count // max(1, most))
    return max(1, -(-count // chunks))  # of one size, as nearly as may be


@dataclass(frozen=True)
class Vmap(PerExample):
    """Differentiates all examples of a microbatch at once and holds their gradients, [B, P], while it weighs them."""

    def accepts(self, loss: Loss, clip: Clip, model: nn.Module) -> str | None:
        return super().accepts(loss, clip, model) or refusal(model)

    def inspect(self, used: Used) -> None:
        with suppress(NoProbe):
            audit(self, used, bool(tried(used.loss, used.model, used.w.views, used.batch)))

    def chunk(self, loss: Loss, model: nn.Module, w: Tree, batch: Batch) -> int:
        sizes = [t.numel() * t.element_size() for t in w.views.values()]
        return self.microbatch or chunk_within(len(batch), batch.x.device, sizes)

    def clipped_sum(
        self, loss: Loss, clip: Clip, groups: Mapping[str, int], model: nn.Module, w: Tree, batch: Batch, state: State
    ) -> Clipped:
        if not clip.needs_norms:
            total, losses = plain_sum(loss, model, w, batch)
            if total.isfinite().all():
                return Clipped(w.with_flat(total), None, None, losses)
        try:
            tried(loss, model, w.views, batch)
        except NoProbe:
            return Loop().clipped_sum(loss, clip, groups, model, w, batch, state)
        grads, losses = per_example_gradients(loss, model, w.views, w.names, batch)
        with full_precision(batch.x.device):
            return self._weighed(clip, groups, w, state, grads, losses)

    def _weighed(
        self, clip: Clip, groups: Mapping[str, int], w: Tree, state: State, grads: dict[str, Tensor], losses: Tensor
    ) -> Clipped:
        norms = group_norms({name: squared_norms(g) for name, g in grads.items()}, groups, losses)
        weights, limit = clip.weights(norms, state), clip.limit(norms, state)
        if limit is not None:
            grads = {name: cut(g, limit) for name, g in grads.items()}
        v, good = weights, norms.isfinite().all(1)
        if not good.all():  # weight 0 would not do: 0 * inf is not a number
            v, grads = weights[good], {name: g[good] for name, g in grads.items()}
        total = torch.cat([weighted_rows(v[:, groups[name]], grads[name]).reshape(-1) for name in w.names])
        if not clip.needs_norms:
            return Clipped(w.with_flat(total), None, None, losses.detach())
        return Clipped(w.with_flat(total), norms, weights, losses.detach())
