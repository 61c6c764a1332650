"""Random streams: the cipher against its standard, the law of what is drawn, and the same bits on every machine."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy import stats

from harness.dp.native import describe, kernels, library
from harness.dp.random import DOUBLE, SINGLE, Stream, box_muller, cipher_words

MILLION = 1_000_000


@pytest.fixture(params=["compiled", "numpy"])
def way(request, monkeypatch):
    """Both ways of computing the same numbers."""
    if request.param == "numpy":
        without_kernels(monkeypatch)
    elif library() is None:
        pytest.skip(f"no kernels ({describe()}); Debian: apt-get install gcc")


def without_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "serve", lambda *tensors: None)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("key", "counter", "block"),  # RFC 8439, appendix A.1: test vectors 1 to 4
    [
        (
            bytes(32), 0,
            "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
            "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
        ),
        (
            bytes(32), 1,
            "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
            "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
        ),
        (
            bytes(31) + b"\1", 1,
            "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
            "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
        ),
        (
            b"\0\xff" + bytes(30), 2,
            "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
            "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
        ),
    ],
)  # fmt: skip
def test_the_cipher_is_chacha20(key, counter, block):
    words = cipher_words(tuple(np.frombuffer(key, "<u4").tolist()), 0, 1)
    assert words[0, :, counter].astype("<u4").tobytes().hex() == block


@pytest.mark.parametrize("counter", [0, 2**32 - 16, 2**63])
@pytest.mark.parametrize("threads", [1, 2])
def test_kernels_and_numpy_give_the_same_bits(counter, threads, monkeypatch):
    """Also where the low half of the counter runs over, and whatever the number of threads."""
    if library() is None:
        pytest.skip(f"no kernels ({describe()}); Debian: apt-get install gcc")
    before = torch.get_num_threads()

    def drawn():
        stream = Stream(5, "noise", 7)
        stream._block = counter
        for n in (0, 1, 255, 256, 257, 10_001):
            yield stream.normal(n)
            yield stream.noised(torch.linspace(-3, 3, n), 0.37)
            yield stream.normal(n, torch.float64)
            yield stream.noised(torch.linspace(-3, 3, n, dtype=torch.float64), 0.37)
            yield stream.noised(torch.linspace(-3, 3, 2 * n)[::2], 0.37)  # not contiguous
            yield stream.uniform(n)
            yield stream.permutation(n)
        yield torch.tensor([stream.seed64() >> 1, stream._block - counter])

    try:
        torch.set_num_threads(threads)
        compiled = list(drawn())
    finally:
        torch.set_num_threads(before)
    without_kernels(monkeypatch)
    for ours, theirs in zip(compiled, drawn(), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.usefixtures("way")
def test_the_streams_are_what_they_were():
    """Golden bits: a record's noise can be drawn again by any later version and on any machine."""
    stream = Stream(2**200 + 1, "noise", 3)
    assert [z.hex() for z in stream.normal(300)[[0, 1, 128, 299]].tolist()] == [
        "-0x1.e3ff0e0000000p-1", "0x1.038a220000000p+1", "0x1.00c0f20000000p-1", "-0x1.3ea3ec0000000p-2",
    ]  # fmt: skip
    assert [z.hex() for z in stream.normal(3, torch.float64).tolist()] == [
        "0x1.39aeaba50e1f1p-3", "-0x1.549ba211e6a6ep+0", "-0x1.0d9fcda156a28p-1",
    ]  # fmt: skip
    assert [u.hex() for u in stream.uniform(2).tolist()] == ["0x1.aef1cef7774b0p-1", "0x1.0f7c09df04610p-5"]
    assert stream.permutation(8).tolist() == [2, 0, 5, 1, 3, 7, 6, 4]
    assert stream.seed64() == 4089695504011823125


def exact(radius, angle, k):
    """The transform in numpy's widest format, by the library's functions."""
    wide, size = np.longdouble, np.longdouble(2) ** k.bits
    low, high = ((w.astype(wide) + wide(0.5)) / size for w in (radius, ~radius))
    with np.errstate(divide="ignore"):  # of the branch that is not taken
        length = np.sqrt(-2 * np.where(low > 0.5, np.log1p(-high), np.log(low)))
    t = ((angle | k.word(3)).view(k.integer) - 1).astype(wide) / size * (2 * np.arctan(wide(1)))
    a, b = length * np.cos(t) * np.where(angle & k.word(2), -1, 1), length * np.sin(t)
    swap = angle & k.word(1) != 0
    return np.where(swap, b, a), np.where(swap, a, b)


