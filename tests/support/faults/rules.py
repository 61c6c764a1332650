"""Clipping rules with a planted fault: in what they bound, declare, release beside the gradient, or remember."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from harness.dp import Flat, GroupWise, Quantile, Relation, Release, Tree
from harness.verify.faults import HIDDEN

# Bounds ---------------------------------------------------------------------------------------------------


class Growing(Flat):
    """Its bound grows from step to step, its declared sensitivity does not."""

    def init(self, layout):
        return 1.0

    def weights(self, norms, state):
        return Flat(self.clip * state).weights(norms, None)

    def update(self, state, public):
        return state * 1.5


class Timed(Flat):
    """Counts its steps, as a rule may. What derives from it does something wrong at some of them."""

    def init(self, layout):
        return {"t": 0}

    def update(self, state, public):
        return {"t": state["t"] + 1}


class LateGrowing(Timed):
    """Its bound grows from the fiftieth step on."""

    def weights(self, norms, state):
        return Flat(self.clip * (1 + max(0, state["t"] - 50) / 25)).weights(norms, None)


@dataclass(frozen=True)
class Gap(Flat):
    """Does not clip norms between two limits."""

    low: float = 30.0
    high: float = 1000.0

    def weights(self, norms, state):
        return torch.where((norms > self.low) & (norms < self.high), 1.0, super().weights(norms, state))


class KeepsInfinite(Flat):
    """Gives a norm that is not a number a weight."""

    def weights(self, norms, state):
        return (self.clip / norms).clamp(max=1.0)


class RoundedUp(Flat):
    """Gives weights that float32 rounds up by half."""

    def weights(self, norms, state):
        return (self.clip / norms).clamp(max=1.0).nan_to_num(0.0)


class GroupByGroup(Flat):
    """Clips each tensor to C and declares C for all of them together."""

    def groups(self, layout):
        return {name: i for i, name in enumerate(layout.names)}


class Relative(Flat):
    """Scales the weights by the mean norm of the batch."""

    def weights(self, norms, state):
        return super().weights(norms, state) * norms.nan_to_num(0, 0, 0).mean().clamp(max=1.0)


class EveryTenthMedian(Timed):
    """Sets its threshold to the median of private norms, in every tenth step."""

    def init(self, layout):
        return {"t": 0, "clip": self.clip}

    def weights(self, norms, state):
        if len(norms):
            HIDDEN["median"] = float(norms.nan_to_num(1, 1, 1).clamp(1e-6, 1e6).median())
        return Flat(state["clip"]).weights(norms, None)

    def sensitivity(self, state, relation):
        return state["clip"] * relation.moves

    def update(self, state, public):
        t = state["t"] + 1
        return {"t": t, "clip": HIDDEN["median"] if t % 10 == 0 else state["clip"]}


# Scales of groups -----------------------------------------------------------------------------------------


class PrivateScale(GroupWise):
    """Noises each tensor in units of the largest norm in the batch."""

    def weights(self, norms, state):
        HIDDEN["scale"] = float(norms.nan_to_num(0, 0, 0).max()) + 1e-3
        return super().weights(norms, state)

    def scale(self, layout, state):
        return dict.fromkeys(layout.names, HIDDEN.get("scale", 1.0))


class SmallScale(GroupWise):
    """Noises one group half as much as the sensitivity supposes."""

    def scale(self, layout, state):
        scale = super().scale(layout, state)
        return {name: value / (2 if name == "4.weight" else 1) for name, value in scale.items()}


class TwoScales(GroupWise):
    """Noises the tensors of one group in different units."""

    def scale(self, layout, state):
        return {name: 1.0 + i for i, name in enumerate(layout.names)}


# Releases beside the gradient, and what is planned for them -----------------------------------------------


class Counted(Flat):
    """An honest side release, for faults to derive from: how many gradients were short."""

    def split(self, sigma):
        return {"grad": sigma * 2**0.5, "count": sigma * 2**0.5}

    def side(self, norms, state, relation, sigma):
        count = (norms < 1).sum().reshape(1).to(norms.dtype)
        return {"count": Release(Tree.of({"count": count}), 1.0 * relation.moves, sigma * 2**0.5)}


class OnlyIfAny(Counted):
    """Releases a count only of batches that hold something."""

    def side(self, norms, state, relation, sigma):
        return super().side(norms, state, relation, sigma) if len(norms) else {}


class SometimesCounts(Timed):
    """Releases a count in every tenth step, and plans none."""

    def side(self, norms, state, relation, sigma):
        return Counted().side(norms, None, relation, sigma) if state["t"] % 10 == 9 else {}


class NeverCounts(Flat):
    """Plans a count that it does not release."""

    def split(self, sigma):
        return {"grad": sigma, "count": 10.0}


class WholeNumbers(Flat):
    """Takes the next whole number for a multiplier: more noise than was asked for."""

    def split(self, sigma):
        return {"grad": float(math.ceil(sigma))}


class MeanNorm(Flat):
    """A side release whose sensitivity is read off the data."""

    def split(self, sigma):
        return {"grad": sigma * 2**0.5, "norm": sigma * 2**0.5}

    def side(self, norms, state, relation, sigma):
        v = norms.nan_to_num(0, 0, 0)
        largest = float(v.max()) if len(v) else 1.0
        return {"norm": Release(Tree.of({"n": v.sum().reshape(1)}), largest * relation.moves, sigma * 2**0.5)}


class SumsOfNorms(Quantile):
    """Releases sums of norms by the sensitivity of counts."""

    def side(self, norms, state, relation, sigma):
        counts = super().side(norms, state, relation, sigma)["counts"]
        sums = (norms * norms.isfinite()).nan_to_num(0, 0, 0).sum(0)
        return {"counts": counts._replace(value=Tree.of({"counts": sums}))}


class WholeCounts(Quantile):
    """Does not take half the batch off: a count moves by 1, and 1/2 is declared."""

    def side(self, norms, state, relation, sigma):
        counts = super().side(norms, state, relation, sigma)["counts"]
        return {"counts": counts._replace(value=counts.value + len(norms) / 2)}


class OneCount(Quantile):
    """Declares the sensitivity of one count for those of all groups."""

    def side(self, norms, state, relation, sigma):
        counts = super().side(norms, state, relation, sigma)["counts"]
        return {"counts": counts._replace(sensitivity=relation.moves / 2)}


class AddedCounts(Quantile):
    """Forgets that replacing an example moves a count by twice as much."""

    def side(self, norms, state, relation, sigma):
        return super().side(norms, state, Relation.ADD_OR_REMOVE, sigma)
