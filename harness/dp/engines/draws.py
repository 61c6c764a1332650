"""The random number generators that a model draws from: their states, and going back to them."""

from __future__ import annotations

import torch
from torch import Tensor


def generators(device: torch.device) -> list[Tensor]:
    """The states of PyTorch's generators: the CPU's, and that of `device` where it is another."""
    states = [torch.default_generator.get_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def rewind(device: torch.device, states: list[Tensor]) -> None:
    """Back to `states`, which `generators` gave for the same device: what is drawn next was drawn then."""
    torch.default_generator.set_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)
