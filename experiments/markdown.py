"""Markdown for pages that are made from rows: tables, and parts of pages that are else written by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Write a table.

    Args:
        head: names of the columns.
        lines: cells, as many as there are columns.
    """
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def insert(page: Path, name: str, text: str) -> None:
    """Replace what stands between the marks of a part of a page.

    Args:
        page: file to change.
        name: of the part; its marks are `<!-- NAME: begin, from rows -->` and `<!-- NAME: end -->`.
        text: what shall stand there, without a line feed at its end.

    Raises:
        ValueError: the page has not both marks.
    """
    first, last = marks(name)
    before, begin, rest = page.read_text(encoding="utf-8").partition(f"{first}\n")
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"{page} has no {first!r} followed by {last!r}; put both where the part belongs")
    page.write_text(f"{before}{begin}{text}\n{end}{after}", encoding="utf-8")


def marks(name: str) -> tuple[str, str]:
    """Give the marks of a part of a page, its first and its last line."""
    return f"<!-- {name}: begin, from rows -->", f"<!-- {name}: end -->"
