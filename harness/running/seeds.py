"""Seeds derived by role, so that runs which differ only in the method are paired.

``init`` depends on the model and the seed of the cell: every method of a task starts from the same weights. It does not
depend on the data, not even by their digest: weights begin there, and nothing hides what they begin with. ``sampling``,
``noise`` and ``path`` depend on the whole cell, on the attempt at it, on its code, and on what else decides its sums to
the bit: two releases must not share the randomness that protects the data. Each is a hash of all that it depends on, in
full: of a cell that is its digest, not its id, which is short enough to be found twice. No two cells, and no two roles,
share one by accident or by having seeds close together.
"""

from __future__ import annotations

import hashlib

from harness.records.cell import Cell, canonical_json


def derive(role: str, *axes: object) -> int:
    """A seed in [0, 2**256) for a role and the axes it depends on (JSON values, in this order)."""
    text = canonical_json([role, *axes])
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")


class Seeds:
    """The seeds of a stage of one attempt at a cell: ``init`` is shared by all methods of a task and by all attempts.

    ``sampling noise path`` are those of this attempt, by code of this hash in this setting
    (`harness.records.draw.Draw`): the same of all give the same run again.
    """

    def __init__(self, cell: Cell, stage: int = 0, *, attempt: int, code: str, setting: str = "") -> None:
        self.init = derive("init", cell.task["architecture"], cell.seed) >> 193
        # These have all 256 bits, and `init` the 63 that PyTorch takes.
        own = cell.digest, stage, attempt, code, setting
        self.sampling = derive("sampling", *own)
        self.noise = derive("noise", *own)
        self.path = derive("path", *own)
