"""B_noise over the readings of a training: tr(HΣ) and GᵀHG averaged over readings, then divided.

Each reading gives an unbiased pair; their averages are taken before the ratio, as for B_simple. The spread of
the averages is made of what each reading knows of its own, over its probes and parts: so even a few readings,
at weights that move on, give a set for the average over their points. Readings that do not know it are each
other's replicates. A single reading on one batch is mostly noise.

A slow test wants the 95 % sets of 4 readings, 8 probes on 16 examples each, to cover in 91 % where B_noise is
10, 40 or 400. Source: tests/gns/curvature/test_coverage.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from gns.curvature.result import CurvatureEstimate, CurvatureReading
from gns.statistics.moments import Moments, exact_unit
from gns.statistics.sets import detection_limit, honest_set, indefinite, inside, satterthwaite, status_of


@dataclass(frozen=True)
class OverReadings:
    """B_noise over some readings.

    Args:
        step: of the last of them.
        b_noise: ratio of the averages, in examples; NaN where GᵀHG averages to 0 or less.
        low: lower end of its set.
        high: upper end; `inf` where there is none.
        status: as of an `Estimate`, or "indefinite" where an average is significantly below 0.
        detection_limit: largest B_noise that these readings could tell from infinity; NaN where tr(HΣ) < 0.
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
        point = inside(self.b_noise, self.low, self.high)
        value = "not resolved" if math.isnan(point) else f"= {format_count(point)} examples"
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
    m = joined([r.estimate for r in readings])
    low, high, empty = honest_set(m, level)
    return OverReadings(
        step=readings[-1].step,
        b_noise=m.x / m.y if m.y > 0 else math.nan,
        low=low,
        high=high,
        status="indefinite" if indefinite(m, level) else status_of(m, high, empty),
        detection_limit=detection_limit(m, level),
        readings=len(readings),
        steps_each=steps_each(readings),
    )


def progress_weighted(
    readings: Sequence[CurvatureReading], batch_size: float, *, level: float = 0.95
) -> OverReadings:
    """The run's mean of B_noise, weighted by the progress of the steps around each reading.

    As `gns.statistics.views.progress_weighted` for B_simple: a step at batch B makes 1/(1 + B_k/B) of the
    progress of one without noise, so that with Q_k = GᵀHG + tr(HΣ)/B, what a step at B loses to curvature,

        Σ ω_k B_k / Σ ω_k = Σ (tr(HΣ)_k / Q_k) / Σ (GᵀHG_k / Q_k).

    Q_k is that of the readings before and after, so that its errors are not those of the reading it weighs;
    the weights are taken as known in the set.

    The neighbours tell Q_k wrongly where it drifts steeply. Simulated, eight readings at batch 4 with errors
    of 15 % in tr(HΣ) and 30 % in GᵀHG: right within 1 %, sets of nominal 95 % cover in 94 %, at a constant
    B_noise of 5, 20 or 100; 2 % too high and 95 % where it rises from 10 to 40 at the same GᵀHG; 11 % too
    high and 92 % from 5 to 100; 6 % too low and 94 % from 5 to 100 while GᵀHG falls to a thirtieth. With
    errors of 10 % in both, the sets of the last two cover in 57 and 84 % only.

    Args:
        readings: of a training, oldest first, on examples of their own.
        batch_size: B, examples a step.
        level: nominal coverage of the set.

    Raises:
        ValueError: fewer than three readings, `batch_size` is not positive, or some Q_k is estimated as 0 or
            less: GᵀHG is not resolved well enough for so large a batch.
    """
    if len(readings) < 3 or not batch_size > 0:
        raise ValueError(
            f"{len(readings)} reading(s) at batch {batch_size:g}; at least 3 and a batch above 0 are needed"
        )
    q = np.array([r.estimate.g_h_g + r.estimate.trace_h_sigma / batch_size for r in readings])
    around = np.convolve(q, [1.0, 0.0, 1.0], "same") / np.convolve(np.ones(len(q)), [1.0, 0.0, 1.0], "same")
    if not (around > 0).all():
        worst = int(np.argmin(around))
        raise ValueError(
            f"around the reading at step {readings[worst].step}, GᵀHG + tr(HΣ)/{batch_size:g} is estimated "
            f"as {around[worst]:.3g}, and above 0 is needed: read B_noise on more examples, or elsewhere"
        )
    weights = around.max() / around  # powers of the loss would leave the range of floats
    weighed = [replace(r, estimate=_times(r.estimate, w)) for r, w in zip(readings, weights, strict=True)]
    found = over_readings(weighed, level=level)
    assert found is not None
    return found


