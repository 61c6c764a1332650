"""Sums of many contributions: one example more moves them by no more than its bound, whatever the others add up to."""

import pytest
import torch
from torch import nn

from harness.dp import SGD, BookKeeping, Ghost, Loop, Method, Vmap
from harness.dp.clip import Flat, GroupWise
from harness.dp.engines.engine import trainable
from harness.dp.loss import Batch, CrossEntropy
from harness.dp.random import Stream
from harness.dp.release import Relation
from harness.dp.tree import Tree
from harness.running.train import Streams, start, step

MANY, BOUND = 1000, 0.1


class Last(nn.Module):
    """The last output of a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.head = (nn.Embedding(11, 6), nn.GRU(6, 5, batch_first=True), nn.Linear(5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embed(x))[0][:, -1])


def images(n: int) -> torch.Tensor:
    return torch.randn(1, 1, 8, 8) + 0.05 * torch.randn(n, 1, 8, 8)


def tokens(n: int) -> torch.Tensor:
    return torch.randint(0, 11, (1, 4)).expand(n, 4).clone()


MODELS = {
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3)),
        images,
    ),
    "recurrent": (Last, tokens),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("clip", [Flat(BOUND), GroupWise(BOUND)], ids=["flat", "group-wise"])
@pytest.mark.parametrize("engine", [BookKeeping(), BookKeeping(400), Ghost(), Vmap()], ids=str)
def test_an_example_moves_a_sum_by_its_bound(name, clip, engine):
    """All gradients point alike, so that the sum is a thousand times as long as one of them."""
    torch.manual_seed(1)
    make, draw = MODELS[name]
    model, x, y = make(), draw(MANY), torch.zeros(MANY, dtype=torch.long)
    w = Tree.of(trainable(model))

    def total(chosen: torch.Tensor) -> torch.Tensor:
        given = (CrossEntropy(), clip, model, w, Batch(x[chosen], y[chosen]), clip.init(w.layout))
        return engine.bounded(*given, 1.0, Relation.ADD_OR_REMOVE).releases["grad"].value.flat.double()

    everyone = torch.arange(MANY)
    whole = total(everyone)
    assert float(whole.norm()) > 0.9 * MANY * BOUND
    for one in (0, 711, MANY - 1):
        assert float((whole - total(everyone[everyone != one])).norm()) <= BOUND * (1 + 1e-6)


def test_a_sum_is_that_of_the_loop():
    torch.manual_seed(1)
    model, x, y = nn.Linear(20, 3), torch.randn(MANY, 20), torch.randint(0, 3, (MANY,))
    w, clip = Tree.of(trainable(model)), Flat(BOUND)
    sums = [
        engine.bounded(
            CrossEntropy(), clip, model, w, Batch(x, y), None, 1.0, Relation.ADD_OR_REMOVE
        ).releases["grad"].value.flat
        for engine in (Loop(), BookKeeping(), Ghost(), Vmap(400))
    ]  # fmt: skip
    assert all(one.dtype is torch.float64 for one in sums)
    assert all(float((one - sums[0]).norm() / sums[0].norm()) < 1e-6 for one in sums)


def test_the_type_of_a_sum_does_not_show_in_the_weights():
    """Whether a batch was empty, so that nothing made a float64 of it, may not decide which floats come out."""
    torch.manual_seed(1)
    model, method = nn.Linear(50, 20), Method(optimizer=SGD(1.0))
    x, y = torch.randint(-1, 2, (8, 50)).float(), torch.zeros(8, dtype=torch.long)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    w = Tree.of(trainable(model))
    parts = start(method, model, 1).parts
    for n in (0, 8):
        streams = Streams(Stream(1, "noise", 0), Stream(1, "path", 0))
        done = step(method, model, w, Batch(x[:n], y[:n]), parts, 50.0, 1000, streams)
        assert divided_in_float32(done.w)


def divided_in_float32(w: Tree) -> bool:
    """Each weight is the quotient of a float32 by 1000; of a float64, one in forty is not."""
    whole = (w.flat * 1000).double()
    near = [torch.nextafter(whole.float(), torch.tensor(side)) for side in (-torch.inf, torch.inf)]
    candidates = [whole.float(), *near, *(torch.nextafter(n, n * 2) for n in near)]
    hit = torch.stack([(-(c / 1000) == w.flat) | ((c / 1000) == w.flat) for c in candidates]).any(0)
    return bool(hit.all())
