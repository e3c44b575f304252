"""What several commands share: exit codes, bad input in one line, and how a run's result is shown."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from gns.estimate import Estimate
    from gns.finetuning.preparation import FinetuneConfig

BAD_INPUT, INTERRUPTED = 2, 130
LENGTH_OF_BASE = 256  # tokens of an example at the most, of the small shipped model

Folder = Annotated[Path, typer.Argument(help="Folder of a measured run.", show_default=False)]
Out = Annotated[
    Path | None, typer.Option(help="Folder to write; it must be new or empty.", show_default=False)
]


def print_result(estimate: Estimate, folder: Path) -> None:
    """Print what was measured in a run and what it means."""
    from gns.advice import advise as advice_on
    from gns.report import PAGE
    from gns.report.text import render
    from gns.statistics.drift import drift

    known = settings_of(folder, estimate)
    change = drift(estimate.history, level=estimate.level)
    advice = advice_on(estimate, **known, change=change) if known["batch_size"] else None
    typer.echo(render(estimate, advice, change=change, page=folder / PAGE))


def load_run(folder: Path) -> Estimate:
    """Load a run, from its good records if some are damaged.

    Raises:
        RecordsError: none is good.
    """
    from gns.estimate import estimate
    from gns.records import RecordsError, load

    try:
        return load(folder)
    except RecordsError as error:
        if not error.steps:
            raise
        return replace(estimate(error.steps), history=tuple(error.steps))


def settings_of(folder: Path, estimate: Estimate) -> dict[str, Any]:
    """Give what the advice asks of a run, see `gns.advising.recorded.inputs`."""
    from gns.advising.recorded import inputs
    from gns.records import read_summary

    summary = read_summary(folder)
    return inputs(estimate.history, summary.settings, summary.batch_size, summary.coverage)


def free_folder(folder: Path) -> Path:
    """Give the folder, or the first of folder-2, folder-3, … that is not there: nothing is overwritten."""
    taken = 1
    free = folder
    while free.exists():
        taken += 1
        free = folder.with_name(f"{folder.name}-{taken}")
    return free


@contextmanager
def one_thread() -> Generator[None]:
    """Keep torch to one thread: so small a model gains little by a second, and on a busy machine loses much.

    (Threads on busy cores wait for each other: 262 s were measured with two where one takes 80 s.)
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def threads_as_in_a_run(config: FinetuneConfig) -> Generator[None]:
    """Measure the small shipped model with one thread, as `gns demo` trains it."""
    from gns.finetuning.preparation import BASE

    with one_thread() if config.model == BASE else nullcontext():
        yield


def named_layers(text: str) -> str | tuple[str, ...]:
    """Read the layers of `--target-modules`: names with commas between, or "all-linear"."""
    names = tuple(name for part in text.split(",") if (name := part.strip()))
    return "all-linear" if names == ("all-linear",) else names


@contextmanager
def one_line_errors(*more: type[Exception]) -> Generator[None]:
    """End bad input in one line and exit code 2, and Ctrl-C before any reading in exit code 130.

    Bad input shows in errors of this package's own kinds, in missing files, and in the kinds named here; any
    other error is a fault of ours and keeps its traceback.

    Raises:
        Exit: with that code.
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("gns: interrupted before the first reading; nothing was written", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        ours = type(error).__module__.startswith("gns.")  # ConfigError, DataError, RecordsError
        if not ours and not isinstance(error, (FileNotFoundError, *more)):
            raise
        typer.echo(f"gns: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(BAD_INPUT) from None


@contextmanager
def spoken_warnings() -> Generator[None]:
    """Say warnings as lines for a user, without the place in the code."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        typer.echo(f"gns: {warning.message}", err=True)
