"""Small models, each with something about it that per-example gradients have been got wrong on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, PADDING, CLASSES = 11, 0, 3


@dataclass(frozen=True)
class Animal:
    """A model's constructor, and the shape of one example: of floats, or of token numbers."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tokens: bool = False
    labels: tuple[int, ...] = ()  # the shape of one example's target

    def model(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = self.build().to(dtype)
        with torch.no_grad():  # off zeros and ones, where errors hide
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
        return model

    def batch(self, size: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Tensor, Tensor]:
        rng = torch.Generator().manual_seed(seed)
        if self.tokens:
            x = torch.randint(0, VOCABULARY, (size, *self.shape), generator=rng)
            x[:, -2:] = PADDING
        else:
            x = torch.randn(size, *self.shape, generator=rng, dtype=torch.float64).to(dtype)
        classes = VOCABULARY if self.labels else CLASSES
        return x, torch.randint(0, classes, (size, *self.labels), generator=rng)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def no_bias() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, CLASSES, bias=False))


def head(channels: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, CLASSES)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(6, 4, (3, 2), padding=(2, 1), dilation=(2, 1), bias=False),
        nn.Tanh(),
        nn.Conv2d(4, 8, 3, padding="same", groups=2),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Tanh(),
        nn.Conv2d(8, 6, (2, 4), padding="same", dilation=(1, 2)),
        nn.Tanh(),
        nn.Conv2d(6, 5, 1, padding=1, padding_mode="circular"),
        *head(5),
    )


def wide_convolution() -> nn.Module:
    """Few positions and many channels: where Gram matrices are the cheaper way to a norm."""
    return nn.Sequential(
        nn.Conv2d(6, 24, 3, stride=4, padding=1),
        nn.Tanh(),
        nn.Conv2d(24, 32, 2, groups=2),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, CLASSES),
    )


def line() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 6, 5, stride=2, padding=2),
        nn.Tanh(),
        nn.Conv1d(6, 6, 3, dilation=2, groups=3, padding="same"),
        nn.Tanh(),
        nn.Conv1d(6, 16, 3, stride=4),
        nn.Flatten(),
        nn.Linear(48, CLASSES),
    )


def volume() -> nn.Module:
    return nn.Sequential(nn.Conv3d(1, 3, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 64, CLASSES))


def transposed() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(2, 3, 3, stride=2), nn.Tanh(), *head(3))


class Tied(nn.Module):
    """A language model whose head is its embedding's weight, as a module that shares the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 6, padding_idx=PADDING)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(x))))


class TiedByFunction(nn.Module):
    """The same, but the weight is used by a function, where no hook sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 6)
        self.body = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.body(self.embed(x))), self.embed.weight)


class Borrowed(nn.Module):
    """A child's parameters used by the parent, which never calls the child."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(5, 4)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(x @ self.child.weight.T + self.child.bias))


class TiedLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Repeated(nn.Module):
    """Modules called several times, on inputs of different size too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.out = (nn.Conv2d(3, 3, 3, padding=1), nn.Linear(12, 12), nn.Linear(12, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(torch.tanh(self.conv(x))))
        x = F.adaptive_avg_pool2d(torch.tanh(self.conv(F.avg_pool2d(x, 2))), 2).flatten(1)
        return self.out(torch.tanh(self.linear(torch.tanh(self.linear(x)))))


def frozen() -> nn.Module:
    model = mlp()
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


class Unused(nn.Module):
    """A branch that no forward pass takes, and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(5, CLASSES), nn.Linear(5, CLASSES)
        self.idle = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Sequence(nn.Module):
    """Tokens, learned positions and a body."""

    def __init__(self, body: nn.Module, batched: bool = True, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width, padding_idx=PADDING)
        self.positions = nn.Embedding(6, width)
        self.body, self.out, self.batched = body, nn.Linear(width, CLASSES), batched

    def forward(self, x: Tensor) -> Tensor:
        numbers = torch.arange(x.shape[1], device=x.device)
        z = self.embed(x) + self.positions(numbers.expand(x.shape) if self.batched else numbers)
        z = self.body(z)
        return self.out((z[0] if isinstance(z, tuple) else z).mean(1))


class TimeFirst(nn.Module):
    """A body that wants [T, B, d]."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.transpose(0, 1)).transpose(0, 1)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, value=x, need_weights=False)[0]


class Projections(nn.Module):
    """Attention by its projections, which see sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.RMSNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ClassToken(nn.Module):
    """Free parameters at the root, used beside the children."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(1, 5, 8))
        self.patch, self.body, self.out = nn.Conv2d(2, 8, 4, 4), Projections(), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = self.patch(x).flatten(2).transpose(1, 2)
        z = torch.cat([self.token.expand(len(x), -1, -1), z], 1) + self.place
        return self.out(self.body(z)[:, 0])


def norms(tracked: bool = False) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.GroupNorm(2, 6),
        nn.Tanh(),
        nn.InstanceNorm2d(6, affine=True),
        nn.LayerNorm([6, 8, 8]),
        nn.Conv2d(6, 4, 3),
        nn.Flatten(2),
        nn.InstanceNorm1d(4, affine=True, track_running_stats=tracked),
        nn.RMSNorm(36),
        nn.LayerNorm(36, bias=False),
        nn.Flatten(),
        nn.Linear(144, CLASSES),
    )


