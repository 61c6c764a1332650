"""Fast clipping in little memory: norms from Gram matrices wherever these are smaller than gradients.

Lee and Kifer, "Scaling up differentially private deep learning with fast per-example gradient clipping"
(arXiv:2009.03106), showed how norms follow from a layer's inputs and output gradients; Bu, Mao and Xu, "Scalable and
efficient training of large convolutional neural networks with differential privacy" (arXiv:2205.10683), where it pays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.dp.engines.taped.engine import Taped


@dataclass(frozen=True)
class Ghost(Taped):
    """As `BookKeeping`, but a layer's norms come in the way that takes less memory, not in the faster one.

    With T positions and P weights, from Gram matrices where 2 T^2 < P ("mixed ghost clipping"), else from gradients.
    The clipped sum comes from the tape. In the papers it is that of a second backward pass through the model, whose
    rounding no norm has seen, and which a hook may change.
    """

    lean: ClassVar[bool] = True
