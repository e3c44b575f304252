"""`python -m experiments.evidence.seeds`: a preset with more runs of configurations that have been run.

    python -m experiments.evidence.seeds laptop-critical            # presets/laptop-critical-seeds.toml
    python -m experiments.sweep --preset laptop-critical-seeds
    python -m experiments.evidence.seeds laptop-critical --edges    # presets/laptop-critical-edges.toml
    python -m experiments.evidence.seeds laptop-critical --together # presets/laptop-critical-together.toml

With --edges: where the best learning rate of a batch that arrived is the last of its grid, one beyond it, in
the seeds of the preset; with --together: the same of all seeds that the configuration has.

The learning rates are halved, never the batch sizes: at each batch size the best one and its two neighbours
go on. A rate that is left behind is no result any more, but the grid counts as having gone there. New seeds
draw adapters and data: the first two differ in the adapter alone, and share data and their order.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments import grids, rows
from experiments.analysis.cells import Row
from experiments.configs import RunConfig, RunError
from experiments.evidence.configurations import CONFIGURATIONS, SIZE, named, per_row
from experiments.evidence.files import FOLDER, runs_in
from experiments.evidence.measured import REFERENCE, Measured, measured

SEEDS = (2, 3)
KEPT = 3  # learning rates of a batch size
COMMON = ("base", "task", "n_train", "rank", "n_eval", "evals", "schedule")

ABOUT = {
    "seeds": (
        """at each batch size the learning rate that was first at the target of N = {n:,} in the first two
# seeds (of the lowest loss where none arrived), and its neighbours. Seeds draw adapters and data here
# (PREREGISTRATION.md, changes).""",
        "more seeds",
        "How sure are the critical batch sizes of these configurations?",
    ),
    "edges": (
        """where the learning rate that was first at the target of N = {n:,} was the last of its grid, one
# more by √2 (PREREGISTRATION.md, grid).""",
        "rates beyond the grid",
        "Is the best learning rate of these batch sizes beyond those that were tried?",
    ),
    "together": (
        """where the learning rate that was first at the target of N = {n:,} in all seeds together was the
# last that all of them have, one more by √2 (PREREGISTRATION.md, grid).""",
        "rates beyond those of all seeds",
        "Is the best learning rate of these batch sizes beyond those that all seeds have?",
    ),
}
HEAD = """\
# Two cores, two workers of one thread each, under 60 minutes. `python -m experiments.evidence.seeds {call}`
# wrote it: {how}
title = "Examples to a target loss, {title}: {names}"
question = "{question}"
scale = "laptop"
figures = ["curves", "surface", "scales"]
series = [{series}]

[rules]
least_steps = 16

[defaults]
{defaults}
"""


