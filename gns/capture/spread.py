"""Norms of single examples in a step: what is kept of them is their fourth moment and the largest few."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

FEW = 10  # one example in so many is kept by its norm


def kept(n: int) -> int:
    """How many of n examples are kept by their norm, ⌈n/10⌉."""
    return -(-n // FEW)


@dataclass(frozen=True)
class Spread:
    """Of the examples' ‖cᵢ‖² over all measured parameters together.

    Args:
        total: Σ ‖cᵢ‖².
        fourth: Σ ‖cᵢ‖⁴.
        largest: ‖cᵢ‖², descending: all, or at least the ⌈n/10⌉ largest; empty where only sums are known.
    """

    total: float
    fourth: float
    largest: np.ndarray

    @classmethod
    def of(cls, sq_norms: np.ndarray) -> Spread:
        """Keep what is kept of ‖cᵢ‖², [n]."""
        wide = np.asarray(sq_norms, dtype=np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            return cls(float(wide.sum()), float(wide @ wide), np.sort(wide)[::-1])

    def scaled(self, factor: float) -> Spread:
        """The same where each ‖cᵢ‖² is so many times as large."""
        return Spread(self.total * factor, self.fourth * factor**2, self.largest * factor)

    def fits(self, total: float, rtol: float) -> bool:
        """Whether the norms add up to Σ over parameters and examples of ‖cᵢ‖², so that none is missing."""
        return math.isfinite(self.fourth) and abs(self.total - total) <= rtol * abs(total)

    def fields(self, n: int) -> dict[str, Any]:
        """Give the fields of `StepSums`, with gᵢ = n cᵢ."""
        with np.errstate(over="ignore"):
            top = tuple((float(n) ** 2 * self.largest[: kept(n)]).tolist())
        return {"mean_fourth": float(n) ** 3 * self.fourth, "top_sq_norms": top}
