"""The noise scale that the runs of a cell measured, as the rows hold it."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
        B_simple, examples: NaN where some run found none (|G|² not above 0), the upper end infinite where
        some run found no upper end; None where nothing was measured.
    """
    read = [(row, _part(row["gns"][kind], part)) for row in cell.rows if _has(row, kind, metric)]
    if not read:
        return None
    smallest = min(row["config"]["batch_size"] for row, _ in read)
    at = [(row, found) for row, found in read if row["config"]["batch_size"] == smallest]
    means = cell.validation[cell.batches.index(smallest)].mean(axis=-1)  # over all seeds, as a curve's
    best = min({row["config"]["lr"] for row, _ in at}, key=lambda rate: _loss(means[cell.rates.index(rate)]))
    chosen = [found for row, found in at if row["config"]["lr"] == best]
    value = geometric([_known(f["b_simple"]) for f in chosen])
    low = geometric([_known(f["low"]) for f in chosen])
    high = geometric([math.inf if f["high"] is None else f["high"] for f in chosen])
    note = f"batch {smallest}, learning rate {best:.3g}, {len(chosen)} run(s)"
    return Estimated(value, low, high, note)


def _has(row: dict, kind: str, metric: str) -> bool:
    """Whether a row has a reading of this kind, with steps enough for one."""
    gns = row.get("gns")
    there = row["status"] == "done" and bool(gns) and gns["metric"] == metric and "joint" in gns[kind]
    return there and gns[kind]["joint"].get("status") != "collecting"


def _part(reading: dict, part: str) -> dict:
    """Give one factor's figures, or the joint ones where there are no factors."""
    return reading.get(part, reading["joint"])


def _loss(mean: float) -> float:
    """A mean over seeds; of one that diverged or is missing nothing is known, and it comes last."""
    return float(mean) if math.isfinite(mean) else math.inf


def _known(value: float | None) -> float:
    """JSON has no NaN: null stands for it."""
    return math.nan if value is None else value


def geometric(values: Sequence[float]) -> float:
    """Give the geometric mean of batch sizes.

    NaN where a value is NaN or below 0, 0 where one is 0, infinite where one is.
    """
    if any(math.isnan(v) or v < 0 for v in values):
        return math.nan
    if 0 in values:
        return 0.0
    return math.inf if math.inf in values else float(np.exp(np.mean(np.log(values))))
