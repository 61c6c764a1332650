"""Whether a network's output for an example depends on others, found by changing them and leaving them out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch
from torch import Tensor, nn

from harness.dp.engines.draws import SEEDS, Loaded
from harness.dp.engines.separable import DRAWS, mixed
from harness.dp.loss import Batch
from harness.models.passes import REMEDY, CrossExampleLayer, Pass, called, forward, kind, same, seeded

# Five examples: few, and unlikely to be the length of another leading dimension.
PROBE = 5
# Relative: sums of gradients in float32, or of what half precision computed, may be off by so much.
ROUGH = 0.02
MANY = 300  # examples of the largest batch that is tried
SEVERAL = 100  # of the largest that is passed back, piece by piece
SOME = 33  # and of that for a large network: some normalise over a batch only if it is not small
UNEVEN = (
    "draws random numbers, and how many depends on what an example holds, so that it moves what others draw",
    "Draw one for every entry, whatever it holds, as nn.Dropout does.",
)
BY_CHANCE = (
    "mixes the examples of a batch now and then, by a random number that it draws",
    "Mix nothing across a batch, neither inputs (mixup, cutmix) nor what layers make of them.",
)
SPREAD = 2654435761  # apart from each other, seeds give numbers that are
CHEAP, DEAR = 4e9, 4e10  # multiply-adds that a pass over MANY and over SOME may take
INFINITE, NOT = float("inf"), float("nan")
FAR = ((1e2, 1e4), (1e6, 1e9), (INFINITE,), (NOT,))  # factors: whoever rescues far examples may rescale all


class Draw:
    """Inputs to try: noise, or whole numbers below ``tokens``."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...], tokens: int | None) -> None:
        self.shape, self.tokens = shape, tokens
        self.generator = torch.Generator().manual_seed(0)
        self.device, self.dtype = kind(model)

    def __call__(self, count: int) -> Tensor:
        size = (count, *self.shape)
        if self.tokens is None:
            x = torch.randn(size, generator=self.generator)
        else:
            x = torch.randint(self.tokens, size, generator=self.generator)
        return x.to(self.device, self.dtype)

    def others(self) -> Iterator[Tensor]:
        """Examples [1 or 2, ...] to put in the place of others, near and far."""
        yield self(1)
        if self.tokens is None:
            for factors in FAR:
                yield torch.cat([self(1) * factor for factor in factors])
        else:
            x = self(1)
            yield torch.cat([torch.full_like(x, self.tokens - 1), torch.zeros_like(x)])


def drawn(model: nn.Module, shape: tuple[int, ...], tokens: int | None) -> list[Draw]:
    """What inputs `model` is tried on: of whole numbers those, and noise too where it runs on noise."""
    noise = Draw(model, shape, None)
    if tokens is None:
        return [noise]
    try:
        forward(model, noise(PROBE))
    except ValueError:
        return [Draw(model, shape, tokens)]
    return [Draw(model, shape, tokens), noise]


def probe(model: nn.Module, classes: int | None, draw: Draw) -> None:
    """Raise CrossExampleLayer, or ValueError for outputs of another shape; see `harness.models.check`.

    The model is in training mode, and at weights where no branch is silent. It ends in the state that it had but for
    attributes that are no tensors.
    """
    x = draw(PROBE)
    before = {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=False).items()}
    with _drawn_by_torch(model):
        base = forward(model, x, record=True)
    _same_state(before, {**model.state_dict(), **base.buffers}, model)
    expected = [PROBE] if classes is None else [PROBE, classes]
    got = list(base.output.shape)
    if (got[:1] if classes is None else got) != expected:
        raise ValueError(
            f"{type(model).__name__} turns {PROBE} examples of shape {list(draw.shape)} into {got}; "
            f"it should give one row per example{'' if classes is None else f', [{PROBE}, {classes}]'}"
        )
    # With dropout, leaving one out may change the masks of the others.
    deterministic = same(base.output, forward(model, x, seed=1).output)
    if not deterministic and not same(base.output, forward(model, x).output):
        raise CrossExampleLayer(
            model,
            "",
            "gives another output for the same examples in a second pass: it keeps something of the first, or draws"
            " random numbers that torch.manual_seed does not seed",
            "A step may depend on its own examples alone; draw by torch.rand.",
        )
    for others in draw.others():
        _changed(model, base, x, others)
    if base.drew:
        _chance(model, x, draw(1))
    many = torch.cat([draw(size(base, x[0].numel())), x])
    if not deterministic:
        _changed(model, forward(model, many), many, draw(1))
        return
    for whole, part in ((x, x[1:]), (x, x[-1:]), (many, x)):
        left = base if whole is x else forward(model, many)
        right = base if part is x else forward(model, part)
        if not same(left.output[-len(part) :], right.output[-len(part) :]):
            raise culprit(model, whole, part, "is left out")
    _separable(model, x, many)


