"""Losses: what is minimised, and how a trained model is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.dp.random import Stream


class Batch(NamedTuple):
    """A logical batch: inputs `x` [B, ...] and targets `y` [B]. B may be zero: an empty Poisson draw is a step."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:  # a batch is as long as its examples, not as its two fields
        return self.x.shape[0]


Split = Literal["train", "test"]


class Data(Protocol):
    """What training needs of a data set (see `harness.data.Dataset`)."""

    @property
    def n_train(self) -> int:
        """Number of training examples: public."""
        ...

    @property
    def n_test(self) -> int:
        """Number of examples to evaluate on."""
        ...

    def batch(self, indices: Tensor, split: Split = "train") -> tuple[Tensor, Tensor]:
        """Normalised inputs and labels."""
        ...


@dataclass(frozen=True)
class Loss:
    """A loss that is a sum over examples, so that one example's gradient is its own, unless it says `coupled`."""

    @property
    def rows(self) -> int:
        """How many rows of the model's input make one example."""
        return 1

    @property
    def coupled(self) -> bool:
        """Whether an example's loss depends on the others of its batch: then no example has a gradient of its own."""
        return False

    @property
    def probes(self) -> bool:
        """Whether `scores` reads training examples too, without privacy: then they are not to be published."""
        return False

    def per_example(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Losses [B] from model outputs [B, ...] and targets [B]."""
        raise NotImplementedError

    def prepare(self, batch: Batch, rng: Stream) -> Batch:
        """What a logical batch becomes before it is trained on; never what is evaluated on."""
        return batch

    def of(self, model: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
        """Losses [B] of a prepared batch."""
        return self.per_example(model(batch.x), batch.y)

    def scores(
        self, model: Callable[[Tensor], Tensor], data: Data, device: torch.device, split: Split = "test"
    ) -> dict[str, float]:
        """How a trained `model`, in evaluation mode, does on a split: "accuracy" and "loss" (of an example)."""
        total, correct = 0.0, 0
        n = data.n_train if split == "train" else data.n_test
        for indices in torch.arange(n, device=device).split(1024):
            x, y = data.batch(indices, split)
            outputs = model(x)
            total += float(self.per_example(outputs, y).double().sum())
            correct += int((outputs.argmax(-1) == y).sum())
        return {"accuracy": correct / n, "loss": total / n}


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Softmax cross-entropy. Outputs [B, K] are logits; outputs [B, T, K] are averaged over the T positions."""

    def per_example(self, outputs: Tensor, y: Tensor) -> Tensor:
        if outputs.ndim == 2:
            return F.cross_entropy(outputs, y, reduction="none")
        return F.cross_entropy(outputs.movedim(-1, 1), y, reduction="none").flatten(1).mean(1)


def crops(x: Tensor, pad: int, flip: bool, rng: Stream) -> Tensor:
    """A random crop of each image of `x` [B, C, H, W] padded by `pad` pixels of zeros, mirrored half of the time."""
    count, _, height, width = x.shape
    down, right, mirror = rng.uniform(3 * count).to(x.device).view(3, count)
    steps = 2 * pad + 1
    rows = (down * steps).long()[:, None] + torch.arange(height, device=x.device)
    columns = (right * steps).long()[:, None] + torch.arange(width, device=x.device)
    if flip:
        columns = torch.where((mirror < 0.5)[:, None], columns.flip(1), columns)
    padded = F.pad(x, (pad,) * 4)
    which = torch.arange(count, device=x.device)[:, None, None]
    return padded.movedim(1, -1)[which, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


@dataclass(frozen=True)
class Views(Loss):
    """Augmentation multiplicity (De et al., arXiv:2204.13650): the mean of a loss over random `views` of an image.

    A view is a crop of the image padded by `pad` pixels of zeros, and with `flip` mirrored half of the time. The views'
    gradients are averaged before they are clipped, so that an example still contributes one gradient.
    """

    of_view: Loss = field(default_factory=CrossEntropy)
    views: int = 4
    pad: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if self.views < 1 or self.pad < 0:
            raise ValueError(f"views = {self.views} and pad = {self.pad}: one view or more, no negative padding")

    @property
    def rows(self) -> int:
        return self.views

    def per_example(self, outputs: Tensor, y: Tensor) -> Tensor:
        return self.of_view.per_example(outputs, y)

    def prepare(self, batch: Batch, rng: Stream) -> Batch:
        """Images [B, C, H, W] to views [B, K, C, H, W], or [B, C, H, W] for one view. Raises ValueError for others."""
        if batch.x.ndim != 4:
            raise ValueError(f"views are made of images [B, C, H, W], not of inputs {list(batch.x.shape)}")
        cropped = crops(batch.x.repeat_interleave(self.views, 0), self.pad, self.flip, rng)
        return Batch(cropped.unflatten(0, (len(batch), self.views)) if self.views > 1 else cropped, batch.y)

    def of(self, model: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
        if self.rows == 1:
            return super().of(model, batch)
        outputs = model(batch.x.flatten(0, 1))
        targets = batch.y[:, None].expand(-1, self.rows).reshape(-1)
        return self.per_example(outputs, targets).unflatten(0, (len(batch), self.rows)).mean(1)
