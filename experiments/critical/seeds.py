"""What seeds do to what was measured: residuals to redraw from, for two seeds cannot be resampled."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from experiments.analysis.cells import Floats
from experiments.analysis.resampling import LEVEL


def redrawn(values: Floats, draws: int, seed: int) -> Floats:
    """[R, J], means over seeds that could have been: rows of [J, S] plus redrawn residuals."""
    pool = residuals(values[np.isfinite(values).all(axis=1)], shared=False)
    drawn = np.random.default_rng(seed).choice(pool, size=(draws, *values.shape)).mean(axis=2)
    return values.mean(axis=1) + drawn


def residuals(values: Floats, shared: bool = True) -> Floats:
    """What seeds do to each row of [K, S], pooled: unbiased variance, Student's width.

    Args:
        values: K batches, S seeds.
        shared: leave out what a seed does to all rows alike.
    """
    n, n_seeds = values.shape
    if n_seeds < 2 or n < 1 + shared:
        return np.zeros(1)
    left = values - values.mean(axis=1, keepdims=True)
    if shared:
        left = left - left.mean(axis=0)
    free = (n - shared) * (n_seeds - 1)
    heavier = stats.t.ppf((1 + LEVEL) / 2, free) / stats.norm.ppf((1 + LEVEL) / 2)
    return left.ravel() * math.sqrt(left.size / free) * heavier
