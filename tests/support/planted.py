"""Methods with a fault planted in one part: wider than the faults that public code had
(`harness.verify.faults.adapters`)."""

import copy
import dataclasses
import math

import torch
from dp_accounting import GaussianDpEvent, LaplaceDpEvent, NoOpDpEvent, PoissonSampledDpEvent
from torch import nn

from harness.dp import (
    SGD,
    Batch,
    CrossEntropy,
    Fixed,
    Flat,
    Gaussian,
    GroupWise,
    Method,
    Path,
    Poisson,
    Quantile,
    Refined,
    Relation,
    Release,
    Shuffle,
    Tree,
    Views,
    Vmap,
)
from harness.verify import conformance as checks
from harness.verify.faults.adapters import Naive, NotDoubled, TooLow, ViewByView

# --- clipping rules ---


@dataclasses.dataclass(frozen=True)
class Growing(Flat):
    """Its bound grows from step to step, its declared sensitivity does not."""

    def init(self, layout):
        return 1.0

    def weights(self, norms, state):
        return Flat(self.clip * state).weights(norms, None)

    def update(self, state, public):
        return state * 1.5


@dataclasses.dataclass(frozen=True)
class Window(Flat):
    """Does not clip norms between 30 and 1000."""

    def weights(self, norms, state):
        return torch.where((norms > 30) & (norms < 1000), torch.ones_like(norms), super().weights(norms, state))


@dataclasses.dataclass(frozen=True)
class Huge(Flat):
    """Does not clip norms above 1e20."""

    def weights(self, norms, state):
        return torch.where(norms > 1e20, torch.ones_like(norms), super().weights(norms, state))


@dataclasses.dataclass(frozen=True)
class KeepsInfinite(Flat):
    """Gives a norm that is not a number a weight."""

    def weights(self, norms, state):
        return (self.clip / norms).clamp(max=1.0)


@dataclasses.dataclass(frozen=True)
class GroupByGroup(Flat):
    """Clips each tensor to C and declares C for them all."""

    def groups(self, layout):
        return {name: i for i, name in enumerate(layout.names)}


@dataclasses.dataclass(frozen=True)
class Relative(Flat):
    """Clips to the mean norm of the batch."""

    def weights(self, norms, state):
        mean = norms.nan_to_num(0, 0, 0).mean().clamp(max=1.0)
        return super().weights(norms, state) * mean


@dataclasses.dataclass(frozen=True)
class Coarse(Vmap):
    """An engine that reads norms too low in float32, as a cancelling sum of squares does, if inputs are sequences."""

    sequences: bool = False

    def bounded(self, loss, clip, model, w, batch, *rest):
        out = super().bounded(loss, clip, model, w, batch, *rest)
        if w.flat.dtype == torch.float64 or self.sequences != (batch.x.ndim == 3):
            return out
        wide = super().bounded(loss, Flat(2 * clip.clip), model, w, batch, *rest)
        out.releases["grad"] = out.releases["grad"]._replace(value=wide.releases["grad"].value)
        return out


@dataclasses.dataclass(frozen=True)
class MeanNorm(Flat):
    """A side release whose sensitivity is read off the data."""

    def split(self, sigma):
        return {"grad": sigma * 2**0.5, "norm": sigma * 2**0.5}

    def side(self, norms, state, relation, sigma):
        v = norms.nan_to_num(0, 0, 0)
        largest = float(v.max()) if len(v) else 1.0
        return {"norm": Release(Tree.of({"n": v.sum().reshape(1)}), largest * relation.moves, sigma * 2**0.5)}


@dataclasses.dataclass(frozen=True)
class Unbilled(Flat):
    """Releases with less noise than it plans."""

    def split(self, sigma):
        return {"grad": sigma, "count": 10.0}


@dataclasses.dataclass(frozen=True)
class Counted(Flat):
    """An honest side release: how many gradients were short."""

    def split(self, sigma):
        return {"grad": sigma * 2**0.5, "count": sigma * 2**0.5}

    def side(self, norms, state, relation, sigma):
        count = (norms < 1).sum().reshape(1).to(norms.dtype)
        return {"count": Release(Tree.of({"count": count}), 1.0 * relation.moves, sigma * 2**0.5)}


