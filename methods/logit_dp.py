"""Logit-DP: contrastive learning with the gradients of similarities clipped (Kong et al., ICLR 2025)."""

from typing import Literal

from harness.dp import Adam, Fixed, Flat, InfoNCE, Method, Pairs, Poisson
from harness.registry import method


@method("logit-dp", paper="arXiv:2310.03104", family="contrastive")
def logit_dp(
    clip: float = 1.0,
    temperature: float = 1.0,
    lr: float = 1e-3,
    sampling: Literal["poisson", "fixed"] = "poisson",
    cap: int | None = None,
    pad: int = 4,
    flip: bool = True,
) -> Method:
    """InfoNCE under Adam, from the noised sum of n^2 clipped similarity gradients: the encoder is released.

    `clip` bounds the gradient of a tempered logit. The sensitivity grows as e^(2 / temperature) with Poisson sampling
    (unless `cap` bounds the batch), and with batches of a fixed size is at most that for their size.
    """
    sampler = Poisson() if sampling == "poisson" else Fixed()
    loss = InfoNCE(temperature, pad, flip)
    return Method(loss=loss, engine=Pairs(cap), clip=Flat(clip), sampler=sampler, optimizer=Adam(lr))
