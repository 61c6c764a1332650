"""Secret random streams: ChaCha20 in counter mode under a key of 256 bits, one for each seed, role and step.

Noise hides an example only from those who cannot foretell it, so one who knows some of it, all batches, and every other
draw of the run, must be as far from the rest as from the start. That is what a stream cipher promises. ChaCha20 (RFC
8439) has twenty rounds, of which the best published attack reaches seven. Twelve would take three quarters of the time
(0.17 against 0.22 ms for 269,000 normal numbers on one core) and save less than a hundredth of any step: not worth an
argument.

A stream is the same bits on every device, with and without the compiled kernel (native/gaussian.c): integers, and
floating point operations that IEEE 754 rounds in one way only, in a fixed order, with polynomials of our own instead
of a library's logarithm.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.dp import gaussian
from harness.dp.gaussian import Grid
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

    __slots__ = ("_block", "_key")

    def __init__(self, seed: int, role: str, step: int) -> None:
        digest = hashlib.sha256(f"{index(seed)} {index(step)} {role}".encode()).digest()
        self._key: tuple[int, ...] = struct.unpack("<8I", digest)
        self._block = 0

    @classmethod
    def of(cls, key: str) -> Stream:
        """The stream with a `key` that another one had, from its beginning."""
        stream = cls.__new__(cls)
        stream._key, stream._block = struct.unpack("<8I", bytes.fromhex(key)), 0
        return stream

    @property
    def key(self) -> str:
        """The key, 64 hex digits: as secret as all that is drawn."""
        return struct.pack("<8I", *self._key).hex()

    def under(self, role: str) -> Stream:
        """The stream of a role within this one's, from its beginning. It has nothing in common with this one."""
        return Stream(int.from_bytes(bytes.fromhex(self.key), "little"), role, 0)

    def normal(self, n: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """Independent standard normal numbers [n]: the middles of intervals of 2^-38, rounded to `dtype`."""
        return (self.integers(n, device).double() + 0.5).mul_(2.0**-gaussian.FINE).to(dtype)

    def noised(self, value: Tensor, grid: Grid | float, dtype: torch.dtype | None = None) -> Tensor:
        """`value` [n], rounded to `grid`, plus normal numbers of deviation `grid.step` * 2^`grid.bits`, rounded to it
        too.

        The sum is one of integers; it is rounded to `dtype`, or the value's, at the end (see `harness.dp.noise`). A
        number instead of a grid is the deviation; the grid is then 2^-32 of it.
        """
        if not isinstance(grid, Grid):
            grid = Grid(math.ldexp(grid, -32), 32)
        value, dtype = value.double(), dtype or value.dtype
        drawn = kernels.gaussian(self._key, self._block, len(value), value, grid, dtype)
        if drawn is None:
            numbers = self.integers(len(value), value.device) >> gaussian.FINE - grid.bits
            return gaussian.on_grid(value, numbers, grid).to(dtype)
        out, self._block = drawn
        return out

    def integers(self, n: int, device: torch.device | str = "cpu") -> Tensor:
        """floor(2^38 Z) [n] for independent standard normal Z, as int64."""
        if torch.device(device).type == "cpu":
            drawn = kernels.gaussian(self._key, self._block, n)
            if drawn is not None:
                out, self._block = drawn
                return out
        numbers, left = gaussian.from_boxes(self._drawn(-(-n // gaussian.NUMBERS), device))
        numbers, places = numbers[:n], left[:n].nonzero().squeeze(1)
        while len(places):
            words = self._drawn(-(-len(places) // BLOCKS), device)
            blocks = words.transpose(1, 2).reshape(-1, 16)[: len(places)]
            numbers[places] = found = gaussian.from_rest(blocks, gaussian.MARGIN)
            places = places[found == gaussian.REJECTED]
        return numbers

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
        words = self._drawn(_tiles(2 * n)).reshape(-1).numpy().view(np.uint32)
        pairs = words[:n].astype(np.uint64)
        pairs <<= np.uint64(32)
        pairs |= words[n : 2 * n]
        return pairs

    def _drawn(self, tiles: int, device: torch.device | str = "cpu") -> Tensor:
        """The next words, int32 [tiles, 16, 16]."""
        words = cipher_words(self._key, self._block, tiles, device)
        self._block += tiles * BLOCKS
        return words

    def words(self, n: int) -> Array:
        """Independent uniform words, uint32 [n]: for the whole state of a generator that is not ours."""
        return self._drawn(_tiles(n)).reshape(-1)[:n].numpy().view(np.uint32)


def _tiles(words: int) -> int:
    return -(-words // TILE)


# --- the cipher ---


def cipher_words(key: tuple[int, ...], counter: int, tiles: int, device: torch.device | str = "cpu") -> Tensor:
    """The words of blocks `counter` to `counter` + 16 * tiles - 1, as int32 [tiles, 16 words, 16 blocks].

    The counter has 64 bits, as Bernstein's ChaCha has it, and the nonce is zero: no two streams share a key.
    """
    if torch.device(device).type == "cpu":
        compiled = kernels.cipher_words(key, counter, tiles)
        if compiled is not None:
            return compiled
    low = torch.arange(tiles * BLOCKS, device=device) + (counter & 0xFFFFFFFF)
    words = _blocks(_signed(key).to(device)[:, None], low, (low >> 32) + (counter >> 32))
    return words.view(16, tiles, BLOCKS).transpose(0, 1).contiguous()


def blocks(keys: Sequence[str], numbers: Tensor) -> Tensor:
    """Blocks of these `numbers` [N] under several keys, int32 [keys, N, 16]: always the same, whatever was drawn."""
    words = torch.stack([_signed(struct.unpack("<8I", bytes.fromhex(key))) for key in keys], 1).to(numbers.device)
    low = numbers.repeat(len(keys))
    return _blocks(words.repeat_interleave(len(numbers), 1), low, low >> 32).view(16, len(keys), -1).permute(1, 2, 0)


def _signed(words: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.array(words, np.uint32).view(np.int32))


def _blocks(key: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The words of the blocks whose numbers have these halves [N], as int32 [16, N]; `key` [8, N] or [8, 1]."""
    start = torch.zeros(16, len(low), dtype=torch.int32, device=low.device)
    start[:4] = _signed(struct.unpack("<4I", b"expand 32-byte k")).to(low.device)[:, None]
    start[4:12] = key
    # Conversion to int32 keeps the lower half.
    start[12], start[13] = low.int(), high.int()
    a, b, c, d = (row.clone() for row in start.view(4, 4, -1))
    for _ in range(ROUNDS // 2):
        _quarter_rounds(a, b, c, d)
        b, c, d = (row.roll(-by, 0) for by, row in enumerate((b, c, d), 1))  # diagonals become columns
        _quarter_rounds(a, b, c, d)
        b, c, d = (row.roll(by, 0) for by, row in enumerate((b, c, d), 1))
    return torch.cat((a, b, c, d)).add_(start)


def _quarter_rounds(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> None:
    """Four quarter rounds at a time, in place; sums of int32 wrap around, as those of words do."""
    for to, by, other, left in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        to += by
        other ^= to
        low = other >> 32 - left
        low &= 2**left - 1
        other <<= left
        other |= low
