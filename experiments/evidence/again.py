"""`python -m experiments.evidence.again`: the runs whose noise scale counts, made again to be read otherwise.

    python -m experiments.evidence.again                                # every configuration that has rows
    python -m experiments.evidence.again --configurations SGD --only curvature

A run is the same whatever is measured in it. Each of these (batch 4, the learning rate that is first at the
target, every seed) is made twice more: in AdamW's metric, a row as of a sweep; and up to the target with
readings of B_noise on examples that no run sees. About a minute a run on one core; what has a row is not made
again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from experiments import loop, rows, rowsfile
from experiments.analysis.cells import Row
from experiments.configs import RunConfig, RunError
from experiments.course import Course
from experiments.evidence.configurations import CONFIGURATIONS, SIZE, named, per_row
from experiments.evidence.files import ADAM, CURVATURE, FOLDER, runs_in
from experiments.evidence.measured import SAME, measured, read_along, reference_runs, steps_to
from experiments.prepared import data_of, device_of, prepare
from experiments.run import run
from experiments.schedules import lr_at
from experiments.seeding import seeded
from gns.curvature.readingsfile import record_of
from gns.curvature.result import CurvatureReading
from gns.hessian import b_noise

READINGS = 8  # on the way to the target, each in the middle of an eighth of the steps
BATCH, FOR_G, FOR_H = 16, 16, 4  # rows of a batch; batches for g and for H
FRESH = 10_000  # added to the data seed: examples that no run sees


def wanted(runs: Sequence[Row], names: Sequence[str]) -> Iterator[tuple[str, Row, float]]:
    """Give the runs that count: name of the configuration, row, steps until it is at the target.

    Args:
        runs: rows of all runs.
        names: of configurations; those without rows enough to be read are passed over.
    """
    parts = named(runs)
    for name in (n for n in names if n in parts):
        try:
            found = measured(parts[name], SIZE // per_row(parts[name]))
        except ValueError:
            continue
        for row in reference_runs(parts[name], found.examples):
            yield name, row, steps_to(row, found.target)


def curved(row: Row, reached: float, device: torch.device) -> dict[str, Any]:
    """Make a run again until it is at the target, and read B_noise on the way.

    Args:
        row: of the run.
        reached: steps until it is there.
        device: of torch.

    Returns:
        `readings`, as `gns.curvature.readingsfile` holds them, and `off`, the largest relative difference of
        a step's loss from that of the row.

    Raises:
        RunError: it is not the same run.
    """
    config = RunConfig.of(row["config"])
    with seeded(config.seed, device):
        prepared, course = prepare(config, device), Course(config)
        torch.manual_seed(config.seed)  # as in `experiments.run`
        steps, fresh = loop.Steps(prepared, course), _fresh(config)
        readings = []
        for k in range(READINGS):
            while course.steps < round((k + 0.5) * reached / READINGS):
                steps.next()
            batches = [prepared.collator(next(fresh)) for _ in range(FOR_G + FOR_H)]
            found = b_noise(
                prepared.model,
                [{name: value.to(device) for name, value in batch.items()} for batch in batches],
                hessian_batches=FOR_H,
                seed=k,
                contributions=False,
            )
            readings.append(CurvatureReading(course.steps, lr_at(config, course.steps), found))
    there = np.array(row["train_loss"][: course.steps], dtype=float)
    off = float(np.abs(np.array(course.train_loss) / there - 1).max(initial=0.0))
    if not off <= SAME:  # nor where it is NaN
        raise RunError(f"run {row['hash']} made again is another: its losses are up to {100 * off:.0f} % off")
    return {"readings": [record_of(reading) for reading in readings], "off": off}


def _fresh(config: RunConfig) -> Iterator[list[Any]]:
    """Batches of the run's population that it does not see, each example once."""
    dials = dict(config.dials) | ({"copies": 1} if "copies" in config.dials else {})
    n = READINGS * (FOR_G + FOR_H) * BATCH
    data = data_of(replace(config, data_seed=config.data_seed + FRESH, n_train=n, dials=dials)).train
    return (list(data[at : at + BATCH]) for at in range(0, n, BATCH))


def in_adams_metric(row: Row, device: torch.device) -> dict[str, Any]:
    """Make a run again, measured in AdamW's metric.

    Raises:
        RunError: it failed.
    """
    found = run(replace(RunConfig.of(row["config"]), gns_metric="adam"), device=str(device))
    if found["status"] == "failed":
        raise RunError(f"run {row['hash']} in Adam's metric: {found['error']}")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what has no row yet."""
    parser = argparse.ArgumentParser(prog="python -m experiments.evidence.again", description=__doc__)
    parser.add_argument("--configurations", nargs="+", default=list(CONFIGURATIONS), choices=CONFIGURATIONS)
    parser.add_argument("--only", choices=("adam", "curvature"), help="one of the two")
    parser.add_argument("--device")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    asked = parser.parse_args(arguments)
    device = device_of(asked.device)
    for name in (ADAM, CURVATURE):
        rows.mended(asked.folder / name)
    try:
        runs = runs_in(asked.folder)
        chosen = list(wanted(runs, asked.configurations))
        if asked.only != "curvature":
            known = {row["hash"] for row in runs if row["status"] in rowsfile.RESULTS}
            _adam([row for _, row, _ in chosen], known, asked.folder / ADAM, device)
        if asked.only != "adam":
            _curvature(chosen, asked.folder / CURVATURE, device)
    except RunError as error:
        parser.exit(2, f"{error}\n")


def _adam(chosen: Sequence[Row], known: Collection[str], path: Path, device: torch.device) -> None:
    missing = [
        row
        for row in chosen
        if row["config"]["optimizer"] == "adamw"
        and replace(RunConfig.of(row["config"]), gns_metric="adam").hash not in known
    ]
    for row in tqdm(missing, unit="run", desc="Adam's metric"):
        rows.append(path, in_adams_metric(row, device))


def _curvature(chosen: Sequence[tuple[str, Row, float]], path: Path, device: torch.device) -> None:
    """Read what is missing; a run that cannot be made again is passed over, and named at the end.

    Raises:
        RunError: there were such runs.
    """
    broken = []
    known = rows.read(path)
    missing = [each for each in chosen if read_along(known, *each[1:]) is None]
    for name, row, reached in tqdm(missing, unit="run", desc="B_noise"):
        begun = time.monotonic()
        about = {"configuration": name, "of": row["hash"], "config": row["config"], "reached": reached}
        try:
            found = curved(row, reached, device)
        except RunError as error:
            broken.append(f"{name}: {error}")
            continue
        made = rows.provenance() | {"seconds": round(time.monotonic() - begun, 2), "device": str(device)}
        rows.append(path, rowsfile.finite(about | found | made))
    if broken:
        raise RunError("\n".join(broken))


if __name__ == "__main__":
    main()