@pytest.mark.parametrize("k", [SINGLE, DOUBLE], ids=["float32", "float64"])
def test_the_transform_is_exact_to_a_few_units_in_the_last_place(k):
    """Also at both ends of the words and where the logarithm's argument changes."""
    if k is DOUBLE and np.finfo(np.longdouble).nmant < 63:
        pytest.skip("no float wider than float64 on this machine; run on x86-64")
    rng, edge = np.random.default_rng(0), np.arange(5000, dtype=k.word)
    words = rng.integers(0, 2**k.bits, (2, 300_000), dtype=k.word)
    radius = np.concatenate([edge, ~edge, k.word(k.root) - edge, k.word(k.root) + edge, words[0]])
    angle = np.concatenate([words[1], edge, ~edge, words[1][:10_000]])
    for ours, truth in zip(box_muller(radius, angle, k), exact(radius, angle, k), strict=True):
        off = np.abs(ours - truth) / np.spacing(np.abs(ours))
        assert off.max() < 5 and off.mean() < 0.6
    assert float(np.hypot(*box_muller(radius[:1], angle[:1], k))[0]) > (6.7 if k is SINGLE else 9.4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_normal_numbers_follow_their_law(dtype):
    z = Stream(1, "noise", 1).normal(MILLION, dtype).double()
    assert abs(float(z.mean())) < 5 / math.sqrt(MILLION)
    assert abs(float(z.square().mean()) - 1) < 5 * math.sqrt(2 / MILLION)
    assert abs(float(z.pow(4).mean()) - 3) < 5 * math.sqrt(96 / MILLION)
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-4
    for bound in (3.0, 4.0, 4.5):
        for side in (z > bound, z < -bound):
            expected = MILLION * stats.norm.sf(bound)
            assert abs(int(side.sum()) - expected) < 5 * math.sqrt(expected) + 1


def test_numbers_are_independent_within_a_stream_and_between_streams():
    """Cosine and sine of one pair, neighbours, releases of one step, roles, steps and seeds: in value and in size."""
    stream = Stream(1, "noise", 1)
    first, second = stream.normal(MILLION), stream.normal(MILLION)
    tiles = first[: MILLION // 256 * 256].view(
        -1, 2, 128
    )  # half a tile holds the cosines, the other the sines
    others = [Stream(*key).normal(MILLION) for key in ((2, "noise", 1), (1, "path", 1), (1, "noise", 2))]
    pairs = [
        (tiles[:, 0].flatten(), tiles[:, 1].flatten()),
        *((first[:-lag], first[lag:]) for lag in (1, 2, 16, 128, 256)),
        *combinations([first, second, *others], 2),
    ]
    for a, b in pairs:
        for x, y in ((a, b), (a.square() - 1, b.square() - 1), (a, b.square() - 1)):
            product = x.double() * y.double()
            assert abs(float(product.mean())) < 6 * float(product.std()) / math.sqrt(len(product))


def test_streams_of_close_seeds_steps_and_roles_differ():
    """Every pair: the seed's whole length counts, and no digit of it runs into the step's."""
    seeds = (0, 1, 11, 2**32, 2**64 + 1, 2**255, -1)
    keys = [
        (seed, role, step)
        for seed in seeds
        for step in (0, 1, 2, 11)
        for role in ("noise", "path", "dropout")
    ]
    assert len({Stream(*key)._key for key in keys}) == len(keys)
    assert Stream(3, "noise", 4)._key == Stream(np.int64(3), "noise", np.int64(4))._key


def test_uniform_numbers_and_orders_follow_their_laws():
    stream = Stream(9, "sampling", 0)
    u = stream.uniform(MILLION)
    assert float(u.min()) >= 0 and float(u.max()) < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-4
    assert torch.equal(u * 2**53, (u * 2**53).round()) and bool(((u * 2**53) % 2).any())
    orders = torch.stack([stream.permutation(4) for _ in range(12_000)])
    codes = (orders * torch.tensor([64, 16, 4, 1])).sum(1)
    counts = codes.unique(return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    assert torch.equal(stream.permutation(1000).sort().values, torch.arange(1000))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; run where nvidia-smi lists one")
def test_another_device_draws_by_itself_and_goes_on():
    def drawn():
        stream = Stream(1, "noise", 1)
        value = torch.zeros(MILLION, device="cuda")
        return [
            stream.normal(MILLION, device="cuda"),
            stream.noised(value, 2.0) / 2,
            stream.noised(value, 2.0) / 2,
        ]

    draws = torch.stack(drawn())
    assert torch.equal(draws, torch.stack(drawn()))
    assert (
        float((draws.double() @ draws.double().T / MILLION - torch.eye(3, device="cuda")).abs().max()) < 0.01
    )
