"""Secret random streams: ChaCha20 in counter mode under a key of 256 bits, one for each seed, role and step.

Noise hides an example only from those who cannot foretell it, so one who knows some of it, all batches, and every other
draw of the run, must be as far from the rest as from the start. That is what a stream cipher promises. ChaCha20 (RFC
8439) has twenty rounds, of which the best published attack reaches seven. Twelve would take three quarters of the time
(0.17 against 0.22 ms for 269,000 normal numbers on one core) and save less than a hundredth of any step: not worth an
argument.

A stream is the same bits on every CPU, with and without the compiled kernel (native/normal.c): integers, and floating
point operations that IEEE 754 rounds in one way only, in a fixed order, with polynomials of our own instead of a
library's logarithm. Other devices draw by PyTorch's generator, seeded with 64 bits of the stream.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.dp.native import kernels

ROUNDS = 20
BLOCKS = 16  # of 16 words each in a tile, the least that is drawn
TILE = 16 * BLOCKS

Array = np.ndarray[Any, np.dtype[Any]]


class Stream:
    """Random numbers that are a function of (seed, role, step) alone; each call goes on where the last one ended.

    The seed may have any length: it is hashed together with role and step, so that streams of neighbouring seeds or
    steps, or of two roles under one seed, have nothing in common.
    """

    __slots__ = ("_block", "_generator", "_key")

    def __init__(self, seed: int, role: str, step: int) -> None:
        digest = hashlib.sha256(f"{int(seed)} {int(step)} {role}".encode()).digest()
        self._key: tuple[int, ...] = struct.unpack("<8I", digest)
        self._block = 0
        self._generator: torch.Generator | None = None

    def normal(
        self, n: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Independent standard normal numbers [n]: on the CPU, 7e-12 of the mass beyond 6.7 is missing in float32."""
        device = torch.device(device)
        if device.type != "cpu":
            return torch.randn(n, generator=self._on(device), dtype=dtype, device=device)
        if dtype is torch.float64:
            radius, angle = self._words64(n + n % 2).reshape(2, -1)
            return torch.from_numpy(np.concatenate(box_muller(radius, angle, DOUBLE))[:n])
        z = kernels.add_normals(self._key, self._block, None, 1.0, n)
        if z is None:
            words = cipher_words(self._key, self._block, _tiles(n))
            pair = box_muller(words[:, :8], words[:, 8:], SINGLE)
            z = torch.from_numpy(np.concatenate(pair, 1).reshape(-1)[:n])
        self._block += _tiles(n) * BLOCKS
        return z.to(dtype)

    def noised(self, value: Tensor, scale: float) -> Tensor:
        """`value` [n] + `scale` times standard normal numbers, in one pass where there is a kernel."""
        n = len(value)
        out = kernels.add_normals(self._key, self._block, value, scale, n)
        if out is not None:
            self._block += _tiles(n) * BLOCKS
            return out
        # not torch.add with alpha, which rounds once where the kernel and other machines round twice
        return self.normal(n, value.dtype, value.device).mul_(scale).add_(value)

    def uniform(self, n: int) -> Tensor:
        """Independent numbers [n] in [0, 1), float64: multiples of 2^-53."""
        return torch.from_numpy((self._words64(n) >> np.uint64(11)) * 2.0**-53)

    def permutation(self, n: int) -> Tensor:
        """A uniformly random order of 0 .. n-1: that of n random words, two of which are equal once in 2^65 / n^2."""
        return torch.from_numpy(self._words64(n).view(np.int64)).argsort(stable=True)

    def seed64(self) -> int:
        """A seed for a generator that is not ours."""
        return int(self._words64(1)[0])

    def _words64(self, n: int) -> Array:
        tiles = _tiles(2 * n)
        words = cipher_words(self._key, self._block, tiles).reshape(-1)
        self._block += tiles * BLOCKS
        pairs = words[:n].astype(np.uint64)
        pairs <<= np.uint64(32)
        pairs |= words[n : 2 * n]
        return pairs

    def _on(self, device: torch.device) -> torch.Generator:
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device).manual_seed(self.seed64())
        return self._generator