def _separable(model: nn.Module, x: Tensor, many: Tensor) -> None:
    """What goes back through a network to its parameters must be each example's own, in a small and a large batch."""
    leaves = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights: list[Tensor] = []

    def values(batch: Batch) -> Tensor:
        with torch.enable_grad(), seeded(x.device, 0):
            outputs = called(model, batch.x.clone()).flatten(1).float()
        if not weights:
            weights.append(torch.randn(outputs.shape[1], generator=torch.Generator().manual_seed(1)).to(outputs))
        return outputs @ weights[0]

    # What cannot be differentiated shows in another place, by its reason.
    with suppress(RuntimeError):
        for batch, size, draws in ((x, 1, DRAWS), (many[-SEVERAL:], 2 * PROBE, 3)):
            name = mixed(values, leaves, Batch(batch, batch.new_zeros(len(batch))), ROUGH, size, draws)
            if name:
                raise CrossExampleLayer(
                    model,
                    "",
                    f'mixes examples in its backward pass: the gradient of "{name}" in a batch is not the sum of its'
                    " examples' own",
                    "Let no hook and no straight-through estimator look along the batch.",
                )


def _chance(model: nn.Module, x: Tensor, others: Tensor) -> None:
    """What a network does by chance, and rarely (mixup of a batch in fifty), it must not do to several examples."""
    changed = torch.cat([others, x[len(others) :]])
    with Loaded() as chance:
        for seed in range(SEEDS):
            # A distribution may have no number to give at the ends.
            with suppress(ValueError):
                a, b = (forward(model, t, seed * SPREAD % 2**31).output for t in (x, changed))
                if not same(a[len(others) :], b[len(others) :]):
                    break
            if not chance.single:
                return
        else:
            return
    raise CrossExampleLayer(model, "", *BY_CHANCE)


@contextmanager
def _drawn_by_torch(model: nn.Module) -> Iterator[None]:
    """Refuse a network that draws from generators that no run seeds: it could not be repeated nor continued."""
    before = _unseeded()
    yield
    for name, state in _unseeded().items():
        if state != before[name]:
            raise ValueError(
                f"{type(model).__name__} draws random numbers from {name} in a forward pass, which a run does not seed:"
                " it could not be repeated. Draw them by torch.rand"
            )


def _unseeded() -> dict[str, str]:
    """The states of the generators that models draw from and runs do not seed."""
    arrays = np.random.get_state(legacy=False)  # noqa: NPY002 (it is the legacy generator that models draw from)
    return {"Python's random": repr(random.getstate()), "numpy.random": repr(arrays)}


def large(model: nn.Module, draw: Draw) -> Tensor:
    """A batch as large as a second or so allows."""
    x = draw(PROBE)
    return draw(size(forward(model, x, record=True), x[0].numel()))


def size(base: Pass, inputs: int) -> int:
    """How many examples make a batch large: as many as a second or so allows, by the multiply-adds of `base`."""
    adds = sum(
        t.numel() * p.numel() // max(1, p.shape[0])
        for _, module, outputs in base.modules
        for t in outputs[:1]
        for p in module.parameters(recurse=False)
        if p.ndim > 1
    )
    each = max(adds / PROBE, 100.0 * inputs)
    return int(max(PROBE, min(SOME, DEAR / each), min(MANY, CHEAP / each)))


def _changed(model: nn.Module, base: Pass, x: Tensor, others: Tensor) -> None:
    """Put `others` in the place of the first examples, and see that nothing else changes."""
    changed = torch.cat([others, x[len(others) :]])
    try:
        after = forward(model, changed)
    except ValueError:  # an example that it does not take: it says so by itself
        return
    _same_buffers(base, after, model)
    if not same(base.output[len(others) :], after.output[len(others) :]):
        raise culprit(model, x, changed, "changes", len(others))


def _same_state(before: dict[str, Tensor], after: dict[str, Tensor], model: nn.Module) -> None:
    """Refuse what a pass changes by itself: how many passes make a step depends on how many examples there are."""
    for name, tensor in before.items():
        if name in after and not torch.equal(tensor, after[name]):
            path, _, last = name.rpartition(".")
            raise CrossExampleLayer(
                model,
                path,
                f'changes "{last}" in every pass, and the number of passes depends on the size of the batch',
                "Compute it from the parameters, or do not update it in training.",
            )


def _same_buffers(a: Pass, b: Pass, model: nn.Module) -> None:
    for name, buffer in a.buffers.items():
        if not same(buffer, b.buffers[name]):
            path, _, last = name.rpartition(".")
            raise CrossExampleLayer(
                model,
                path,
                f'writes the data into its buffer "{last}", which is published without noise',
                "Remove the buffer, or do not update it in training.",
            )


def culprit(model: nn.Module, x: Tensor, changed: Tensor, what: str, ahead: int = 1) -> CrossExampleLayer:
    """The first module to end with another output for the examples that stayed: its parts ended unchanged."""
    reason = f"gives another output for an example when another one of a batch of {len(x)} {what}"
    a, b = forward(model, x, record=True), forward(model, changed, record=True)
    drawn = forward(model, x, seed=1, record=True)
    stayed = min(len(x) - ahead, len(changed))
    for (path, _, ours), (_, _, theirs), (*_, again) in zip(a.modules, b.modules, drawn.modules, strict=False):
        for one, other, redrawn in zip(ours, theirs, again, strict=False):
            batch_first = one.ndim > 0 and len(one) == len(x) and other.ndim > 0 and len(other) == len(changed)
            if batch_first and not same(one[-stayed:], other[-stayed:]):
                why = (reason, REMEDY) if same(one, redrawn) else UNEVEN
                return CrossExampleLayer(model, path, *why)
    return CrossExampleLayer(model, "", reason)
