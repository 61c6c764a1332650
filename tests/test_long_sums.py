"""Sums of many contributions: one example more moves them by no more than its bound, whatever the others add up to."""

import pytest
import torch
from torch import nn

from harness.dp import BookKeeping, Ghost, Loop, Vmap
from harness.dp.clip import Flat, GroupWise
from harness.dp.engines.engine import trainable
from harness.dp.loss import Batch, CrossEntropy
from harness.dp.release import Relation
from harness.dp.tree import Tree

MANY, BOUND = 1500, 0.1


class Last(nn.Module):
    """The last output of a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.head = (
            nn.Embedding(11, 6),
            nn.GRU(6, 5, batch_first=True),
            nn.Linear(5, 3),
        )

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
def test_an_example_moves_a_long_sum_by_its_bound(name, clip, engine):
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


def test_a_long_sum_is_that_of_the_loop():
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