class Windows(nn.Module):
    """Windows and time steps folded into the batch, example after example and the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(1, 3, 2), nn.LayerNorm(81), nn.Linear(81, 6)
        self.scale, self.late = LayerScale(6), nn.Linear(6, 5)
        self.out = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        z = torch.tanh(self.conv(x.flatten(0, 1)[:, None]).flatten(1))
        z = self.scale(torch.tanh(self.linear(self.norm(z)))).unflatten(0, (n, -1))
        z = torch.tanh(self.late(z.transpose(0, 1).flatten(0, 1))).unflatten(0, (-1, n))
        return self.out(z.mean(0))


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Shift(nn.Module):
    """Backpropagates from its output alone, so that nothing guards its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + self.beta)


class Unheard(nn.Module):
    """Layers that no library knows, with several inputs, keyword arguments and a tuple of outputs."""

    class Mix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = nn.Parameter(torch.randn(5, 4, 3) * 0.3)
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor, *, scale: float, other: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            z = torch.einsum("bi,ijk,bj->bk", x, self.core, torch.tanh(self.inner(other)))
            return z * scale, {"square": z.square()}

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.mix, self.out = nn.Bilinear(5, 5, 4), self.Mix(), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z, more = self.mix(x, scale=1.5, other=torch.tanh(self.pair(x, x.sin())))
        return self.out(torch.cat([z, more["square"]], 1))


class InPlace(nn.Module):
    """Outputs and inputs of layers that are written to afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = (nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(inplace=True))
        self.sequence, self.shift, self.out = nn.Linear(4, 4), Shift(4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = self.relu(self.conv(x))
        z = self.relu(self.norm(z)) + 0.1
        z = self.sequence(z.flatten(2).transpose(1, 2))  # a view of a matrix product
        z.mul_(2).add_(0.5)
        y = z.detach() * 1.0
        u = self.shift(y)
        y.zero_()
        return self.out((z + u).tanh().mean(1))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = (
            nn.Conv2d(2, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Linear(4, CLASSES),
        )
        self.norm, self.short = nn.GroupNorm(2, 4), nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.second(torch.tanh(self.norm(self.first(x))))
        z += self.short(x)
        return self.out(torch.tanh(z).mean((2, 3)))


class Standardised(nn.Conv2d):
    """Weight standardisation: a subclass of a known layer that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, w / (w.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)


def standardised() -> nn.Module:
    return nn.Sequential(Standardised(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), *head(4))


def weight_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, CLASSES))


def batch_norm_in_eval_mode() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), *head(4)).eval()


def root() -> nn.Module:
    return nn.Linear(5, CLASSES)


class Mixing(nn.Module):
    """Attention along the wrong dimension: examples look at each other, and no gradient is an example's own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Sequence(TimeFirst(Projections()))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


ZOO: dict[str, Animal] = {
    "mlp": Animal(mlp, (5,)),
    "no bias": Animal(no_bias, (5,)),
    "a layer alone": Animal(root, (5,)),
    "convolutions": Animal(convolutions, (2, 9, 9)),
    "wide convolution": Animal(wide_convolution, (6, 12, 12)),
    "conv1d": Animal(line, (2, 24)),
    "conv3d": Animal(volume, (1, 3, 3, 3)),
    "transposed convolution": Animal(transposed, (2, 4, 4)),
    "tied head": Animal(Tied, (6,), tokens=True, labels=(6,)),
    "tied by function": Animal(TiedByFunction, (6,), tokens=True, labels=(6,)),
    "tied linear": Animal(TiedLinear, (5,)),
    "borrowed parameters": Animal(Borrowed, (5,)),
    "repeated calls": Animal(Repeated, (3, 6, 6)),
    "frozen": Animal(frozen, (5,)),
    "unused": Animal(Unused, (5,)),
    "attention": Animal(lambda: Sequence(SelfAttention()), (6,), tokens=True),
    "projections": Animal(lambda: Sequence(Projections()), (6,), tokens=True),
    "transformer": Animal(
        lambda: Sequence(nn.TransformerEncoderLayer(8, 2, 12, 0.0, F.gelu, batch_first=True)), (6,), tokens=True
    ),
    "time first": Animal(
        lambda: Sequence(TimeFirst(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.LayerNorm(8), LayerScale(8)))),
        (6,),
        tokens=True,
    ),
    "time first transformer": Animal(
        lambda: Sequence(TimeFirst(nn.TransformerEncoderLayer(8, 2, 12, 0.0, F.gelu)), False), (6,), tokens=True
    ),
    "lstm": Animal(lambda: Sequence(nn.LSTM(8, 8, batch_first=True)), (6,), tokens=True),
    "gru": Animal(lambda: Sequence(nn.GRU(8, 4, bidirectional=True, batch_first=True), False), (6,), tokens=True),
    "class token": Animal(ClassToken, (2, 8, 8)),
    "norms": Animal(norms, (2, 8, 8)),
    "norms in eval mode": Animal(lambda: norms(tracked=True).eval(), (2, 8, 8)),
    "windows": Animal(Windows, (4, 4, 10)),
    "layer scale": Animal(
        lambda: nn.Sequential(nn.Linear(5, 4), LayerScale(4), nn.Tanh(), nn.Linear(4, CLASSES)), (5,)
    ),
    "unheard of": Animal(Unheard, (5,)),
    "in place": Animal(InPlace, (2, 6, 6)),
    "residual": Animal(Residual, (2, 6, 6)),
    "standardised weights": Animal(standardised, (2, 6, 6)),
    "weight norm": Animal(weight_norm, (5,)),
    "batch norm in eval mode": Animal(batch_norm_in_eval_mode, (2, 6, 6)),
}
