"""`gns advise`: what a measured noise scale means for batch size, learning rate, epoch and machine."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from gns.commands.shared import Folder, load_run, one_line_errors

if TYPE_CHECKING:
    from gns.advice import Advice, Row
    from gns.commands.known import Known


def advise(
    run: Folder,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples an optimizer step in use (default: the run's).")
    ] = None,
    dataset_size: Annotated[
        int | None, typer.Option(help="Examples in the data (default: the run's).")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="In use at that batch size (default: the run's, if the batch is).")
    ] = None,
    throughput: Annotated[
        list[str] | None,
        typer.Option(
            help="Measured speed: the file of `gns throughput`, or BATCH=EXAMPLES_PER_SECOND; may be given "
            "several times (default: throughput.json in RUN, if there)."
        ),
    ] = None,
    time_price: Annotated[
        float | None,
        typer.Option(
            help="What the fewest possible steps cost, relative to the fewest possible examples: 3 if time "
            "matters three times as much (default 1)."
        ),
    ] = None,
    step_price: Annotated[
        float | None,
        typer.Option(help="Instead: how many examples the time of one optimizer step is worth."),
    ] = None,
    examples_needed: Annotated[
        float | None,
        typer.Option(
            help="Examples that the loss you aim at takes at the batch in use (default: the run's)."
        ),
    ] = None,
    data_bits: Annotated[
        float | None,
        typer.Option(help="Log-loss of the data in the first epoch, in bits (default: from the run's loss)."),
    ] = None,
    trainable_parameters: Annotated[
        int | None, typer.Option(help="Numbers that the adapters train (default: the run's).")
    ] = None,
) -> None:
    """Say what a measured noise scale means for batch size, learning rate, epoch and machine."""
    given = {name: value for name, value in locals().items() if name != "run"}
    with one_line_errors(ValueError):
        from gns.advice import advise as advice_on
        from gns.advising.phrases import POOLED
        from gns.commands.known import known_of
        from gns.statistics.drift import drift

        estimate = load_run(run)
        known = known_of(run, estimate, given)
        change = drift(estimate.history, level=estimate.level)
        advice = advice_on(estimate, change=change, **known.arguments)
        said = (*advice.estimate_warnings, *advice.warnings, *known.remarks)
        advice = replace(advice, warnings=said, estimate_warnings=())
        parts = "batches" if POOLED in estimate.view else "steps"
        measured = f"{estimate.n_steps} {parts} × {estimate.examples_per_step:.4g} {estimate.unit}"
        measured += f", {estimate.view}"
        _show(advice, known, (str(run), measured))


def _show(advice: Advice, known: Known, source: tuple[str, str]) -> None:
    """Print the verdict first, then the table and the other subjects, then what all of it rests on."""
    from gns.advising.wording import BATCH_SIZE, LEARNING_RATE
    from gns.commands.tables import print_title

    typer.echo(advice.headline)
    if advice.moved:
        typer.echo(advice.moved)
    for section in advice.sections:
        print_title(section.title)
        typer.echo("\n".join(section.sentences))
        if section.title == BATCH_SIZE:
            _print_trade_off(advice)
        if section.title == LEARNING_RATE:
            _print_rates(advice)
    if advice.warnings:
        print_title("Careful")
        typer.echo("\n".join(f"Warning: {line}" for line in advice.warnings))
    print_title("Before you rely on it")
    typer.echo("\n".join(f"Note: {line}" for line in advice.caveats))
    _print_inputs(known, source)


def _print_trade_off(advice: Advice) -> None:
    """Print steps and examples at each batch size, with what else is known of it."""
    from rich.table import Table

    from gns.commands.tables import print_table

    speeds = {timed.batch_size: timed for timed in advice.goodput}
    titles = ["batch", "steps", "examples"]
    titles += ["steps an epoch"] if advice.plan else []
    titles += ["examples/s", "useful/s"] if speeds else []
    table = Table(*titles, "")
    for row in advice.table:
        cells = [str(row.batch_size), f"× {_pair(row.steps)}", f"× {_pair(row.examples)}"]
        cells += [f"{row.steps_per_epoch:,}"] if row.steps_per_epoch is not None else []
        if speeds:
            timed = speeds.get(row.batch_size)
            cells += [f"{timed.examples_per_second:.3g}", _pair(sorted(timed.useful))] if timed else ["", ""]
        table.add_row(*cells, _mark(row, advice))
    print_table(table)
    typer.echo("Steps and examples to the same loss, as multiples of the fewest possible.")


def _print_rates(advice: Advice) -> None:
    """Print the learning rate of each law at each batch size."""
    from rich.table import Table

    from gns.commands.tables import print_table

    table = Table("batch", *advice.table[0].learning_rates, "")
    for row in advice.table:
        rates = [_pair(rates) for rates in row.learning_rates.values()]
        table.add_row(str(row.batch_size), *rates, _mark(row, advice))
    print_table(table)


def _pair(band) -> str:
    """Write a band in few digits."""
    low, high = (f"{x:.2g}" if x < 100 else f"{x:.3g}" for x in map(float, band))
    return low if low == high else f"{low} … {high.replace('inf', '∞')}"


def _mark(row: Row, advice: Advice) -> str:
    """Say what is special about a batch size."""
    near = advice.ranges[-1]
    marks = ["in use"] if row.batch_size == advice.batch_size else []
    marks += ["proposed"] if row.batch_size == near.pick else []
    if near.low <= row.batch_size <= near.high:
        marks.append("in the range")
    if advice.soonest is not None and row.batch_size == advice.soonest.batch_size:
        marks.append("soonest here")
    return ", ".join(marks)


def _print_inputs(known: Known, source: tuple[str, str]) -> None:
    """Print what the advice rests on, each with its source."""
    from rich.table import Table

    from gns.commands.tables import print_table, print_title

    print_title("What this rests on")
    table = Table("", "value", "from")
    table.add_row("noise scale", source[1], source[0])
    for row in known.rows:
        table.add_row(*row)
    print_table(table)
