"""The check of the clipping rule by itself, at every norm that a gradient can have."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from harness.dp.clip import Clip, State
from harness.dp.release import Relation, Release
from harness.running.train import Progress, start
from harness.verify.conformance.neighbours import moved
from harness.verify.conformance.subject import SIGMA, STEPS, Inapplicable, Subject, Violation


def clip_rule(s: Subject) -> None:
    """at any gradient norm, the weights keep within the declared sensitivity, under either relation"""
    ruled(s, [*s.reached, *s.aged])


def ruled(s: Subject, states: Sequence[Progress]) -> None:
    """Judge the rule in some states. Raises Violation, and Inapplicable where there is no rule."""
    s.noises()
    clip = s.method.clip
    if not clip.needs_norms and math.isinf(clip.sensitivity(None, s.method.sampler.relation)):
        raise Inapplicable("it has no clipping rule: its engine bounds what an example adds")
    layout = start(s.method, s.model, STEPS).w.layout
    of = clip.groups(layout)
    groups = 1 + max(of.values())
    norms = _norms(groups)
    for p in states:
        state = p.parts.clip
        weights, scale = clip.weights(norms, state), clip.scale(layout, state) or {}
        units = norms.new_tensor([max(scale.get(n, 1.0) for n in of if of[n] == g) for g in range(groups)])
        if len({(of[n], scale.get(n, 1.0)) for n in of}) > groups:
            raise Violation("tensors of one clipping group have different scales: give a group one scale")
        if weights.shape != norms.shape:
            raise Violation(f"weights have shape {tuple(weights.shape)}, the norms {tuple(norms.shape)}")
        single = weights.float().double()  # as engines weigh the gradients of a float32 model
        for relation, (rounded, slack) in itertools.product(Relation, ((weights, 1e-9), (single, 1e-6))):
            reach = relation.moves * (rounded * norms / units).square().sum(1).sqrt()
            allowed, worst = clip.sensitivity(state, relation), int(reach.nan_to_num(math.inf).argmax())
            if not float(reach[worst]) <= allowed * (1 + slack):
                raise Violation(
                    f"under {relation.value}, gradients of norms {norms[worst].tolist()} move the sum by"
                    f" {float(reach[worst]):.6g} after {p.step} steps, the declared sensitivity is {allowed:.6g}:"
                    " weights times norms, over all groups, must stay below it (twice them under replace-one)"
                )
        for value in (math.inf, math.nan):
            spoilt = norms[:1].clone()
            spoilt[0, -1] = value
            if float(clip.weights(spoilt, state)[0, -1]) != 0:
                raise Violation(f"a norm of {value} has a weight that is not 0: give it 0")
        for i in range(0, len(norms), len(norms) // 20):
            if not torch.equal(clip.weights(norms[i : i + 1], state)[0], weights[i]):
                raise Violation("an example's weight depends on the other examples: compute it from its norms alone")
        for relation in Relation:
            _side_rule(clip, norms, state, relation)


def _side_rule(clip: Clip, norms: Tensor, state: State, relation: Relation) -> None:
    """Judge the side releases of a batch that one example, of any norms, joins or is replaced in."""
    bad = torch.full_like(norms[:3], math.inf)
    bad[1], bad[2, :-1] = math.nan, 1.0  # all infinite, all not numbers, the last group alone infinite
    joining = torch.cat([norms[:: max(1, len(norms) // 40)], bad])
    others = norms[:: max(1, len(norms) // 5)]

    def side(*rows: Tensor) -> dict[str, Release]:
        return clip.side(torch.cat([others, *(row[None] for row in rows)]), state, relation, SIGMA)

    for ours, theirs in zip(joining, joining.roll(7, 0), strict=True):
        replaced = relation is Relation.REPLACE_ONE
        story = f"under {relation.value}, an example of norms {ours.tolist()}"
        moved(side(ours), side(theirs) if replaced else side(), story)


def _norms(groups: int) -> Tensor:
    """Norms [B, G] from 1e-45 to 1e45 and 0: alike in all groups, in one group alone, and mixed."""
    spans = [torch.logspace(-top, top, 1201, dtype=torch.float64) for top in (45, 3)]
    grid = torch.cat([torch.zeros(1, dtype=torch.float64), *spans])
    rows = [grid[:, None].expand(-1, groups)]
    if groups > 1:
        rng = torch.Generator().manual_seed(6)
        rows += [grid[:, None] * unit for unit in torch.eye(groups, dtype=grid.dtype)]
        rows += [torch.stack([grid[torch.randperm(len(grid), generator=rng)] for _ in range(groups)], 1)]
    return torch.cat(rows)
