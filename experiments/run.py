"""One run, one row of results.

    python -m experiments.run --config '{"base": "1m", "task": "wordmath"}' --out rows.jsonl

A run never fails the program: what goes wrong inside it is a row with status "failed" and the error in one
line. A run that diverges is a result, not a failure. Under `torchrun` or `accelerate launch` the processes
share the run, and the first one writes its row.

    torchrun --nproc-per-node 8 -m experiments.run --config run.json --out rows.jsonl
    accelerate launch --multi_gpu --num_processes 8 -m experiments.run --config run.json --out rows.jsonl

With `--cpu`, `accelerate launch` starts a single process, whatever `--num_processes` says: take `torchrun`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments import loop, rowsfile
from experiments.configs import RunConfig, RunError
from experiments.course import Course
from experiments.outcome import device_name, finished, header, one_line, summary
from experiments.prepared import Prepared, device_of, prepare
from experiments.readings import readings
from experiments.rowsfile import finite
from experiments.seeding import seeded
from gns.monitor import GNSMonitor, GNSWarning

EXIT_FAILED, EXIT_REFUSED = 1, 2


def run(config: RunConfig, *, device: str | None = None) -> dict[str, Any]:
    """Make one run.

    Args:
        config: of the run.
        device: of torch; None: an accelerator if there is one.

    Returns:
        Its row, of plain JSON: see `experiments.outcome`. Nothing but KeyboardInterrupt is raised.
    """
    engine = engine_of(config)
    row, started = header(config, engine), time.monotonic()
    try:
        if engine == "packed":
            from experiments.packed import run_packed

            return run_packed([config], device=device)[0]
        where = device_of(device)
        row["device"] = device_name(where)
        with seeded(config.seed, where):
            row |= _made(prepare(config, where), engine)
    except (Exception, SystemExit) as error:
        row |= {"status": "failed", "error": one_line(error)}
    row["seconds"] = round(time.monotonic() - started, 3)
    return finite(row)


def engine_of(config: RunConfig) -> str:
    """Say which engine makes a run: with "auto" the loop, or where several processes share it the Trainer."""
    if config.engine != "auto":
        return config.engine
    return "trainer" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else "loop"


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
        print(summary(row))
        if chosen.out is not None:
            rowsfile.append(chosen.out, [row])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return EXIT_FAILED if row["status"] == "failed" else 0


if __name__ == "__main__":
    sys.exit(main())
