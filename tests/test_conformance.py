"""Every registered method, ours and those of installed packages, passes the conformance checks."""

import dataclasses

import pytest
import torch

from harness import registry
from harness.dp import Flat, Gaussian, Method, Path, Release
from harness.verify import check
from harness.verify.conformance import examine


@pytest.mark.parametrize("name", sorted(registry.index("method")))
def test_method_conforms(name):
    assert [line for line in check(name) if not line.ok] == []


@dataclasses.dataclass(frozen=True)
class TooLow(Flat):
    """Claims half of its sensitivity."""

    def sensitivity(self, state, relation):
        return super().sensitivity(state, relation) / 2


@dataclasses.dataclass(frozen=True)
class Stuck(Gaussian):
    """Adds the same noise in every step."""

    def add(self, release, rng):
        return super().add(release, torch.Generator().manual_seed(0))


@dataclasses.dataclass(frozen=True)
class Quiet(Gaussian):
    """Forgets to scale the noise by the sensitivity."""

    def add(self, release, rng):
        return super().add(Release(release.value, 1.0, release.sigma), rng)


@dataclasses.dataclass(frozen=True)
class Drift(Path):
    """Moves the weights by itself."""

    def base(self, w, state, rng):
        return w * 1.001


@dataclasses.dataclass(frozen=True)
class Unbilled(Flat):
    """Releases with less noise than it plans."""

    def split(self, sigma):
        return {"grad": sigma, "count": 10.0}


@pytest.mark.parametrize(
    ("fault", "caught"),
    [
        (Method(clip=TooLow(0.3)), "declared sensitivity"),
        (Method(noise=Stuck()), "afresh in every step"),
        (Method(clip=Flat(0.1), noise=Quiet()), "standard deviation"),
        (Method(path=Drift()), "learning rate of 0"),
        (Method(clip=Unbilled()), "ledger is the plan"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_planted_fault_is_caught(fault, caught):
    failed = [line.name for line in examine(fault) if not line.ok]
    assert any(caught in name for name in failed), failed
