"""DP-LS: a last layer by least squares, from noised moments of the features (Mehta et al., TMLR 2023)."""

from harness.dp import Full, LeastSquares, Method, Moments, Squares, Unclipped
from harness.registry import method


@method("dp-ls", paper="arXiv:2211.13403", family="transfer")
def dp_ls(radius: float = 1.0, alpha: float = 1.0, reg: float = 1e-2) -> Method:
    """Weighted least squares in closed form, from each class's first and second moments; meant for one step.

    Features are shortened to `radius`. `alpha` weighs the outputs that should be 0 against the one that should be 1;
    `reg` is relative to mean moments, so the paper's divided by the number of examples.
    """
    return Method(
        loss=Squares(alpha),
        engine=Moments(radius),
        clip=Unclipped(),
        sampler=Full(),
        optimizer=LeastSquares(alpha, reg),
    )
