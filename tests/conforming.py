"""Every check on a method, but none twice on the same thing: methods share samplers, and some share more."""

import dataclasses
import json

from harness.dp.method import describe
from harness.verify import conformance as checks

SAMPLER = (checks.sampled, checks.sampled_at_large)  # see nothing but the sampler
RELEASES = (  # see nothing of optimizer and path: they look at what is released at the first weights
    checks.equals_loop, checks.within_sensitivity, checks.within_sensitivity_float32,
    checks.within_sensitivity_sequence, checks.adversarial, checks.statistics_refused, checks.separately,
    checks.steady_draws, checks.other_engines, checks.other_models, checks.other_sizes,
)  # fmt: skip
_held = set()


def failed(method, identity=None, leave=()):
    """The lines of the checks that fail, but for those in `leave` and those that held for the same parts before."""
    s = dataclasses.replace(checks.subject(method), identity=identity)
    lines = []
    for each in checks.CHECKS:
        seen = each.__name__, _looked_at(each, method)
        if each in leave or seen in _held:
            continue
        line = checks.verdict(each, s)
        if line.ok:
            _held.add(seen)
        lines.append(line)
    return [line for line in lines if not line.ok]


def _looked_at(each, method):
    """All that decides a check's outcome. Values of one description are of one class in this repository."""
    parts = describe(method) | {"private": method.noise.private}
    if each in SAMPLER:
        parts = {name: parts[name] for name in ("sampler", "private")}
    elif each in RELEASES:
        parts = {name: part for name, part in parts.items() if name not in ("optimizer", "path")}
    else:
        return object()
    return json.dumps(parts, sort_keys=True)
