"""`gns probe`: the noise scale at frozen weights, before any training or at a checkpoint."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gns.commands.shared import (
    INTERRUPTED,
    LENGTH_OF_BASE,
    Out,
    free_folder,
    one_line_errors,
    settings_of,
    spoken_warnings,
    threads_as_in_a_run,
)

if TYPE_CHECKING:
    from gns.finetuning.preparation import FinetuneConfig, Prepared
    from gns.probing.result import FrozenEstimate

FRESH = "Fresh adapters: factor B starts at zero, so only factor B has a gradient, and the number is its own."
SHORT = "the data hold {n} whole batches of {size}; {asked} were asked for"


def probe(
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id (default: the adapter's base, or gns:base).")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="As in `gns measure` (default: the run's, or gns:held-out).")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of a trained adapter, a checkpoint or a run.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of fresh LoRA adapters (default 16).")] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha of fresh adapters (default 16.0).")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in a batch (default 8).")] = None,
    batches: Annotated[int, typer.Option(help="Batches, at the most.")] = 50,
    relative_width: Annotated[
        float | None, typer.Option(help="Stop once the interval is this narrow, e.g. 0.2 for ±20 %.")
    ] = None,
    largest: Annotated[
        int, typer.Option(help="Show so many of the examples with the largest gradients.")
    ] = 0,
    dropout: Annotated[bool, typer.Option("--dropout", help="Measure with dropout on.")] = False,
    split_dropout: Annotated[
        bool,
        typer.Option("--split-dropout", help="Tell dropout's noise from the data's; twice the time."),
    ] = False,
    max_length: Annotated[int | None, typer.Option(help="Most tokens in an example (default 512).")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the base, as in `gns measure`.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of adapters and data order (default 0).")] = None,
    out: Out = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Measure the noise scale at the weights as they are; nothing is trained.

    Without options: the small model that comes with this package, on text it never saw. Writes runs/probe, or
    runs/probe-2 … if that is taken, unless --out says where.
    """
    options = dict(locals())
    names = (
        "model",
        "data",
        "rank",
        "alpha",
        "batch_size",
        "max_length",
        "dtype",
        "seed",
        "trust_remote_code",
    )
    given = {n: options[n] for n in names if options[n] is not None and options[n] is not False}
    asked = {"relative_width": relative_width, "largest": largest}
    asked |= {"dropout": dropout, "split_dropout": split_dropout}
    with one_line_errors():
        config, trained = _configured(given, adapter, batches)
        folder = out or free_folder(Path("runs/probe"))
        from gns.finetuning.runfolder import refuse_used

        refuse_used(folder)
        with threads_as_in_a_run(config):
            found, about = _measure(config, trained, batches, asked)
        _write(folder, found, config, about)
        _print(found, folder, fresh=trained is None)
    if found.stopped is not None and found.stopped.startswith("interrupted"):
        raise typer.Exit(INTERRUPTED)


def _configured(
    given: dict[str, Any], adapter: Path | None, batches: int
) -> tuple[FinetuneConfig, Path | None]:
    """Build the configuration of options, and find the adapter's folder.

    Raises:
        ConfigError: an option is missing or does not fit.
    """
    from gns.finetuning.preparation import BASE, HELD_OUT, ConfigError, FinetuneConfig

    if batches < 2:
        raise ConfigError(f"batches is {batches}; 2 or more are needed to see a spread")
    found = None if adapter is None else _adapter(adapter)
    known = {} if found is None else _of_run(found)
    if found is None and given.keys() & {"model", "data"}:
        for name in ("model", "data"):
            if name not in given:
                raise ConfigError(f"--{name} is missing; a local path or a hub id is needed")
    elif found is None:
        known = {"model": BASE, "data": HELD_OUT, "max_length": LENGTH_OF_BASE}
    for name in ("rank", "alpha"):
        if found is not None and name in given:
            raise ConfigError(f"--{name} is of fresh adapters; that of {found} is what it was trained with")
    values = {"held_out": 0, **known, **given}
    for name in ("model", "data"):
        if name not in values:
            raise ConfigError(f"--{name} is missing, and {adapter} does not say what it was trained with")
    return replace(FinetuneConfig(**values), steps=batches, epochs=None, grad_accum=1, every=1), found


