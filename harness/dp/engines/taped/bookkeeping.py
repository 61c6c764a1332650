"""Fast clipping by one pass: clipped sums from what the norms were made of.

Bu et al., "Differentially private optimization on large model at small cost" (arXiv:2210.00038), with the rules of
`harness.dp.engines.taped.rules` in place of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.dp.engines.taped.engine import Taped


@dataclass(frozen=True)
class BookKeeping(Taped):
    """One forward pass and one backward pass to the layers' outputs; norms and weighted sums from the tape.

    No weight gradient is computed and thrown away. Each layer's norm comes from its per-example gradients, which then
    stand in for its weight gradient, or from Gram matrices, whichever costs less; its clipped sum from one weighted
    product. Several clipping groups cost no more than one.
    """
