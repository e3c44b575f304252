"""B_noise over the readings of a training: tr(HΣ) and GᵀHG averaged over readings, then divided.

Each reading gives an unbiased pair; their averages are taken before the ratio, as for B_simple, and readings
are the replicates of the confidence set. A single reading on one batch is mostly noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gns.curvature.result import CurvatureReading
from gns.moments import Moments, exact_unit
from gns.sets import detection_limit, honest_set, indefinite, status_of


@dataclass(frozen=True)
class OverReadings:
    """B_noise over some readings.

    Args:
        step: of the last of them.
        b_noise: ratio of the averages, in examples; NaN where GᵀHG averages to 0 or less.
        low: lower end of its set.
        high: upper end; `inf` where there is none.
        status: as of an `Estimate`, or "indefinite" where an average is significantly below 0.
        detection_limit: largest B_noise that these readings could tell from infinity.
        readings: how many.
        steps_each: what one cost, in steps of that training: the median; NaN where unknown.
    """

    step: int
    b_noise: float
    low: float
    high: float
    status: str
    detection_limit: float
    readings: int
    steps_each: float

    def __str__(self) -> str:
        from gns.estimate import format_count

        bounds = f"{format_count(self.low)} … {format_count(self.high)}"
        cost = "" if math.isnan(self.steps_each) else f", each about {self.steps_each:.0f} training steps"
        value = "not resolved" if math.isnan(self.b_noise) else f"= {format_count(self.b_noise)} examples"
        return f"B_noise {value} ({bounds}), {self.readings} readings{cost}; {self.status}"


def over_readings(readings: Sequence[CurvatureReading], *, level: float = 0.95) -> OverReadings | None:
    """Average readings and divide.

    Args:
        readings: of a training.
        level: nominal coverage of the set.

    Returns:
        What they say together; None with fewer than two.
    """
    if len(readings) < 2:
        return None
    x = np.array([r.estimate.trace_h_sigma for r in readings])
    y = np.array([r.estimate.g_h_g for r in readings])
    unit = exact_unit(x, y)
    ones = np.ones(len(readings))
    m = Moments.of(x * unit, y * unit, ones, ones)
    low, high, empty = honest_set(m, level)
    spent = [r.estimate.cost for r in readings if r.estimate.cost is not None]
    costs = [c.steps for c in spent if not math.isnan(c.steps)]
    return OverReadings(
        step=readings[-1].step,
        b_noise=m.x / m.y if m.y > 0 else math.nan,
        low=low,
        high=high,
        status="indefinite" if indefinite(m, level) else status_of(m, high, empty),
        detection_limit=detection_limit(m, level),
        readings=len(readings),
        steps_each=float(np.median(costs)) if costs else math.nan,
    )


def so_far(readings: Sequence[CurvatureReading], *, level: float = 0.95) -> list[OverReadings]:
    """What the readings said together after each of them, from the third on."""
    found = (over_readings(readings[:k], level=level) for k in range(3, len(readings) + 1))
    return [each for each in found if each is not None]
