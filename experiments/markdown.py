"""Tables of Markdown, for the pages that are made from rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Write a table.

    Args:
        head: names of the columns.
        lines: cells, as many as there are columns.
    """
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))