def _tiles(words: int) -> int:
    return -(-words // TILE)


# --- the cipher ---


def cipher_words(key: tuple[int, ...], counter: int, tiles: int) -> Array:
    """The words of blocks `counter` to `counter` + 16 * tiles - 1, uint32 [tiles, 16 words, 16 blocks].

    The counter has 64 bits, as Bernstein's ChaCha has it, and the nonce is zero: no two streams share a key.
    """
    compiled = kernels.cipher_words(key, counter, tiles)
    if compiled is not None:
        return compiled.numpy()
    count = np.arange(counter, counter + tiles * BLOCKS, dtype=np.uint64)
    start = np.zeros((16, len(count)), np.uint32)
    start[:12] = np.array([*struct.unpack("<4I", b"expand 32-byte k"), *key], np.uint32)[:, None]
    start[12], start[13] = count & np.uint64(0xFFFFFFFF), count >> np.uint64(32)
    a, b, c, d = (row.copy() for row in start.reshape(4, 4, -1))
    for _ in range(ROUNDS // 2):
        _quarter_rounds(a, b, c, d)
        b, c, d = (np.roll(row, -by, 0) for by, row in enumerate((b, c, d), 1))  # diagonals become columns
        _quarter_rounds(a, b, c, d)
        b, c, d = (np.roll(row, by, 0) for by, row in enumerate((b, c, d), 1))
    return (np.concatenate((a, b, c, d)) + start).reshape(16, tiles, BLOCKS).transpose(1, 0, 2)


def _quarter_rounds(a: Array, b: Array, c: Array, d: Array) -> None:
    """Four quarter rounds at a time, in place."""
    for to, by, other, left in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        to += by
        other ^= to
        high = other << np.uint32(left)
        other >>= np.uint32(32 - left)
        other |= high


# --- the transform ---


@dataclass(frozen=True)
class Format:
    """A floating point format and its polynomials, lowest power first.

    They interpolate at Chebyshev nodes, in z = s^2 < 0.1716^2 or q = t^2 <= 1/4: (log((1 + s) / (1 - s)) - 2s) / s^3,
    sin(pi/2 t) / t and (cos(pi/2 t) - 1) / t^2.
    """

    real: type[np.floating[Any]]
    word: type[np.unsignedinteger[Any]]
    integer: type[np.signedinteger[Any]]
    bits: int  # of a word
    digits: int  # of the mantissa
    root: int  # the square root of 1/2 as a fraction of 2^bits
    log2: tuple[float, float]  # log 2, the first part short enough for exact products with an exponent
    log: tuple[float, ...]
    sine: tuple[float, ...]
    cosine: tuple[float, ...]


SINGLE = Format(
    np.float32, np.uint32, np.int32, 32, 23, 0xB504F333, (0.693359375, -2.1219444e-4),
    log=(0.66666687, 0.39988774, 0.29580277),
    sine=(1.5707964, -0.6459635, 0.07968022, -0.004602149),
    cosine=(-1.2337005, 0.2536694, -0.020861529, 0.0009067399),
)  # fmt: skip
DOUBLE = Format(
    np.float64, np.uint64, np.int64, 64, 52, 0xB504F333F9DE6484, (0.6931471803691238, 1.9082149292705877e-10),
    log=(
        0.666666666666667, 0.3999999999989931, 0.2857142862606338, 0.22222211120449298, 0.1818289017031397,
        0.15331686868638428, 0.14616878919029822,
    ),
    sine=(
        1.5707963267948966, -0.6459640975062463, 0.07969262624616692, -0.004681754135314827, 0.0001604411847266723,
        -3.598842717144858e-06, 5.691927850489633e-08, -6.627624938992472e-10,
    ),
    cosine=(
        -1.2337005501361697, 0.25366950790104803, -0.02086348076335295, 0.0009192602748390894, -2.520204236776104e-05,
        4.710874326431131e-07, -6.3863890969045165e-09, 6.513222727592812e-11,
    ),
)  # fmt: skip


def box_muller(radius: Array, angle: Array, k: Format) -> tuple[Array, Array]:
    """Two independent standard normal numbers from two random words (Box and Muller 1958).

    The radius is sqrt(-2 log u), u = (word + 1/2) / 2^bits. Above the root of 1/2 the logarithm is computed from 1 - u,
    which a float holds more finely there. The angle's lowest two bits choose an axis and a side of it, the others a t
    in (-1/2, 1/2), of a right angle, around it. Right to 5 units in the last place, on average to 0.6.
    """
    high = radius > k.word(k.root)
    x = np.where(high, ~radius, radius).astype(k.real) + k.real(0.5)
    root = np.sqrt(k.real(0.5)).view(k.word)
    bits = x.view(k.word) - root  # u = (1 + f) * 2^e, 1 + f between the roots of 1/2 and of 2
    e = np.where(high, 0, (bits.view(k.integer) >> k.digits) - k.bits).astype(k.real)
    mantissa = ((bits & k.word(2**k.digits - 1)) + root).view(k.real)
    f = np.where(high, x * k.real(-(2.0**-k.bits)), mantissa - k.real(1))
    s = f / (f + k.real(2))  # log(1 + f) = 2s + s z P(z), and 2s = f - s f, s f = f^2/2 - s f^2/2
    z, h = s * s, f * f * k.real(0.5)
    tail = s * (h + z * _polynomial(z, k.log, k.real)) + e * k.real(k.log2[1]) - h
    log = e * k.real(k.log2[0]) + (f + tail)
    length = np.sqrt(log * k.real(-2))

    t = ((angle | k.word(3)).view(k.integer) - 1).astype(k.real) * k.real(2.0**-k.bits)
    q = t * t
    b = length * (t * _polynomial(q, k.sine, k.real))
    cosine = q * _polynomial(q, k.cosine, k.real) + k.real(1)
    a = length * np.where(angle & k.word(2), -cosine, cosine)
    swap = angle & k.word(1) != 0
    return np.where(swap, b, a), np.where(swap, a, b)


def _polynomial(x: Array, coefficients: tuple[float, ...], real: type[np.floating[Any]]) -> Array:
    *others, last = coefficients
    total: Array = np.full_like(x, real(last))
    for coefficient in reversed(others):
        total = x * total + real(coefficient)
    return total