def _adapter(path: Path) -> Path:
    """Find the folder with the adapter's configuration: the one given, or that of a run.

    Raises:
        ConfigError: there is none.
    """
    from gns.finetuning.preparation import ConfigError
    from gns.finetuning.runfolder import ADAPTER

    for folder in (path, path / ADAPTER):
        if (folder / "adapter_config.json").is_file():
            return folder
    seen = "holds no adapter_config.json" if path.is_dir() else "is not a folder"
    raise ConfigError(f"{path}: {seen}; the folder of an adapter, a checkpoint or a run is needed")


def _of_run(adapter: Path) -> dict[str, Any]:
    """Say what the run was given that an adapter lies in; else the base model that it names."""
    import json

    from gns.finetuning.runfolder import RUN, read_config

    for folder in adapter.resolve().parents[:2]:
        if (folder / RUN).is_file():
            config = read_config(folder)
            names = (
                "model",
                "data",
                "batch_size",
                "max_length",
                "dtype",
                "seed",
                "held_out",
                "trust_remote_code",
            )
            return {name: getattr(config, name) for name in names}
    try:
        base = json.loads((adapter / "adapter_config.json").read_bytes())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    return {"model": base} if base else {}


def _measure(
    config: FinetuneConfig, adapter: Path | None, batches: int, asked: dict[str, Any]
) -> tuple[FrozenEstimate, dict[str, Any]]:
    """Load everything and measure; give the estimate and what is worth knowing of the run."""
    import torch

    from gns.commands.display import Display
    from gns.finetune import without_bars
    from gns.finetuning.preparation import prepare
    from gns.frozen import probe as measured

    with without_bars(), Display() as display:
        prepared = prepare(config, adapter=adapter)
        rows = _batches(prepared, config, batches)
        if len(rows) < batches:
            display.remark(SHORT.format(n=len(rows), size=config.batch_size, asked=batches))
        for line in prepared.remarks:
            display.remark(line)
    model = prepared.model.to("cuda" if torch.cuda.is_available() else "cpu")
    kind, dtype = model.device.type, config.base_dtype
    with spoken_warnings(), torch.autocast(kind, dtype=dtype, enabled=dtype is not torch.float32):
        found = measured(
            model, rows, seed=config.seed, describe=prepared.tokenizer if asked["largest"] else None, **asked
        )
    return found, {"device": str(model.device), "dataset_size": len(prepared.train)}


def _batches(prepared: Prepared, config: FinetuneConfig, batches: int) -> list[dict[str, Any]]:
    """Shuffle the data, and collate as many whole batches as were asked for, or as there are."""
    import torch

    from gns.finetuning.data import Collator, pad_id

    collate, size = Collator(pad_id(prepared.tokenizer)), config.batch_size
    order = torch.randperm(len(prepared.train), generator=torch.Generator().manual_seed(config.seed)).tolist()
    whole = min(batches, len(order) // size)
    return [collate([prepared.train[i] for i in order[k * size : (k + 1) * size]]) for k in range(whole)]


def _write(folder: Path, found: FrozenEstimate, config: FinetuneConfig, about: dict[str, Any]) -> None:
    from gns.probing.file import write_probe
    from gns.records import write_summary

    write_probe(folder, found)
    settings = {**asdict(config), **about, "learning_rate": None}
    write_summary(folder, found, settings=settings, batch_size=config.batch_size)


def _print(found: FrozenEstimate, folder: Path, *, fresh: bool) -> None:
    from gns.advice import advise
    from gns.probing.words import render
    from gns.report.text import pays

    typer.echo(render(found, (FRESH,) if fresh else ()))
    known = settings_of(folder, found)
    if found.status != "collecting" and known["batch_size"]:
        advice = advise(found, batch_size=known["batch_size"], dataset_size=known["dataset_size"])
        typer.echo("\n".join(["", *pays(advice, folder)]))
    typer.echo(f"\nWritten: {folder}")
