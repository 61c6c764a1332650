"""Public image data sets by name: from a ``.npz`` in the data root, other files there, or by download."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from harness.data.arrays import IDX_FILES, read_idx_folder, read_npz
from harness.data.canonical import Array, Raw
from harness.data.source import DATA, DOWNLOAD, Candidate, Places, Source, first_of
from harness.registry import dataset


@dataset(
    "mnist",
    shape=(1, 28, 28),
    classes=10,
    n_train=60000,
    n_test=10000,
    mean=(0.1307,),
    std=(0.3081,),
    statistics="MNIST's published mean and deviation (PyTorch examples)",
)
def mnist(root: Places) -> Source:
    """MNIST (LeCun et al. 1998): 60,000 and 10,000 handwritten digits, 28x28 grey."""
    return _idx("mnist", root, [root.root / "MNIST" / "raw"], "MNIST")


@dataset(
    "fashion-mnist",
    shape=(1, 28, 28),
    classes=10,
    n_train=60000,
    n_test=10000,
    mean=(0.2860,),
    std=(0.3530,),
    statistics="Fashion-MNIST's published mean and deviation",
    digest="38da93abb8656246",
)
def fashion_mnist(root: Places) -> Source:
    """Fashion-MNIST (arXiv:1708.07747): 60,000 and 10,000 pictures of clothes, 28x28 grey."""
    shares = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    debian = [Path(share) / "datasets" / "fashion-mnist" for share in shares.split(":") if share]
    return _idx(
        "fashion-mnist",
        root,
        [root.root / "FashionMNIST" / "raw", *debian],
        "FashionMNIST",
        ["apt-get install dataset-fashion-mnist (Debian, Ubuntu)"],
    )


@dataset(
    "cifar10",
    shape=(3, 32, 32),
    classes=10,
    n_train=50000,
    n_test=10000,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    statistics="CIFAR-10's published channel means and deviations",
    digest="18fe8053fed154c9",
)
def cifar10(root: Places) -> Source:
    """CIFAR-10 (Krizhevsky 2009): 50,000 and 10,000 colour pictures of 32x32 in 10 classes."""
    return _torchvision("cifar10", root, "CIFAR10", (root.root / "cifar-10-batches-py",), classes=10)


@dataset(
    "cifar100",
    shape=(3, 32, 32),
    classes=100,
    n_train=50000,
    n_test=10000,
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    statistics="CIFAR-100's published channel means and deviations",
)
def cifar100(root: Places) -> Source:
    """CIFAR-100 (Krizhevsky 2009): 50,000 and 10,000 colour pictures of 32x32 in 100 classes."""
    return _torchvision("cifar100", root, "CIFAR100", (root.root / "cifar-100-python",), classes=100)


# The coarse class of each of CIFAR-100's fine classes, as the published files pair them.
_COARSE = (
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7,
    6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10,
    16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16,
    12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13,
)  # fmt: skip


@dataset(
    "cifar100-coarse",
    shape=(3, 32, 32),
    classes=20,
    n_train=50000,
    n_test=10000,
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    statistics="CIFAR-100's published channel means and deviations",
)
def cifar100_coarse(root: Places) -> Source:
    """CIFAR-100 under its 20 coarse labels, each of which unites five classes."""
    fine = cifar100(root)

    def read() -> Raw:
        raw, coarse = fine.read(), np.array(_COARSE)
        return replace(raw, y_train=coarse[raw.y_train], y_test=coarse[raw.y_test], classes=20)

    return Source(read, fine.stamp)


@dataset(
    "svhn",
    shape=(3, 32, 32),
    classes=10,
    n_train=73257,
    n_test=26032,
    mean=(0.4377, 0.4438, 0.4728),
    std=(0.1980, 0.2010, 0.1970),
    statistics="SVHN's published channel means and deviations",
)
def svhn(root: Places) -> Source:
    """Street View House Numbers (Netzer et al. 2011): 73,257 and 26,032 colour digits of 32x32."""
    files = tuple(root.root / f"{part}_32x32.mat" for part in ("train", "test"))
    return _torchvision("svhn", root, "SVHN", files, classes=10)


def _parts(class_name: str, root: Places, download: bool) -> list[tuple[Array, Array]]:
    """``(images, labels)`` of train and test from torchvision, which checks the published checksums."""
    from torchvision import datasets

    make = getattr(datasets, class_name)
    both: list[tuple[Array, Array]] = []
    for train in (True, False):
        which = {"split": "train" if train else "test"} if class_name == "SVHN" else {"train": train}
        one = make(root.root, download=download, **which)
        labels = one.labels if class_name == "SVHN" else one.targets
        both.append((np.asarray(one.data), np.asarray(labels, dtype=np.int64)))
    return both


def _torchvision(name: str, root: Places, class_name: str, files: tuple[Path, ...], classes: int) -> Source:
    def read() -> Raw:
        (x, y), (x_test, y_test) = _parts(class_name, root, download=False)
        if class_name != "SVHN":  # channels last
            x, x_test = x.transpose(0, 3, 1, 2), x_test.transpose(0, 3, 1, 2)
        return Raw(x, y, x_test, y_test, f"torchvision {class_name}", classes)

    return _first(name, root, class_name, [Candidate(f"torchvision {class_name}", files, read)])


def _idx(name: str, root: Places, folders: list[Path], class_name: str, remedies: Sequence[str] = ()) -> Source:
    def at(folder: Path, suffix: str) -> Candidate:
        files = tuple(folder / f"{file}{suffix}" for file in IDX_FILES)
        return Candidate("IDX", files, lambda: read_idx_folder(files, f"IDX files {IDX_FILES[0]}{suffix} ..."))

    return _first(
        name, root, class_name, [at(folder, suffix) for folder in folders for suffix in ("", ".gz")], remedies
    )


def _first(
    name: str, root: Places, class_name: str, candidates: list[Candidate], remedies: Sequence[str] = ()
) -> Source:
    """A ``.npz`` in the data root, else the first candidate, else what torchvision downloads where that is allowed."""
    file = root.root / f"{name}.npz"
    npz = Candidate("x_train y_train x_test y_test, as Keras has them", (file,), lambda: read_npz(file))
    remedies = [
        *remedies,
        f"{DOWNLOAD}=1 in the environment: torchvision downloads it into {root.root}",
        f"put {name}.npz (x_train y_train x_test y_test) into {root.root}, or set {DATA} to the folder that has it",
    ]

    def fetch() -> None:
        root.root.mkdir(parents=True, exist_ok=True)
        _parts(class_name, root, download=True)

    return first_of(name, [npz, *candidates], remedies, fetch if root.download else None)
