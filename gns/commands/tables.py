"""Tables for a terminal, and as plain columns for anything else."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

PLAIN_WIDTH = 200  # columns of a pipe or file: nothing is folded


def print_table(table: Table) -> None:
    """Print a table on standard output, ruled in a terminal and plain elsewhere."""
    console = Console(highlight=False)
    if console.is_terminal:
        table.box = box.SIMPLE_HEAD
        console.print(table)
        return
    table.box = None
    table.pad_edge = False
    Console(width=PLAIN_WIDTH, highlight=False).print(table)


def print_title(title: str) -> None:
    """Print a heading, bold in a terminal, after an empty line."""
    console = Console(highlight=False)
    console.print()
    console.print(title, style="bold", markup=False)
