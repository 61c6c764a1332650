"""Settings for all tests, and what is computed once for them all."""

import functools
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support import SHARED

# The first example of a property pays for importing and compiling; on a busy machine that takes longer than a second.
# Each run draws other examples, so few in each are many in all.
settings.register_profile("epsbench", suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=40)
settings.load_profile("epsbench")


def pytest_configure(config):
    if SHARED not in os.environ:
        os.environ[SHARED] = folder = tempfile.mkdtemp(prefix="epsbench-tests-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        config.add_cleanup(lambda: os.environ.pop(SHARED, None))


# What takes longest, which begins first: no worker is left alone with it at the end.
LONG = ("conformance", "audit_neighbours", "robustness", "stages", "engines", "docs", "cli", "faults", "trial", "bench")


def pytest_collection_modifyitems(items):
    ranks = {f"test_{name}": rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session", autouse=True)
def epsilons_once():
    """An epsilon is a function of ledger, delta, relation and accountant, and takes seconds: computed once a session,
    whichever of its processes asks, and forked children with them."""
    from harness.dp import account, cache

    compute = account._answer

    @functools.lru_cache(maxsize=4096)
    def answer(entries, delta, relation, accountant):
        known = account.ACCOUNTANTS[accountant]
        key = repr((entries, delta, relation, known.__module__, known.__qualname__))
        file = Path(os.environ[SHARED], hashlib.sha256(key.encode()).hexdigest())
        if file.exists():
            found, note = json.loads(file.read_bytes())
            return account._Answer(found, note)
        made = compute(entries, delta, relation, accountant)
        cache.dump(file, made)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(account, "_answer", answer)
        yield


@pytest.fixture(autouse=True)
def files_of_this_test_alone():
    """A user's file that a test registers goes with the test's folder: the next test must not look for it."""
    from harness import registry

    known = registry.installed()._files
    before = list(known)
    yield
    if known != before:
        known[:] = before
        registry.installed()._index = None


@pytest.fixture
def equal_noise(monkeypatch):
    """Noise that does not depend on what it hides, as no run has it: two runs can then be compared."""
    from harness.dp import Release

    monkeypatch.setattr(Release, "digest", "")
