"""The support attack: images against brute force, certain and right on float noise, silent on a lattice."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from harness import cli, registry
from harness.dp import SGD, Gaussian, Method, Quantile, Release, Tree, Views
from harness.dp.random import Stream
from harness.peers.noise import NOISES
from harness.verify.audits import support
from harness.verify.audits.canary import Refused
from harness.verify.audits.images import Fused, Known, Lattice, ScaledSum, Short, Sum, guesses, held
from harness.verify.audits.support import SupportSetting, attacked, neighbours
from harness.verify.audits.verdict import Claim
from harness.verify.faults.parts import FloatSum

FEW = SupportSetting(repeat=24)
LESS = SupportSetting(repeat=8)


# --- images, against all that there is: every number of 16 bits ---


def floats16() -> np.ndarray:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    return every[np.isfinite(every)]


@pytest.mark.parametrize("deviation", [1.0, 1.37, 3.9, 30.75])
@pytest.mark.parametrize("image", [Sum(), ScaledSum(), ScaledSum(2**0.5), Fused(), Fused(2**0.5)], ids=lambda i: i.name)
def test_an_image_is_all_that_noise_can_make_and_no_more(image, deviation):
    every, s = floats16(), np.full(1, deviation)
    with np.errstate(all="ignore"):
        for v in np.array([0.0, 1.0, -0.713, 5.27, 0.0333, -19.3], np.float16):
            if isinstance(image, Fused):
                made = (float(v) + image.scaled(s, every.dtype).astype(float) * every.astype(float)).astype(np.float16)
            elif isinstance(image, ScaledSum):
                made = v + image.scaled(s, every.dtype) * every
            else:
                made = v + every
            made, y = (np.unique(made[np.isfinite(made)]), every[(np.abs(every) < 1e3) & (np.abs(every) > 1e-2)])
            there = np.isin(y, made)
            assert np.array_equal(image.possible(y, np.full_like(y, v), s), there)
            assert (isinstance(image, Sum) and not v) or (~there).sum() > 30  # it excludes something


def test_a_hypothesis_holds_where_it_is_true_and_nowhere_else():
    rng = np.random.default_rng(0)
    v = np.broadcast_to(rng.normal(size=300).astype(np.float32), (16, 300))
    z, s = rng.normal(size=v.shape), np.full(300, 1.7)

    def names(y):
        known = Known(y.astype(np.float32), v, s)
        return {image.name for image in held(guesses(known), known, rng)}

    z32 = z.astype(np.float32)
    product, short = (v + np.float32(1.7) * z32), v + 1.7 * z32.astype(float)
    assert {Sum().name, ScaledSum().name} <= names(product)
    assert names(v + (1.7 * z).astype(np.float32)) == {Sum().name}
    assert Fused().name in names(v.astype(float) + np.float64(np.float32(1.7)) * z32)
    assert names(short) == {Short().name}
    assert names(v + 1.7 * z) == set()  # exact, then rounded once
    cosets = names(v + np.rint(z * 2**20) * (1.7 * 2.0**-20))
    assert Lattice(2.0**-20).name in cosets and not any("sum" in name.split(" from ")[0] for name in cosets)
    assert any("lattice" in name for name in names(v + 0.0123 * np.rint(1.7 * z / 0.0123)))  # any step is found
    lattice = np.rint((v + 1.7 * z) / 0.0123) * 0.0123
    assert names(lattice) == set()  # the sum is on it too


# --- whole attacks ---


@dataclass(frozen=True)
class OnLattice(Gaussian):
    """Noise as it should be: sum and noise are integers, in steps of a part of the deviation, before they meet.

    Or not quite: drawn in float32, or in multiples of 2^`coarse` steps, the integers have holes.
    """

    bits: int = 32
    single: bool = False
    coarse: int = 0

    def add(self, release: Release, rng: Stream) -> Tree:
        draws, steps = np.random.default_rng(rng.seed64()), support.deviations(release) * 2.0**-self.bits
        sum_ = np.rint(release.value.flat.double().numpy() / steps).astype(np.int64)
        z = draws.normal(size=len(steps)).astype(np.float32 if self.single else np.float64).astype(float)
        noise = np.floor(z * 2.0 ** (self.bits - self.coarse)).astype(np.int64) << self.coarse
        y = torch.from_numpy((sum_ + noise + 0.5) * steps)
        return release.value.with_flat(y.to(release.value.flat.dtype))


@dataclass(frozen=True)
class OffLattice(Gaussian):
    """Noise on a lattice that the sum is not on."""

    def add(self, release: Release, rng: Stream) -> Tree:
        draws, steps = np.random.default_rng(rng.seed64()), support.deviations(release) * 2.0**-20
        noise = np.rint(draws.normal(size=len(steps)) * 2.0**20) * steps
        return release.value.with_flat((release.value.flat.double() + torch.from_numpy(noise)).float())


def decided(method: Method, s: SupportSetting = FEW, sigma: float = 2.0) -> dict[str, tuple[int, int]]:
    two = neighbours(method, s.trained())
    found = attacked(Claim(method, s, two.n_train, two.n_train, sigma, "pld"), two)
    return {name: (tally["right"], tally["wrong"]) for name, tally in found.facts().items()}


def named(method: str) -> Method:
    return registry.load(registry.resolve("method", method))()


def test_float_noise_is_decided_with_certainty_and_refuted():
    v = support.audit(Method(noise=FloatSum()), SupportSetting(repeat=80))
    assert v.planted["releases"] == {"right": 80, "wrong": 0, "undecided": 0, "contradictions": 0}
    assert v.planted["weights"]["right"] > 60 and v.planted["weights"]["wrong"] == 0
    assert v.refuted and v.instrument == support.CERTAINTY and v.bounds["trade-off"]["epsilon"] > v.claimed


def test_final_weights_alone_decide_at_a_small_epsilon():
    method = dataclasses.replace(named("one-step-last-layer"), noise=FloatSum())
    found = decided(method, sigma=30.75)["weights"]  # epsilon 0.1
    assert found[0] > 0.7 * FEW.repeat and found[1] == 0


CASES = {
    "one step": (Method(), FEW),
    "last layer": (named("one-step-last-layer"), FEW),
    "three steps": (Method(optimizer=SGD(0.1, 0.9)), dataclasses.replace(LESS, steps=3)),
    "side releases": (Method(clip=Quantile()), LESS),
    "matrices": (named("dp-ls"), LESS),
    "groups": (named("group-wise"), LESS),
    "views": (Method(loss=Views(views=2, pad=1)), LESS),
}


@pytest.mark.parametrize("name", CASES)
def test_a_lattice_decides_nothing_where_floats_decide_all(name):
    method, s = CASES[name]
    floats = decided(dataclasses.replace(method, noise=FloatSum()), s)
    assert floats["releases"] == (s.repeat, 0)
    for bits in (24, 40) if s is FEW else (30,):
        silent = decided(dataclasses.replace(method, noise=OnLattice(bits)), s)
        assert set(silent.values()) == {(0, 0)}


def test_this_harness_decides_nothing():
    """Its own noise, at epsilon 3 and at 0.1."""
    for sigma in (2.0, 30.75):
        assert set(decided(Method(), sigma=sigma).values()) == {(0, 0)}


@pytest.mark.parametrize("noise", [OffLattice(), OnLattice(40, single=True), OnLattice(40, coarse=16)], ids=str)
def test_integers_with_holes_are_decided(noise):
    """A lattice that the sum is not on, or integers that noise does not reach."""
    assert decided(Method(noise=noise))["releases"] == (FEW.repeat, 0)


@pytest.mark.parametrize("name", NOISES)
def test_the_noise_of_others_is_decided(name):
    kind = NOISES[name]
    if kind.version() is None:
        pytest.skip(f"{kind.PACKAGE} is absent: pip install {kind.PACKAGE}")
    right, wrong = decided(Method(noise=kind()), LESS)["releases"]
    assert right >= LESS.repeat - 1 and not wrong


def test_certainty_needs_decisions_and_no_mistake():
    inside = np.arange(200) < 100
    right = np.where(inside, 1, -1)
    assert support.certainty(support.Tally(list(right)), inside, 1e-5, 0.01) == support.MOST
    assert support.certainty(support.Tally([-right[0], *right[1:]]), inside, 1e-5, 0.01) == 0
    assert support.certainty(support.Tally([0] * 200), inside, 1e-5, 0.01) == 0
    few = support.Tally([1, *[0] * 199])  # one in a hundred is more than a delta of 1e-5, and less than one of 0.1
    assert support.certainty(few, inside, 1e-5, 0.01) == support.MOST
    assert support.certainty(few, inside, 0.1, 0.01) == 0


def test_what_cannot_be_attacked_is_refused():
    with pytest.raises(Refused, match="without noise"):
        support.audit(named("non-private"), FEW)
    with pytest.raises(Refused, match="rate 1"):
        support.audit(Method(), dataclasses.replace(FEW, rate=0.5))
    with pytest.raises(Refused, match="neighbours"):
        neighbours(Method(), dataclasses.replace(FEW, examples=1).trained())


OWN = """
from harness.dp import Method
from harness.registry import method
from harness.verify.faults.parts import FloatSum

@method("floats")
def floats() -> Method:
    return Method(noise=FloatSum())
"""


def test_the_command_records_and_refutes(tmp_path, capsys):
    (tmp_path / "own.py").write_text(OWN)
    request = [str(tmp_path / "own.py"), "--support", "--repeat", "80", "--results", str(tmp_path)]
    assert cli.main(["audit", *request]) == 1
    assert "REFUTED: releases decide 80 of 80" in capsys.readouterr().out
    (file,) = (tmp_path / "audits").iterdir()
    made = json.loads(file.read_text())
    assert (
        made["instrument"] == SupportSetting.instrument and made["flagged"] and made["facts"]["releases"]["wrong"] == 0
    )
    assert cli.main(["audit", *request]) == 1 and "recorded before" in capsys.readouterr().out


@pytest.mark.parametrize("more", [["--canaries", "9"], ["--neighbours"], ["--membership"], ["--rate", "0.5"]], ids=str)
def test_options_that_do_not_go_together_are_refused(more, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["audit", "dp-sgd", "--support", *more])
    assert stopped.value.code == 2 and more[0] in capsys.readouterr().err
