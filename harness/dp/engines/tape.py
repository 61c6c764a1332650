"""Who computed what: the calls of a model's modules in one forward pass, and the gradient at each of their outputs.

A `Tape` notes each module call, its inputs and where its outputs stand in the autograd graph. One backward pass to
those outputs then gives everything that per-example gradients need, and no weight gradient is computed on the way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from harness.dp.engines.draws import generators, rewind
from harness.dp.engines.engine import losses_of
from harness.dp.engines.weights import replaced
from harness.dp.loss import Batch, Loss

ANSWERING = (nn.RNNBase, nn.MultiheadAttention)  # modules whose rules read their outputs, which are kept for them


@dataclass(slots=True)
class Call:
    """One call of the module at `path`: its inputs, flattened, and its outputs as places in the autograd graph."""

    path: str
    inputs: list[Any]
    spec: TreeSpec | None  # how the inputs were given; None: as one tensor
    versions: list[int | None]
    outputs: list[Tensor | None] = field(default_factory=list)  # None: not differentiable
    edges: list[GradientEdge | None] = field(default_factory=list)
    output_versions: list[int] = field(default_factory=list)
    results: list[Tensor] = field(default_factory=list)  # the outputs' values, where a rule reads them
    result_versions: list[int] = field(default_factory=list)

    def arguments(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`leaves` in place of the inputs, as positional and keyword arguments."""
        return ((leaves[0],), {}) if self.spec is None else tree_unflatten(leaves, self.spec)

    @property
    def disturbed(self) -> bool:
        """Whether an input or a result, or an output whose place in the graph is thereby lost, was written to since."""
        inputs = any(v is not None and t._version != v for t, v in zip(self.inputs, self.versions, strict=True))
        outputs = any(
            t is not None and t._is_view() and t._version != v
            for t, v in zip(self.outputs, self.output_versions, strict=True)
        )
        results = any(t._version != v for t, v in zip(self.results, self.result_versions, strict=True))
        return inputs or outputs or results


@dataclass
class Tape:
    """The calls of one forward pass, in the order in which they returned.

    `copy`: copy what is taped. `spread`: modules whose outputs are repeated for each of so many `examples`.
    """

    copy: bool = False
    spread: Collection[str] = ()
    examples: int = 0
    calls: list[Call] = field(default_factory=list)
    _open: list[Call] = field(default_factory=list)

    def enter(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):  # what nearly every layer is given
            leaves, spec = [args[0].detach()], None
        else:
            leaves, spec = tree_flatten((args, kwargs))
            leaves = [t.detach() if isinstance(t, Tensor) else t for t in leaves]
        if self.copy:
            leaves = [t.clone() if isinstance(t, Tensor) else t for t in leaves]
        self._open.append(Call(path, leaves, spec, [t._version if isinstance(t, Tensor) else None for t in leaves]))

    def leave(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call = self._open.pop()
        if self.copy:
            output = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, output)
        if path in self.spread:
            output = repeated(output, self.examples)
        for leaf in (output,) if isinstance(output, Tensor) else tree_flatten(output)[0]:
            known = isinstance(leaf, Tensor) and leaf.requires_grad
            call.outputs.append(leaf if known else None)
            call.edges.append(get_gradient_edge(leaf) if known else None)
            call.output_versions.append(leaf._version if known else 0)
            if isinstance(module, ANSWERING) and isinstance(leaf, Tensor):
                call.results.append(leaf.detach().clone() if self.copy else leaf.detach())
                call.result_versions.append(call.results[-1]._version)
        self.calls.append(call)
        return output

    @property
    def disturbed(self) -> bool:
        """Whether anything on the tape was written to since: then the pass must be taped anew, with copies."""
        return any(call.disturbed for call in self.calls)


def repeated(t: Tensor, examples: int) -> Tensor:
    """`t` [1, ...] or [...] as [examples, ...], without a copy."""
    t = t if t.ndim and len(t) == 1 else t.unsqueeze(0)
    return t.expand(examples, *t.shape[1:])


def hooked(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that take hooks, by path: all but those compiled by torch.jit."""
    return {path: m for path, m in model.named_modules() if not isinstance(m, torch.jit.ScriptModule)}


@contextmanager
def taping(
    model: nn.Module,
    paths: Collection[str] | None = None,
    copy: bool = False,
    spread: Collection[str] = (),
    examples: int = 0,
) -> Iterator[Tape]:
    """Tape the calls of the modules at `paths` (None: of all). No hook outlives the block."""
    tape, handles = Tape(copy, spread, examples), []
    try:
        modules = hooked(model)
        for path in modules if paths is None else paths:
            module = modules[path]
            enter, leave = partial(tape.enter, path), partial(tape.leave, path)
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True, prepend=True))
        yield tape
    finally:
        for handle in handles:
            handle.remove()


class Run(NamedTuple):
    """A taped pass: losses [B], the gradient of their sum at each output of each call, and at each free parameter.

    `copied`: whether the tape holds copies. `woken`: which of the parameters that were to have no gradient have one.
    """

    losses: Tensor
    calls: list[Call]
    cotangents: list[list[Tensor | None]]
    free: dict[str, Tensor]
    copied: bool
    woken: frozenset[str] = frozenset()


def run(
    loss: Loss,
    model: nn.Module,
    leaves: Mapping[str, Tensor],
    batch: Batch,
    paths: Collection[str] | None = None,
    free: Collection[str] = (),
    spread: Collection[str] = (),
    idle: Collection[str] = (),
    copy: bool = False,
    retain: bool = True,
) -> Run:
    """Forward, then backward to the outputs of the modules at `paths` (None: of all).

    The model holds its weights, `leaves`. Each example gets a copy of the parameters in `free`, and of the outputs of
    the modules in `spread`. Those in `idle` should have no gradient. `retain`: whether the graph is needed again.
    """
    copies = {name: repeated(leaves[name].detach(), len(batch)).requires_grad_() for name in free}
    before = None if copy else generators(batch.x.device)
    with taping(model, paths, copy, spread, len(batch)) as tape, replaced(model, copies):
        losses = losses_of(loss, model, batch)
    if before is not None and tape.disturbed:
        # The same random numbers again: others would make an example's dropout depend on what others make necessary.
        rewind(batch.x.device, before)
        return run(loss, model, leaves, batch, paths, free, spread, idle, True, retain)
    ends = [edge for call in tape.calls for edge in call.edges if edge is not None]
    ends += [get_gradient_edge(t) for t in (*copies.values(), *(leaves[name] for name in idle))]
    found = iter(torch.autograd.grad(losses.sum(), ends, retain_graph=retain, allow_unused=True) if ends else ())
    cotangents = [[None if edge is None else next(found) for edge in call.edges] for call in tape.calls]
    for call in tape.calls:
        call.outputs, call.edges = [], []
    given = {name: next(found) for name in copies}
    rows = {name: g.unflatten(0, (-1, *leaves[name].shape[:1])) for name, g in given.items() if g is not None}
    woken = frozenset(name for name in idle if next(found) is not None)
    return Run(losses, tape.calls, cotangents, rows, copy, woken)
