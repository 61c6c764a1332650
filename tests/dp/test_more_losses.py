"""Losses that weigh examples or mix their views: against formulas, and each example by itself."""

import pytest
import torch
import torch.nn.functional as F

from harness.dp import Batch, CrossEntropy, Focal, Method, Mixed
from harness.dp.random import Stream
from harness.registry.parts import combine

X = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(5) % 3


def test_focal_is_cross_entropy_weighed_by_what_is_missing():
    outputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p = outputs.softmax(1).gather(1, Y[:, None]).squeeze(1)
    assert torch.allclose(Focal(gamma=2.0).per_example(outputs, Y), -((1 - p) ** 2) * p.log())
    assert torch.allclose(Focal(gamma=0.0).per_example(outputs, Y), CrossEntropy().per_example(outputs, Y))
    sequence = outputs.unsqueeze(1).expand(5, 4, 3)
    several = Focal(gamma=2.0).per_example(sequence, Y[:, None].expand(5, 4))
    assert torch.allclose(several, Focal(gamma=2.0).per_example(outputs, Y))


def test_mixtures_are_of_an_examples_own_views():
    loss = Mixed(views=3, mixtures=4, pad=1)
    made = loss.prepare(Batch(X, Y), Stream(1, "views", 0))
    assert made.x.shape == (5, 7, 1, 6, 6) and loss.rows == 7
    views, mixtures = made.x[:, :3].flatten(2), made.x[:, 3:].flatten(2)
    for i in range(5):
        for mixture in mixtures[i]:
            # On the segment between two of the views.
            apart = [
                float((mixture - a - t * (b - a)).norm())
                for a in views[i] for b in views[i] if float((b - a).norm()) > 0
                for t in [float(((mixture - a) @ (b - a)) / (b - a).square().sum())] if -1e-6 <= t <= 1 + 1e-6
            ]  # fmt: skip
            assert min(apart, default=float((mixture - views[i][0]).norm())) < 1e-4
    # Another example changes nothing of what is made of the others.
    other = X.clone()
    other[2] += 1.0
    again = loss.prepare(Batch(other, Y), Stream(1, "views", 0))
    assert torch.equal(torch.cat([made.x[:2], made.x[3:]]), torch.cat([again.x[:2], again.x[3:]]))


def test_the_loss_is_the_mean_over_views_and_mixtures():
    loss = Mixed(views=2, mixtures=2, pad=1)
    made = loss.prepare(Batch(X, Y), Stream(1, "views", 0))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 3))
    rows = [F.cross_entropy(model(made.x[:, k]), Y, reduction="none") for k in range(4)]
    assert torch.allclose(loss.of(model, made), torch.stack(rows).mean(0), atol=1e-6)


def test_suites_may_name_them():
    made = combine(Method(), {"loss": "focal?gamma=2", "views": "mixed?views=2&mixtures=3"})
    assert made.loss == Mixed(Focal(2.0), views=2, mixtures=3)
    with pytest.raises(ValueError, match="two views or more"):
        Mixed(views=1)
