"""The support attack on other people's noise: `python -m harness.verify.faults.support_peers`, the table in
docs/audits.md.

One method, whose final weights can be solved for its release, with the noise of one library after the other.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from harness import registry
from harness.dp.method import Method
from harness.dp.noise import Gaussian, Noise
from harness.peers.noise import NOISES
from harness.records.tables import inserted, markdown
from harness.verify.audits.support import SupportSetting, attacked, neighbours
from harness.verify.audits.verdict import Claim
from harness.verify.faults.parts import FloatSum

METHOD = "one-step-last-layer"
MARKER = "peers"


class NoiseRow(NamedTuple):
    """One noise: what was decided of `repeat` coins at each epsilon, by releases and by final weights alone."""

    noise: str
    version: str
    adds: str
    holds: str
    decided: Mapping[float, Mapping[str, Mapping[str, int]]]


def attack(name: str, version: str, adds: str, noise: Noise, epsilons: Sequence[float], repeat: int) -> NoiseRow:
    """The row of a noise."""
    plain: Method = registry.load(registry.resolve("method", METHOD))()
    method, decided, images = dataclasses.replace(plain, noise=noise), {}, set[str]()
    for epsilon in epsilons:
        s = SupportSetting(epsilon=epsilon, repeat=repeat)
        two = neighbours(method, s.trained())
        found = attacked(Claim.of(method, s, two.n_train), two)
        decided[epsilon] = found.facts()
        images |= {image.name for held in found.images.values() for image in held}
    return NoiseRow(name, version, adds, "; ".join(sorted(images)) or "nothing that was tried", decided)


def rows(epsilons: Sequence[float], repeat: int) -> tuple[list[NoiseRow], list[str]]:
    """A row for each noise whose library is there, and why others have none."""
    found = [
        attack("epsbench", "", "Gaussian()", Gaussian(), epsilons, repeat),
        attack("epsbench with the planted fault", "", "v + torch.randn() * s", FloatSum(), epsilons, repeat),
    ]
    absent = []
    for name, kind in NOISES.items():
        version = kind.version()
        if version is None:
            absent.append(f'{name}: {kind.PACKAGE} is not installed: pip install "{kind.PACKAGE}"')
        else:
            found.append(attack(name, version, kind.ADDS, kind(), epsilons, repeat))
    return found, absent


def table(found: Sequence[NoiseRow], repeat: int) -> str:
    """The rows in Markdown: coins decided of `repeat`, from releases / from final weights alone."""
    epsilons = list(found[0].decided)
    titles = ["noise", "computes", "what holds of it", *(f"at {epsilon:g}" for epsilon in epsilons), "wrong"]
    lines = []
    for row in found:
        cells, wrong = [], 0
        for facts in row.decided.values():
            cells.append(" / ".join(str(tally["right"] + tally["wrong"]) for tally in facts.values()))
            wrong += sum(tally["wrong"] for tally in facts.values())
        lines.append([f"{row.noise} {row.version}".strip(), f"`{row.adds}`", row.holds, *cells, str(wrong)])
    return "\n".join(
        [*markdown(titles, lines), "", f"Coins decided of {repeat:,}, from releases / from final weights alone."]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Attack all of them, print the table, and put it into a text."""
    parser = argparse.ArgumentParser(prog="python -m harness.verify.faults.support_peers", description=__doc__)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[3.0, 0.1], metavar="E", help="claims")
    parser.add_argument("--repeat", type=int, default=1000, metavar="N", help="runs of each")
    parser.add_argument(
        "--docs", type=Path, metavar="FILE",
        help="the text to put the table in, between its markers: docs/audits.md of this checkout, say",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found, absent = rows(given.epsilon, given.repeat)
    made = table(found, given.repeat)
    print(made)
    for reason in absent:
        print(f"skipped: {reason}")
    if given.docs:
        text = given.docs.read_text(encoding="utf-8")
        given.docs.write_text(inserted(text, made, MARKER), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
