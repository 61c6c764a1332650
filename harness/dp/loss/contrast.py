"""Losses that need no labels: contrast between pairs of views, and rotations; and the probe that judges embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.dp.loss.loss import Batch, Data, Loss, Split, crops
from harness.dp.random import Stream

TINY = 1e-12  # shorter embeddings are not stretched to unit length
PROBED = 10_000  # training examples that a probe is fitted to, at most
CHUNK = 256  # examples at a time when a loss is evaluated: the number of candidates of a contrast
RIDGE = 1e-4  # of the probe, on standardised embeddings


def unit(outputs: Tensor) -> Tensor:
    """Embeddings [B, ...] as rows [B, d] of unit length, in float64: so that no product of two exceeds one."""
    z = outputs.flatten(1).double()
    return z / torch.linalg.vector_norm(z, dim=1, keepdim=True).clamp(min=TINY)


@dataclass(frozen=True)
class SelfSupervised(Loss):
    """A loss without labels: a trained model is an encoder, and is judged by a linear probe."""

    @property
    def probes(self) -> bool:
        return True

    def scores(
        self, model: Callable[[Tensor], Tensor], data: Data, device: torch.device, split: Split = "test"
    ) -> dict[str, float]:
        """{"accuracy": of the probe, "loss": the mean of this loss, on views drawn from a fixed public stream}.

        The probe is an evaluation protocol: it reads training labels without privacy, and is never released.
        """
        total = 0.0
        n = data.n_train if split == "train" else data.n_test
        for place, indices in enumerate(torch.arange(n, device=device).split(CHUNK)):
            batch = self.prepare(Batch(*data.batch(indices, split)), Stream(0, "evaluation", place))
            total += float(self.of(model, batch).double().sum())
        return {"accuracy": probe(model, data, device, split), "loss": total / n}


@dataclass(frozen=True)
class InfoNCE(SelfSupervised):
    """Which of the batch's second views belongs to this first view (van den Oord et al., arXiv:1807.03748).

    With u_i and v_j the unit embeddings of the first view of example i and the second view of example j, the logits
    are Z_ij = <u_i, v_j> / temperature, and example i loses -log softmax_j(Z_ij)[i]. A batch of one loses nothing.

    A view is a crop of the image padded by `pad` pixels, with `flip` mirrored half of the time, and with its contrast
    and brightness changed by up to `jitter` (of the image's contrast, and in the data's normalised units).
    """

    temperature: float = 0.5
    pad: int = 4
    flip: bool = True
    jitter: float = 0.2

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"the temperature must be positive and finite, not {self.temperature}")
        if self.pad < 0 or not 0 <= self.jitter < 1:
            raise ValueError(f"pad = {self.pad} and jitter = {self.jitter}: no negative padding, jitter below 1")

    @property
    def rows(self) -> int:
        return 2

    @property
    def coupled(self) -> bool:
        return True

    def prepare(self, batch: Batch, rng: Stream) -> Batch:
        """Images [B, C, H, W] to pairs of views [B, 2, C, H, W]. Raises ValueError for other inputs."""
        if batch.x.ndim != 4:
            raise ValueError(f"views are made of images [B, C, H, W], not of inputs {list(batch.x.shape)}")
        x = crops(batch.x.repeat_interleave(2, 0), self.pad, self.flip, rng)
        if self.jitter:
            change = (2 * rng.uniform(2 * len(x)) - 1).mul_(self.jitter).to(x.device, x.dtype)
            contrast, brightness = change.view(2, -1, 1, 1, 1)
            mean = x.mean((1, 2, 3), keepdim=True)
            x = (x - mean) * (1 + contrast) + mean + brightness
        return Batch(x.unflatten(0, (len(batch), 2)), batch.y)

    def of(self, model: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
        """Losses [B] of pairs of views [B, 2, ...], in float64."""
        return self.of_units(unit(model(batch.x.flatten(0, 1))))

    def of_units(self, units: Tensor) -> Tensor:
        """Losses [B] of unit embeddings [2B, d], the two views of an example next to each other."""
        logits = self.logits(units)
        return logits.logsumexp(1) - logits.diagonal()

    def logits(self, units: Tensor) -> Tensor:
        """Z [B, B]: row i holds the first view of example i against all second views."""
        return units[0::2] @ units[1::2].T / self.temperature


@dataclass(frozen=True)
class Rotations(SelfSupervised):
    """By which of four right angles an image was turned (Gidaris et al., arXiv:1803.07728): a sum over examples.

    The first four outputs of the model are the logits, or three are and the fourth is zero, which loses nothing. An
    example's loss is the mean over its four rotations.
    """

    @property
    def rows(self) -> int:
        return 4

    def prepare(self, batch: Batch, rng: Stream) -> Batch:
        """Square images [B, C, H, H] to [B, 4, C, H, H]. Raises ValueError for other inputs."""
        if batch.x.ndim != 4 or batch.x.shape[2] != batch.x.shape[3]:
            raise ValueError(f"rotations are made of square images, not of inputs {list(batch.x.shape)}")
        return Batch(torch.stack([batch.x.rot90(turns, (2, 3)) for turns in range(4)], 1), batch.y)

    def of(self, model: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
        """Losses [B] of images [B, 4, ...]. Raises ValueError for a model of fewer than three outputs."""
        outputs = model(batch.x.flatten(0, 1)).flatten(1)[:, :4]
        if outputs.shape[1] < 3:
            raise ValueError(f"four rotations need three outputs, and the model has {outputs.shape[1]}")
        outputs = F.pad(outputs, (0, 4 - outputs.shape[1]))
        turns = torch.arange(4, device=outputs.device).repeat(len(batch))
        return F.cross_entropy(outputs, turns, reduction="none").unflatten(0, (-1, 4)).mean(1)


def probe(model: Callable[[Tensor], Tensor], data: Data, device: torch.device, split: Split = "test") -> float:
    """Accuracy on `split` of multinomial logistic regression on the model's outputs, as the model gives them.

    Fitted in float64 by L-BFGS from zero, so deterministic, to the first 10,000 training examples, with outputs
    standardised there and an l2 penalty of 1e-4 / 2. Not a number where an output is not finite. It is not private.
    """
    features, labels = embedded(model, data, device, "train", min(data.n_train, PROBED))
    test, truth = embedded(model, data, device, split, data.n_train if split == "train" else data.n_test)
    if not (features.isfinite().all() and test.isfinite().all()):
        return math.nan
    mean, deviation = features.mean(0), features.std(0, correction=0) + TINY
    features, test = (features - mean) / deviation, (test - mean) / deviation
    classes = int(torch.cat([labels, truth]).max()) + 1
    weight = features.new_zeros(classes, features.shape[1], requires_grad=True)
    bias = features.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), labels) + RIDGE / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return float((F.linear(test, weight, bias).argmax(1) == truth).double().mean())


@torch.no_grad()
def embedded(
    model: Callable[[Tensor], Tensor], data: Data, device: torch.device, split: Split, count: int
) -> tuple[Tensor, Tensor]:
    """Outputs [count, d], in float64, and labels of the first `count` examples of a split."""
    pieces = []
    for indices in torch.arange(count, device=device).split(1024):
        x, y = data.batch(indices, split)
        pieces.append((model(x).flatten(1).double(), y))
    outputs, labels = zip(*pieces, strict=True)
    return torch.cat(outputs), torch.cat(labels)
