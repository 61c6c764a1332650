"""Runs a function in a process of its own, so that its leaks, crashes and time limits harm nothing else."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

Answer = dict[str, Any]
# torch is imported once, by the server that the processes are forked from; it computes nothing before that.
PRELOADED = ["harness.bench.trial", "harness.bench.race"]


class Gone(Exception):
    """The process gave no answer; the message says why."""


def call(function: Callable[..., Answer], request: Mapping[str, Any], limit: float) -> Answer:
    """What `function(**request)` returns, from a fresh process that has `limit` seconds. Raises `Gone`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, function, request), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(limit):
            raise Gone(f"took more than {limit:.0f} s")
        found: Answer = here.recv()
        return found
    except EOFError:
        process.join()
        raise Gone(f"its process ended with exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        here.close()


def _answer(there: Connection, function: Callable[..., Answer], request: Mapping[str, Any]) -> None:
    warnings.simplefilter("ignore")  # those of other people's libraries would bury the progress
    there.send(function(**request))
    there.close()
