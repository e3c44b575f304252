"""The noise scale that the runs of a cell measured, as the rows hold it."""

from __future__ import annotations

import math

import numpy as np

from experiments.analysis.cells import Cell
from experiments.analysis.curves import Estimated


def measured(
    cell: Cell, part: str = "B", kind: str = "progress_weighted", metric: str = "euclidean"
) -> Estimated | None:
    """Give a cell's noise scale, from the smallest batch at which it was measured.

    Above the critical batch size no average over a run works, so the smallest batch is the reference. Of the
    learning rates measured there the one with the smallest validation loss counts; over seeds, the geometric
    mean of values and of the ends of their intervals: each the width of one run's, however many seeds.

    Args:
        cell: whose rows may have readings.
        part: "B", "A" or "joint"; "joint" is taken where a run has no factors.
        kind: "progress_weighted" or "summary".
        metric: of the readings.

    Returns:
        B_simple, examples; infinite where some run found no upper end; None where nothing was measured.
    """
    read = [(row, _part(row["gns"][kind], part)) for row in cell.rows if _has(row, kind, metric)]
    if not read:
        return None
    smallest = min(row["config"]["batch_size"] for row, _ in read)
    at = [(row, found) for row, found in read if row["config"]["batch_size"] == smallest]
    losses: dict[float, list[float]] = {}
    for row, _ in at:
        losses.setdefault(row["config"]["lr"], []).append(row["validation"][-1]["loss"])
    best = min(losses, key=lambda rate: float(np.mean(losses[rate])))
    chosen = [found for row, found in at if row["config"]["lr"] == best]
    value, low, high = (_geometric([_number(f[key]) for f in chosen]) for key in ("b_simple", "low", "high"))
    note = f"batch {smallest}, learning rate {best:.3g}, {len(chosen)} run(s)"
    return Estimated(value, low, high, note)


def _has(row: dict, kind: str, metric: str) -> bool:
    """Whether a row has a reading of this kind."""
    gns = row.get("gns")
    return row["status"] == "done" and bool(gns) and gns["metric"] == metric and "joint" in gns[kind]


def _part(reading: dict, part: str) -> dict:
    """Give one factor's figures, or the joint ones where there are no factors."""
    return reading.get(part, reading["joint"])


def _number(value: float | None) -> float:
    """JSON has no infinity: null stands for it."""
    return math.inf if value is None else value


def _geometric(values: list[float]) -> float:
    """Geometric mean; a single infinite value makes it so, and one that is not positive makes it 0."""
    if min(values) <= 0:
        return 0.0
    return math.inf if math.inf in values else float(np.exp(np.mean(np.log(values))))
