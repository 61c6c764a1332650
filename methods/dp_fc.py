"""DP-FC: gradients of a last layer, preconditioned by the features' noised Gram matrix (Mehta et al., TMLR 2023)."""

from harness.dp import Flat, Full, Method, Preconditioned, Sigmoid, WithGram
from harness.registry import method


@method("dp-fc", paper="arXiv:2211.13403", family="transfer")
def dp_fc(
    clip: float = 1.0,
    radius: float = 1.0,
    gram_noise: float = 1.0,
    lr: float = 1.0,
    reg: float = 0.01,
    shift: float = -10.0,
) -> Method:
    """Full-batch steps along gradients times the inverse of the features' Gram matrix, released once, at the start.

    Features are shortened to `radius` for the Gram matrix, gradients to `clip`. `gram_noise` is the matrix' noise
    multiplier in units of the gradients', `reg` is relative to mean moments, `shift` the fixed bias of every class.
    """
    return Method(
        loss=Sigmoid(shift),
        engine=WithGram(radius=radius, noise=gram_noise),
        clip=Flat(clip),
        sampler=Full(),
        optimizer=Preconditioned(lr, reg),
    )
