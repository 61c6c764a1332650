"""Layers and small helpers shared by the networks. All of them work under ``torch.func.vmap``."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


def images(model: str, shape: tuple[int, ...], at_least: int) -> tuple[int, int, int]:
    """``shape`` as ``(channels, height, width)``; ``ValueError`` naming the model where it does not fit."""
    if len(shape) != 3 or min(shape[1:]) < at_least:
        raise ValueError(
            f'model "{model}" takes images [channels, height, width] of at least {at_least}x{at_least}; '
            f"the data has examples of shape {list(shape)}. "
            + ('Use "mlp" or "logistic".' if len(shape) != 2 else 'Use "cnn1d", "mlp" or "logistic".')
        )
    return shape[0], shape[1], shape[2]


def numbers(text: str) -> list[int]:
    """The numbers of "8,16,32"; empty where one of them is not a whole number above 0."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        return []
    return found if min(found) > 0 else []


class WSConv2d(nn.Module):
    """Convolution with scaled weight standardisation, as De et al. (arXiv:2204.13650) use it.

    The weight of each output channel is centred and divided by sqrt(fan-in * variance), then multiplied by
    a trained ``gain``; ``epsilon`` bounds fan-in * variance from below. Standardising happens in each
    forward pass, so a per-example gradient goes through it. Not an ``nn.Conv2d``: engines that know plain
    convolutions would take its ``weight`` for the one that meets the input.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0, epsilon: float = 1e-4
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        self.gain = nn.Parameter(torch.ones(outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.stride, self.padding, self.epsilon = stride, padding, epsilon
        lecun_(self.weight)

    def standardised(self) -> Tensor:
        """The weight that meets the input, ``[outputs, inputs, kernel, kernel]``."""
        fan_in = self.weight[0].numel()
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        variance = self.weight.var(dim=(1, 2, 3), keepdim=True, correction=0)
        scale = torch.rsqrt((variance * fan_in).clamp(min=self.epsilon)) * self.gain.view(-1, 1, 1, 1)
        return (self.weight - mean) * scale

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, inputs, H, W]`` to ``[B, outputs, H', W']``."""
        return F.conv2d(x, self.standardised(), self.bias, self.stride, self.padding)

    def extra_repr(self) -> str:
        """Shapes, as in the printed form of ``nn.Conv2d``."""
        outputs, inputs, kernel, _ = self.weight.shape
        return f"{inputs}, {outputs}, kernel_size={kernel}, stride={self.stride}, padding={self.padding}"


def lecun_(weight: Tensor) -> None:
    """Fill with normals of variance 1 / fan-in, cut at two deviations: the initialisation of De et al."""
    # .8796 is the deviation of a standard normal cut at +-2.
    deviation = math.sqrt(1.0 / weight[0].numel()) / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)


def to_groupnorm(model: nn.Module, groups: int = 16) -> nn.Module:
    """A copy of ``model`` with a GroupNorm for each BatchNorm; the argument is left as it is.

    Scale, shift and epsilon are copied, running statistics are dropped (they are functions of the data).
    The number of groups is the largest divisor of the channels up to ``groups``. A BatchNorm with its own
    activation (timm) becomes the GroupNorm followed by that activation. Raises ``ValueError`` for a lazy
    module not yet initialised.
    """
    if groups < 1:
        raise ValueError(f"groups={groups}: write 1 or more")
    if isinstance(model, _BatchNorm):
        return _replacement(model, groups, "model")
    result = copy.deepcopy(model)
    # A module used in two places stays one module.
    made: dict[int, nn.Module] = {}
    for path, module in list(result.named_modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, _BatchNorm):
                where = f"{path}.{name}" if path else name
                new = made.setdefault(id(child), _replacement(child, groups, where))
                setattr(module, name, new)
    return result


def _replacement(norm: _BatchNorm, groups: int, where: str) -> nn.Module:
    if isinstance(norm, nn.modules.lazy.LazyModuleMixin):
        raise ValueError(f"{where}: {type(norm).__name__} has no size yet; run the model once, then convert it")
    channels = norm.num_features
    count = max(g for g in range(1, min(groups, channels) + 1) if channels % g == 0)
    new = nn.GroupNorm(count, channels, eps=norm.eps, affine=norm.affine)
    if norm.affine:
        with torch.no_grad():
            for old, fresh in ((norm.weight, new.weight), (norm.bias, new.bias)):
                fresh.data = old.detach().clone()
                fresh.requires_grad_(old.requires_grad)
    new.train(norm.training)
    after = list(norm.children())
    return nn.Sequential(new, *after) if after else new


class Headed(nn.Module):
    """A network and, on its outputs [B, width], a linear layer of zeros with `classes` outputs.

    With `frozen` the network is taken as it is and only the head is trained. A head that starts at zero makes the first
    outputs, and so the first gradient of the head, the same for every seed.
    """

    def __init__(self, body: nn.Module, input_shape: tuple[int, ...], classes: int, frozen: bool) -> None:
        super().__init__()
        some = next(body.parameters())
        with torch.no_grad():
            probe = torch.zeros(1, *input_shape, dtype=some.dtype, device=some.device)
            width = body.eval()(probe).shape[-1]
        self.frozen = frozen
        self.body = body.requires_grad_(not frozen)
        self.head = nn.Linear(width, classes, dtype=some.dtype, device=some.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> Headed:
        """As for any module, but that a frozen network stays in evaluation mode: its outputs are features."""
        super().train(mode)
        if self.frozen:
            self.body.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Class scores [B, classes]."""
        scores: Tensor = self.head(self.body(x))
        return scores
