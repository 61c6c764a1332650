"""Integers of a Gaussian, drawn exactly: floor(2^38 Z), Z standard normal.

Why integers. A float32 sum plus a float32 number comes out as floats that depend on the sum: what cannot come out
gives it away (Mironov, CCS 2012). Rounding commutes with adding an integer, floor(k + Z) = k + floor(Z). So a sum k
on a grid plus floor(Z) is a function of k + Z, the Gaussian mechanism of the theorems, and all integers can come out
whatever k is.

How. |Z| is cut into cells of 2^-7. In each cell as many boxes of mass 2^-16 stand side by side under the density as
fit: so 16 random bits choose a box, 31 a place in its cell, one the sign. All places in a box are alike, and nothing
is computed. About one number in a hundred falls to what boxes leave over, in each cell

- a remainder, less than a box, alike everywhere in the cell;
- a wedge between the density and its least value in the cell, f_c (e^t - 1), t = (x_c^2 - x^2) / 2, x_c the far end.
  A try is accepted with probability (e^t - 1) / (e^T - 1), T the greatest t in the cell.

A block of the cipher serves a try: a remainder or a wedge is drawn by the alias method, a place in its cell, and
whether it is accepted. Where it is not, there is another try, in another round.

How exactly. x is the middle of an integer's interval, so the numbers are a discrete Gaussian on half-integers. By
Poisson's summation it has the mass of the Gaussian, and it is floor(2^38 Z') for a Z' whose variance is less by 2^-76
/ 12, up to one part in 2^147 for each number. Thresholds of the alias method have 212 bits, and so have the bits that
are compared with them and with e^t - 1. Both are compared in 52 bits first, and where these do not decide, as they do
but once in 2^44 wedges, exactly. Nothing is beyond 16, a mass of 2^-189. Altogether the numbers are within 2^-146 of
floor(2^38 Z') in total variation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal, localcontext
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

CELL = 7  # cells are 2^-7 wide
END = 16  # of the numbers
FINE = 38  # a number is an integer of 2^-38
INSIDE = FINE - CELL  # bits of a place in a cell
CELLS = END << CELL
NUMBERS = 160  # from a tile of the cipher
BOX = 16  # a box has a mass of 2^-16
LEFT = 0xFFFF  # in the table of boxes: what they leave over
PART, REST = 52, 160  # bits that are compared first, and afterwards
MARGIN = 2.0**-44  # of a wedge's height: nearer, and 52 bits do not decide
REJECTED = -(2**63)

PI = "3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534211706798214808651"
DIGITS = 110  # of exact comparisons
UNIT = 1 << 340  # fixed point, for the tables


EDGE = 2.0**50  # of a grid: values beyond are cut off there
COARSEST = 8  # bits of a grid
ROUNDING = 2.0**-20  # of the sensitivity: rounding should move a sum by less


class Grid(NamedTuple):
    """Public points that a release lies on, `step` apart. The noise has a deviation of 2^`bits` steps."""

    step: float
    bits: int

    def in_units(self, scale: float) -> Grid:
        """The same grid for values in other units."""
        return Grid(self.step * scale, self.bits)


def on_grid(value: Tensor, noise: Tensor, grid: Grid) -> Tensor:
    """`value` rounded to `grid`, plus `noise`, whole numbers of its steps: float64, in the middles of intervals."""
    k = (value.double() * (1 / grid.step)).round_().clamp_(-EDGE, EDGE).nan_to_num_(0.0)
    return (k + (noise.double() + 0.5)).mul_(grid.step)


def grid(sigma: float, sensitivity: float, size: int, finest: int = FINE) -> Grid:
    """The grid for a sum of `size` numbers that moves by `sensitivity` (l2), and noise `sigma` times as large.

    Rounding to multiples of the step moves the sum further. The product of a value and 1 / step is off by up to 1/4
    of a step at `EDGE`, hence rounded numbers by up to 3/4, and two of them by 3/2 of a step, on each coordinate. It
    is the moved sum whose noise has the multiplier `sigma`: the deviation s is sigma (sensitivity + 3/2 sqrt(size)
    step), and step = 2^-bits s. The last factor makes up for the rounding of s and for 2^-76 / 12 of its square.
    Cutting values off at `EDGE` steps moves no two of them apart.

    The step is the largest that keeps rounding below `ROUNDING`, with 8 to `finest` bits, or that of `finest` bits
    where none does. Raises ValueError where rounding is then as large as the noise.
    """
    if not sigma > 0:
        raise ValueError(f"a noise multiplier must be positive, and is {sigma}")
    moved = 1.5 * math.sqrt(size) * sigma
    bits = min(max(math.ceil(math.log2(max(moved / ROUNDING, 1))), COARSEST), finest)
    rounding = math.ldexp(moved, -bits)
    if not rounding < 1:
        raise ValueError(
            f"no grid is fine enough for {size} numbers at a noise multiplier of {sigma:.4g}: it must be below"
            f" {2**finest / (1.5 * math.sqrt(size)):.3g}"
        )
    deviation = sigma * sensitivity / (1 - rounding) * (1 + 2.0**-50)
    if not 2.0**-900 < deviation < 2.0**900:
        raise ValueError(f"no grid holds noise of a deviation of {deviation:.4g}: write another unit")
    return Grid(math.ldexp(deviation, -bits), bits)


class Tables(NamedTuple):
    """What numbers are drawn by.

    `boxes` [2^16]: the cell of each, or `LEFT`. Of the pieces that boxes leave over, the remainders of all cells and
    then their wedges: `exact` thresholds of the alias method, as parts of 2^212, their first 52 bits as `thresholds`,
    and the pieces' `aliases`. `heights` [CELLS]: e^T - 1 of each wedge.
    """

    boxes: Tensor
    thresholds: Tensor
    aliases: Tensor
    heights: Tensor
    exact: tuple[int, ...]


@cache
def tables() -> Tables:
    """The tables, in integers alone: the same on every machine."""
    with localcontext() as context:
        context.prec = DIGITS
        width = Decimal(2) ** -CELL
        ratio, change = (int((-power * width**2).exp() * UNIT) for power in (Decimal("0.5"), Decimal(1)))
        pi = int(Decimal(PI) * UNIT)
        context.prec = 40
        heights = [float((Decimal(2 * c + 1) * width**2 / 2).exp() - 1) for c in range(CELLS)]
    # The densities exp(-x^2 / 2) at the ends of the cells, and the mass of all, half of sqrt(2 pi).
    density = [UNIT]
    for _ in range(CELLS):
        density.append(density[-1] * ratio // UNIT)
        ratio = ratio * change // UNIT
    mass = math.isqrt(pi * UNIT // 2)
    boxes: list[int] = []
    remainders, wedges = [], []
    for cell in range(CELLS):
        inside = density[cell + 1] >> CELL
        count = (inside << BOX) // mass
        boxes += [cell] * count
        remainders.append(inside - (count * mass >> BOX))
        wedges.append(density[cell] - density[cell + 1] >> CELL)
    boxes += [LEFT] * (2**BOX - len(boxes))
    exact, aliases = alias(remainders + wedges)
    return Tables(
        torch.tensor(boxes).to(torch.uint16),
        torch.tensor([t >> REST for t in exact]),
        torch.tensor(aliases, dtype=torch.int32),
        torch.tensor(heights, dtype=torch.float64),
        tuple(exact),
    )


def alias(weights: Sequence[int]) -> tuple[list[int], list[int]]:
    """Walker's alias method: a number i of n, and i where 212 more bits are below threshold i, else its alias."""
    n, total, whole = len(weights), sum(weights), 1 << PART + REST
    scaled = [weight * n * whole // total for weight in weights]
    thresholds, aliases = [whole] * n, list(range(n))
    short = [i for i, one in enumerate(scaled) if one < whole]
    long = [i for i, one in enumerate(scaled) if one >= whole]
    while short and long:
        one, other = short.pop(), long[-1]
        thresholds[one], aliases[one] = scaled[one], other
        scaled[other] -= whole - scaled[one]
        if scaled[other] < whole:
            short.append(long.pop())
    return thresholds, aliases


def decide(block: Sequence[int]) -> int:
    """One try, exactly: the number that a block of 16 words gives, or `REJECTED`."""
    piece, part = block[1] % (2 * CELLS), _bits(block[0], block[1], block[6:11])
    if part >= tables().exact[piece]:
        piece = int(tables().aliases[piece])
    cell, inside = piece % CELLS, block[3] >> 1
    if piece >= CELLS:
        with localcontext() as context:
            context.prec = DIGITS
            # In units of 2^-39.
            far, at = (cell + 1) << INSIDE + 1, (cell << INSIDE + 1) + 2 * inside + 1
            t = Decimal(far**2 - at**2) * Decimal(2) ** -(2 * FINE + 3)
            most = Decimal(2 * cell + 1) * Decimal(2) ** -(2 * CELL + 1)
            drawn = Decimal(_bits(block[4], block[5], block[11:16])) * Decimal(2) ** -(PART + REST)
            if drawn * (most.exp() - 1) >= t.exp() - 1:
                return REJECTED
    number = cell << INSIDE | inside
    return ~number if block[3] & 1 else number


def _bits(first: int, second: int, rest: Sequence[int]) -> int:
    """32 bits, 20 more, and those of five words."""
    bits = first << 20 | second >> 12
    for word in rest:
        bits = bits << 32 | word
    return bits


# --- the same in PyTorch, on any device ---


def from_boxes(words: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers [160 * tiles] from words [tiles, 16, 16] of the cipher, and whether boxes leave them over.

    Each of the first five words of a block holds two boxes; the next ten, places in them and signs.
    """
    boxes = tables().boxes.to(words.device, torch.int64)
    drawn, place = _unsigned(words[:, :5]), _unsigned(words[:, 5:15]).flatten()
    cell = boxes[torch.cat((drawn & 0xFFFF, drawn >> 16), 1).flatten()]
    return (cell << INSIDE | place >> 1) ^ -(place & 1), cell == LEFT


def from_rest(blocks: Tensor, margin: float) -> Tensor:
    """One try with each of the blocks [n, 16]: numbers, or `REJECTED`."""
    table = tables()
    thresholds, aliases, heights = (t.to(blocks.device) for t in (table.thresholds, table.aliases, table.heights))
    w = _unsigned(blocks).unbind(1)
    part, drawn = w[0] << 20 | w[1] >> 12, w[1] % (2 * CELLS)
    piece = torch.where(part < thresholds[drawn], drawn, aliases[drawn].long())
    cell, inside, wedge = piece % CELLS, w[3] >> 1, piece >= CELLS
    near = (((1 << INSIDE) - inside).double() - 0.5) * 2.0**-FINE
    x = near * ((cell + 1).double() * 2.0 ** (1 - CELL) - near) * 0.5
    e = torch.full_like(x, 1.0 / 3628800)
    for divisor in (362880.0, 40320.0, 5040.0, 720.0, 120.0, 24.0, 6.0, 2.0, 1.0):
        e = e * x + 1.0 / divisor
    gap = (w[4] << 20 | w[5] >> 12).double() * 2.0**-PART * heights[cell] - e * x
    unsure = (part == thresholds[drawn]) | (wedge & (gap.abs() <= margin * heights[cell]))
    number = (cell << INSIDE | inside) ^ -(w[3] & 1)
    number = torch.where(wedge & (gap > 0), REJECTED, number)
    for place in unsure.nonzero().flatten().tolist():
        number[place] = decide([int(one[place]) for one in w])
    return number


def _unsigned(words: Tensor) -> Tensor:
    """Words of 32 bits as int64."""
    return words.long() & 0xFFFFFFFF
