"""One data set, held as whole tensors: there is no loader and no Python per example."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from harness.data.canonical import KEYS, Array

# Digests and descriptions are answered without importing torch.
if TYPE_CHECKING:
    import torch
    from torch import Tensor

Split = Literal["train", "test"]


def validation_size(n_train: int) -> int:
    """How many of ``n_train`` examples :meth:`Dataset.validation_split` keeps for training (80 %)."""
    return n_train * 4 // 5


@dataclass(frozen=True)
class Facts:
    """What is known of a data set without its arrays. ``digest`` is empty where only loading can tell.

    ``sources`` are the digests of the data that it was made of, where it was made of other data. ``tokens`` is given
    where all inputs are whole numbers from 0 that are used as they are, such as tokens: all are below it.
    """

    name: str
    digest: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    statistics: str
    input_shape: tuple[int, ...]
    classes: int
    n_train: int
    n_test: int
    public_data: str = "none"
    sources: tuple[str, ...] = ()
    tokens: int | None = None


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test examples in canonical order, with public channel statistics.

    Images are uint8 ``[N, C, H, W]``, everything else float32 ``[N, ...]``; labels are int64 ``[N]``.
    ``mean`` and ``std`` (one number per channel, or one for all) are constants that do not come from these
    examples; ``statistics`` says from where. For images they apply to pixels divided by 255. ``digest``
    names the content, whatever file it was read from; ``source`` says which. ``tokens`` is as in :class:`Facts`.
    ``dtype`` is what :meth:`batch` returns, float32 when None.
    """

    name: str
    classes: int
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str
    source: str
    statistics: str
    public_data: str = "none"
    tokens: int | None = None
    dtype: torch.dtype | None = None

    @classmethod
    def of(cls, facts: Facts, arrays: Iterable[Array], source: str) -> Dataset:
        """The data set of ``x_train y_train x_test y_test``, which stay where they are in memory."""
        import torch

        x_train, y_train, x_test, y_test = map(torch.from_numpy, arrays)
        names = ("mean", "std", "digest", "statistics", "public_data", "tokens")
        shared: dict[str, Any] = {name: getattr(facts, name) for name in names}
        return cls(facts.name, facts.classes, x_train, y_train, x_test, y_test, source=source, **shared)

    @property
    def n_train(self) -> int:
        """Number of training examples."""
        return self.x_train.shape[0]

    @property
    def n_test(self) -> int:
        """Number of test examples."""
        return self.x_test.shape[0]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example, ``(C, H, W)`` for images."""
        return tuple(self.x_train.shape[1:])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Dataset:
        """The same data on ``device``. :meth:`batch` then returns ``dtype``; images stay uint8 in memory."""
        moved: dict[str, Any] = {key: getattr(self, key).to(device) for key in KEYS}
        return replace(self, **moved, dtype=dtype or self.dtype)

    def batch(self, indices: Tensor | slice, split: Split = "train") -> tuple[Tensor, Tensor]:
        """Normalised inputs ``[B, ...]`` and labels ``[B]`` of the examples ``indices``; B may be 0.

        Gathering and normalising happen on the device that holds the data. A full batch, all examples in
        order, is a view of what is stored where nothing has to be normalised: features of many gigabytes
        are then not copied. So a batch is to be read, never written to.
        """
        x, y = (self.x_train, self.y_train) if split == "train" else (self.x_test, self.y_test)
        chosen = slice(None) if _is_all(indices, len(y)) else indices
        return self.normalise(x[chosen]), y[chosen]

    def normalise(self, x: Tensor) -> Tensor:
        """Stored examples to a model's input: ``(x - mean) / std``, for uint8 with x / 255 for x.

        Mean 0 and deviation 1 give ``x`` itself, if it has the wanted type.
        """
        scale, shift = self._affine
        if x.dtype == scale.dtype and not any(self.mean) and all(s == 1 for s in self.std):
            return x
        return x.to(scale.dtype).mul(scale).add_(shift)

    @cached_property
    def _affine(self) -> tuple[Tensor, Tensor]:
        """``scale`` and ``shift`` with normalised = x * scale + shift, on the data's device, rounded once."""
        import torch

        unit = 255.0 if self.x_train.dtype == torch.uint8 else 1.0
        dtype, device = self.dtype or torch.float32, self.x_train.device
        per_channel = (-1,) + (1,) * (self.x_train.ndim - 2)

        def tensor(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64).view(per_channel).to(device, dtype)

        return (
            tensor([1.0 / (unit * s) for s in self.std]),
            tensor([-m / s for m, s in zip(self.mean, self.std, strict=True)]),
        )

    def validation_split(self) -> Dataset:
        """For choosing hyper-parameters: the first 80 % of train as train, the rest of train as test.

        The order is that of content hashes, so the cut is random with respect to the content, and the same
        on every machine. The real test examples are not in the result.
        """
        cut = validation_size(self.n_train)
        return replace(
            self,
            name=f"{self.name}:validation",
            digest=hashlib.sha256(f"{self.digest}:validation".encode()).hexdigest()[:16],
            x_train=self.x_train[:cut],
            y_train=self.y_train[:cut],
            x_test=self.x_train[cut:],
            y_test=self.y_train[cut:],
        )


def _is_all(indices: Tensor | slice, n: int) -> bool:
    """Whether ``indices`` are 0, 1, ..., n-1. Asks the device only where there are n of them."""
    import torch

    if isinstance(indices, slice) or indices.shape != (n,) or indices.dtype == torch.bool:
        return False
    return torch.equal(indices, torch.arange(n, device=indices.device, dtype=indices.dtype))
