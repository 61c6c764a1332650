"""Random streams: the cipher against its standard, what is drawn and how, and the same bits on every machine."""

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from harness.dp import gaussian
from harness.dp.gaussian import LEFT, REJECTED, Grid, decide, from_rest, grid, tables
from harness.dp.native import describe, kernels, library
from harness.dp.random import BLOCKS, Stream, cipher_words

MILLION = 1_000_000


@pytest.fixture(params=["compiled", "torch"])
def way(request, monkeypatch):
    """Both ways of computing the same numbers."""
    if request.param == "torch":
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
    assert words[0, :, counter].numpy().astype("<i4").tobytes().hex() == block


@pytest.mark.usefixtures("way")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.binary(min_size=32, max_size=32), counter=st.integers(0, 2**60))
def test_the_cipher_is_that_of_another_library(key, counter):
    """OpenSSL's, block by block: its nonce of 16 bytes begins with the counter. Also where the low half runs over,
    which is between two tiles: streams count in these."""
    counter -= counter % BLOCKS
    nonces = [block.to_bytes(8, "little") + bytes(8) for block in range(counter, counter + 32)]
    blocks = [Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor().update(bytes(64)) for nonce in nonces]
    theirs = b"".join(blocks)
    words = cipher_words(tuple(np.frombuffer(key, "<u4").tolist()), counter, 2)
    assert words.transpose(1, 2).contiguous().numpy().astype("<i4").tobytes() == theirs


@pytest.mark.parametrize("counter", [0, 2**32 - 16, 2**63])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("margin", [gaussian.MARGIN, 1.0])
def test_kernels_and_torch_give_the_same_bits(counter, threads, margin, monkeypatch):
    """Also where the low half of the counter runs over, whatever the number of threads, and where a wide margin has
    every wedge decided exactly."""
    if library() is None:
        pytest.skip(f"no kernels ({describe()}); Debian: apt-get install gcc")
    before = torch.get_num_threads()
    monkeypatch.setattr(gaussian, "MARGIN", margin)
    monkeypatch.setattr(kernels._tables(), "margin", margin)
    points = grid(0.37, 1.0, 300)

    def drawn():
        stream = Stream(5, "noise", 7)
        stream._block = counter
        for n in (0, 1, 159, 160, 161, 4_001):
            yield stream.normal(n)
            yield stream.noised(torch.linspace(-3, 3, n), points)
            yield stream.normal(n, torch.float64)
            yield stream.noised(torch.linspace(-3, 3, n, dtype=torch.float64), points)
            yield stream.noised(torch.linspace(-3, 3, 2 * n)[::2], points)  # not contiguous
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
        "-0x1.a88b500000000p-2",
        "-0x1.7d03720000000p+0",
        "-0x1.8573900000000p+0",
        "0x1.0d5c9c0000000p+0",
    ]
    assert [z.hex() for z in stream.normal(3, torch.float64).tolist()] == [
        "0x1.3ed097dd68000p-2",
        "-0x1.1940b3aa90000p-3",
        "0x1.13a4012a0a000p+0",
    ]
    assert [u.hex() for u in stream.uniform(2).tolist()] == ["0x1.c60c232515374p-3", "0x1.1846102aac0fbp-1"]
    assert stream.permutation(8).tolist() == [2, 7, 5, 1, 4, 0, 6, 3]
    assert stream.seed64() == 5921215287736908027


def test_boxes_remainders_and_wedges_make_up_the_density():
    """Cell by cell, to 2^-180 of all: what boxes hold, and what the alias method gives to the rest of the cell."""
    mpmath = pytest.importorskip("mpmath")  # comes with torch
    table, whole = tables(), 2**212
    counts = table.boxes.long().bincount(minlength=LEFT + 1).tolist()
    drawn = [mpmath.mpf(0)] * len(table.exact)
    with mpmath.workprec(400):
        for i, (threshold, other) in enumerate(zip(table.exact, table.aliases.tolist(), strict=True)):
            drawn[i] += mpmath.mpf(threshold) / whole
            drawn[other] += mpmath.mpf(whole - threshold) / whole
        width, half = mpmath.mpf(1) / 128, len(drawn) // 2
        ends = [mpmath.exp(-((c * width) ** 2) / 2) for c in range(half + 1)]
        masses = [mpmath.sqrt(mpmath.pi / 2) * mpmath.erfc(c * width / mpmath.sqrt(2)) for c in range(half + 1)]
        accepted = []
        for c in range(half):
            wedge = masses[c] - masses[c + 1] - width * ends[c + 1]
            accepted.append(drawn[c] + drawn[half + c] * wedge / (width * (ends[c] - ends[c + 1])))
        rest = mpmath.mpf(counts[LEFT]) / 2**16 / sum(accepted)
        off = sum(
            abs(mpmath.mpf(counts[c]) / 2**16 + rest * accepted[c] - (masses[c] - masses[c + 1]) / masses[0])
            for c in range(half)
        )
        assert off < mpmath.mpf(2) ** -180
        assert counts[LEFT] < 500