@dataclasses.dataclass(frozen=True)
class OnlyIfAny(Counted):
    """Releases a count only of batches that hold something."""

    def side(self, norms, state, relation, sigma):
        return super().side(norms, state, relation, sigma) if len(norms) else {}


@dataclasses.dataclass(frozen=True)
class Coarsely(Flat):
    """Gives weights that float32 rounds up by half."""

    def weights(self, norms, state):
        return (self.clip / norms).clamp(max=1.0).nan_to_num(0.0)


# --- groups with scales of their own, adaptive thresholds, views ---


@dataclasses.dataclass(frozen=True)
class SumsOfNorms(Quantile):
    """Releases sums of norms by the sensitivity of counts."""

    def side(self, norms, state, relation, sigma):
        counts = super().side(norms, state, relation, sigma)["counts"]
        sums = (norms * norms.isfinite()).nan_to_num(0, 0, 0).sum(0)
        return {"counts": counts._replace(value=Tree.of({"counts": sums}))}


@dataclasses.dataclass(frozen=True)
class WholeCounts(Quantile):
    """Does not take half the batch off: a count moves by 1, and 1/2 is declared."""

    def side(self, norms, state, relation, sigma):
        counts = super().side(norms, state, relation, sigma)["counts"]
        return {"counts": counts._replace(value=counts.value + len(norms) / 2)}


@dataclasses.dataclass(frozen=True)
class OneCount(Quantile):
    """Declares the sensitivity of one count for those of all groups."""

    def side(self, norms, state, relation, sigma):
        counts = super().side(norms, state, relation, sigma)["counts"]
        return {"counts": counts._replace(sensitivity=relation.moves / 2)}


@dataclasses.dataclass(frozen=True)
class AddedCounts(Quantile):
    """Forgets that replacing an example moves a count by twice as much."""

    def side(self, norms, state, relation, sigma):
        return super().side(norms, state, Relation.ADD_OR_REMOVE, sigma)


@dataclasses.dataclass(frozen=True)
class PrivateMedian(Quantile):
    """Sets its thresholds to the medians of the private norms."""

    def side(self, norms, state, relation, sigma):
        out = super().side(norms, state, relation, sigma)
        if len(norms):
            state["thresholds"] = tuple(norms.nan_to_num(1, 1, 1).median(0).values.clamp(min=1e-3).tolist())
        return out


LAST: dict[str, float] = {"scale": 1.0}


@dataclasses.dataclass(frozen=True)
class PrivateScale(GroupWise):
    """Noises each tensor in units of the largest norm in the batch."""

    def weights(self, norms, state):
        LAST["scale"] = float(norms.nan_to_num(0, 0, 0).max()) + 1e-3
        return super().weights(norms, state)

    def scale(self, layout, state):
        return dict.fromkeys(layout.names, LAST["scale"])


@dataclasses.dataclass(frozen=True)
class SmallScale(GroupWise):
    """Noises one group half as much as the sensitivity supposes."""

    def scale(self, layout, state):
        scale = dict(super().scale(layout, state))
        return {name: value / (2 if name == "4.weight" else 1) for name, value in scale.items()}


@dataclasses.dataclass(frozen=True)
class TwoScales(GroupWise):
    """Noises the tensors of one group in different units."""

    def scale(self, layout, state):
        return {name: 1.0 + i for i, name in enumerate(layout.names)}


@dataclasses.dataclass(frozen=True)
class Scaleless(Gaussian):
    """Forgets the scales."""

    def add(self, release, rng):
        return super().add(release._replace(scale=None), rng)


@dataclasses.dataclass(frozen=True)
class OneScaleShort(Gaussian):
    """Takes one tensor's scale for half of what it is."""

    def add(self, release, rng):
        scale = {**release.scale, "1.bias": release.scale["1.bias"] / 2}
        return super().add(release._replace(scale=scale), rng)


@dataclasses.dataclass(frozen=True)
class ViewsAveragedLate(Vmap):
    """Clips each view's gradient and averages: within the bound, and not what was asked for."""

    def bounded(self, loss, clip, model, w, batch, *rest):
        out = ViewByView().bounded(loss, clip, model, w, batch, *rest)
        grad = out.releases["grad"]
        out.releases["grad"] = grad._replace(value=grad.value / loss.views)
        return out