def kept(found: Measured) -> dict[int, tuple[float, ...]]:
    """Give the learning rates that go on: the best one and its neighbours, of those that all seeds have.

    Best is the one first at the target; where none arrives, the one of the lowest loss at the end.

    Args:
        found: a reading of the configuration.

    Returns:
        Batch size → rates, rising; fewer than three where no more were tried.
    """
    examples, cell, made = found.examples, found.cell, {}
    for batch, best in zip(examples.batches.astype(int), examples.rates, strict=True):
        rates = [cell.rates[i] for i in cell.tried(cell.batches.index(batch))]
        start = int(np.clip(rates.index(best) - KEPT // 2, 0, max(0, len(rates) - KEPT)))
        made[int(batch)] = tuple(rates[start : start + KEPT])
    return made


def more(part: Sequence[Row], seeds: Sequence[int]) -> list[RunConfig]:
    """Give the runs of a configuration with other seeds.

    Args:
        part: rows of the configuration.
        seeds: of adapters and data.

    Raises:
        ValueError: the rows do not give its examples to the target.
    """
    return _runs(part, kept(measured(part, SIZE // per_row(part))), [(seed, seed) for seed in seeds])


def beyond(part: Sequence[Row], own: Sequence[Row]) -> list[RunConfig]:
    """Give the runs that extend a configuration's grids: one learning rate beyond each edge, all seeds.

    What was extended before is among them, so that a preset says all of it.

    Args:
        part: rows of the configuration.
        own: of these, the rows of the grid that is extended.

    Raises:
        ValueError: the rows do not give its examples to the target.
    """
    found = measured(part, SIZE // per_row(part))
    examples, rates = found.examples, {}
    for batch, rate in sorted(_places(part) - _places(own)):
        rates.setdefault(batch, []).append(rate)
    for batch, best, lost in zip(
        examples.batches.astype(int), examples.rates, examples.censored, strict=True
    ):
        if batch in examples.edges and not lost:
            j = found.cell.batches.index(batch)
            upper = best == found.cell.rates[found.cell.tried(j)[-1]]
            rates.setdefault(int(batch), []).append(float(f"{best * 2 ** (0.5 if upper else -0.5):.3g}"))
    return _runs(part, {batch: sorted(of) for batch, of in sorted(rates.items())}, found.cell.seeds)


def of_the_seeds(part: Sequence[Row], own: Sequence[Row]) -> list[Row]:
    """Give the rows of a grid's seeds, whichever preset made them: the grid's own and what extends it.

    Args:
        part: rows of the configuration.
        own: of these, the rows of the grid.
    """
    seeds = {(row["config"]["seed"], row["config"]["data_seed"]) for row in own}
    return [row for row in part if (row["config"]["seed"], row["config"]["data_seed"]) in seeds]


def _places(part: Sequence[Row]) -> set[tuple[int, float]]:
    """Batch sizes and learning rates."""
    return {(row["config"]["batch_size"], row["config"]["lr"]) for row in part}


def _runs(
    part: Sequence[Row], rates: Mapping[int, Sequence[float]], seeds: Sequence[tuple[int, int]]
) -> list[RunConfig]:
    """Give runs of a configuration at other rates and seeds, with the noise scale at the reference batch."""
    common = RunConfig.of(part[0]["config"])
    return [
        replace(
            common,
            batch_size=batch,
            lr=rate,
            seed=seed,
            data_seed=data,
            gns_every=int(batch == REFERENCE),
            gns_metric="euclidean",
        )
        for batch, own in rates.items()
        for rate in own
        for seed, data in seeds
    ]


def written(of: str, runs: Mapping[str, list[RunConfig]], kind: str = "seeds") -> str:
    """Write the preset.

    Args:
        of: name of the preset whose runs these go on.
        kind: of `ABOUT`.
        runs: configuration → runs.

    Returns:
        TOML that `experiments.grids` reads as exactly these runs.

    Raises:
        RunError: it does not, as runs differ in a field that is not written.
    """
    every = [config for part in runs.values() for config in part]
    first = every[0]
    own = [CONFIGURATIONS[name] for name in runs]
    differ = sorted({key for each in own for key in each})
    if len(own) > 1:  # what they have in common tells no curve from another
        differ = [
            key
            for key in differ
            if key not in COMMON or any(each.get(key) != own[0].get(key) for each in own)
        ]
    defaults = {key: getattr(first, key) for key in COMMON if key not in differ}
    how, title, question = ABOUT[kind]
    text = HEAD.format(
        call=of if kind == "seeds" else f"{of} --{kind}",
        how=how.format(n=SIZE),
        title=title,
        question=question,
        names="; ".join(runs),
        series=", ".join(map(_toml, differ or ["rank"])),
        defaults="\n".join(f"{key} = {_toml(value)}" for key, value in defaults.items()),
    )
    for part in runs.values():
        text += "\n[[cells]]\n" + "\n".join(_cell(part, differ, defaults)) + "\n"
    again = grids.parsed(of, tomllib.loads(text), f"{of}-{kind}.toml").configs
    if {config.hash for config in again} != {config.hash for config in every}:
        raise RunError(f"{of}: its runs differ in more than a preset of {kind} can say")
    return text


def _cell(part: Sequence[RunConfig], differ: Sequence[str], defaults: Mapping[str, Any]) -> Iterator[str]:
    """Write the lines of one configuration."""
    first = part[0]
    for key in differ:
        dial = key.startswith("dials.")
        value = first.dials.get(key.removeprefix("dials.")) if dial else getattr(first, key)
        if value is not None:
            yield f"{_toml(key) if dial else key} = {_toml(value)}"
    yield from (
        f"{key} = {_toml(getattr(first, key))}" for key in defaults if getattr(first, key) != defaults[key]
    )
    seeds, data = (list(each) for each in zip(*sorted({(c.seed, c.data_seed) for c in part}), strict=True))
    yield f"\n[[cells.zip]]\nseed = {_toml(seeds)}\ndata_seed = {_toml(data)}\n"
    batches = list(dict.fromkeys(config.batch_size for config in part))
    yield f"[[cells.zip]]\nbatch_size = {_toml(batches)}"
    yield "lr = ["
    for batch in batches:
        yield f"  {_toml(list(dict.fromkeys(c.lr for c in part if c.batch_size == batch)))},"
    yield "]"
    yield f"gns_every = {_toml([int(batch == REFERENCE) for batch in batches])}"


def _toml(value: Any) -> str:
    """Write a text, a number or a list of numbers: as JSON does."""
    return json.dumps(value, ensure_ascii=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and write the preset; exit with 2 and a word on what is missing if it cannot."""
    parser = argparse.ArgumentParser(prog="python -m experiments.evidence.seeds", description="More seeds.")
    parser.add_argument("preset", help="whose runs are committed, e.g. laptop-critical")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--edges", action="store_true", help="rates beyond the grid, of the preset's seeds")
    kinds.add_argument("--together", action="store_true", help="the same, of all seeds that there are")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the committed rows")
    parser.add_argument("--out", type=Path, help="file to write (default: presets/NAME-KIND.toml)")
    asked = parser.parse_args(arguments)
    kind = "together" if asked.together else "edges" if asked.edges else "seeds"
    source = asked.folder / f"{asked.preset}.jsonl.gz"
    out = asked.out or grids.FOLDER / f"{asked.preset}-{kind}.toml"
    try:
        if not source.exists():
            raise RunError(f"{source}: no such file of rows; run and --collect {asked.preset} first")
        grids_of = named(rows.read(source))
        if not grids_of:
            raise RunError(f"{source}: no rows of a preregistered configuration")
        extended = {row["hash"] for row in rows.read(asked.folder / f"{asked.preset}-together.jsonl.gz")}
        every, runs = named(runs_in(asked.folder)), {}
        for name, own in grids_of.items():
            if asked.together:
                runs[name] = beyond(every[name], [row for row in every[name] if row["hash"] not in extended])
                continue
            part = of_the_seeds(every[name], own)
            runs[name] = beyond(part, own) if asked.edges else more(part, asked.seeds)
        runs = {name: part for name, part in runs.items() if part}
        if not runs:
            raise RunError(f"{source}: no batch that arrived has its best learning rate at an edge")
        text = written(asked.preset, runs, kind)
    except (RunError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    out.write_text(text, encoding="utf-8")
    print(out)


if __name__ == "__main__":
    main()
