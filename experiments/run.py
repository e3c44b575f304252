"""One run, one row of results.

    python -m experiments.run --config '{"base": "1m", "task": "wordmath"}' --out rows.jsonl

A run never fails the program: what goes wrong inside it is a row with status "failed" and the error in one
line. A run that diverges is a result, not a failure. Under `torchrun` or `accelerate launch` the processes
share the run, and the first one writes its row.

    torchrun --nproc-per-node 8 -m experiments.run --config run.json --out rows.jsonl
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments import loop, rows
from experiments.configs import RunConfig, RunError
from experiments.course import Course
from experiments.evaluation import token_mean
from experiments.prepared import Data, Prepared, device_of, plain, prepare
from experiments.readings import readings
from experiments.seeding import seeded
from experiments.tasks import Item
from experiments.tasks.accuracy import answers
from gns.monitor import GNSMonitor, GNSWarning
from gns.sources import first_line

PACKAGES = ("torch", "transformers", "peft", "accelerate")
RESULTS = (
    *("steps_done", "examples_seen", "tokens_seen", "train_loss", "validation", "test_loss", "test_losses"),
    *("accuracy", "items_right", "target_step", "target_examples", "gns"),
)
EXIT_FAILED, EXIT_REFUSED = 1, 2


def run(config: RunConfig, *, device: str | None = None) -> dict[str, Any]:
    """Make one run.

    Args:
        config: of the run.
        device: of torch; None: an accelerator if there is one.

    Returns:
        Its row, of plain JSON: see `header` and `finished`. Nothing but KeyboardInterrupt is raised.
    """
    engine = engine_of(config)
    if engine == "packed":
        from experiments.packed import run_packed

        return run_packed([config], device=device)[0]
    row, started = header(config, engine), time.monotonic()
    try:
        where = device_of(device)
        row["device"] = device_name(where)
        with seeded(config.seed, where):
            row |= _made(prepare(config, where), engine)
    except (Exception, SystemExit) as error:
        row |= {"status": "failed", "error": one_line(error)}
    row["seconds"] = round(time.monotonic() - started, 3)
    return plain(row)


def engine_of(config: RunConfig) -> str:
    """Say which engine makes a run: with "auto" the loop, or where several processes share it the Trainer."""
    if config.engine != "auto":
        return config.engine
    return "trainer" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else "loop"


def header(config: RunConfig, engine: str) -> dict[str, Any]:
    """Begin a row: what is run, with what, and null for every result."""
    commit, versions = _made_with()
    return {
        "hash": config.hash,
        "config": config.to_dict(),
        "status": "failed",
        "error": None,
        "commit": commit,
        "versions": versions,
        "device": None,
        "engine": engine,
        "threads": torch.get_num_threads(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": 0.0,
        **dict.fromkeys(RESULTS),
    }


@functools.cache
def _made_with() -> tuple[str, dict[str, str]]:
    """Commit and versions; of the start of the program, whose code is what runs."""
    made = rows.provenance()
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return made.pop("commit"), made | packages


def device_name(device: torch.device) -> str:
    """Name a device: "cpu x86_64", "cuda NVIDIA H100"."""
    is_cuda = device.type == "cuda"
    return f"{device.type} {torch.cuda.get_device_name(device) if is_cuda else platform.machine()}"


def one_line(error: BaseException) -> str:
    """Give an error in one line: what and, unless it is about the configuration, where."""
    if isinstance(error, RunError):
        return first_line(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(last.filename).name}, line {last.lineno}"
    return f"{type(error).__name__}: {first_line(error)} ({where})"


def _made(prepared: Prepared, engine: str) -> dict[str, Any]:
    """Train and evaluate: the part of a row that depends on the run."""
    train: Callable[[Prepared, Course, GNSMonitor | None], None] = _loop
    if engine == "trainer":
        from experiments import trainer

        train = trainer.train
    course, monitor, config = Course(prepared.config), None, prepared.config
    if config.gns_every:
        monitor = GNSMonitor(
            prepared.model, every=config.gns_every, metric=config.gns_metric, history=config.n_steps
        )
    course.evaluated(prepared.validation_loss())
    remarks: list[str] = []
    if not course.over:
        torch.manual_seed(config.seed)  # of the dropout, whatever loading has drawn
        remarks = heard(lambda: train(prepared, course, monitor))
    gns = None if monitor is None or not course.steps else readings(monitor, remarks)
    return finished(prepared, course) | {"gns": gns}


def _loop(prepared: Prepared, course: Course, monitor: GNSMonitor | None) -> None:
    """Train with the plain loop, measured."""
    if monitor is None:
        loop.train(prepared, course)
        return
    with monitor:
        loop.train(prepared, course)


def heard(work: Callable[[], None]) -> list[str]:
    """Do some work and give what the monitor warned of; other warnings go on to the user."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", GNSWarning)
        work()
    mine = [w for w in caught if issubclass(w.category, GNSWarning)]
    for other in caught:
        if other not in mine:
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    return [str(w.message) for w in mine]


