"""The scattering transform of pictures: fixed filters, so a representation that nobody had to learn.

Two layers of wavelets and modulus, averaged over windows of ``2**scales`` pixels (Bruna and Mallat,
arXiv:1203.1513), with the Morlet filters and the sizes of Oyallon et al. (arXiv:1809.06367), which Tramer and
Boneh (arXiv:2011.11660) train privately on: 81 numbers for each window of each channel.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.fft import fft2, fftfreq, ifft2
from torch.nn.functional import pad

# Of the finest wavelet: deviation in pixels, and radians a pixel. Its aspect is 4 over the number of angles.
WIDTH, FREQUENCY = 0.8, 3 * math.pi / 4


def scatter(x: Tensor, scales: int, angles: int) -> Tensor:
    """``[B, C, H, W]`` to ``[B, C, paths, H >> scales, W >> scales]``; H and W are above ``2**scales``.

    Pictures are continued by reflection. Order of paths: the average; then for each scale each angle; then for
    each pair of a finer and a coarser scale each pair of angles.
    """
    step = 2**scales
    height, width = x.shape[-2:]
    if min(height, width) <= step:
        raise ValueError(f"pictures of {width}x{height} are too small to scatter; {step + 1} pixels are needed")
    right, below = step + -width % step, step + -height % step
    x = pad(x, (step, right, step, below), mode="reflect")
    wavelets, window = (f.to(x.device) for f in filters(*x.shape[-2:], scales, angles))

    def averaged(u: Tensor) -> Tensor:
        smooth = ifft2(fft2(u) * window).real[..., ::step, ::step]
        return smooth[..., 1 : 1 + (height >> scales), 1 : 1 + (width >> scales)]

    found = [averaged(x)[:, :, None]]
    first = [ifft2(fft2(x)[:, :, None] * wavelets[j]).abs() for j in range(scales)]  # [B, C, angles, H, W]
    found += [averaged(u) for u in first]
    for j, u in enumerate(first):
        for coarser in range(j + 1, scales):
            second = ifft2(fft2(u)[:, :, :, None] * wavelets[coarser]).abs()
            found.append(averaged(second).flatten(2, 3))
    return torch.cat(found, dim=2)


@lru_cache(maxsize=8)
def filters(height: int, width: int, scales: int, angles: int) -> tuple[Tensor, Tensor]:
    """Fourier transforms of the wavelets ``[scales, angles, height, width]`` and the window ``[height, width]``."""
    wavelets = [
        [_morlet(height, width, 2.0**j, math.pi * k / angles, 4 / angles) for k in range(angles)] for j in range(scales)
    ]
    window = _gaussian(height, width, WIDTH * 2.0 ** (scales - 1), 1.0, 0.0, 0.0)
    return torch.stack([torch.stack(row) for row in wavelets]).float(), window.float()


def _morlet(height: int, width: int, scale: float, angle: float, slant: float) -> Tensor:
    """A Gabor filter less as much of its envelope as makes it blind to a constant."""
    gabor = _gaussian(height, width, WIDTH * scale, slant, angle, FREQUENCY / scale)
    envelope = _gaussian(height, width, WIDTH * scale, slant, angle, 0.0)
    return gabor - gabor[0, 0] / envelope[0, 0] * envelope


def _gaussian(height: int, width: int, deviation: float, slant: float, angle: float, centre: float) -> Tensor:
    """The Fourier transform, on the grid of a picture, of a Gaussian of integral 1 that oscillates.

    Along ``angle`` it has this deviation and frequency ``centre`` (radians a pixel), across it deviation /
    slant. Frequencies beyond the grid's alias into it, as they do when such a filter is sampled.
    """
    total = torch.zeros(height, width, dtype=torch.float64)
    for turn_y in range(-2, 3):
        for turn_x in range(-2, 3):
            v = 2 * math.pi * (fftfreq(height, dtype=torch.float64)[:, None] + turn_y)
            h = 2 * math.pi * (fftfreq(width, dtype=torch.float64)[None, :] + turn_x)
            along = h * math.cos(angle) + v * math.sin(angle)
            across = v * math.cos(angle) - h * math.sin(angle)
            total += torch.exp(-(deviation**2) / 2 * ((along - centre) ** 2 + (across / slant) ** 2))
    return total
