"""Every check on a method, but none twice on the same thing: methods share samplers, and some share more."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

from harness.dp.method import describe
from harness.verify import conformance as checks
from tests.support import SHARED

SAMPLER = (checks.sampled, checks.sampled_at_large)  # see nothing but the sampler
RELEASES = (  # see nothing of optimizer and path: they look at what is released at the first weights
    checks.equals_loop, checks.within_sensitivity, checks.within_sensitivity_float32,
    checks.within_sensitivity_sequence, checks.adversarial, checks.statistics_refused, checks.separately,
    checks.steady_draws, checks.other_engines, checks.other_models, checks.other_sizes,
    checks.noised, checks.independent, checks.noise_billed,
)  # fmt: skip


def failed(method, identity=None, leave=()):
    """The lines of the checks that fail, but for those in `leave` and those that held for the same parts before."""
    s = dataclasses.replace(checks.subject(method), identity=identity)
    lines = []
    for each in checks.CHECKS:
        parts = _looked_at(each, method)
        if each in leave or (parts and _held(each, parts).exists()):
            continue
        line = checks.verdict(each, s)
        if line.ok and parts:
            _held(each, parts).touch()
        lines.append(line)
    return [line for line in lines if not line.ok]


def _held(each, parts):
    """A file of this session, of all its processes, that is there where a check held."""
    name = hashlib.sha256(f"{each.__name__} {parts}".encode()).hexdigest()
    return Path(os.environ[SHARED], f"held-{name}")


def _looked_at(each, method):
    """All that decides a check's outcome, where less does than the whole method. Values of one description are of one
    class in this repository."""
    parts = describe(method) | {"private": method.noise.private}
    if each in SAMPLER:
        parts = {name: parts[name] for name in ("sampler", "private")}
    elif each in RELEASES:
        parts = {name: part for name, part in parts.items() if name not in ("optimizer", "path")}
    else:
        return None
    return json.dumps(parts, sort_keys=True)
