"""What Logit-DP is compared with: no privacy, the whole gradient clipped at once, and a loss that is a sum."""

from harness.dp import Adam, Flat, InfoNCE, Method, NoNoise, Plain, Rotations, Unclipped, Whole
from harness.registry import method


@method("contrastive", paper="arXiv:1807.03748", family="contrastive")
def contrastive(temperature: float = 0.5, lr: float = 1e-3, pad: int = 4, flip: bool = True) -> Method:
    """InfoNCE under Adam without privacy: the exact gradients are released."""
    loss = InfoNCE(temperature, pad, flip)
    return Method(loss=loss, engine=Plain(), clip=Unclipped(), noise=NoNoise(), optimizer=Adam(lr))


@method("contrastive-naive", paper="arXiv:2310.03104", family="contrastive")
def contrastive_naive(
    clip: float = 1.0, temperature: float = 0.5, lr: float = 1e-3, pad: int = 4, flip: bool = True
) -> Method:
    """InfoNCE under Adam, from the noised gradient of the whole batch, clipped as one vector: sensitivity 2 `clip`."""
    loss = InfoNCE(temperature, pad, flip)
    return Method(loss=loss, engine=Whole(), clip=Flat(clip), optimizer=Adam(lr))


@method("dp-rotation", paper="arXiv:1803.07728", family="contrastive")
def dp_rotation(clip: float = 1.0, lr: float = 1e-3) -> Method:
    """Ordinary DP-SGD (under Adam) on a loss without labels that is a sum: by which right angle an image was turned."""
    return Method(loss=Rotations(), clip=Flat(clip), optimizer=Adam(lr))