@dataclasses.dataclass(frozen=True)
class Uncut(Vmap):
    """Leaves the coordinates as they are, whatever the rule's limit."""

    def bounded(self, loss, clip, *rest):
        return super().bounded(loss, Flat(clip.clip), *rest)


# --- noise ---


def _noisy(release, z):
    flat = release.value.flat
    return release.value.with_flat(flat + release.sigma * release.sensitivity * z.to(flat.dtype))


def _normal(release, rng):
    return rng.normal(len(release.value.flat), torch.float64)


@dataclasses.dataclass(frozen=True)
class Quiet(Gaussian):
    """Forgets to scale the noise by the sensitivity."""

    def add(self, release, rng):
        return super().add(Release(release.value, 1.0, release.sigma), rng)


@dataclasses.dataclass(frozen=True)
class Bare(Gaussian):
    """Leaves the last tensor without noise and adds a little more to the others."""

    def add(self, release, rng):
        z, last = _normal(release, rng), math.prod(release.value.layout.shapes[-1])
        z[-last:] = 0
        return _noisy(release, z * (len(z) / max(1, len(z) - last)) ** 0.5)


@dataclasses.dataclass(frozen=True)
class Uneven(Gaussian):
    """Adds half the noise to one coordinate."""

    def add(self, release, rng):
        z = _normal(release, rng)
        z[5 % len(z)] /= 2
        return _noisy(release, z)


@dataclasses.dataclass(frozen=True)
class Uniform(Gaussian):
    """Noise of the right deviation and the wrong law."""

    def add(self, release, rng):
        return _noisy(release, (rng.uniform(len(release.value.flat)) - 0.5) * 12**0.5)


@dataclasses.dataclass(frozen=True)
class Paired(Gaussian):
    """Every second coordinate repeats its neighbour's noise."""

    def add(self, release, rng):
        z = _normal(release, rng)
        return _noisy(release, z.repeat_interleave(2)[: len(z)])


ADDED: list[torch.Tensor] = []


@dataclasses.dataclass(frozen=True)
class Cancelling(Gaussian):
    """Every second step takes away the noise of the one before."""

    def add(self, release, rng):
        if ADDED:
            return _noisy(release, -ADDED.pop())
        ADDED.append(_normal(release, rng))
        return _noisy(release, ADDED[0])


@dataclasses.dataclass(frozen=True)
class Restarting(Gaussian):
    """The stream starts anew for each release of a step."""

    def add(self, release, rng):
        return super().add(release, copy.copy(rng))


@dataclasses.dataclass(frozen=True)
class Shared(Gaussian):
    """A small part of the noise is common to all coordinates."""

    def add(self, release, rng):
        z = _normal(release, rng)
        return _noisy(release, 0.99**0.5 * z + 0.1 * z.sum() / len(z) ** 0.5)


@dataclasses.dataclass(frozen=True)
class RowsAlike(Gaussian):
    """A twentieth of the noise on a class is common to all classes: too little for any two coordinates to tell."""

    def add(self, release, rng):
        parts = []
        for _, t in release.value.items():
            z = rng.normal(t.numel(), torch.float64)
            if t.ndim == 2:
                z = 0.95**0.5 * z + 0.05**0.5 * rng.normal(t.shape[1], torch.float64).repeat(t.shape[0])
            parts.append(z)
        return _noisy(release, torch.cat(parts))


@dataclasses.dataclass(frozen=True)
class Overbilled(Gaussian):
    """Claims twice the noise that it adds."""

    def event(self, sigmas):
        return GaussianDpEvent(2 * super().event(sigmas).noise_multiplier)


@dataclasses.dataclass(frozen=True)
class OneOfSeveral(Gaussian):
    """Bills the first release of a step only."""

    def event(self, sigmas):
        return GaussianDpEvent(next(iter(sigmas)))


@dataclasses.dataclass(frozen=True)
class AsLaplace(Gaussian):
    """Bills another mechanism."""

    def event(self, sigmas):
        return LaplaceDpEvent(1.0)


# --- samplers ---


@dataclasses.dataclass(frozen=True)
class FixedAsPoisson(Poisson):
    """Draws batches of one size, and bills Poisson sampling."""

    def draw(self, n, batch, step, seed):
        return Fixed().draw(n, batch, step, seed)


@dataclasses.dataclass(frozen=True)
class OneBatch(Poisson):
    """Draws the same batch in every step."""

    def draw(self, n, batch, step, seed):
        return super().draw(n, batch, 0, seed)


