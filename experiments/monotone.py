"""Where a noisy curve that should rise first reaches a level: isotonic regression, then PCHIP."""

from __future__ import annotations

import numpy as np
from scipy.interpolate import PchipInterpolator

from experiments.analysis.cells import Floats

FINE = 32  # places between two points at which the interpolant is looked at; linear between those
ROUNDING = 1e-12


def isotonic(y: Floats) -> Floats:
    """Least-squares fit that does not fall, for each row.

    f_j = max over i ≤ j of min over k ≥ j of the mean of y_i … y_k (Barlow et al. 1972, theorem 1.4).

    Args:
        y: [R, J], finite.

    Returns:
        [R, J].

    Slow twin: scipy.optimize.isotonic_regression, row by row.
    """
    n_rows, n = y.shape
    sums = np.concatenate([np.zeros((n_rows, 1)), np.cumsum(y, axis=1)], axis=1)
    found = np.full((n_rows, n), -np.inf)
    for i in range(n):
        means = (sums[:, i + 1 :] - sums[:, i : i + 1]) / np.arange(1, n - i + 1)  # of y_i … y_k
        least = np.minimum.accumulate(means[:, ::-1], axis=1)[:, ::-1]  # over k ≥ j
        found[:, i:] = np.maximum(found[:, i:], least)
    return found


def start(y: Floats) -> Floats:
    """[R]: where each row's monotone curve begins; ∞ where its first value is infinite.

    Args:
        y: [R, J]; from its first infinite value on all of a row counts as infinite.
    """
    found = np.full(len(y), np.inf)
    for n, rows in _by_length(y):
        if n:
            found[rows] = isotonic(y[rows, :n])[:, 0]
    return found


def first_reach(x: Floats, y: Floats, level: Floats) -> Floats:
    """Say where each row of y, made monotone, first reaches its level.

    An infinite y is reached right after the point before it.

    Args:
        x: [J], rising.
        y: [R, J]; from its first infinite value on all of a row counts as infinite.
        level: [R].

    Returns:
        [R], places in x; ∞ where the last y is below, x[0] where the first is not.
    """
    found = np.full(len(y), x[0], dtype=float)
    for n, rows in _by_length(y):
        if n:
            found[rows] = _reach(x[:n], isotonic(y[rows, :n]), level[rows])
            beyond = np.inf if n == len(x) else x[n - 1]
            found[rows] = np.minimum(found[rows], beyond)
    return found


def _reach(x: Floats, y: Floats, level: Floats) -> Floats:
    """[R]: places of finite, monotone rows; ∞ where the level is not reached."""
    if len(x) == 1:
        return np.where(y[:, 0] >= level - ROUNDING, x[0], np.inf)
    fine = np.interp(np.arange(FINE * (len(x) - 1) + 1) / FINE, np.arange(len(x)), x)
    curve = np.maximum.accumulate(PchipInterpolator(x, y, axis=1)(fine), axis=1)  # [R, fine]
    above = curve >= (level - ROUNDING * np.maximum(1, np.abs(level)))[:, None]
    at = above.argmax(axis=1)
    before = np.maximum(at - 1, 0)
    low, high = (np.take_along_axis(curve, i[:, None], axis=1)[:, 0] for i in (before, at))
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(high > low, (level - low) / (high - low), 1.0)
    place = fine[before] + np.clip(share, 0, 1) * (fine[at] - fine[before])
    return np.where(above.any(axis=1), np.where(at == 0, x[0], place), np.inf)


def _by_length(y: Floats) -> list[tuple[int, Floats]]:
    """Sort rows by how many values they have before the first infinite one."""
    infinite = np.isinf(y)
    lengths = np.where(infinite.any(axis=1), infinite.argmax(axis=1), y.shape[1])
    return [(int(n), np.flatnonzero(lengths == n)) for n in np.unique(lengths)]
