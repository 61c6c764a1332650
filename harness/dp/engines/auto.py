"""The fastest engine for a model on this machine, found by trying them."""

from __future__ import annotations

import copy
import hashlib
import os
import platform
import time
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from harness.dp import cache
from harness.dp.clip import Clip, State
from harness.dp.engines.engine import Engine, PerExample
from harness.dp.engines.survey import modes, untouched
from harness.dp.engines.taped.bookkeeping import BookKeeping
from harness.dp.engines.taped.engine import unaudited
from harness.dp.engines.taped.ghost import Ghost
from harness.dp.engines.vmap import Vmap
from harness.dp.loss import Batch, Loss
from harness.dp.native import describe
from harness.dp.release import Bounded, Relation
from harness.dp.tree import Tree

CANDIDATES: Mapping[str, PerExample] = {
    "bookkeeping": BookKeeping(),
    "bookkeeping, channels last": BookKeeping(channels_last=True),
    "ghost": Ghost(),
    "vmap": Vmap(),
}
TRIED = 32  # examples of a trial
ROUNDS = 3
HOPELESS = 1.5  # times the best so far: not tried any further
NOISE = 1.03  # times the best: no slower, as far as a trial can tell, and the first of these is chosen

_chosen: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Auto(PerExample):
    """Times its candidates once for each model, shape and machine, and is the fastest of them from then on.

    It times them on made-up examples: which one it is does not depend on private ones, nor on there being any.
    The choice is kept in $EPSBENCH_CACHE/engines (else ~/.cache/epsbench/engines): engines round differently, so a run
    that is continued in another process repeats its bits only with the same one. All candidates are the same mechanism.
    """

    def accepts(self, loss: Loss, clip: Clip, model: nn.Module) -> str | None:
        reasons = [engine.accepts(loss, clip, model) for engine in CANDIDATES.values()]
        return None if None in reasons else reasons[0]

    def bounded(
        self,
        loss: Loss,
        clip: Clip,
        model: nn.Module,
        w: Tree,
        batch: Batch,
        state: State,
        sigma: float,
        relation: Relation,
        step: int = 0,
    ) -> Bounded:
        arguments = (loss, clip, model, w, batch, state, sigma, relation, step)
        return replace(self.chosen(*arguments), microbatch=self.microbatch).bounded(*arguments)

    def chosen(
        self,
        loss: Loss,
        clip: Clip,
        model: nn.Module,
        w: Tree,
        batch: Batch,
        state: State,
        sigma: float,
        relation: Relation,
        step: int = 0,
    ) -> PerExample:
        """The candidate for this model and examples of this shape; tries them all where that is not known yet."""
        groups = 1 + max(clip.groups(w.layout).values(), default=0)
        images = any(t.ndim == 4 for t in w.views.values())
        able = {
            name: engine
            for name, engine in CANDIDATES.items()
            if engine.accepts(loss, clip, model) is None and (images or not channels_last(engine))
        }
        facts = [type(loss).__name__, groups, clip.needs_norms, list(batch.x.shape[1:]), str(batch.x.dtype), list(able)]
        key = repr((facts, modes(model), w.layout, batch.x.device.type, torch.get_num_threads()))
        known = _chosen.setdefault(model, {})
        if key not in known:
            file = _file(key)
            arguments = (loss, clip, model, w, made_up(batch), state, sigma, relation, step)
            known[key] = _read(file, able) or _fastest(able, arguments)
            cache.dump(file, {"engine": known[key]})
        return CANDIDATES[known[key]]


def channels_last(engine: PerExample) -> bool:
    """Whether an engine lays images out with channels last, which nothing but convolutions gains by."""
    return getattr(engine, "channels_last", False)


def made_up(batch: Batch) -> Batch:
    """Examples of the batch's shape and type for a trial: zeros and ones, which any vocabulary has."""
    ones = torch.randint(2, (TRIED, *batch.x.shape[1:]), generator=torch.Generator().manual_seed(0))
    return Batch(ones.to(batch.x), batch.y.new_zeros(TRIED, *batch.y.shape[1:]))


def _fastest(engines: Mapping[str, Engine], arguments: tuple[Any, ...]) -> str:
    """The name of the engine with the shortest call of `bounded`, rounds interleaved after one that warms up.

    The first, where none can take made-up examples. A copy of the model is tried, so that what engines find out of it
    on these is not taken for found out on true ones.
    """
    loss, clip, original, *rest = arguments
    device = arguments[4].x.device
    try:
        model = copy.deepcopy(original)
    except Exception:  # some hold what cannot be copied
        return next(iter(engines))
    arguments = (loss, clip, model, *rest)
    best: dict[str, float] = {}

    def seconds(engine: Engine) -> float:
        start = time.perf_counter()
        engine.bounded(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    able = dict(engines)
    with untouched(model, device), unaudited(model):
        for name, engine in engines.items():
            try:
                seconds(engine)
            except Exception:  # some models are beyond some engines, and only running them shows it
                del able[name]
        for _ in range(ROUNDS):
            for name, engine in able.items():
                if not best or best.get(name, 0) < HOPELESS * min(best.values()):
                    best[name] = min(best.get(name, float("inf")), seconds(engine))
    return next((name for name in best if best[name] <= NOISE * min(best.values())), next(iter(engines)))


def _file(key: str) -> Path:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    machine = (platform.machine(), platform.processor(), os.cpu_count(), gpu, torch.__version__, describe())
    return cache.root() / "engines" / f"{hashlib.sha256(repr((key, machine)).encode()).hexdigest()[:16]}.json"


def _read(file: Path, able: Container[str]) -> str | None:
    """The engine in a file, if it is one that can serve."""
    held = cache.load(file)
    name = held.get("engine") if isinstance(held, dict) else None
    return name if isinstance(name, str) and name in able else None
