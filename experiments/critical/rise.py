"""Where E(B) has risen by a share: by monotone interpolation, with what censored batches leave open."""

from __future__ import annotations

import math

import numpy as np

from experiments.analysis.cells import Floats
from experiments.analysis.curves import Estimated
from experiments.analysis.resampling import LEVEL, interval
from experiments.critical.examples import Efficiency
from experiments.monotone import first_reach, start

SMALL = 0.1  # of B_crit: what the smallest batch must not exceed to stand for a vanishing one


def overhead(found: Efficiency, share: float = 1.0, level: float = LEVEL) -> Estimated:
    """Say at which batch a run needs `share` more examples than at the smallest batch.

    Args:
        found: E(B).
        share: 1 for twice the examples, 0.2 for 20 % more.
        level: of the interval.

    Returns:
        Examples a step. Infinite: not within the grid ("beyond the grid"). Where a censored batch leaves the
        place open, the interval spans what is left, and the value is what it is at least.
    """
    rise, at = math.log1p(share), np.log(found.batches)

    def batches(logs: Floats) -> Floats:
        """[1 + R]: where each reading of ln E has risen that much."""
        return np.exp(first_reach(at, logs, start(logs) + rise))

    known = np.vstack([found.log_examples, found.draws])  # [1 + R, J]
    lows = highs = batches(np.where(found.censored, np.inf, known))
    if found.censored.any():  # at least what was seen, and E does not fall
        highs = batches(np.where(found.censored, np.maximum.accumulate(known, axis=1), known))
        highs = open_above(lows, highs, found)
    return _estimated(found, lows, highs, level, share)


def open_above(lows: Floats, highs: Floats, found: Efficiency) -> Floats:
    """Give what places may be at the most: where they lie within the batches that arrived, what they are.

    What was censored bends the interpolant there as well, and says nothing of it.

    Args:
        lows: [...], places read as if what was censored never arrived.
        highs: [...], as if it arrived with the examples that it saw.
        found: E(B), of which something is censored.
    """
    last = found.batches[max(int(found.censored.argmax()) - 1, 0)]  # places are exp(log B): a rounding less
    return np.where(lows >= last * (1 - 1e-9), np.maximum(lows, highs), lows)


def _estimated(found: Efficiency, lows: Floats, highs: Floats, level: float, share: float) -> Estimated:
    """Put values and replicates of both readings of what is censored into one estimate."""
    notes, at_least = [], bool(highs[0] > lows[0])
    if len(found.draws):
        low, high = interval(lows[1:], level)[0], interval(highs[1:], level)[1]
    else:
        low, high = 0.0, math.inf
        notes.append("one seed, or one batch with all: no interval")
    if found.censored[0]:
        return Estimated(math.nan, 0.0, math.inf, "the smallest batch did not reach the target")
    if found.censored.any():
        low, high = min(low, float(lows[0])), max(high, float(highs[0]))
        lost = ", ".join(str(int(b)) for b in found.batches[found.censored])
        notes.append(f"{'at least: ' if at_least else ''}censored at batch {lost}")
    value = float(lows[0])
    if math.isinf(value):
        notes.append("beyond the grid")
    elif found.batches[0] > SMALL * value / share:
        notes.append(f"batch {int(found.batches[0])} is not small against it: reads high")
    if found.edges:
        notes.append(f"learning rate at the edge of its grid at batch {', '.join(map(str, found.edges))}")
    return Estimated(value, low, high, "; ".join(notes), lows[1:], lows[1:], highs[1:], at_least)
