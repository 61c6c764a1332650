"""`epsbench claims`: published privacy numbers, recomputed from their settings, and what became of each.

The claims are in `suites/claims.toml`, which begins with ``kind = "claims"``; each of its tables is of a kind of
`harness.verify.claims.kinds`. docs/claims.md is what `epsbench claims --write` makes of them.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from harness.records.tables import markdown as grid
from harness.registry import did_you_mean
from harness.suite.tables import Text, TomlTable
from harness.suite.toml.reader import Reader, source
from harness.verify.claims.accounts import ORDERS
from harness.verify.claims.kinds import KINDS, NEAR, ROUNDED, Finding, PublishedClaim

KIND = "claims"
FILE, DOCUMENT = Path("suites/claims.toml"), Path("docs/claims.md")


# The file -------------------------------------------------------------------------------------------------


class ClaimsHeader(TomlTable):
    """``[claims]``: the question that the file answers."""

    question: Text


@dataclass(frozen=True)
class Claims:
    """A checked file, its claims in order of kinds."""

    file: str
    question: str
    claims: tuple[PublishedClaim, ...]


def load(path: Path) -> Claims:
    """Read and check a file. Raises `SuiteError` with every problem and its line."""
    return parse(source(path), str(path))


def parse(text: str, file: str = "claims.toml") -> Claims:
    """Check a text; `file` is the name that errors give. Raises `SuiteError`."""
    return ClaimsReader(text, file).claims()


class ClaimsReader(Reader):
    noun: ClassVar[str] = "file of claims"
    kind: ClassVar[str] = KIND
    single: ClassVar[Mapping[str, type[TomlTable]]] = {"claims": ClaimsHeader}
    arrays: ClassVar[Mapping[str, type[TomlTable]]] = KINDS
    needed: ClassVar[Sequence[str]] = ("claims",)

    def claims(self) -> Claims:
        header = self.one("claims", ClaimsHeader)
        found: dict[str, PublishedClaim] = {}
        for kind, table in KINDS.items():
            for index, claim in self.array(kind, table).items():
                for key, text in claim.objections():
                    self.bad((kind, index, key), f"[[{kind}]] {text}")
                if claim.id in found:
                    self.bad((kind, index, "id"), f'two claims are called "{claim.id}".')
                found[claim.id] = claim
        if not found and not self.problems:
            self.bad((), f"the {self.noun} has no claim; write one of {', '.join(f'[[{k}]]' for k in KINDS)}.")
        self.stop()
        assert header is not None
        return Claims(self.file, header.question, tuple(found.values()))


# Text -----------------------------------------------------------------------------------------------------


def table(findings: Sequence[tuple[PublishedClaim, Finding]]) -> str:
    """One row for each claim, in Markdown."""
    rows = []
    for claim, found in findings:
        proved = ", ".join(f"{number(f.value)} ({f.name})" for f in found.figures if f.role)
        rows.append((
            f"`{claim.id}`: {claim.title}", f"{number(claim.published)} ({claim.quantity})", proved,
            f"**{found.verdict}**: {found.reason}",
        ))  # fmt: skip
    return "\n".join(grid(("claim", "published", "recomputed", "verdict"), rows)) + "\n"


def section(claim: PublishedClaim, found: Finding) -> str:
    """All about one claim, in Markdown."""
    inputs = ", ".join(f"{key} = {_value(value)}" for key, value in claim.inputs().items())
    figures = [(f"published, {claim.quantity}", number(claim.published), "the claim")]
    figures += [(f.name, number(f.value), _ROLES[f.role]) for f in found.figures]
    lines = [
        f"### {claim.id}",
        "",
        f"{claim.title}. **{found.verdict.capitalize()}**: {found.reason}.",
        "",
        f"- claim: {claim.claim}",
        f"- source: {claim.source}; read in {claim.read}",
        f"- inputs: {inputs}",
        f"- recomputed by: {claim.formula}",
        *([f"- assumptions: {'; '.join(claim.assumptions)}"] if claim.assumptions else []),
        *([f"- note: {claim.note}"] if claim.note else []),
        f"- again: `epsbench claims {claim.id}`",
        "",
        *grid(("figure", "value", "what it is"), figures),
    ]
    return "\n".join(lines) + "\n"


_ROLES = {"bound": "proved", "measured": "measured", "assumed": "under the assumptions", "": "for comparison"}


def number(value: float) -> str:
    """Four digits, as in 0.9028, 277.3, 44055 and 9.703e+08."""
    return f"{value:.0f}" if 1000 <= value < 1e6 else f"{value:.4g}"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def markdown(claims: Claims, findings: Sequence[tuple[PublishedClaim, Finding]]) -> str:
    """docs/claims.md: the question, how to read a verdict, the table, and a section for each claim."""
    head = f"""\
# Published claims, recomputed

{claims.question}
`epsbench claims --write` made this page from [{claims.file}](../{claims.file}).

The settings are those of the papers and their public code; the accountants are ours, on add-or-remove neighbours
unless a claim says otherwise:

- **PLD**: privacy loss distributions (dp_accounting), on a grid of 1e-4 that is rounded against the claim. The
  tightest of them.
- **RDP**: Renyi divergence with dp_accounting's orders and today's conversion to epsilon.
- **RDP, classical conversion**: RDP(a) + log(1/delta) / (a - 1), the least over {len(ORDERS)} orders from
  {ORDERS[0]:g} to {ORDERS[-1]:g}. It is a bound too, and older papers printed it.
- **analytic Gaussian**: exact, for one Gaussian release without sampling.
- **ModelMix's accountant**: that of its authors' code, with what it takes for granted.

Whether a run really drew Poisson samples and kept its state secret is not asked here: a claim is recomputed as if it
had. Verdicts, of numbers of which the smaller is the stronger claim:

| verdict | meaning |
|---|---|
| agrees | within {100 * NEAR:g} % of a bound, which is named; a tighter one may still prove less |
| overstates | a bound proves at least {100 * NEAR:g} % less: the claim is true, and more is |
| understates | below every bound, or what was measured, by more than {100 * ROUNDED:g} %: nothing proves it |
| holds only under assumptions | they are listed; without them it would understate, or say nothing |
"""
    sections = "\n".join(section(claim, found) for claim, found in findings)
    return f"{head}\n## The table\n\n{table(findings)}\n## One by one\n\n{sections}"


# The command ----------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Recompute what is asked for and print it, or write the page."""
    if options.ids and options.write:
        options.error("--write writes all claims; leave out the ids")
    if options.out and not options.write:
        options.error("--out is for --write")
    claims = load(options.suite)
    known = {claim.id: claim for claim in claims.claims}
    for name in options.ids:
        if name not in known:
            near = did_you_mean(name, known)
            there = textwrap.fill(", ".join(known), 100)
            options.error(
                f"{claims.file} has no claim {name!r}" + (f'; did you mean "{near}"?' if near else f"; it has\n{there}")
            )
    chosen = [known[name] for name in dict.fromkeys(options.ids)] or claims.claims
    findings = [(claim, claim.recompute()) for claim in chosen]
    if options.write:
        write(claims, findings, options.out or DOCUMENT)
    elif options.ids:
        print("\n".join(section(*one) for one in findings), end="")
    else:
        print(table(findings), end="")
    return 0


def write(claims: Claims, findings: Sequence[tuple[PublishedClaim, Finding]], path: Path = DOCUMENT) -> None:
    """Write the page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(markdown(claims, findings), encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)
