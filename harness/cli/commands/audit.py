"""Bound a method's epsilon from below, by attacking it; record it.

epsbench audit dp-sgd                                   at epsilon 3, in seconds
epsbench audit dp-sgd dp-adam --epsilon 1 8             two methods, each at both
epsbench audit '*' --epsilon 1 8 --task mnist-5k/tanh-cnn-28    every method
epsbench audit group-wise?adaptive=false                with parameters of its own
epsbench audit my.py                                    each method of a file of yours
epsbench audit dp-sgd --canaries 1 --repeat 500         a run for each canary: no two share one
epsbench audit logit-dp adaptive --neighbours           one example in or out, in thousands of short runs
epsbench audit dp-sgd --membership                      who was in the training data? (LiRA)
epsbench audit '*' --support                            do the floats of the noise give an example away?
"""

from __future__ import annotations

import argparse
from pathlib import Path

PLACE = 140
COUNTS = {
    "examples": "of the task, 0 for all", "steps": "of each run", "canaries": "in each run",
    "repeat": "independent runs; models, with --membership", "seed": "of all",
}  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "method", nargs="+", metavar="METHOD|METHOD.py",
        help="as registered, with options: name?key=value; 'dp-*' for all whose names begin so",
    )  # fmt: skip
    parser.add_argument("--epsilon", type=float, nargs="+", default=[3.0], metavar="E", help="claims (default: 3)")
    parser.add_argument("--delta", type=float)
    parser.add_argument("--level", type=float, help="the probability of refuting a true claim (default: 0.01)")
    parser.add_argument("--task", metavar="DATA/MODEL", help="what is trained")
    parser.add_argument("--rate", type=float, help="expected batch over n")
    for name, what in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", help=what)
    parser.add_argument(
        "--neighbours", action="store_true",
        help="train on one of two neighbouring data sets, in place of canaries; without being asked where a method"
        " takes no canaries and --canaries is not given",
    )  # fmt: skip
    parser.add_argument(
        "--membership", action="store_true", help="infer who was in the training data, in place of canaries"
    )
    parser.add_argument(
        "--support", action="store_true",
        help="ask of every released float whether it could come of either of two neighbours, in place of canaries",
    )  # fmt: skip
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR")


def run(options: argparse.Namespace) -> int:
    """Audit what is asked for; the exit code: 1 where a claim is refuted."""
    from harness.verify.audits import command as audits

    return audits.run(options)
