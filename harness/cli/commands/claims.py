"""Recompute published privacy numbers from their settings.

epsbench claims                          every claim in one table: under a minute on one core
epsbench claims modelmix-cifar10         this one: source, inputs, every figure, the reason for the verdict
epsbench claims --write                  docs/claims.md again
epsbench claims --suite mine.toml        claims of your own
"""

from __future__ import annotations

import argparse
from pathlib import Path

PLACE = 130
DOCUMENT, SUITE = Path("docs/claims.md"), Path("suites/claims.toml")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", nargs="*", metavar="ID", help="claims to show in full (default: a table of all)")
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT}, or the page that --out names")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"where to (default: {DOCUMENT})")
    parser.add_argument("--suite", type=Path, default=SUITE, metavar="FILE", help=f"default: {SUITE}")


def run(options: argparse.Namespace) -> int:
    """Recompute what is asked for; the exit code."""
    from harness.verify.claims import command as recomputed

    return recomputed.run(options)
