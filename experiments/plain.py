"""Configurations in, rows out: a sweep where only torch, transformers and peft are installed."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments import forecast, rowsfile
from experiments.configs import RunConfig, RunError
from experiments.engines import accompanied, executed
from experiments.patience import patiently

SAY = 10.0  # seconds between two lines of progress


def read_configs(path: Path) -> list[RunConfig]:
    """Read configurations, one JSON object a line.

    Raises:
        RunError: the file is missing, or a line is no configuration; the message names the line.
    """
    if not path.exists():
        raise RunError(
            f"{path}: no such file; python -m experiments.sweep --preset NAME --write {path} makes one"
        )
    configs: dict[str, RunConfig] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            config = RunConfig.of(json.loads(line))
        except (ValueError, TypeError) as error:  # RunError is a ValueError
            raise RunError(f"{path}, line {number}: {error}") from error
        configs[config.hash] = config
    return list(configs.values())


def run_file(source: Path, target: Path, *, engine: str, device: str | None, retry: bool = False) -> int:
    """Execute the configurations of a file that have no row yet, and append each row as soon as it is known.

    Args:
        source: configurations, JSON lines.
        target: rows, JSON lines.
        engine: module with the two functions of `experiments.engines`.
        device: to run on; None: the best there is.
        retry: run those once more that failed.

    Returns:
        0 if every run has a result, 1 if some failed.

    Raises:
        RunError: a file holds something else, or the disk was full for minutes.
    """
    configs = read_configs(source)
    known = rowsfile.results(rowsfile.read(target))
    over = rowsfile.RESULTS if retry else rowsfile.STATUSES
    todo = [c for c in configs if c.hash not in known or known[c.hash]["status"] not in over]
    tally = forecast.Tally(configs, "laptop", 1)
    tally.rows(known.values())
    said = 0.0
    for rows in _executed(todo, importlib.import_module(engine), device):
        patiently(lambda rows=rows: rowsfile.append(target, rows))
        tally.rows(rows)
        known |= {row["hash"]: row for row in rows}
        if time.monotonic() - said > SAY:
            said, left = time.monotonic(), sum(c.hash not in known for c in configs)
            print(
                f"{len(configs) - left} of {len(configs)} runs, {forecast.words(tally.left(left))} left",
                file=sys.stderr,
            )
    statuses = [known[c.hash]["status"] for c in configs]
    print(", ".join(f"{statuses.count(s)} {s}" for s in rowsfile.STATUSES) + f"; {target}")
    return 1 if "failed" in statuses else 0


def _executed(todo: list[RunConfig], engine: Any, device: str | None) -> Iterator[list[rowsfile.Row]]:
    """Execute runs, several in one program where that pays."""
    while todo:
        group = [todo[0], *accompanied(engine, todo[0], todo[1:], device, len(todo) - 1)]
        done = {config.hash for config in group}
        todo = [config for config in todo if config.hash not in done]
        yield executed(engine, group, device)
