"""Per-example gradients by vectorisation: `torch.func.vmap` over `grad`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from harness.dp.clip import Clip, State
from harness.dp.engines.engine import Clipped, PerExample, group_norms
from harness.dp.engines.rows import squared_norms, weighted_rows
from harness.dp.loss import Batch, Loss
from harness.dp.tree import Tree


def per_example_gradients(
    loss: Loss, model: nn.Module, w: Mapping[str, Tensor], names: Iterable[str], batch: Batch
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients [B, *shape] of each example's loss for the parameters in `names`, at `w`, and the losses [B]."""
    chosen = set(names)
    fixed = {name: t for name, t in w.items() if name not in chosen}

    def one(free: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs = functional_call(model, {**fixed, **free}, (x[None],))
        return loss.per_example(outputs, y[None]).sum()

    each = vmap(grad_and_value(one), in_dims=(None, 0, 0), randomness="different")
    return each({name: t for name, t in w.items() if name in chosen}, batch.x, batch.y)


def plain_sum(loss: Loss, model: nn.Module, w: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
    """The unweighted sum of gradients, flat, and the losses [B]: one backward pass."""
    leaves = {name: t.detach().requires_grad_() for name, t in w.items()}
    losses = loss.per_example(functional_call(model, leaves, (batch.x,)), batch.y)
    grads = torch.autograd.grad(
        losses.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return torch.cat([g.reshape(-1) for g in grads]), losses.detach()


def refusal(model: nn.Module) -> str | None:
    """Why no engine but the loop may serve `model`: an embedding whose gradient depends on the rest of the batch."""
    for path, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.weight.requires_grad:
            for option in ("max_norm", "scale_grad_by_freq", "sparse"):
                if getattr(module, option):
                    return f"{path or 'the model'} ({type(module).__name__}) has {option} set: leave it out"
    return None


def best_chunk(model: nn.Module, batch: Batch) -> int:
    """How many examples' gradients to hold at once.

    On a GPU: as many as fit in an eighth of its memory. On a CPU, large chunks spread the cost of small kernels, but
    fresh memory is slow: glibc maps every block of 32 MiB or more anew and the kernel must clear it, so each tensor
    stays below that, and all together below 72 MiB. Depends on nothing but shapes, so a resumed run chunks alike.
    """
    sizes = [p.numel() * p.element_size() for p in model.parameters() if p.requires_grad]
    row, largest = max(1, sum(sizes)), max(1, *sizes, 1)
    if batch.x.is_cuda:
        most = torch.cuda.get_device_properties(batch.x.device).total_memory // 8 // row
    else:
        most = min(128, (72 << 20) // row, (26 << 20) // largest)
        most -= most % 8 if most > 8 else 0
    return max(1, min(len(batch), most))


@dataclass(frozen=True)
class Vmap(PerExample):
    """Differentiates all examples of a microbatch at once and holds their gradients, [B, P], while it weighs them."""

    def accepts(self, loss: Loss, clip: Clip, model: nn.Module) -> str | None:
        return refusal(model)

    def chunk(self, model: nn.Module, batch: Batch) -> int:
        return self.microbatch or best_chunk(model, batch)

    def clipped_sum(
        self,
        loss: Loss,
        clip: Clip,
        groups: Mapping[str, int],
        model: nn.Module,
        w: Tree,
        batch: Batch,
        state: State,
    ) -> Clipped:
        if not clip.needs_norms:
            total, losses = plain_sum(loss, model, w, batch)
            if total.isfinite().all():
                return Clipped(w.with_flat(total), None, None, losses)
        grads, losses = per_example_gradients(loss, model, w.views, w.names, batch)
        norms = group_norms({name: squared_norms(g) for name, g in grads.items()}, groups)
        weights = clip.weights(norms, state)
        v, good = weights, norms.isfinite().all(1)
        if not good.all():  # weight 0 would not do: 0 * inf is not a number
            v, grads = weights[good], {name: g[good] for name, g in grads.items()}
        total = torch.cat([weighted_rows(v[:, groups[name]], g).reshape(-1) for name, g in grads.items()])
        if not clip.needs_norms:
            return Clipped(w.with_flat(total), None, None, losses.detach())
        return Clipped(w.with_flat(total), norms, weights, losses.detach())
