"""`gns throughput`: examples a second on this machine, for growing batch sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gns.commands.shared import (
    INTERRUPTED,
    LENGTH_OF_BASE,
    named_layers,
    one_line_errors,
    threads_as_in_a_run,
)

if TYPE_CHECKING:
    from gns.advising.throughput import Throughput
    from gns.finetuning.preparation import FinetuneConfig

UNSTEADY = 1.5  # steps of one size further apart than this are remarked on


def throughput(
    run: Annotated[
        Path | None,
        typer.Argument(help="Folder of a run whose model and settings are timed.", show_default=False),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of a causal language model (default gns:base).")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA rank (default 16).")] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="Layers to adapt, with commas between (default all-linear).")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens in every example (default 512; 256 for gns:base).")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the base: float32, bfloat16, float16 or auto (default auto).")
    ] = None,
    largest: Annotated[int, typer.Option(help="Largest batch to time.")] = 256,
    seconds: Annotated[float, typer.Option(help="Most time for one batch size, as foreseen.")] = 30.0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for throughput.json, made if it is not there, or a .json file; the file must not be "
            "there (default: throughput.json in RUN, or here).",
            show_default=False,
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Time training steps with LoRA adapters on this machine, for batch sizes 1, 2, 4, 8 and so on.

    Full steps on random tokens: forward, backward, clipping, optimizer; the median of several. Sizes that
    would take more than a safe share of the free memory are not tried: larger batches are accumulated. Ctrl-C
    keeps the curve so far. `gns advise` makes of it the batch that is soonest at a given loss.
    """
    given = {
        "model": model,
        "rank": rank,
        "max_length": max_length,
        "dtype": dtype,
        "target_modules": None if target_modules is None else named_layers(target_modules),
        "trust_remote_code": trust_remote_code or None,
    }
    with one_line_errors(ValueError):
        config = _configured(run, {name: value for name, value in given.items() if value is not None})
        path = _new_file(run, out)
        with threads_as_in_a_run(config):
            curve = _measure(config, path, largest, seconds)
        _show(curve, path, run)
    if curve.interrupted:
        raise typer.Exit(INTERRUPTED)


def _configured(run: Path | None, given: dict[str, Any]) -> FinetuneConfig:
    """Build the configuration from the run and the options; the options win.

    Raises:
        ConfigError: the run cannot be read, or a value is out of range.
    """
    from gns.finetuning.preparation import BASE, HELD_OUT, FinetuneConfig
    from gns.finetuning.runfolder import read_config

    if run is not None:
        config = replace(read_config(run), **given)
    else:
        length = LENGTH_OF_BASE if given.get("model", BASE) == BASE else FinetuneConfig.max_length
        config = FinetuneConfig(**{"model": BASE, "data": HELD_OUT, "max_length": length, **given})
    config.check()
    return config


def _new_file(run: Path | None, out: Path | None) -> Path:
    """Give the file to write; its folder is made when there is something to write.

    Raises:
        ThroughputError: it is there already, or a file is in the way of its folder.
    """
    from gns.advising.throughput import FILE, ThroughputError

    path = out or run or Path()
    path = path if path.suffix == ".json" and not path.is_dir() else path / FILE
    if path.exists():
        raise ThroughputError(f"{path}: is there already; delete it, or give another with --out")
    for folder in path.parents:
        if folder.exists() and not folder.is_dir():
            raise ThroughputError(f"{path}: {folder} is a file; a folder is needed")
    return path


def _measure(config: FinetuneConfig, path: Path, largest: int, seconds: float) -> Throughput:
    """Measure, show progress, and keep the file up to date with every batch size.

    Raises:
        ThroughputError: not even one example fits.
        KeyboardInterrupt: the user ended it before anything was timed.
    """
    from rich.console import Console

    from gns.advising.throughput import Sweep, ThroughputError, write
    from gns.finetune import without_bars
    from gns.finetuning.timing import LoraTrial

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with console.status("loading the model") as status:
        with without_bars():
            trial = LoraTrial(config)
        settings = trial.settings()
        where = (
            f"{settings['device']}, {settings['dtype']}, {settings['tokens_per_example']} tokens an example"
        )
        console.print(f"gns: timing {config.model} on {where}", markup=False)

        def hear(curve: Throughput) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, replace(curve, settings=settings))
            console.print(_line(curve), markup=False)

        def announce(micro: int, accumulation: int) -> None:
            status.update(f"timing {micro} × {accumulation}")

        curve = Sweep(trial, largest=largest, seconds=seconds, hear=hear, announce=announce).run()
    if not curve.points:
        if curve.interrupted:
            raise KeyboardInterrupt
        raise ThroughputError(f"{config.model}: nothing could be timed: {curve.stopped}")
    curve = replace(curve, settings=settings)
    write(path, curve)
    return curve


def _line(curve: Throughput) -> str:
    """Say what the last batch size to be timed gave."""
    last = curve.latest
    if last is None:
        return "nothing timed yet"
    return (
        f"batch {last.batch_size} = {last.micro_batch} × {last.accumulation}: "
        f"{last.examples_per_second:.3g} examples/s, {last.seconds:.3g} s a step"
    )


def _show(curve: Throughput, path: Path, run: Path | None) -> None:
    """Print the curve, why it ended, and what it is good for."""
    from rich.table import Table

    from gns.advising.throughput import GIB
    from gns.commands.tables import print_table

    table = Table("batch", "micro-batch × accumulation", "examples/s", "s a step", "range", "peak memory")
    for point in curve.points:
        table.add_row(
            str(point.batch_size),
            f"{point.micro_batch} × {point.accumulation}",
            f"{point.examples_per_second:.3g}",
            f"{point.seconds:.3g}",
            f"{point.fastest:.3g} … {point.slowest:.3g} ({point.repeats} steps)",
            "" if point.peak_bytes is None else f"{point.peak_bytes / GIB:.2f} GiB",
        )
    print_table(table)
    typer.echo(
        f"Ended because {curve.stopped}." if not curve.interrupted else "Interrupted; the curve so far."
    )
    ratio = max(point.slowest / point.fastest for point in curve.points)
    if ratio > UNSTEADY:
        typer.echo(f"Steps of one size differ by up to {ratio:.1f} ×: was something else running?")
    inside = run is not None and path.parent == run
    use = f"gns advise {run}" if inside else f"gns advise RUN --throughput {path}"
    typer.echo(f"Wrote {path}; what it means for a measured run: {use}")
