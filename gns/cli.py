"""The command line: `gns demo`, `measure`, `probe`, `report`, `advise`, `throughput`.

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

from gns.commands.advise import advise
from gns.commands.probe import probe
from gns.commands.report import report
from gns.commands.shared import (
    BAD_INPUT,
    INTERRUPTED,
    LENGTH_OF_BASE,
    Out,
    free_folder,
    named_layers,
    one_line_errors,
    one_thread,
    print_result,
)
from gns.commands.throughput import throughput

if TYPE_CHECKING:
    from gns.finetune import RunResult
    from gns.finetuning.preparation import FinetuneConfig

DEMO = {"model": "gns:base", "data": "gns:held-out", "lr": 1e-3, "max_length": LENGTH_OF_BASE}

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
    """Measure a small real LoRA fine-tune, without network: about two minutes on a CPU core.

    A small language model that comes with this package learns source text of the Python standard library that
    it never saw. Writes runs/demo, or runs/demo-2 … if that is taken.
    """
    with one_line_errors():
        from gns.finetuning.preparation import FinetuneConfig

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
    metric: Annotated[
        str | None, typer.Option(help="In which norms are taken: euclidean or adam (default euclidean).")
    ] = None,
    curvature_every: Annotated[
        int | None, typer.Option(help="Read B_noise too, once in so many steps (default: never).")
    ] = None,
    curvature_spectrum: Annotated[
        int | None,
        typer.Option(
            help="Products a reading spends on the largest eigenvalue of the Hessian, for the learning-rate "
            "ceiling 2/λ_max; ten about double its cost (default 0: none)."
        ),
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


app.command()(probe)
app.command()(report)
app.command()(advise)
app.command()(throughput)


def _configured(given: dict[str, Any], out: Path | None, resume: bool) -> FinetuneConfig:
    """Build the configuration from the options that were given; a resumed run has the rest from its start.

    Raises:
        ConfigError: an option is missing.
    """
    from gns.finetuning.preparation import ConfigError, FinetuneConfig
    from gns.finetuning.runfolder import read_config

    if "target_modules" in given:
        given["target_modules"] = named_layers(given["target_modules"])
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
    from gns.commands.display import Display
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


if __name__ == "__main__":
    main()
