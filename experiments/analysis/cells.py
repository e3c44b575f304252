"""Rows of a sweep sorted into cells: what is the same but for batch size, learning rate and seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Row = Mapping[str, Any]
Floats = NDArray[np.float64]
AXES = ("batch_size", "lr")
SEEDS = ("seed", "data_seed")
# what does not move the weights of a run; `evals` only where no evaluation can end it, see `_kept`
IGNORED = (*AXES, *SEEDS, "engine", "micro_batch", "gns_every", "gns_metric", "evals", "generate")
NOT_DRAWN = ("full", "foundation", "pissa", "milora")  # adapters that are the same whatever the seed


@dataclass(frozen=True)
class Cell:
    """All runs of one configuration, over J batch sizes, learning rates and S seeds.

    Args:
        fields: of the configuration, task dials as `dials.NAME`; without what does not move a run's weights.
        batches: [J], examples a step, rising.
        rates: learning rates, rising; all that occur at any batch size, L of them.
        seeds: (seed, data_seed), S of them.
        validation: [J, L, S], nats per token at the end of the run; infinite where it diverged, NaN where
            there is no result.
        test: the same on the test split.
        right: [J, L, I, S], 1 where an item of the test split was answered right, 0 where wrong, NaN where
            it was not asked; I is 0 without answers.
        rows: that it was made of.
    """

    fields: Mapping[str, Any]
    batches: tuple[int, ...]
    rates: tuple[float, ...]
    seeds: tuple[tuple[int, int], ...]
    validation: Floats
    test: Floats
    right: Floats
    rows: tuple[Row, ...] = field(compare=False, repr=False)

    def tried(self, j: int) -> NDArray[np.intp]:
        """Give the places of the learning rates that every seed has a row of at batch j, diverged or not."""
        return np.flatnonzero(~np.isnan(self.validation[j]).any(axis=-1))


def independent(cell: Cell) -> list[list[int]]:
    """Give the places of seeds that vary independently: each on its own, or all that share data together.

    Seeds that share the data and their order are no independent draws beside seeds that do not. Where all
    share them there is only what their adapters do; where those are not drawn (`NOT_DRAWN`, without dropout)
    they are one run.
    """
    places: dict[int, list[int]] = {}
    for place, (_, data) in enumerate(cell.seeds):
        places.setdefault(data, []).append(place)
    alike = cell.fields.get("adapter") in NOT_DRAWN and not cell.fields.get("dropout")
    apart = len(places) == 1 and not alike
    return [[i] for i in range(len(cell.seeds))] if apart else list(places.values())


def averaged(values: NDArray[Any], groups: Sequence[Sequence[int]]) -> Floats:
    """[..., D], mean over the members of each group of the last axis; NaN where one is missing."""
    return np.stack([values[..., list(group)].mean(axis=-1) for group in groups], axis=-1)


def by_data(cell: Cell) -> Cell:
    """Give the cell with seeds averaged that are one draw together; S becomes the number of draws."""
    groups = independent(cell)
    if len(groups) == len(cell.seeds):
        return cell
    names = "validation", "test", "right"
    seeds = tuple(cell.seeds[group[0]] for group in groups)
    return replace(cell, seeds=seeds, **{name: averaged(getattr(cell, name), groups) for name in names})


def ruled_out(losses: Floats, best: int) -> NDArray[np.bool_]:
    """Say which learning rates some seeds lack that are worse than the best one on the seeds they have.

    Successive halving leaves such rates behind: they are no result of the cell, but the grid went there.

    Args:
        losses: [L, S], NaN where there is no run, infinite where it diverged.
        best: place of a rate that has all seeds.

    Returns:
        [L], False for rates with all seeds or none.
    """
    there = ~np.isnan(losses)
    pairs = [(own[has], losses[best][has]) for own, has in zip(losses, there, strict=True)]
    worse = np.array([len(own) > 0 and own.mean() > beside.mean() for own, beside in pairs])
    return ~there.all(axis=1) & worse


def fields_of(row: Row) -> dict[str, Any]:
    """Give a row's configuration with the task's dials beside the other fields."""
    config = dict(row["config"])
    return config | {f"dials.{key}": value for key, value in config.pop("dials").items()}


def cells(rows: Iterable[Row]) -> list[Cell]:
    """Sort rows into cells, in the order in which they come up.

    Failed runs are no results. Seeds that a cell has at some batch sizes only are left NaN at the others. Of
    several rows of one place (one of them answered, say) that with the most answers counts.
    """
    groups: dict[tuple, list[tuple[dict[str, Any], Row]]] = {}
    for row in rows:
        if row["status"] == "failed":
            continue
        fields = fields_of(row)
        key = tuple(sorted((k, repr(v)) for k, v in _kept(fields).items()))
        groups.setdefault(key, []).append((fields, row))
    return [_cell(members) for members in groups.values()]


def varied(found: Sequence[Cell]) -> list[str]:
    """Name the fields in which cells differ, in the order of a configuration."""
    names = list(dict.fromkeys(name for cell in found for name in cell.fields))
    return [name for name in names if len({repr(cell.fields.get(name)) for cell in found}) > 1]


def _kept(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Give what a cell is told by: a run to a target ends at an evaluation, so their number counts there."""
    to_target = fields.get("protocol") == "target"
    return {k: v for k, v in fields.items() if k not in IGNORED or (k == "evals" and to_target)}


def _cell(members: Sequence[tuple[dict[str, Any], Row]]) -> Cell:
    """Put the rows of one configuration into arrays."""
    batches = sorted({fields["batch_size"] for fields, _ in members})
    rates = sorted({fields["lr"] for fields, _ in members})
    seeds = sorted({(fields["seed"], fields["data_seed"]) for fields, _ in members})
    validation = np.full((len(batches), len(rates), len(seeds)), math.nan)
    test = validation.copy()
    items = max(len(row.get("items_right") or ()) for _, row in members)
    right = np.full((*validation.shape[:2], items, len(seeds)), math.nan)
    for fields, row in sorted(members, key=lambda member: len(member[1].get("items_right") or ())):
        seed = (fields["seed"], fields["data_seed"])
        at = batches.index(fields["batch_size"]), rates.index(fields["lr"]), seeds.index(seed)
        if row["status"] == "diverged":
            validation[at] = test[at] = math.inf
        else:
            validation[at] = row["validation"][-1]["loss"]
            test[at] = row["test_loss"]
            answers = row.get("items_right") or ()
            right[(*at[:2], slice(len(answers)), at[2])] = answers
    rows = tuple(row for _, row in members)
    return Cell(
        _kept(members[0][0]),
        tuple(batches),
        tuple(rates),
        tuple(seeds),
        validation,
        test,
        right,
        rows,
    )
