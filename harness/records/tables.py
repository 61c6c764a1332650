"""Tables as text: Markdown for documents, aligned columns for terminals, and the place of a table in a document."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]], rule: str = "---") -> list[str]:
    """The lines of a Markdown table; `rule` aligns its columns. Cells are written as they are."""
    return [f"| {' | '.join(line)} |" for line in (titles, [rule] * len(titles), *rows)]


def aligned(lines: Sequence[Sequence[str]], left: Collection[int]) -> list[str]:
    """Lines of cells as columns of one width; the columns `left` begin on the left, the others end on the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def inserted(text: str, table: str, name: str) -> str:
    """`text` with `table` between the markers ``<!-- NAME -->`` and ``<!-- end of NAME -->``.

    Raises ValueError where they are missing.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed) or text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the text must hold {begin} and then {end}, each once")
    return f"{before}{begin}\n{table}\n{end}{after}"
