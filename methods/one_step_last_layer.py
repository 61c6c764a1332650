"""One step for the last layer, on the whole data at once (Mehta et al., TMLR 2023)."""

import math

from harness.dp import SGD, Flat, Full, Method
from harness.registry import method


@method("one-step-last-layer", paper="arXiv:2205.02973", family="transfer")
def one_step_last_layer(
    classes: int = 10, radius: float = 1.0, bias: bool = True, lr: float = 1.0, momentum: float = 0.0
) -> Method:
    """Full-batch steps for a linear head that starts at zero, clipped at the largest first gradient there can be.

    At zero the softmax gradient of an example with features f is (1/K - e_y) [f; 1]^T, of norm sqrt(1 - 1/K) |[f; 1]|
    exactly: with K = `classes` and |f| <= `radius`, known in public, no gradient of the first step is clipped. (The
    clipping norm is a millionth above, so that rounding clips nothing either.) A wrong `classes` leaves it within 0.7
    and 1.5 times what it should be, and moves no privacy claim. After one step from zero the classes' order is the same
    for every `lr`; the steps may be more than one.
    """
    clip = math.sqrt((1 - 1 / classes) * (radius**2 + bias)) * (1 + 1e-6)
    return Method(clip=Flat(clip), sampler=Full(), optimizer=SGD(lr, momentum))
