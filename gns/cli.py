"""The command line: `gns demo`, `gns measure`, `gns report`, `gns advise`.

Results go to standard output, progress and remarks to standard error. Bad input ends in one line and exit
code 2, before anything is written; Ctrl-C in a report of what was measured and exit code 130. Heavy imports
are made inside the commands, so that help is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from gns.commands.shared import (
    BAD_INPUT,
    INTERRUPTED,
    Folder,
    Out,
    free_folder,
    load_run,
    one_line_errors,
    one_thread,
    print_result,
    settings_of,
    spoken_warnings,
)

if TYPE_CHECKING:
    from gns.estimate import Estimate
    from gns.finetune import RunResult
    from gns.preparation import FinetuneConfig

DEMO = {"model": "gns:base", "data": "gns:held-out", "lr": 1e-3, "max_length": 256}

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="How large a batch pays when you fine-tune with LoRA, and how sure that number is.",
)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process with its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        code = app(arguments, prog_name="gns", standalone_mode=False)
    except typer.Abort:
        code = INTERRUPTED
    except Exception as error:
        explain = getattr(
            error, "format_message", None
        )  # of click's errors, whichever click typer brings along
        if explain is None:
            raise
        typer.echo(f"gns: {' '.join(explain().split())} (see gns --help)", err=True)
        code = BAD_INPUT
    sys.exit(code if isinstance(code, int) else 0)


@app.command()
def demo(
    out: Out = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Examples in a step.")] = 16,
    seed: Annotated[int, typer.Option(help="Of adapters and data order.")] = 0,
) -> None:
    """Measure a small real LoRA fine-tune, without network: about a minute on two CPU cores.

    A small language model that comes with this package learns source text of the Python standard library that
    it never saw. Writes runs/demo, or runs/demo-2 … if that is taken.
    """
    with one_line_errors():
        from gns.preparation import FinetuneConfig

        config = FinetuneConfig(**DEMO, steps=steps, batch_size=batch_size, seed=seed)
        with one_thread():
            _finetune(config, out or free_folder(Path("runs/demo")), resume=False)


@app.command()
def measure(
    model: Annotated[str | None, typer.Option(help="Folder or hub id of a causal language model.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="JSONL (text, or prompt + response, or messages), text, a folder of these, or a hub id."
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA rank (default 16).")] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha (default 16.0).")] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="Layers to adapt, with commas between (default all-linear).")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in a forward pass (default 8).")] = None,
    grad_accum: Annotated[int | None, typer.Option(help="Forward passes in a step (default 1).")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate (default 0.0002).")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="constant, cosine or linear (default constant).")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps (default: what the epochs need).")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the data (default: 1, unless steps).")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Most tokens in an example (default 512).")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the base: float32, bfloat16, float16 or auto (default auto).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of adapters and data order (default 0).")] = None,
    every: Annotated[int | None, typer.Option(help="Measure one step in so many (default 1).")] = None,
    curvature_every: Annotated[
        int | None, typer.Option(help="Read B_noise too, once in so many steps (default: never).")
    ] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints (default 50).")] = None,
    out: Out = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Measure a LoRA fine-tune of your own model on your own data.

    Writes runs/measure, or runs/measure-2 … if that is taken, unless --out says where.
    """
    given = {name: value for name, value in locals().items() if value is not None and value is not False}
    given = {name: value for name, value in given.items() if name not in ("out", "resume")}
    with one_line_errors():
        config = _configured(given, out, resume)
        _finetune(config, out or free_folder(Path("runs/measure")), resume=resume)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of measured runs.", show_default=False)],
) -> None:
    """Draw the report of a run anew from its recorded steps; of several runs, compare them too."""
    with one_line_errors():
        from gns.report import redraw

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


@app.command()
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
        typer.Option(help="Measured speed as BATCH=EXAMPLES_PER_SECOND; may be given several times."),
    ] = None,
) -> None:
    """Say what a measured noise scale means for batch size and learning rate."""
    with one_line_errors(ValueError):
        estimate = load_run(run)
        known = settings_of(run, estimate)
        if batch_size in (None, known["batch_size"]):
            learning_rate = learning_rate or known["learning_rate"]
        from gns.advice import advise as advice_on
        from gns.drift import drift

        advice = advice_on(
            estimate,
            change=drift(estimate.history, level=estimate.level),
            batch_size=known["batch_size"] if batch_size is None else batch_size,
            dataset_size=known["dataset_size"] if dataset_size is None else dataset_size,
            learning_rate=learning_rate,
            throughput=dict(map(_speed, throughput)) if throughput else None,
        )
        typer.echo(str(advice))


def _configured(given: dict[str, Any], out: Path | None, resume: bool) -> FinetuneConfig:
    """Build the configuration from the options that were given; a resumed run has the rest from its start.

    Raises:
        ConfigError: an option is missing.
    """
    from gns.preparation import ConfigError, FinetuneConfig
    from gns.runfolder import read_config

    targets = given.get("target_modules", "all-linear")
    if targets != "all-linear":
        names = tuple(name for part in targets.split(",") if (name := part.strip()))
        given["target_modules"] = "all-linear" if names == ("all-linear",) else names
    if resume:
        if out is None:
            raise ConfigError("--resume needs --out, the folder of the interrupted run")
        return replace(read_config(out), **given)
    for name in ("model", "data"):
        if name not in given:
            raise ConfigError(f"--{name} is missing; a local path or a hub id is needed")
    return FinetuneConfig(**given)


def _finetune(config: FinetuneConfig, out: Path, *, resume: bool) -> None:
    """Run, show, and say what was found.

    Raises:
        Exit: the run was interrupted.
    """
    from gns.display import Display
    from gns.finetune import run

    with Display() as display:
        result = run(config, out, resume=resume, watcher=display)
    if result.interrupted:
        made = f"interrupted after {result.steps_made} of {result.n_steps} steps"
        typer.echo(f"gns: {made}; go on with: gns measure --resume --out {out}", err=True)
    _print_run(result)
    print_result(result.estimate, out)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)


def _print_run(result: RunResult) -> None:
    if result.loss_before is not None and result.loss_after is not None:
        change = f"{result.loss_before:.3f} → {result.loss_after:.3f} nats a token"
        typer.echo(f"Held-out loss: {change} in {result.steps_made} steps.\n")


def _print_table(estimates: dict[Path, Estimate]) -> None:
    from rich.console import Console
    from rich.table import Table

    from gns.drift import drift
    from gns.estimate import format_count

    table = Table("run", "B_simple", "interval", "level", "status", "steps", "learning rate", "unit")
    for run, estimate in estimates.items():
        change = drift(estimate.history, level=estimate.level)
        moving = f", {change.direction}" if change and change.moved else ""
        rate = settings_of(run, estimate)["learning_rate"]
        table.add_row(
            str(run),
            format_count(estimate.b_simple),
            f"{format_count(estimate.low)} … {format_count(estimate.high)}",
            f"{100 * estimate.level:g} %",
            f"{estimate.status}{moving}",
            f"{estimate.n_steps} × {format_count(estimate.examples_per_step)}",
            f"{rate:g}" if rate else "?",
            estimate.unit,
        )
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table)


def _speed(text: str) -> tuple[int, float]:
    """Read BATCH=EXAMPLES_PER_SECOND.

    Raises:
        ValueError: it is not of that form.
    """
    batch, _, speed = text.partition("=")
    try:
        return int(batch), float(speed)
    except ValueError:
        raise ValueError(f"throughput {text!r}: BATCH=EXAMPLES_PER_SECOND is needed, e.g. 16=3.5") from None


if __name__ == "__main__":
    main()