@dataclasses.dataclass(frozen=True)
class OneSeed(Poisson):
    """Draws the same batches in every run."""

    def draw(self, n, batch, step, seed):
        return super().draw(n, batch, step, 7)


@dataclasses.dataclass(frozen=True)
class Twice(Poisson):
    """Draws twice as often as it bills."""

    def draw(self, n, batch, step, seed):
        return super().draw(n, 2 * batch, step, seed)


@dataclasses.dataclass(frozen=True)
class Together(Poisson):
    """Neighbours come together."""

    def draw(self, n, batch, step, seed):
        half = super().draw(n // 2, batch // 2, step, seed)
        return torch.cat([2 * half, 2 * half + 1])


@dataclasses.dataclass(frozen=True)
class SometimesFree(Poisson):
    """Bills one step in four."""

    def wrap(self, event, n, batch, step):
        return super().wrap(event, n, batch, step) if step % 4 == 0 else NoOpDpEvent()


@dataclasses.dataclass(frozen=True)
class Amplifies(Poisson):
    """Slips more noise into the event."""

    def wrap(self, event, n, batch, step):
        return PoissonSampledDpEvent(batch / n, GaussianDpEvent(2 * event.noise_multiplier))


@dataclasses.dataclass(frozen=True)
class Repeats(Fixed):
    """Draws with replacement, and bills without."""

    def draw(self, n, batch, step, seed):
        return torch.randint(n, (batch,), generator=torch.Generator().manual_seed(seed + step))


@dataclasses.dataclass(frozen=True)
class NeverShuffles(Fixed):
    """Cycles through the data in one order, and bills fresh subsets."""

    def draw(self, n, batch, step, seed):
        return (torch.arange(batch) + step * batch) % n


@dataclasses.dataclass(frozen=True)
class HalfEpochs(Shuffle):
    """Shuffles afresh in mid-epoch, and bills epochs."""

    def draw(self, n, batch, step, seed):
        return super().draw(n, batch, 2 * step, seed)


# --- the rest ---


@dataclasses.dataclass(frozen=True)
class Drift(Path):
    """Moves the weights by itself."""

    def base(self, w, state, rng):
        return w * 1.001


@dataclasses.dataclass(frozen=True)
class Discount(Path):
    """Bills a tenth."""

    def amend(self, event):
        return GaussianDpEvent(10 * event.noise_multiplier) if isinstance(event, GaussianDpEvent) else event


KEPT: list[Tree] = []


@dataclasses.dataclass(frozen=True)
class Leaky(Vmap):
    """Keeps the private sum."""

    def bounded(self, *args):
        out = super().bounded(*args)
        KEPT[:] = [out.releases["grad"].value.clone()]
        return out


@dataclasses.dataclass(frozen=True)
class Uses(SGD):
    """Steps along what `Leaky` kept."""

    def update(self, g, state, w):
        return w - self.lr * (g * 0.001 + KEPT[0] / 16), None


@dataclasses.dataclass(frozen=True)
class Remembers(SGD):
    """Leaves the weights alone and keeps the private sum in its state."""

    def update(self, g, state, w):
        return super().update(g, None, w)[0], KEPT[0]


@dataclasses.dataclass(frozen=True)
class Borrows(Vmap):
    """Keeps the private sum itself, not a copy."""

    def bounded(self, *args):
        out = super().bounded(*args)
        KEPT[:] = [out.releases["grad"].value]
        return out


CALLS = [0]


@dataclasses.dataclass(frozen=True)
class Warming(SGD):
    """Counts its steps outside its state: a run that is continued starts anew."""

    def init(self, w, steps):
        CALLS[0] = 0
        return super().init(w, steps)

    def update(self, g, state, w):
        CALLS[0] += 1
        return super().update(g * (1 / CALLS[0]), state, w)


@dataclasses.dataclass(frozen=True)
class ByThreads(Vmap):
    """A sum for each thread, and one of them forgotten."""

    def bounded(self, *args):
        out = super().bounded(*args)
        grad = out.releases["grad"]
        out.releases["grad"] = grad._replace(value=grad.value * (1 / torch.get_num_threads()))
        return out


@dataclasses.dataclass(frozen=True)
class Unmarked(Vmap):
    """Its microbatch is a part of what a run is."""

    microbatch: int | None = 4


@dataclasses.dataclass(frozen=True)
class WholeNumbers(Flat):
    """Takes the next whole number for a multiplier: more noise than was asked for."""

    def split(self, sigma):
        return {"grad": float(math.ceil(sigma))}


# --- what shows late, in large, or with other models ---


@dataclasses.dataclass(frozen=True)
class LateGrowing(Flat):
    """Its bound grows from the fiftieth step on."""

    def init(self, layout):
        return {"t": 0}

    def weights(self, norms, state):
        return Flat(self.clip * (1 + max(0, state["t"] - 50) / 25)).weights(norms, None)

    def update(self, state, public):
        return {"t": state["t"] + 1}


SEEN: dict[str, float] = {}


@dataclasses.dataclass(frozen=True)
class EveryTenthMedian(Flat):
    """Sets its threshold to the median of private norms, in every tenth step."""

    def init(self, layout):
        return {"t": 0, "clip": self.clip}

    def weights(self, norms, state):
        if len(norms):
            SEEN["median"] = float(norms.nan_to_num(1, 1, 1).clamp(1e-6, 1e6).median())
        return Flat(state["clip"]).weights(norms, None)

    def sensitivity(self, state, relation):
        return state["clip"] * relation.moves

    def update(self, state, public):
        t = state["t"] + 1
        return {"t": t, "clip": SEEN["median"] if t % 10 == 0 else state["clip"]}


@dataclasses.dataclass(frozen=True)
class SometimesCounts(Flat):
    """Releases a count in every tenth step, and plans none."""

    def init(self, layout):
        return {"t": 0}

    def side(self, norms, state, relation, sigma):
        return Counted().side(norms, None, relation, sigma) if state["t"] % 10 == 9 else {}

    def update(self, state, public):
        return {"t": state["t"] + 1}


@dataclasses.dataclass(frozen=True)
class Watching(Vmap):
    """Keeps the private loss and sum."""

    def bounded(self, *args):
        out = super().bounded(*args)
        if len(out.observed.losses):
            SEEN["loss"] = float(out.observed.losses.mean())
        KEPT[:] = [out.releases["grad"].value.clone()]
        return out


@dataclasses.dataclass(frozen=True)
class Plateau(SGD):
    """Halves the learning rate once the private loss has not improved for ten steps."""

    def init(self, w, steps):
        SEEN.update(best=math.inf, bad=0, lr=self.lr, loss=0.0)

    def update(self, g, state, w):
        SEEN["bad"] = 0 if SEEN["loss"] < SEEN["best"] else SEEN["bad"] + 1
        SEEN["best"] = min(SEEN["best"], SEEN["loss"])
        if SEEN["bad"] >= 10:
            SEEN.update(bad=0, lr=SEEN["lr"] / 2)
        return w - SEEN["lr"] * g, None


@dataclasses.dataclass(frozen=True)
class LateMomentum(SGD):
    """Mixes in private gradients after the hundredth step."""

    def init(self, w, steps):
        return {"t": 0}

    def update(self, g, state, w):
        g = g * 0.9 + KEPT[0] / 160 if state["t"] > 100 else g
        return w - self.lr * g, {"t": state["t"] + 1}


@dataclasses.dataclass(frozen=True)
class BestByLoss(Path):
    """Hands out the weights of the least private loss."""

    def init(self, w):
        SEEN["least"] = math.inf
        BEST[:] = [w]

    def after(self, old, new, g, state):
        if SEEN["loss"] < SEEN["least"]:
            SEEN["least"], BEST[:] = SEEN["loss"], [old]

    def kept(self, w, state):
        return BEST[0]


BEST: list[Tree] = []


@dataclasses.dataclass(frozen=True)
class After(Vmap):
    """Twice the bound, or half the noise that is planned, from the hundredth step on."""

    clips: float = 1.0
    noises: float = 1.0

    def bounded(self, loss, clip, model, w, batch, state, sigma, relation, step=0):
        late = step >= 100
        rest = (model, w, batch, state, sigma * (self.noises if late else 1), relation, step)
        out = super().bounded(loss, clip, *rest)
        if late:
            wide = super().bounded(loss, Flat(self.clips * clip.clip), *rest)
            out.releases["grad"] = out.releases["grad"]._replace(value=wide.releases["grad"].value)
        return out


@dataclasses.dataclass(frozen=True)
class LastPiece(Vmap):
    """Takes the mean over pieces of 64 for a sum: the last piece counts as 64."""

    def bounded(self, loss, clip, model, w, batch, *rest):
        out, last = super().bounded(loss, clip, model, w, batch, *rest), len(batch) % 64
        if len(batch) > 64 and last:
            piece = Batch(batch.x[-last:], batch.y[-last:])
            more = super().bounded(loss, clip, model, w, piece, *rest).releases["grad"].value
            grad = out.releases["grad"]
            out.releases["grad"] = grad._replace(value=grad.value + more * (64 / last - 1))
        return out


@dataclasses.dataclass(frozen=True)
class NormsBy(Naive):
    """Norms with one rule wrong: of an embedding's rows, of a layer used often, of a weight that two layers share."""

    fault: str = "rows"

    def gradients(self, loss, model, w, batch):
        LAYERS[:] = [
            f"{path}.{name}"
            for path, module in model.named_modules()
            if isinstance(module, WRONG_IN[self.fault])
            for name, _ in module.named_parameters(recurse=False)
        ]
        names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
        if self.fault == "tied":
            LAYERS[:] = ["inner.weight"] if "again.weight" in names else []
        if self.fault == "frozen":
            LAYERS[:] = names if not all(p.requires_grad for p in model.parameters()) else []
        return super().gradients(loss, model, w, batch)

    def squares(self, grads):
        found = super().squares(grads)
        return {name: square / 4 if name in LAYERS else square for name, square in found.items()}


LAYERS: list[str] = []
WRONG_IN = {"rows": nn.Embedding, "recurrent": nn.RNNBase, "gains": nn.LayerNorm, "tied": (), "frozen": ()}


@dataclasses.dataclass(frozen=True)
class PrivateMomentum(Vmap):
    """Adds up clipped sums before they are noised."""

    def bounded(self, *args):
        out = super().bounded(*args)
        grad = out.releases["grad"]
        if KEPT and KEPT[0].layout == grad.value.layout:
            out.releases["grad"] = grad._replace(value=grad.value + 0.9 * KEPT[0])
        KEPT[:] = [out.releases["grad"].value.clone()]
        return out


@dataclasses.dataclass(frozen=True)
class Balanced(CrossEntropy):
    """Weighs classes by the labels seen so far."""

    def prepare(self, batch, rng):
        HISTOGRAM[0] = 0.9 * HISTOGRAM[0] + 0.1 * torch.bincount(batch.y, minlength=3)
        return batch

    def per_example(self, outputs, y):
        return super().per_example(outputs, y) / (HISTOGRAM[0][y] + 0.1)


HISTOGRAM = [torch.ones(3, dtype=torch.float64)]


@dataclasses.dataclass(frozen=True)
class Mixup(CrossEntropy):
    """Mixes examples before they are clipped."""

    def prepare(self, batch, rng):
        return Batch(0.7 * batch.x + 0.3 * batch.x[rng.permutation(len(batch))], batch.y)


@dataclasses.dataclass(frozen=True)
class Repeated(CrossEntropy):
    """Makes two examples of one."""

    def prepare(self, batch, rng):
        return Batch(batch.x.repeat_interleave(2, 0), batch.y.repeat_interleave(2))


@dataclasses.dataclass(frozen=True)
class Clamped(Gaussian):
    """No noise beyond four standard deviations."""

    def add(self, release, rng):
        return _noisy(release, _normal(release, rng).clamp(-4, 4))


@dataclasses.dataclass(frozen=True)
class InHalf(Gaussian):
    """Noise of half precision on sums of single."""

    def add(self, release, rng):
        return _noisy(release, _normal(release, rng).half())


@dataclasses.dataclass(frozen=True)
class FirstThousands(Gaussian):
    """A buffer of 4096 numbers, and zeros after them."""

    def add(self, release, rng):
        z = torch.zeros(len(release.value.flat), dtype=torch.float64)
        z[:4096] = rng.normal(min(4096, len(z)), torch.float64)
        return _noisy(release, z)


@dataclasses.dataclass(frozen=True)
class Mirrored(Gaussian):
    """The second half of long noise is the first with the other sign."""

    def add(self, release, rng):
        z = _normal(release, rng)
        return _noisy(release, torch.cat([z[: -(len(z) // 2)], -z[: len(z) // 2]]) if len(z) > 1000 else z)


@dataclasses.dataclass(frozen=True)
class ShufflesMany(Poisson):
    """Shuffles where there are many examples."""

    def draw(self, n, batch, step, seed):
        return (super() if n < 10_000 else Shuffle()).draw(n, batch, step, seed)


@dataclasses.dataclass(frozen=True)
class Table(Poisson):
    """Draws a thousand batches, and starts over."""

    def draw(self, n, batch, step, seed):
        return super().draw(n, batch, step % 1000, seed)


@dataclasses.dataclass(frozen=True)
class CutShort(Poisson):
    """Keeps three times the expected batch at most."""

    def draw(self, n, batch, step, seed):
        return super().draw(n, batch, step, seed)[: 3 * batch]


@dataclasses.dataclass(frozen=True)
class FreeLater(Poisson):
    """Bills five hundred steps."""

    def wrap(self, event, n, batch, step):
        return super().wrap(event, n, batch, step) if step < 500 else NoOpDpEvent()


@dataclasses.dataclass(frozen=True)
class DrawsMoreLater(Poisson):
    """Draws twice as often after a while."""

    def draw(self, n, batch, step, seed):
        return super().draw(n, 2 * batch if step >= 300 else batch, step, seed)


@dataclasses.dataclass(frozen=True)
class CoarseCoins(Poisson):
    """Rounds the rate up to a multiple of 1/256."""

    def draw(self, n, batch, step, seed):
        return super().draw(n, math.ceil(256 * batch / n) * n / 256, step, seed)


@dataclasses.dataclass(frozen=True)
class ShufflesApart(Shuffle):
    """Claims add-or-remove neighbours for batches of one size."""

    @property
    def relation(self):
        return Relation.ADD_OR_REMOVE


@dataclasses.dataclass(frozen=True)
class DiscountsLarge(Path):
    """Bills less where the multiplier is large."""

    def amend(self, event):
        large = isinstance(event, GaussianDpEvent) and event.noise_multiplier > 3
        return GaussianDpEvent(1.5 * event.noise_multiplier) if large else event


FAULTS = [
    (Method(clip=TooLow(0.3)), checks.within_sensitivity),
    (Method(clip=TooLow(0.3)), checks.clip_rule),
    (Method(clip=NotDoubled(), sampler=Fixed()), checks.replaced),
    (Method(clip=NotDoubled()), checks.clip_rule),
    (Method(clip=Growing()), checks.within_sensitivity_later),
    (Method(clip=Growing()), checks.clip_rule),
    (Method(clip=Window()), checks.clip_rule),
    (Method(clip=Huge()), checks.clip_rule),
    (Method(clip=KeepsInfinite()), checks.clip_rule),
    (Method(clip=GroupByGroup()), checks.clip_rule),
    (Method(clip=Relative()), checks.clip_rule),
    (Method(engine=Coarse(), clip=Flat(0.1)), checks.within_sensitivity_float32),
    (Method(engine=Coarse(sequences=True)), checks.within_sensitivity_sequence),
    (Method(clip=MeanNorm()), checks.within_sensitivity),
    (Method(clip=MeanNorm()), checks.twins),
    (Method(engine=Leaky(), optimizer=Uses()), checks.twins),
    (Method(engine=Leaky(), optimizer=Remembers()), checks.twins),
    (Method(clip=OnlyIfAny()), checks.empty_step),
    (Method(clip=Coarsely(1e-6)), checks.clip_rule),
    (Method(clip=SumsOfNorms()), checks.within_sensitivity),
    (Method(clip=SumsOfNorms()), checks.clip_rule),
    (Method(clip=WholeCounts()), checks.clip_rule),
    (Method(clip=OneCount()), checks.clip_rule),
    (Method(clip=AddedCounts()), checks.clip_rule),
    (Method(clip=AddedCounts(), sampler=Fixed()), checks.replaced),
    (Method(clip=PrivateMedian()), checks.twins),
    (Method(clip=PrivateScale()), checks.within_sensitivity),
    (Method(clip=SmallScale(allocation="equal")), checks.clip_rule),
    (Method(clip=SmallScale(0.01, allocation="equal")), checks.within_sensitivity_later),
    (Method(clip=TwoScales(by="flat")), checks.clip_rule),
    (Method(clip=GroupWise(allocation="dimension"), noise=Scaleless()), checks.noised),
    (Method(clip=GroupWise(allocation="optimal"), noise=OneScaleShort()), checks.noised),
    (Method(loss=Views(views=3, pad=1), engine=ViewsAveragedLate(), clip=Flat(0.1)), checks.equals_loop),
    (Method(clip=Refined(0.1, share=0.1), engine=Uncut()), checks.equals_loop),
    (Method(clip=Flat(0.1), noise=Quiet()), checks.noised),
    (Method(noise=Bare()), checks.noised),
    (Method(noise=Uneven()), checks.noised),
    (Method(noise=Uniform()), checks.noised),
    (Method(noise=Paired()), checks.independent),
    (Method(noise=Cancelling()), checks.independent),
    (Method(noise=Shared()), checks.independent),
    (Method(noise=RowsAlike()), checks.independent),
    (Method(noise=Restarting(), clip=Counted()), checks.independent),
    (Method(clip=Flat(2.0), noise=Quiet()), checks.noise_billed),
    (Method(noise=Overbilled()), checks.noise_billed),
    (Method(noise=OneOfSeveral()), checks.noise_billed),
    (Method(noise=AsLaplace()), checks.noise_billed),
    (Method(path=Discount()), checks.amended),
    (Method(sampler=FixedAsPoisson()), checks.sampled),
    (Method(sampler=OneBatch()), checks.sampled),
    (Method(sampler=OneSeed()), checks.sampled),
    (Method(sampler=Twice()), checks.sampled),
    (Method(sampler=Together()), checks.sampled),
    (Method(sampler=SometimesFree()), checks.sampled),
    (Method(sampler=Amplifies()), checks.sampled),
    (Method(sampler=Repeats()), checks.sampled),
    (Method(sampler=NeverShuffles()), checks.sampled),
    (Method(sampler=HalfEpochs()), checks.sampled),
    (Method(path=Drift()), checks.still),
    (Method(engine=Borrows(), optimizer=Uses()), checks.poisoned),
    (Method(optimizer=Warming()), checks.resumed),
    (Method(engine=ByThreads()), checks.thread_free),
    (Method(engine=Unmarked()), checks.identified),
    (Method(clip=WholeNumbers()), checks.calibrated),
    (Method(clip=Unbilled()), checks.billed),
    (Method(clip=LateGrowing()), checks.clip_rule),
    (Method(clip=LateGrowing()), checks.within_sensitivity_much_later),
    (Method(engine=After(clips=2.0)), checks.within_sensitivity_much_later),
    (Method(engine=After(noises=0.5)), checks.within_sensitivity_much_later),
    (Method(clip=SometimesCounts()), checks.within_sensitivity_much_later),
    (Method(clip=EveryTenthMedian()), checks.twins_later),
    (Method(engine=Watching(), optimizer=Plateau()), checks.twins_later),
    (Method(engine=Watching(), optimizer=LateMomentum()), checks.twins_later),
    (Method(engine=Watching(), path=BestByLoss()), checks.twins),
    (Method(engine=PrivateMomentum()), checks.forgetful),
    (Method(loss=Balanced()), checks.forgetful),
    (Method(loss=Mixup()), checks.separately),
    (Method(loss=Repeated()), checks.separately),
    (Method(engine=LastPiece()), checks.other_sizes),
    *((Method(engine=NormsBy(fault=fault), clip=Flat(0.1)), checks.other_models) for fault in WRONG_IN),
    (Method(noise=Clamped()), checks.noised),
    (Method(noise=InHalf()), checks.noised),
    (Method(noise=FirstThousands()), checks.noised),
    (Method(noise=Mirrored()), checks.noised),
    (Method(sampler=ShufflesMany()), checks.sampled_at_large),
    (Method(sampler=Table()), checks.sampled_at_large),
    (Method(sampler=CutShort()), checks.sampled_at_large),
    (Method(sampler=FreeLater()), checks.sampled_at_large),
    (Method(sampler=DrawsMoreLater()), checks.sampled_at_large),
    (Method(sampler=CoarseCoins()), checks.sampled_at_large),
    (Method(sampler=ShufflesApart()), checks.sampled_at_large),
    (Method(path=DiscountsLarge()), checks.amended),
]