def test_a_try_is_decided_as_exact_arithmetic_decides_it():
    """Random blocks, all zeros, all ones, and parts that equal their threshold in the first 52 bits."""
    blocks = cipher_words(tuple(range(8)), 0, 150).transpose(1, 2).reshape(-1, 16)
    ties = blocks[:64].clone()
    for block, piece in zip(ties, range(0, 4096, 64), strict=True):
        part = min(int(tables().thresholds[piece]), 2**52 - 1)
        high, low = part >> 20, (part & 0xFFFFF) << 12 | piece
        block[:2] = torch.tensor([high, low], dtype=torch.uint32).view(torch.int32)
    blocks = torch.cat([blocks, ties, torch.zeros(1, 16, dtype=torch.int32), -torch.ones(1, 16, dtype=torch.int32)])
    found = from_rest(blocks, gaussian.MARGIN).tolist()
    exact = [decide(block) for block in blocks.numpy().view(np.uint32).tolist()]
    assert found == exact
    assert 0.1 < sum(number == REJECTED for number in exact) / len(exact) < 0.5


@given(
    sigma=st.floats(1e-3, 1e3), sensitivity=st.floats(1e-6, 1e6), size=st.integers(1, 10**9), value=st.floats(-1e9, 1e9)
)
def test_a_grid_is_fine_enough_and_what_it_rounds_is_charged(sigma, sensitivity, size, value):
    points = grid(sigma, sensitivity, size)
    exact, deviation = Fraction(points.step), points.step * 2**points.bits
    moved = 1.5 * math.sqrt(size) * points.step
    assert moved <= 2**-20 * sensitivity or points.bits == gaussian.FINE
    assert deviation >= sigma * (sensitivity + moved) * (1 - 1e-15)
    assert deviation <= sigma * sensitivity * (1 + 1.1 * 2**-20) or points.bits == gaussian.FINE
    value = max(min(value, 2**50 * points.step), -(2**50) * points.step)
    k = round(value * (1 / points.step))
    assert abs(k * exact - Fraction(value)) <= Fraction(3, 4) * exact


def test_a_grid_that_would_be_too_coarse_is_refused():
    with pytest.raises(ValueError, match="no grid is fine enough for 1000000 numbers"):
        grid(1e9, 1.0, 10**6)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_release_is_a_function_of_an_integer_sum(dtype):
    """With the same draws, values apart by multiples of the step come out as integers as far apart; beyond the edge
    of the grid they come out alike.
    """
    points = grid(1.0, 1.0, 1000)
    far = 2.0**50 * points.step
    value = torch.cat([torch.linspace(-3, 3, 997), torch.tensor([4 * far, -4 * far, far])]).to(dtype)
    k = (value.double() / points.step).round().clamp(-(2.0**50), 2.0**50)
    numbers = Stream(1, "noise", 1).integers(1000) >> gaussian.FINE - points.bits
    expected = ((k + numbers.double() + 0.5) * points.step).to(dtype)
    assert torch.equal(Stream(1, "noise", 1).noised(value, points), expected)
    # A cell of the grid is one point for the values in it.
    inside = (k.double() * points.step).to(dtype)
    same = (inside.double() / points.step).round() == k
    assert torch.equal(Stream(1, "noise", 1).noised(inside, points)[same], expected[same])
    assert Grid(2.0, 3).in_units(0.5) == Grid(1.0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_normal_numbers_follow_their_distribution(dtype):
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
    """Numbers of one block, neighbours, releases of one step, roles, steps and seeds: in value and in size."""
    stream = Stream(1, "noise", 1)
    first, second = stream.normal(MILLION), stream.normal(MILLION)
    tiles = first[: MILLION // 160 * 160].view(-1, 2, 80)
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
    keys = [(seed, role, step) for seed in seeds for step in (0, 1, 2, 11) for role in ("noise", "path", "dropout")]
    assert len({Stream(*key)._key for key in keys}) == len(keys)
    assert Stream(3, "noise", 4)._key == Stream(np.int64(3), "noise", np.int64(4))._key


def test_uniform_numbers_and_orders_follow_their_distributions():
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
def test_another_device_draws_the_same_bits():
    value, points = torch.linspace(-3, 3, MILLION), grid(1.0, 1.0, MILLION)
    drawn = []
    for device in ("cpu", "cuda"):
        stream = Stream(1, "noise", 1)
        drawn.append([stream.normal(MILLION, device=device).cpu(), stream.noised(value.to(device), points).cpu()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*drawn, strict=True))
