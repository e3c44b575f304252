"""What a row of paired times says: the median of its ratios, how well it is known, how far steps scatter."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES, LEVEL = 4_000, 0.95


@dataclass(frozen=True)
class Ratio:
    """Time of a step, × the untouched step.

    Args:
        middle: median of the paired ratios.
        low: lower quartile of the ratios: how far single steps scatter.
        high: upper quartile.
        least: lower end of the 95 % bootstrap interval of the median: how well the median is known.
        most: its upper end.
        pairs: how many ratios there are.
    """

    middle: float
    low: float
    high: float
    least: float
    most: float
    pairs: int

    @property
    def off(self) -> float:
        """How far from 1 the interval reaches: of A/A, what cannot be told apart."""
        return max(abs(self.least - 1), abs(self.most - 1))

    def __str__(self) -> str:
        return f"{self.middle:.3f} ({self.least:.3f} … {self.most:.3f})"


def ratio(row: Mapping[str, Any]) -> Ratio:
    """Ratios arm/untouched of a row's pairs; of sums over blocks, if there are.

    The bootstrap draws pairs as if each were independent of the next. Neighbours share one untouched step,
    which correlates them by 1/6 at most: the interval is then 15 % too narrow.
    """
    size = row.get("block", 1)
    plain, other = (_sums(row[key], size) for key in ("untouched_s", "arm_s"))
    ratios = [b / a for a, b in zip(plain, other, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    least, most = bootstrap(ratios)
    return Ratio(statistics.median(ratios), low, high, least, most, len(ratios))


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the median."""
    drawn = np.random.default_rng(seed).choice(values, (RESAMPLES, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _sums(values: Sequence[float], size: int) -> list[float]:
    return [sum(values[i : i + size]) for i in range(0, len(values) - size + 1, size)]
