"""The engines of JAX, compiled for the twin of a model: `vmap` of `grad`, and clipped gradients of JAX Privacy."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from harness.dp.clip import Clip, Flat, State, Unclipped
from harness.dp.engines.engine import Clipped
from harness.dp.loss import Batch, CrossEntropy, Loss
from harness.dp.tree import Layout, Tree
from harness.models.layers import WSConv2d
from harness.peers.peer import GradientPeer, Peer

_compiled: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], Callable[..., Any]]] = WeakKeyDictionary()


class Jax(Peer):
    """What both have in common: compiled once for a model, its modes and its layout, and for each shape of a batch."""

    INSTALL: ClassVar[str] = "epsbench[peers]"

    def refuses(self, loss: Loss, clip: Clip, model: nn.Module) -> str | None:
        import jax

        from harness.peers.twin import lacking

        if type(loss) is not CrossEntropy:
            return f"{type(loss).__name__} has no JAX twin: CrossEntropy has"
        kinds = {p.device.type.replace("cuda", "gpu") for p in model.parameters()}
        if kinds - {jax.default_backend()}:
            return f"the model is on {', '.join(sorted(kinds))}, and JAX runs on {jax.default_backend()}"
        return lacking(model)

    def build(self, value: Callable[..., Any], model: nn.Module, clip: Clip) -> Callable[..., Any]:
        """What to compile, from an example's loss as a function of parameters, frozen ones, x [1, ...] and y [1]."""
        raise NotImplementedError

    def together(
        self, loss: Loss, clip: Clip, groups: Mapping[str, int], model: nn.Module, w: Tree, batch: Batch, state: State
    ) -> Clipped:
        """`clipped_sum`, where it is enough that an example that is broken adds zero if it is alone."""
        raise NotImplementedError

    def clipped_sum(
        self, loss: Loss, clip: Clip, groups: Mapping[str, int], model: nn.Module, w: Tree, batch: Batch, state: State
    ) -> Clipped:
        found = self.together(loss, clip, groups, model, w, batch, state)
        if found.norms is None or found.weights is None or len(batch) == 1 or found.norms.isfinite().all():
            return found
        # One by one: XLA's grouped convolutions multiply an example's numbers with zeros meant for the others, so a
        # single infinity breaks them all.
        alone = zip(batch.x.split(1), batch.y.split(1), strict=True)
        parts = [self.together(loss, clip, groups, model, w, Batch(x, y), state) for x, y in alone]
        flat = torch.stack([p.total.flat for p in parts]).sum(0)
        norms, weights, losses = (
            torch.cat(column) for column in zip(*((p.norms, p.weights, p.losses) for p in parts), strict=True)
        )
        return Clipped(w.with_flat(flat), norms, weights, losses)

    def call(self, model: nn.Module, clip: Clip, w: Tree, batch: Batch) -> Any:
        """The compiled function's outputs, as tensors; nothing is copied on the way in or out but what is unaligned."""
        import jax

        frozen = {n: p for n, p in model.named_parameters() if n not in w.layout.names}
        key = (type(self), w.layout, clip, tuple(frozen), tuple(m.training for m in model.modules()))
        made = _compiled.setdefault(model, {})
        with jax.enable_x64(w.flat.dtype is torch.float64):
            if key not in made:
                built, layout = self.build(example_loss(model, (*w.names, *frozen)), model, clip), w.layout
                made[key] = jax.jit(lambda flat, *rest: built(cut(flat, layout), *rest))
            arrays = (array(w.flat), {n: array(p) for n, p in frozen.items()}, array(batch.x), array(batch.y))
            # JAX computes in the background, on memory that PyTorch may reuse as soon as this returns.
            found = jax.block_until_ready(made[key](*arrays))
            return jax.tree.map(torch.from_dlpack, found)


def array(t: Tensor) -> Any:
    """`t` as a JAX array on the same memory; integers as 32 bits, which is what JAX calls an integer."""
    import jax

    t = t.detach().contiguous()
    return jax.dlpack.from_dlpack(t if t.is_floating_point() else t.int())


