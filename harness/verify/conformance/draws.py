"""The check of random layers: one example must not decide which random numbers the others get."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import nn

from harness.dp.loss import Batch
from harness.dp.release import Release
from harness.verify.conformance.neighbours import moved
from harness.verify.conformance.subject import Inapplicable, Subject

EXAMPLES, PLACES = 8, (0, 3, 7)
SEED = 17


def steady_draws(s: Subject) -> None:
    """nor does an example that is not finite move what dropout draws for the others"""
    s.noises()
    width = s.data.x[0].numel()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        layers = nn.Flatten(), nn.Linear(width, 32), nn.Dropout(0.5), nn.Linear(32, 3)
        dropping = dataclasses.replace(s, model=nn.Sequential(*layers).double())
    if reason := s.method.engine.accepts(s.method.loss, s.method.clip, dropping.model):
        raise Inapplicable(f"the engine takes no such model: {reason}")
    batch = s.prepared(s.data.x[:EXAMPLES], s.data.y[:EXAMPLES])

    def released(given: Batch) -> dict[str, Release]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return dropping.releases(given)

    try:
        whole = released(batch)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise Inapplicable(f"the engine takes no dropout: {error}") from error
    for place in PLACES:
        x = batch.x.clone()
        x[place] = math.nan  # which takes out its own contribution, and nothing else
        moved(whole, released(Batch(x, batch.y)), f"dropout, and example {place} not a number")