def finished(prepared: Prepared, course: Course) -> dict[str, Any]:
    """Give what a row says of a run that is over; of a diverged one what was known until then.

    Args:
        prepared: with the trained model.
        course: of the run.

    Returns:
        The course's part; `test_loss`, nats per token, and `test_losses`, each item's own mean with six
        digits; `accuracy` and `items_right` (0 or 1 each), of the items that have an answer.
    """
    row = course.row()
    if course.diverged:
        return row
    data = prepared.data
    losses = prepared.item_losses(data.test)
    return row | tested(data, losses, items_right(prepared))


def tested(data: Data, losses: Sequence[float], right: Sequence[int]) -> dict[str, Any]:
    """Give what a row says of the test split.

    Args:
        data: of the run.
        losses: of each item of the split, nats per token.
        right: 0 or 1 for each item that was answered.
    """
    return {
        "test_loss": token_mean(losses, data.test),
        "test_losses": [float(f"{loss:.6g}") for loss in losses],
        "accuracy": sum(right) / len(right) if right else None,
        "items_right": list(right) or None,
    }


def items_right(prepared: Prepared) -> list[int]:
    """Let the model answer the items that have an answer, and compare."""
    config, data = prepared.config, prepared.data
    asked = askable(data)
    if not asked:
        return []
    with prepared.autocast():
        given = answers(
            prepared.model,
            prepared.tokenizer,
            asked,
            max_new_tokens=config.max_length,
            batch_size=32,
        )
    return compared(data, asked, given)


def askable(data: Data) -> list[Item]:
    """Give the items to be answered that have an answer."""
    return [item for item in data.answered if item.answer is not None]


def compared(data: Data, asked: Sequence[Item], given: Sequence[str]) -> list[int]:
    """Say of each answer whether it is right, 0 or 1."""
    return [int(data.task.right(item, text)) for item, text in zip(asked, given, strict=True)]


def summary(row: dict[str, Any]) -> str:
    """Say in one line what a row found."""
    config = row["config"]
    about = f"{row['hash']} {config['base']} {config['task']} {config['adapter']} r={config['rank']}"
    about += f" B={config['batch_size']} lr={config['lr']:g}: {row['status']}"
    if row["status"] == "failed":
        return f"{about}: {row['error']}"
    said = [f"{row['steps_done']} steps, {row['examples_seen']} examples in {row['seconds']:.1f} s"]
    if row["test_loss"] is not None:
        said.append(f"test loss {row['test_loss']:.4f} nats per token")
    if row["accuracy"] is not None:
        said.append(f"{row['accuracy']:.1%} right")
    if config["target_loss"] is not None:
        reached = row["target_examples"]
        said.append("target not reached" if reached is None else f"target after {reached:.0f} examples")
    if row["gns"]:
        joint = row["gns"]["summary"]["joint"]
        value = "not known" if joint["b_simple"] is None else f"{joint['b_simple']:.3g} examples"
        said.append(f"B_simple {value} ({joint['status']})")
    return f"{about}; {', '.join(said)}"


def write(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a file of JSON lines, at once, so that no other process's row comes into it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write((json.dumps(row, allow_nan=False) + "\n").encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, make the run, write its row; 0, or 1 where it failed, or 2 where it is none."""
    asked = argparse.ArgumentParser(prog="python -m experiments.run", description="Make one run.")
    asked.add_argument("--config", required=True, help="JSON of a RunConfig, or a file with it")
    asked.add_argument("--out", type=Path, help="file of JSON lines that the row is added to")
    asked.add_argument("--device", help="of torch (default: an accelerator if there is one)")
    chosen = asked.parse_args(arguments)
    try:
        given = chosen.config if chosen.config.lstrip().startswith("{") else Path(chosen.config).read_text()
        config = RunConfig.of(json.loads(given))
    except (RunError, OSError, json.JSONDecodeError) as error:
        print(f"--config: {error}", file=sys.stderr)
        return EXIT_REFUSED
    row = run(config, device=chosen.device)
    if int(os.environ.get("RANK", 0)) == 0:
        if chosen.out is not None:
            write(chosen.out, row)
        print(summary(row))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return EXIT_FAILED if row["status"] == "failed" else 0


if __name__ == "__main__":
    sys.exit(main())
