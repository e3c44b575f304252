"""The trade-off law fitted to E(B): a diagnostic beside what is read off it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from experiments.analysis.cells import Floats
from experiments.analysis.curves import Estimated
from experiments.analysis.resampling import LEVEL, interval
from experiments.critical.examples import Efficiency

OCTAVES = np.arange(-8.0, 24.0, 0.05)  # log₂ of the critical batch sizes that the hyperbola is tried with


@dataclass(frozen=True)
class Hyperbola:
    """E = E_min (1 + B/B_crit), that is (S/S_min − 1)(E/E_min − 1) = 1, fitted to the batches that arrived.

    Args:
        b_crit: examples.
        e_min: examples at a vanishing batch.
        s_min: steps at an infinite one, E_min/B_crit.
        misfit: root mean square of ln (measured/fitted), over the degrees of freedom that are left.
    """

    b_crit: Estimated
    e_min: float
    s_min: float
    misfit: float


def hyperbola(found: Efficiency, level: float = LEVEL) -> Hyperbola:
    """Fit the trade-off law in ln E, by least squares; censored batches are left out and named.

    Raises:
        ValueError: fewer than three batches arrived.
    """
    arrived = ~found.censored & np.isfinite(found.log_examples)
    if arrived.sum() < 3:
        raise ValueError(f"a hyperbola needs three batch sizes that reach the target; {arrived.sum()} do")
    shapes = np.log1p(found.batches[arrived] / np.exp2(OCTAVES)[:, None])  # [G, J]
    place, level_, misfit = _fitted(shapes, found.log_examples[arrived])
    drawn = np.array([_fitted(shapes, draw[arrived])[0] for draw in found.draws], dtype=int)
    sizes = np.exp2(np.concatenate([[-np.inf], OCTAVES[1:-1], [np.inf]]))  # a fit at the end has no end
    low, high = interval(sizes[drawn], level) if len(drawn) else (0.0, math.inf)
    notes = [f"without batch {int(b)}, censored" for b in found.batches[~arrived]]
    notes += ["E does not bend within the grid"] if place in (0, len(OCTAVES) - 1) else []
    e_min, b_crit = math.exp(level_), float(sizes[place])
    left = math.sqrt(misfit / max(1, int(arrived.sum()) - 2))
    return Hyperbola(
        Estimated(b_crit, low, high, "; ".join(notes), sizes[drawn]),
        e_min,
        e_min / b_crit if b_crit else 0.0,
        left,
    )


def _fitted(shapes: Floats, logs: Floats) -> tuple[int, float, float]:
    """Best row of shapes [G, J], the ln E_min that goes with it, and the sum of squares."""
    levels = (logs - shapes).mean(axis=1)
    squares = ((logs - shapes - levels[:, None]) ** 2).sum(axis=1)
    place = int(np.argmin(squares))
    return place, float(levels[place]), float(squares[place])
