"""Noise of other libraries as a part of a method, to attack it in the same loop as ours.

Each draws and adds as its library does, tensor by tensor, on the same sums, with the deviation that the harness asks
for. Where a library exports no function for it, its arithmetic is repeated here; the class says which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from harness.dp.noise import Gaussian
from harness.dp.random import Stream
from harness.dp.release import Release
from harness.dp.tree import Tree
from harness.peers.peer import Library


@dataclass(frozen=True)
class PeerNoise(Library, Gaussian):
    """Gaussian noise by another library, drawn and added by `noised`."""

    ADDS: ClassVar[str]  # what it computes

    def add(self, release: Release, rng: Stream) -> Tree:
        whole, scale = release.sigma * release.sensitivity, release.scale or {}
        noised = [self.noised(t, whole * scale.get(name, 1.0), rng.seed64()) for name, t in release.formatted.items()]
        return release.value.with_flat(torch.cat([t.reshape(-1) for t in noised]))

    def noised(self, value: Tensor, deviation: float, seed: int) -> Tensor:
        """`value` and noise of this deviation; `seed` has 64 bits."""
        raise NotImplementedError


class Opacus(PeerNoise):
    """`DPOptimizer.add_noise`: `torch.normal` with this deviation, added to the summed gradient."""

    PACKAGE: ClassVar[str] = "opacus"
    ADDS: ClassVar[str] = "v + torch.normal(0, s)"
    SECURE: ClassVar[bool] = False

    def noised(self, value: Tensor, deviation: float, seed: int) -> Tensor:
        from opacus.optimizers.optimizer import _generate_noise

        generator = torch.Generator().manual_seed(seed % 2**63)
        drawn: Tensor = _generate_noise(deviation, value, generator, self.SECURE)
        return value + drawn


class OpacusSecure(Opacus):
    """The same with `secure_mode=True`: the sum of four draws, halved (Holohan and Braghin, arXiv:2107.10138)."""

    ADDS: ClassVar[str] = "v + (four of torch.normal(0, s)) / 2"
    SECURE: ClassVar[bool] = True


class JaxPrivacy(PeerNoise):
    """`jax_privacy.noise_addition.gaussian_privatizer`, compiled, as training steps are."""

    PACKAGE: ClassVar[str] = "jax-privacy"
    ADDS: ClassVar[str] = "v + s * jax.random.normal(), compiled"
    COMPILED: ClassVar[bool] = True

    def noised(self, value: Tensor, deviation: float, seed: int) -> Tensor:
        import jax

        words = np.array(divmod(seed, 2**32), np.uint32)
        with jax.enable_x64(value.dtype is torch.float64):
            return torch.from_numpy(np.array(_privatized(self.COMPILED)(value.numpy(), words, deviation)))


class JaxPrivacyEager(JaxPrivacy):
    """The same, operation by operation."""

    ADDS: ClassVar[str] = "v + s * jax.random.normal(), one by one"
    COMPILED: ClassVar[bool] = False


@cache
def _privatized(compiled: bool) -> Callable[..., Any]:
    """A sum with noise of a deviation, by JAX Privacy; `words` are those of a key."""
    import jax
    from jax_privacy.noise_addition import gaussian_privatizer

    def noised(value: Any, words: Any, deviation: Any) -> Any:
        privatizer = gaussian_privatizer(stddev=deviation, prng_key=jax.random.wrap_key_data(words))
        return privatizer.update(value, privatizer.init(value))[0]

    return jax.jit(noised, static_argnums=2) if compiled else noised


class TensorFlowPrivacy(PeerNoise):
    """`GaussianSumQuery.get_noised_result` (0.9.0) by TensorFlow: the package pins an accountant that we cannot use."""

    PACKAGE: ClassVar[str] = "tensorflow-cpu"
    ADDS: ClassVar[str] = "v + tf.random_normal_initializer(stddev=s)(shape)"

    def noised(self, value: Tensor, deviation: float, seed: int) -> Tensor:
        import tensorflow as tf

        tf.random.set_seed(seed % 2**63)
        v = tf.constant(value.numpy())
        drawn = tf.random_normal_initializer(stddev=tf.cast(deviation, tf.float32))(tf.shape(v))
        return torch.from_numpy((v + tf.cast(drawn, v.dtype)).numpy())


class NumPy(PeerNoise):
    """Noise drawn in float64 and rounded to the sum's type before it is added, as by hand."""

    PACKAGE: ClassVar[str] = "numpy"
    ADDS: ClassVar[str] = "v + float32(rng.normal(0, s))"

    def noised(self, value: Tensor, deviation: float, seed: int) -> Tensor:
        drawn = np.random.default_rng(seed).normal(0.0, deviation, value.shape)
        return value + torch.from_numpy(drawn).to(value.dtype)


NOISES: Mapping[str, type[PeerNoise]] = {
    "Opacus": Opacus,
    "Opacus, secure_mode": OpacusSecure,
    "JAX Privacy": JaxPrivacy,
    "JAX Privacy, not compiled": JaxPrivacyEager,
    "TensorFlow Privacy, by TensorFlow": TensorFlowPrivacy,
    "NumPy by hand": NumPy,
}
