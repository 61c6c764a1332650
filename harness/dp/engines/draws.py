"""The random number generators that a model draws from: their states, filling them, and going back to them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from harness.dp.random import Stream

WORDS = 624  # of the Mersenne twister's state, which PyTorch's CPU generator keeps as 64-bit numbers after its header
HEADER = 24  # bytes: the seed, how many words are left, whether it was seeded, the next word


def generators(device: torch.device) -> list[Tensor]:
    """The states of PyTorch's generators: the CPU's, and that of `device` where it is another."""
    states = [torch.default_generator.get_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def rewind(device: torch.device, states: list[Tensor]) -> None:
    """Back to `states`, which `generators` gave for the same device: what is drawn next was drawn then."""
    torch.default_generator.set_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def fill(device: torch.device, stream: Stream) -> None:
    """Have PyTorch's generators, the CPU's and that of `device`, draw what `stream` says: dropout masks, say.

    `manual_seed` keeps 32 bits of a seed on a CPU, few enough to try them all. So the whole state is written, 624 words
    of the stream, and what is drawn is as secret as that is. Philox, which a GPU has, holds 64 bits and no more.
    """
    if device.type != "cpu":
        torch.manual_seed(stream.seed64())
    state = _seeded().copy()
    state[HEADER : HEADER + 8 * WORDS].view(np.uint64)[:] = stream.words(WORDS)
    torch.default_generator.set_state(torch.from_numpy(state))


@cache
def _seeded() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The state of a CPU generator that has just been seeded: no word is used, no half of a pair is kept."""
    return torch.Generator().manual_seed(0).get_state().numpy()


def secrecy(device: torch.device) -> int:
    """Bits that have to be guessed to know what `fill` makes `device` draw: a stream's key, or the seed of a GPU."""
    return 256 if device.type == "cpu" else 64


SEEDS = 32  # from which a model is tried that leaves something to chance: each decision falls either way in most tries


class Loaded(TorchDispatchMode):
    """Inside the block, random numbers that are drawn one by one are 0, one half or nearly 1, each as often.

    Decisions that a model leaves to chance (`torch.rand(()) < 0.02`) then fall the rare way too. What comes follows
    from the generator's state. `single` says whether there was such a draw.
    """

    def __init__(self) -> None:
        super().__init__()
        self.single = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        if drawn and isinstance(out, Tensor) and out.numel() == 1 and out.is_floating_point():
            self.single = True
            below = 1 - torch.finfo(out.dtype).eps
            out.fill_((0.0, 0.5, below)[int(torch.randint(3, ()))])
        return out
