"""Features of a public, frozen network as a data set: ``features:cifar10?backbone=efficientnet-lite0&size=128``.

Every row depends on one picture alone and has a norm of at most 1, whatever the picture is, so that a row is one
example's worth of private data with a public bound. Rows are computed once and read from a file after that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from harness.data.backbones import Backbone, Network
from harness.data.backbones import backbone as found_backbone
from harness.data.dataset import Dataset, Facts, Split
from harness.data.extract import Rows, fill, finished, mapped
from harness.data.pictures import Base
from harness.data.pictures import base as found_base
from harness.data.source import DatasetError, DatasetMismatch, DatasetMissing, Derived, Places
from harness.dp import cache
from harness.registry import dataset

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1  # part of the digest: raise it when the same pictures and weights give other features
MICROBATCH = 32  # pictures that go through the network at once
INSIDE = 1 - 2.0**-20  # rows are this long, so that rounding to float32 does not lengthen one beyond 1


@dataset("features")
def features(
    path: str,
    root: Places,
    backbone: str,
    size: int | None = None,
    norm: Literal["unit"] | float = "unit",
    checkpoint: str | None = None,
    public: str | None = None,
) -> Derived:
    """Features of the pictures of another data set by a public network: "features:cifar10?backbone=scattering".

    ``backbone`` is efficientnet-lite0 (ImageNet weights from a package), scattering (fixed filters) or timm/NAME;
    the latter downloads its weights, or takes those of ``checkpoint`` (a .safetensors file) and what these were
    trained on, ``public``. ``size`` is the side that pictures are resized to; default: what the backbone was made
    for. Each row is divided by its norm, or with ``norm=20`` by the larger of its norm and 20.
    """
    if size is not None and size < 1:
        raise DatasetError(f"features:{path}?size={size}: write a number of pixels, as in size=128")
    if norm != "unit" and norm <= 0:
        raise DatasetError(f'features:{path}?norm={norm}: write "unit" or a length above 0')
    one = Features(
        found_base(path, root), found_backbone(backbone, checkpoint, public, root), backbone, size, norm, checkpoint
    )
    return Derived(one.facts, one.load, one.missing)


@dataclass(frozen=True)
class Features:
    """A data set of pictures, a backbone, and how they meet."""

    base: Base
    backbone: Backbone
    name: str
    size: int | None
    norm: str | float
    checkpoint: str | None

    def missing(self) -> DatasetMissing | None:
        """What is missing of the pictures or of the network."""
        return self.base.missing() or self.backbone.missing()

    def facts(self) -> Facts:
        """Known from the facts of the pictures and of the network; nothing is computed."""
        card, pictures = self.backbone.card(), self.base.facts()
        channels, height, width = pictures.input_shape
        side = self.size or card.side
        if side is None and height == 0:
            raise DatasetError(f"features:{pictures.name}: its pictures may differ in size; write size=64, say")
        if card.mean and channels not in (1, 3):
            raise DatasetError(f"backbone={self.name} takes pictures of 1 or 3 channels, not {channels}")
        shape = (channels, side or height, side or width)
        identity = {
            "version": VERSION,
            "base": pictures.digest,
            "backbone": asdict(card) | {"side": None},
            "size": side,
            "norm": self.norm,
        }
        unit = "its norm" if self.norm == "unit" else f"the larger of its norm and {self.norm:g}"
        return Facts(
            name=self._title(pictures.name),
            digest=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16],
            mean=(0.0,),
            std=(1.0,),
            statistics=f"none: every row is divided by {unit}, so that it is at most 1 long",
            input_shape=(self.backbone.width(shape),),
            classes=pictures.classes,
            n_train=pictures.n_train,
            n_test=pictures.n_test,
            public_data=self.backbone.public_data,
            sources=(pictures.digest,),
        )

    def load(self) -> Dataset:
        """The rows, computed first where they are not kept."""
        facts = self.facts()
        folder = cache.root() / "features" / facts.digest
        sizes: dict[Split, int] = {"train": facts.n_train, "test": facts.n_test}
        if not finished(folder, sizes, facts.input_shape[0]):
            folder = cache.usable(folder)
        fill(folder, sizes, facts.input_shape[0], lambda: self._rows(folder), facts.name)
        arrays = (mapped(folder / f"{name}.npy") for name in ("train", "train-labels", "test", "test-labels"))
        return Dataset.of(facts, arrays, f"{self.name} features in {folder.name}")

    def _title(self, pictures: str) -> str:
        """The canonical name; of a path only its stem, as a record does not depend on folders."""
        options = {
            "backbone": self.name,
            "checkpoint": self.checkpoint and Path(self.checkpoint).stem,
            "norm": None if self.norm == "unit" else f"{self.norm:g}",
            "size": self.size,
        }
        return f"features:{pictures}?" + "&".join(f"{k}={v}" for k, v in options.items() if v is not None)

    def _rows(self, folder: Path) -> Rows:
        """What computes rows, with the labels written."""
        absent = self.missing()
        if absent is not None:
            raise absent
        card, pictures, planned = self.backbone.card(), self.base.open(), self.base.facts().digest
        if pictures.digest != planned:
            raise DatasetMismatch(
                f"{pictures.source}: its pictures have changed (digest {pictures.digest}, not {planned}); plan the "
                "suite again: runs on other pictures are other runs"
            )
        splits: tuple[Split, Split] = ("train", "test")
        for split in splits:
            cache.write_whole(folder / f"{split}-labels.npy", partial(np.save, arr=pictures.labels(split)))
        compute = extractor(self.backbone.build(), card.mean, card.std, self.norm)
        side = self.size or card.side

        def rows(split: Split, start: int, stop: int) -> np.ndarray:
            x = pictures.read(split, start, stop, side, card.interpolation)
            return compute(x).numpy()

        return rows


def extractor(net: Network, mean: tuple[float, ...], std: tuple[float, ...], norm: str | float) -> Network:
    """Pixels in 0..1, ``[B, C, S, S]``, to bounded rows, float32 ``[B, D]`` on the CPU; on a GPU if there is one.

    The rows of an example do not depend on the others; this is tried on the first pictures. Raises
    :class:`DatasetError` where they do, or where a feature is not finite.
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = isinstance(net, torch.nn.Module)
    if isinstance(net, torch.nn.Module):
        net = net.to(device).to(memory_format=torch.channels_last)
    tried = False

    def forward(x: Tensor) -> Tensor:
        x = x.to(device)
        if mean:
            x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
            x = (x - x.new_tensor(mean).view(3, 1, 1)) / x.new_tensor(std).view(3, 1, 1)
        if module:
            x = x.contiguous(memory_format=torch.channels_last)
        try:
            return net(x).flatten(1)
        except (RuntimeError, ValueError, AssertionError) as error:
            raise DatasetError(f"the backbone cannot take pictures of {list(x.shape[1:])}: {error}") from error

    @torch.no_grad()
    def compute(x: Tensor) -> Tensor:
        nonlocal tried
        with _full_precision():
            found = torch.cat([forward(part) for part in x.split(MICROBATCH)]).cpu()
            if not tried:
                _refuse_mixing(found[:1], forward(x[:1]).cpu())
                tried = True
        if not found.isfinite().all():
            raise DatasetError("the backbone gives features that are not finite")
        return bounded(found, norm)

    return compute


def bounded(f: Tensor, norm: str | float) -> Tensor:
    """Rows ``[B, D]`` divided by their norm, or by the larger of it and ``norm``: none is longer than 1.

    A row of zeros stays one.
    """
    import torch

    wide = f.double()
    length = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    least = torch.finfo(torch.float64).tiny if norm == "unit" else float(norm)
    return (wide * (INSIDE / length.clamp_min(least))).float()


def _refuse_mixing(together: Tensor, alone: Tensor) -> None:
    import torch

    scale = float(together.abs().max()) or 1.0
    if not torch.allclose(together, alone, rtol=1e-3, atol=1e-3 * scale):
        raise DatasetError(
            "the backbone's features of a picture depend on the other pictures of its batch, so that one example "
            "touches many rows and no privacy guarantee holds; take another backbone"
        )


@contextmanager
def _full_precision() -> Iterator[None]:
    """Products in float32 proper, whatever the session allows for training."""
    from torch.backends import cuda, cudnn

    before = cuda.matmul.allow_tf32, cudnn.allow_tf32
    try:
        cuda.matmul.allow_tf32 = cudnn.allow_tf32 = False
        yield
    finally:
        cuda.matmul.allow_tf32, cudnn.allow_tf32 = before
