"""Checks by running again: in other microbatches, on other threads, resumed, without learning, without examples."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.dp.method import describe
from harness.dp.random import Stream
from harness.dp.release import Relation
from harness.dp.tree import Tree
from harness.running.train import Progress, read_checkpoint, start, step, write_checkpoint
from harness.verify.conformance.neighbours import moved
from harness.verify.conformance.subject import SIGMA, STEPS, Alike, Inapplicable, Subject, Violation


def described(s: Subject) -> None:
    """every part is a value that JSON can hold"""
    text = json.dumps(describe(s.method), allow_nan=False)
    if json.loads(text) != describe(s.method):
        raise Violation("a part holds a value that JSON does not give back: use numbers, strings, lists and parts")


def microbatch_free(s: Subject) -> None:
    """the size of the microbatch changes nothing"""
    if "microbatch" not in {f.name for f in dataclasses.fields(s.method.engine)}:
        raise Inapplicable("its engine has no microbatch")
    half = s.reached[len(s.reached) // 2]
    for size in (1, 5):
        split: dict[str, Any] = {"microbatch": size}
        small = dataclasses.replace(s.method, engine=dataclasses.replace(s.method.engine, **split))
        off = float((s.run(small, until=half.step).w - half.w).norm() / half.w.norm())
        if not off <= 1e-9:
            raise Violation(
                f"microbatches of {size} move the weights by {off:.1e} relative after {half.step} steps: keep state"
                " per logical step",
                evidence=f"weights off by {off:.2g} relative",
            )


def thread_free(s: Subject) -> None:
    """the number of threads changes nothing but the last bits"""
    one, before = s.reached[1], torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 2)
        other = s.run(until=one.step).w
    finally:
        torch.set_num_threads(before)
    off = float((other - one.w).norm() / one.w.norm())
    if not off <= 1e-9:
        raise Violation(
            f"another number of threads moves the weights by {off:.1e} relative: draw randomness from the rng handed"
            " in, and cut work into the same pieces whatever runs them",
            evidence=f"weights off by {off:.2g} relative",
        )


def still(s: Subject) -> None:
    """a learning rate of 0 leaves the weights where they are"""
    optimizer = s.method.optimizer
    if not any(f.name == "lr" for f in dataclasses.fields(optimizer)):
        raise Inapplicable("its optimizer has no learning rate")
    p = s.reached[1]
    bases = [s.method.path.base(p.w, p.parts.path, Stream(seed, "path", 1)) for seed in (1, 2)]
    if not same(*bases):
        raise Inapplicable("its path steps from a random point, and so moves the weights by itself")
    stop: dict[str, Any] = {"lr": 0.0}
    try:
        frozen = dataclasses.replace(s.method, optimizer=dataclasses.replace(optimizer, **stop))
    except ValueError as error:
        raise Inapplicable(f"its optimizer takes no learning rate of 0: {error}") from error
    off = float((s.run(frozen).w - start(frozen, s.model, STEPS, s.apart).w).norm())
    if off:
        raise Violation(
            f"with lr = 0 the weights move by {off:.1e}: something but the optimizer changes them",
            evidence=f"weights move by {off:.2g}",
        )


def empty_step(s: Subject) -> None:
    """an empty Poisson batch is a step like any other"""
    m = s.method
    p = start(m, s.model, STEPS, s.apart)
    batch = s.prepared(s.data.x[:0], s.data.y[:0])
    w, parts = p.w, p.parts
    for t in range(STEPS):  # not one: a method that asks twice for a step moves nothing at first
        streams = Alike(Stream(1, "noise", t), Stream(1, "path", t))
        done = step(m, s.model, w, batch, parts, SIGMA, s.batch, streams, t)
        w, parts = done.w, done.parts
        if not w.flat.isfinite().all():
            raise Violation("an empty batch makes the weights non-finite")
    if m.noise.private and torch.equal(w.flat, p.w.flat):
        raise Violation(
            "an empty batch adds no noise: an observer would know that it was empty", evidence="weights do not move"
        )
    if m.noise.private:
        _noised(s, batch)
    if m.noise.private and m.sampler.relation is not Relation.REPLACE_ONE:
        one = s.prepared(s.data.x[:1], s.data.y[:1])
        for at in s.reached[:2]:
            moved(s.releases(one, at=at), s.releases(batch, at=at), "removing the only example")


def _noised(s: Subject, batch: Any) -> None:
    for name, r in s.releases(batch).items():
        public, _ = s.method.noise.publish(r, Stream(1, "noise", 0), s.method.noise.init(1, 1))
        if torch.equal(public.flat, r.value.flat):
            raise Violation(
                f'the release "{name}" of an empty batch is not noised: an observer would know that it was empty',
                evidence="no noise",
            )


def resumed(s: Subject) -> None:
    """a run continued from a checkpoint ends in the same bits"""
    whole = s.reached[-1].w
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "checkpoint.safetensors"

        def save(p: Progress) -> None:
            if p.step <= STEPS // 2:
                write_checkpoint(file, p)

        s.run(save=save)
        again = s.run(progress=read_checkpoint(file)).w
    if not torch.equal(again.flat, whole.flat):
        raise Violation(
            "a resumed run differs: keep state in the parts' states, and draw randomness from the rng handed in"
        )


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal to the last bit."""
    if isinstance(a, Tree):
        return isinstance(b, Tree) and torch.equal(a.flat, b.flat)
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
