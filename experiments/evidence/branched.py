"""`python -m experiments.evidence.branched`: the third definition of the critical batch, by configuration.

    python -m experiments.evidence.branched                              # every configuration that has rows
    python -m experiments.evidence.branched --configurations reference   # one of them

A trunk at the smallest batch and the learning rate that is first at the target there, over N/2 rows, and
branches at 1 to 32 times the batch over the next N/2, for N = 1,024. Each seed draws adapters and data. About
a minute a seed on one core; what has rows is not made again.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments import rows
from experiments.analysis.cells import Row
from experiments.analysis.curves import Estimated
from experiments.branches import branch_runs
from experiments.configs import RunConfig, RunError
from experiments.critical import branched
from experiments.evidence.configurations import CONFIGURATIONS, SIZE, named, per_row
from experiments.evidence.files import BRANCHES, FOLDER, runs_in
from experiments.evidence.measured import measured

SEEDS = tuple(range(4))  # of adapters and data
MULTIPLES = (1, 2, 4, 8, 16, 32)  # of the batch: on past where examples double
LEAST = 4  # steps of a branch: one of fewer hardly trains


def trunks(
    runs: Sequence[Row], names: Collection[str], seeds: Sequence[int] = SEEDS
) -> Iterator[tuple[str, RunConfig]]:
    """Give a trunk for each seed of each configuration that can be read.

    Args:
        runs: rows of all runs.
        names: of configurations.
        seeds: of adapters and data.
    """
    for name, part in named(runs).items():
        if name not in names:
            continue
        try:
            examples = measured(part, SIZE // per_row(part)).examples
        except ValueError:
            continue
        smallest = {"batch_size": int(examples.batches[0]), "lr": float(examples.rates[0])}
        unread = {"gns_every": 0, "gns_metric": "euclidean"}  # whatever the first row measured
        for seed in seeds:
            yield (
                name,
                RunConfig.of(part[0]["config"] | smallest | unread | {"seed": seed, "data_seed": seed}),
            )


def branches_of(name: str, trunk: RunConfig, device: str | None = None) -> dict[str, Any]:
    """Make the branches of a trunk: from the middle of the way to N on.

    Returns:
        One row: the configuration's name, the trunk's hash, and a row for each branch as of `branch_runs`.

    Raises:
        RunError: one of them failed.
    """
    length = SIZE // 2 // trunk.dials.get("merged", 1)
    multiples = [k for k in MULTIPLES if length >= LEAST * k * trunk.batch_size]
    made = branch_runs(trunk, length // trunk.batch_size, length, multiples, device)
    if failed := [row["error"] for row in made if row["status"] == "failed"]:
        raise RunError(f"{name}, seed {trunk.seed}: {failed[0]}")
    return {"configuration": name, "trunk": trunk.hash, "branches": made}


def branched_batches(made: Sequence[Mapping[str, Any]]) -> dict[str, Estimated]:
    """Give the largest batch that branches went on at for free, by configuration.

    Args:
        made: rows of this module; of several learning rates of a trunk the last one's count.

    Returns:
        By configuration; NaN with a note where no batch can be named, as the trunk's own batch diverged.
    """
    found: dict[str, Estimated] = {}
    for name in CONFIGURATIONS:
        own = [each["branches"] for each in made if each["configuration"] == name]
        own = [each for each in own if each[0]["config"]["lr"] == own[-1][0]["config"]["lr"]]
        if len(own) > 1:
            try:
                found[name] = branched(row for each in own for row in each)
            except ValueError as error:
                found[name] = Estimated(math.nan, -math.inf, math.inf, str(error))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what has no rows yet; what fails is named at the end, with 2 as the status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.evidence.branched", description=__doc__)
    parser.add_argument("--configurations", nargs="+", default=list(CONFIGURATIONS), choices=CONFIGURATIONS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--device")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    asked = parser.parse_args(arguments)
    path = asked.folder / BRANCHES
    rows.mended(path)
    known = {row["trunk"] for row in rows.read(path)}
    chosen = trunks(runs_in(asked.folder), asked.configurations, asked.seeds)
    missing = [(name, trunk) for name, trunk in chosen if trunk.hash not in known]
    failed = []
    for name, trunk in tqdm(missing, unit="trunk", desc="branches"):
        try:
            rows.append(path, branches_of(name, trunk, asked.device))
        except RunError as error:
            failed.append(str(error))
    if failed:
        parser.exit(2, "\n".join((*failed, "")))


if __name__ == "__main__":
    main()
