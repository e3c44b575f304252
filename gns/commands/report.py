"""`gns report`: draw the report of runs anew, and compare several."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gns.commands.shared import load_run, one_line_errors, print_result, settings_of, spoken_warnings

if TYPE_CHECKING:
    from gns.estimate import Estimate


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of measured runs.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Page that compares several runs (default: comparison.html beside the first run's folder).",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Draw the report of a run anew from its recorded steps; of several runs, compare them too."""
    with one_line_errors(ValueError):
        _check(runs, out)
    with one_line_errors():
        from gns.report import compare, redraw

        for run in runs:  # all are read before any is written
            settings_of(run, load_run(run))
        estimates = {}
        for run in runs:
            with spoken_warnings():
                page = redraw(run)
            estimates[run] = load_run(run)
            if len(runs) == 1:
                print_result(estimates[run], run)
            else:
                typer.echo(f"Report: {page}")
        if len(runs) > 1:
            _print_table(estimates)
            typer.echo(f"Comparison: {_shown(compare(runs, out))}")


def _check(runs: list[Path], out: Path | None) -> None:
    """Refuse what cannot be compared, before anything is written.

    Raises:
        ValueError: a run is named twice, or `out` is not the name of a file for two or more runs.
    """
    if len({run.resolve() for run in runs}) < len(runs):
        raise ValueError("a run is named twice; name different ones")
    if out is not None and len(runs) < 2:
        raise ValueError("--out names the page that compares runs; name two or more runs")
    if out is not None and out.is_dir():
        raise ValueError(
            f"--out {out}: is a folder; the name of a page is needed, e.g. {out}/comparison.html"
        )


def _shown(path: Path) -> Path:
    """Give a path as seen from here, where it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _print_table(estimates: dict[Path, Estimate]) -> None:
    from rich.console import Console
    from rich.table import Table

    from gns.estimate import format_count
    from gns.statistics.drift import drift

    table = Table("run", "B_simple", "interval", "level", "status", "steps", "learning rate", "unit")
    for run, estimate in estimates.items():
        change = drift(estimate.history, level=estimate.level)
        moving = f", {change.direction}" if change and change.moved else ""
        rate = settings_of(run, estimate)["learning_rate"]
        table.add_row(
            str(run),
            format_count(estimate.point),
            f"{format_count(estimate.low)} … {format_count(estimate.high)}",
            f"{100 * estimate.level:g} %",
            f"{estimate.status}{moving}",
            f"{estimate.n_steps} × {format_count(estimate.examples_per_step)}",
            f"{rate:.3g}" if rate else "?",
            estimate.unit,
        )
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table)