def _times(estimate: CurvatureEstimate, factor: float) -> CurvatureEstimate:
    moments = None if estimate.moments is None else estimate.moments.times(factor)
    x, y = estimate.trace_h_sigma * factor, estimate.g_h_g * factor
    return replace(estimate, trace_h_sigma=x, g_h_g=y, moments=moments)


def joined(estimates: Sequence[CurvatureEstimate]) -> Moments:
    """The averages over readings of tr(HΣ) and GᵀHG, with their spread, up to a common power of two.

    Readings are taken as independent. With one at every step they share examples, those of one reading's g
    being those of the next one's H, and the spread is then a little too small.
    """
    x, y = np.array([(e.trace_h_sigma, e.g_h_g) for e in estimates]).T
    unit = exact_unit(x, y)
    known = [e.moments for e in estimates if e.moments is not None]
    if len(known) < len(estimates):
        ones = np.ones(len(x))
        return Moments.of(x * unit, y * unit, ones, ones)
    n, variances = len(x), np.array([np.array(m.second) * m.k / m.df for m in known]) * unit**2
    theta = x.sum() / y.sum() if y.sum() > 0 else math.inf
    at = np.array([1, -2 * theta, theta**2] if math.isfinite(theta) else [0, 0, 1])
    each = variances @ at
    own = np.array([m.df for m in known])
    df = satterthwaite(float(each.sum()), float(each**2 @ (1 / own))) or float(own.sum())
    second = variances.sum(0) / n**2 * df / (df + 1)
    third = np.sum([m.third for m in known], axis=0) * unit**3 / n**3
    return Moments(
        unit * float(x.mean()), unit * float(y.mean()), tuple(second.tolist()), tuple(third.tolist()), df + 1
    )


def so_far(readings: Sequence[CurvatureReading], *, level: float = 0.95) -> list[OverReadings]:
    """What the readings said together after each of them, from the third on."""
    found = (over_readings(readings[:k], level=level) for k in range(3, len(readings) + 1))
    return [each for each in found if each is not None]


def steps_each(readings: Sequence[CurvatureReading]) -> float:
    """What one reading cost, in steps of that training: the median; NaN where unknown."""
    spent = [r.estimate.cost for r in readings if r.estimate.cost is not None]
    costs = [c.steps for c in spent if not math.isnan(c.steps)]
    return float(np.median(costs)) if costs else math.nan


def cost_in_words(readings: Sequence[CurvatureReading]) -> str:
    """What the readings of a training cost; nothing where that is unknown."""
    each = steps_each(readings)
    if math.isnan(each):
        return ""
    apart = np.diff([r.step for r in readings]) if len(readings) > 1 else [readings[0].step + 1]
    share = 100 * each / float(np.median(apart))
    count = f"{len(readings)} readings" if len(readings) > 1 else "1 reading"
    return f"{count} of about {each:.0f} steps each: {share:.0f} % more time"


def in_words(readings: Sequence[CurvatureReading], *, level: float = 0.95) -> list[str]:
    """What the readings of a training say, in sentences for a report."""
    if not readings:
        return []
    together, last = over_readings(readings, level=level), readings[-1]
    said = [f"{together}." if together else f"{last.estimate}."]
    if cost := cost_in_words(readings):
        said.append(f"{cost}.")
    found, ceiling = last.estimate.largest_eigenvalue, last.estimate.max_learning_rate
    if found is not None and ceiling is not None and found > 0:
        said.append(
            f"Largest eigenvalue of H at step {last.step}: λ_max ≥ {found:.3g} (a lower bound). Above a "
            f"learning rate of 2/λ_max = {ceiling:.3g} plain gradient descent diverges along its direction; "
            "optimizers that scale their steps, as AdamW does, have another ceiling."
        )
    elif found is not None:
        said.append(f"H at step {last.step} showed no direction of positive curvature: it sets no ceiling.")
    return said
