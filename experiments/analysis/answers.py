"""Right answers that a rule for the batch size gives away: exact matches, paired item by item."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from experiments.analysis.cells import Floats
from experiments.analysis.curves import Curve, Estimated
from experiments.analysis.resampling import DRAWS, interval


def answers_lost(
    found: Sequence[Curve], chosen: Sequence[float], draws: int = DRAWS, seed: int = 0
) -> Estimated:
    """Price a rule: share of right answers at the batch best on validation loss less that at its choice.

    Both at the learning rate that is best on validation loss. A choice between two batch sizes is read off a
    line in log₂ B, one beyond the grid at its edge. Configurations without answers are left out.

    Args:
        found: [K], a curve for each configuration.
        chosen: [K], batch sizes that the rule gives.
        draws: replicates, over configurations and items: all answer the same ones, so that a draw of items
            is a draw for all of them.
        seed: of the draws.

    Returns:
        Mean over configurations, −1 … 1; NaN where none has answers.
    """
    own = [lost for c, b in zip(found, chosen, strict=True) if (lost := _lost(c, b)) is not None]
    if not own:
        return Estimated(math.nan, -math.inf, math.inf)
    items = min(len(lost) for lost in own)
    lost = np.array([each[:items] for each in own])  # [K, items]
    random = np.random.default_rng(seed)
    weights = random.multinomial(items, np.full(items, 1 / items), size=draws) / items  # [R, items]
    of = random.multinomial(len(lost), np.full(len(lost), 1 / len(lost)), size=draws) / len(lost)  # [R, K]
    means = np.einsum("rk,ki,ri->r", of, lost, weights)
    return Estimated(float(lost.mean()), *interval(means), "", means)


def _lost(found: Curve, batch: float) -> Floats | None:
    """[items], right answers at the best batch less those at another, means over seeds; None without any."""
    right = _right(found)
    if right is None:
        return None
    inside = min(max(batch, found.batches[0]), found.batches[-1])
    at = np.interp(np.log2(inside), np.log2(found.batches), np.arange(len(found.batches)))
    low = min(int(at), max(0, len(found.batches) - 2))
    high = min(low + 1, len(found.batches) - 1)
    between = right[low] + (at - low) * (right[high] - right[low])
    return right[int(found.validation.argmin())] - between


def _right(found: Curve) -> Floats | None:
    """[J, items], 0 … 1 over seeds at the chosen learning rates; None where a run has no answers."""
    cell = found.cell
    answered = {}
    for row in cell.rows:
        if row.get("items_right"):
            config = row["config"]
            place = config["batch_size"], config["lr"], (config["seed"], config["data_seed"])
            answered[place] = np.array(row["items_right"], dtype=float)
    made = []
    for batch in found.batches:
        rate = cell.rates[found.place(batch)[1]]
        own = [answered.get((int(batch), rate, seed)) for seed in cell.seeds]
        if any(each is None for each in own):
            return None
        made.append(np.mean([each for each in own if each is not None], axis=0))
    return np.array(made)
