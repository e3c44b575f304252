"""Bootstrap over seeds that works from two seeds on, paired by common random numbers.

Runs of one seed share adapter, data and evaluation items, so a seed moves the whole curve; that shift says
nothing about where the curve bends, and is taken out first. What is left, run by run, is pooled over the
learning rates near the best one at a batch size and its two neighbours, because two or three seeds alone
cannot be resampled. Validation and test residuals are drawn as pairs. Residuals are scaled to unbiased
variance, and by the ratio of Student's quantile to the normal one for the pool's degrees of freedom.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from experiments.analysis.cells import Cell, Floats

LEVEL = 0.95
DRAWS = 1_000


def means(losses: Floats) -> Floats:
    """[J, L], mean over seeds; infinite where one diverged, NaN where one is missing."""
    return losses.mean(axis=-1)


def replicates(cell: Cell, chosen: Floats, draws: int = DRAWS, seed: int = 0) -> tuple[Floats, Floats]:
    """Draw what other seeds could have given.

    Args:
        cell: S seeds; with one seed there is no spread to draw from, and all replicates are the data.
        chosen: [J], place of the best learning rate at each batch; NaN where there is none.
        draws: R, their number.
        seed: of the draws.

    Returns:
        (validation, test), each [R, J, L], means over S seeds; infinite or NaN where the data are.
    """
    random = np.random.default_rng(seed)
    validation, test = means(cell.validation), means(cell.test)
    n_batches, n_rates, n_seeds = cell.validation.shape
    shape = (draws, n_batches, n_rates)
    new_validation = np.broadcast_to(validation, shape).copy()
    new_test = np.broadcast_to(test, shape).copy()
    if n_seeds < 2:
        return new_validation, new_test
    residuals = _residuals(cell, chosen)
    for j in range(n_batches):
        near = [residuals[i] for i in (j - 1, j, j + 1) if i in residuals]
        if not near:
            continue
        pool = np.concatenate(near)  # [n, 2]
        drawn = pool[random.integers(len(pool), size=(draws, n_rates, n_seeds))].mean(axis=2)
        new_validation[:, j] += drawn[..., 0]
        new_test[:, j] += drawn[..., 1]
    return new_validation, new_test


def interval(draws: Floats, level: float = LEVEL) -> tuple[float, float]:
    """Give the central interval of draws; infinite draws count, NaN ones do not.

    Args:
        draws: [R].
        level: of the interval.
    """
    known = np.sort(draws[~np.isnan(draws)])
    if not len(known):
        return -math.inf, math.inf
    # order statistics: an interpolation between a number and infinity would be no number
    low = known[math.floor((1 - level) / 2 * (len(known) - 1))]
    high = known[math.ceil((1 + level) / 2 * (len(known) - 1))]
    return float(low), float(high)


def _residuals(cell: Cell, chosen: Floats) -> dict[int, Floats]:
    """Batch j → [n, 2], validation and test residuals of the runs at the best rate and its neighbours."""
    runs: list[tuple[int, Floats, Floats]] = []
    for j in range(len(cell.batches)):
        if math.isnan(chosen[j]):
            continue
        tried = [i for i in cell.tried(j) if np.isfinite(cell.validation[j, i]).all()]
        place = tried.index(int(chosen[j]))
        near = tried[max(0, place - 1) : place + 2]
        runs += [(j, cell.validation[j, i], cell.test[j, i]) for i in near]
    if not runs:
        return {}
    pairs = np.array([[v - v.mean(), t - t.mean()] for _, v, t in runs])  # [K, 2, S]
    if len(runs) > 1:
        pairs -= pairs.mean(axis=0)  # what a seed does to every run
    n_runs, _, n_seeds = pairs.shape
    lost = n_seeds / (n_seeds - 1) * (n_runs / (n_runs - 1) if n_runs > 1 else 1.0)
    found: dict[int, Floats] = {}
    batches = np.array([j for j, _, _ in runs])
    for j in np.unique(batches):
        pooled = int(np.isin(batches, (j - 1, j, j + 1)).sum())
        free = max(1.0, pooled * n_seeds / lost)
        heavier = stats.t.ppf((1 + LEVEL) / 2, free) / stats.norm.ppf((1 + LEVEL) / 2)
        own = pairs[batches == j] * math.sqrt(lost) * heavier
        found[int(j)] = own.transpose(0, 2, 1).reshape(-1, 2)
    return found
