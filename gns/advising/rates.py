"""A learning rate carried from one batch size to another, by each law, as curves with bands. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gns.advising.tradeoff import LAWS, band

PER_OCTAVE = 8  # points of a curve from one power of two to the next


@dataclass(frozen=True)
class RateCurve:
    """The learning rate that one law gives at each batch size, starting from the one in use.

    B_simple stands in for the law's own noise scale; the band is only the interval of B_simple.

    Args:
        law: name of the law, a key of `gns.advising.tradeoff.LAWS`.
        batches: [k], examples a step, rising; not only whole numbers.
        low: [k], least learning rate over the interval of the noise scale.
        high: [k], largest.
    """

    law: str
    batches: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def rate_curves(
    rate: float, reference: int, ends: tuple[float, float], first: float, last: float
) -> tuple[RateCurve, ...]:
    """Draw every law on a fine grid.

    Args:
        rate: learning rate in use.
        reference: batch in use, which is put on the grid.
        ends: interval of the noise scale, examples.
        first: smallest batch of the grid.
        last: largest.

    Returns:
        One curve a law.
    """
    octaves = math.log2(last / first)
    count = max(1, math.ceil(octaves * PER_OCTAVE))
    grid = {first * 2 ** (octaves * i / count) for i in range(count + 1)}
    batches = tuple(sorted(grid | {float(reference)}))
    curves = []
    for name, law in LAWS.items():
        bands = [band([rate * law(batch, reference, b) for b in ends]) for batch in batches]
        curves.append(RateCurve(name, batches, tuple(low for low, _ in bands), tuple(h for _, h in bands)))
    return tuple(curves)


def spread(batch: float, reference: float, ends: Sequence[float]) -> float:
    """How far apart the learning-rate laws are at one batch, largest over smallest, at the worse end."""
    at_each_end = [[law(batch, reference, b) for law in LAWS.values()] for b in ends]
    return max(max(ratios) / min(ratios) for ratios in at_each_end)
