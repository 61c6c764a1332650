"""Bring the records that MLflow lacks into MLflow.

epsbench track                       what is not known to be there
epsbench track --rebuild             compare with the store itself, and add or replace what differs
MLFLOW_TRACKING_URI=http://host:5000 epsbench track
"""

from __future__ import annotations

import argparse

from harness.cli.arguments import options
from harness.cli.errors import OK, UserError
from harness.records.public import SWITCH

PLACE = 110


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rebuild", action="store_true", help="ask the store itself, not the list of what was sent")
    parser.add_argument("--uri", help="the tracking store (default: $MLFLOW_TRACKING_URI, else sqlite:///mlflow.db)")
    options(parser, "--results", SWITCH)


def run(options: argparse.Namespace) -> int:
    """Bring into MLflow what it lacks; the exit code."""
    from harness.records import mlflow as tracking

    if not options.results.is_dir():
        raise UserError(f"{options.results}: no such folder; name one with --results DIR")
    waiting = tracking.pending(options.results, options.uri, private=options.private)
    if not waiting and not options.rebuild:
        print("MLflow has every record; --rebuild asks the store itself")
        return OK
    added = tracking.rebuild(options.results, options.uri, private=options.private)
    print(f"{added} records added to {tracking.resolve_uri(options.uri)}")
    return OK