def cut(flat: Any, layout: Layout) -> dict[str, Any]:
    """A flat array cut into named ones."""
    parts = zip(layout.names, layout.offsets, layout.sizes, layout.shapes, strict=True)
    return {name: flat[start : start + size].reshape(tuple(shape)) for name, start, size, shape in parts}


def example_loss(model: nn.Module, names: tuple[str, ...]) -> Callable[..., Any]:
    """An example's cross-entropy as a function of trained and frozen parameters, x [1, ...] and y [1, ...].

    Holds on to the model weakly: what is compiled for a model must not keep it alive.
    """
    import jax
    import jax.numpy as jnp

    from harness.peers.twin import run

    alive = weakref.ref(model)

    def value(w: dict[str, Any], frozen: dict[str, Any], x: Any, y: Any) -> Any:
        model = alive()
        assert model is not None
        by_identity = {id(model.get_parameter(name)): {**w, **frozen}[name] for name in names}
        logits = run(model, lambda p: None if p is None else by_identity[id(p)], x)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits, -1), y[..., None], -1)
        return -chosen.mean()  # over the positions, where there are any

    return value


class Vmapped(Jax, GradientPeer):
    """`jax.jit(jax.vmap(jax.value_and_grad(loss)))`: per-example gradients by vectorisation, as XLA compiles it.

    Subramani, Vadivelu and Kamath, arXiv:2010.09063.
    """

    PACKAGE: ClassVar[str] = "jax"
    IMPORTS: ClassVar[str] = "jax"

    def build(self, value: Callable[..., Any], model: nn.Module, clip: Clip) -> Callable[..., Any]:
        import jax

        def one(w: Any, frozen: Any, x: Any, y: Any) -> Any:
            return jax.value_and_grad(value)(w, frozen, x[None], y[None])

        return jax.vmap(one, in_axes=(None, None, 0, 0))

    together = GradientPeer.clipped_sum

    def rows(self, loss: Loss, model: nn.Module, w: Tree, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        losses, grads = self.call(model, Unclipped(), w, batch)
        return grads, losses


class Privacy(Jax):
    """`jax_privacy.clipping.clipped_grad`: norms, clipping and sum in one compiled function (Balle et al. 2022).

    The library clips a whole gradient to one norm and nothing else. It sets an example's infinities to zero and keeps
    the rest of it; here such an example adds zero as a whole.
    """

    PACKAGE: ClassVar[str] = "jax-privacy"
    IMPORTS: ClassVar[str] = "jax_privacy"

    def refuses(self, loss: Loss, clip: Clip, model: nn.Module) -> str | None:
        if type(clip) not in (Flat, Unclipped):
            return f"{type(clip).__name__} is not a rule of JAX Privacy, which clips a whole gradient to one norm"
        return super().refuses(loss, clip, model)

    def build(self, value: Callable[..., Any], model: nn.Module, clip: Clip) -> Callable[..., Any]:
        from jax_privacy.clipping import clipped_grad

        # One example at a time, inside what is compiled: on a CPU, XLA sums a batch of gradients so slowly that this is
        # the faster way, by a factor of 3 to 250 as measured; but not for convolutions, which are slow in a loop.
        loops = all(p.is_cpu for p in model.parameters())
        loops &= not any(isinstance(m, _ConvNd | WSConv2d) for m in model.modules())
        summed = clipped_grad(
            value,
            batch_argnums=(2, 3),
            l2_clip_norm=clip.clip if isinstance(clip, Flat) else float("inf"),
            microbatch_size=1 if loops else None,
            return_values=True,
            return_grad_norms=True,
        )

        def whole(w: Any, frozen: Any, x: Any, y: Any) -> Any:
            grads, aux = summed(w, frozen, x, y)
            return grads, aux.grad_norms, aux.values

        return whole

    def together(
        self, loss: Loss, clip: Clip, groups: Mapping[str, int], model: nn.Module, w: Tree, batch: Batch, state: State
    ) -> Clipped:
        grads, norms, losses = self.call(model, clip, w, batch)
        flat = torch.cat([grads[name].reshape(-1) for name in w.names])
        if not norms.isfinite().all():
            flat = torch.zeros_like(flat)
        return Clipped(w.with_flat(flat), norms[:, None], clip.weights(norms[:, None], state), losses)
