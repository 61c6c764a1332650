"""Plant faults that public code had; say which instrument catches each.

epsbench faults                  all of them, and the table in this checkout's manual
epsbench faults --docs my.md     in a text of yours that has the two markers
"""

from __future__ import annotations

import argparse
from pathlib import Path

PLACE = 150
MANUAL = Path(__file__).resolve().parents[3] / "docs" / "verification.md"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--docs",
        type=Path,
        default=MANUAL if MANUAL.is_file() else None,
        metavar="FILE",
        help="the text to put the table in, between its two markers; the manual of this checkout, if there is one",
    )


def run(options: argparse.Namespace) -> int:
    """Plant them all; the exit code: 1 where one is missed, and nothing is written."""
    from harness.verify.faults import gallery as planted

    return planted.run(options.docs)
