"""Lines, laws and surfaces fitted to measured batch sizes, learning rates and losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from experiments.analysis.cells import Cell, Floats
from experiments.analysis.curves import Curve, Estimated
from experiments.analysis.resampling import LEVEL, interval, means, replicates

_UNKNOWN = np.empty(0)
OCTAVES = np.arange(-8.0, 24.0, 0.05)  # log₂ of the noise scales that a law is tried with
LEAST = 3  # batch sizes that a law is fitted to: with two figures a fit to two says nothing
LAWS: dict[str, Callable[[Floats, Floats], Floats]] = {
    # (B, B_n) → ε/ε_max
    "surge": lambda b, noise: 2 / (np.sqrt(noise / b) + np.sqrt(b / noise)),
    "sgd": lambda b, noise: 1 / (1 + noise / b),
    "sqrt": lambda b, noise: np.sqrt(b),
    "constant": lambda b, noise: np.ones_like(b * noise),
}


@dataclass(frozen=True)
class LawFit:
    """A law of the best learning rate over batch size.

    Args:
        law: name in `LAWS`.
        peak: ε_max; for "sqrt" the rate at batch 1, for "constant" the rate.
        noise: B_n, examples; NaN where the law has none. Infinite ends: the data do not bend.
        misfit: root mean square of log₂ (measured/fitted), over the degrees of freedom that are left.
        left_out: batch sizes whose best learning rate is at the edge of its grid, and so not known.
    """

    law: str
    peak: float
    noise: Estimated
    misfit: float
    left_out: int = 0

    def rate(self, batches: Floats) -> Floats:
        """Give ε at batch sizes, the law with its fitted figures."""
        noise = self.noise.value if math.isfinite(self.noise.value) else 1.0
        return self.peak * LAWS[self.law](np.asarray(batches, dtype=float), np.float64(noise))


@dataclass(frozen=True)
class Surface:
    """Validation loss as a quadratic in (log₂ B, log₂ ε) near its smallest value.

    Args:
        center: (log₂ B, log₂ ε) that coordinates are counted from.
        coefficients: of 1, x, y, x², xy, y².
        batch: B of the minimum, examples; its note says "no minimum" where the quadratic has none.
        rate: ε of the minimum.
        misfit: root mean square residual, nats per token.
        points: runs it was fitted to, means over seeds.
    """

    center: tuple[float, float]
    coefficients: Floats
    batch: Estimated
    rate: Estimated
    misfit: float
    points: int


def slope(x: Sequence[float] | Floats, y: Sequence[float] | Floats, level: float = LEVEL) -> Estimated:
    """Fit y = a + b·x by least squares; b with Student's interval.

    Raises:
        ValueError: fewer than three points, or all x are one.
    """
    at, to = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(at) < 3 or np.ptp(at) == 0:
        raise ValueError(f"a slope with an interval needs three points at two places; seen x = {at.tolist()}")
    fit = stats.linregress(at, to)
    width = stats.t.ppf((1 + level) / 2, len(at) - 2) * fit.stderr
    return Estimated(fit.slope, fit.slope - width, fit.slope + width)


def exponent(sizes: Sequence[float], found: Sequence[Estimated], level: float = LEVEL) -> Estimated:
    """Fit B ∝ Nᵏ to batch sizes with bootstrap draws; the interval comes from the draws.

    Args:
        sizes: [K], data sizes N.
        found: [K], as from `largest_within`.
        level: of the interval.

    Returns:
        k, without an interval where a number has no draws. A batch size beyond the grid says only "at
        least": in the data k is then NaN; a replicate counts with the smallest k that it leaves possible for
        the lower end, and the largest for the upper one. The note says how many such replicates there are.

    Raises:
        ValueError: all data sizes are one.
    """
    if any(not len(each.draws) for each in found):
        found = [replace(each, draws=_UNKNOWN, least=_UNKNOWN, most=_UNKNOWN) for each in found]
    log_sizes = np.log(np.asarray(sizes, dtype=float))
    if len(log_sizes) < 2 or np.ptp(log_sizes) == 0:
        raise ValueError(f"an exponent needs two data sizes; seen {list(sizes)}")
    centered = log_sizes - log_sizes.mean()
    weights = centered / (centered @ centered)
    weights[np.abs(weights) < 1e-9 * np.abs(weights).max()] = 0.0  # of a size in the middle: of no account
    with np.errstate(divide="ignore"):
        values = np.log(np.array([math.inf if each.at_least else each.value for each in found]))
        least, most, draws = (np.log(np.stack(bound)) for bound in _bounds(found))  # [K, R] each
    rising = (weights > 0)[:, None]
    lows = _weighted(weights, np.where(rising, least, most))
    highs = _weighted(weights, np.where(rising, most, least))
    open_ = float((least != most).any(axis=0).mean()) if least.size else 0.0
    note = f"beyond the grid in {open_:.0%} of the draws" if open_ else ""
    value = float(_weighted(weights, values[:, None])[0])
    ends = interval(lows, level)[0], interval(highs, level)[1]  # of no draws: infinite
    return Estimated(
        value if math.isfinite(value) else math.nan, *ends, note, _weighted(weights, draws), lows, highs
    )


def _bounds(found: Sequence[Estimated]) -> tuple[list[Floats], list[Floats], list[Floats]]:
    """Give of each number what its replicates are at the least, at the most, and themselves.

    An infinite replicate without a bound may be anything.
    """
    least = [f.least if len(f.least) else np.where(np.isfinite(f.draws), f.draws, 0.0) for f in found]
    most = [f.most if len(f.most) else f.draws for f in found]
    return least, most, [f.draws for f in found]


def _weighted(weights: Floats, logs: Floats) -> Floats:
    """[R], Σ weights·logs over [K, R], without what has no weight; NaN for ∞ − ∞."""
    used = weights != 0
    with np.errstate(invalid="ignore"):
        return weights[used] @ logs[used]


def fit_law(law: str, found: Curve) -> LawFit:
    """Fit a law to the best learning rates of a curve, in log₂.

    ε_max has a closed form at each B_n, so B_n is searched on a grid of 20 values an octave. A learning rate
    at the edge of its grid was not measured, the best one lies beyond: such batch sizes are left out, in the
    data and in each replicate. A replicate that keeps fewer than three may mean any B_n.

    Args:
        law: "surge": ε = 2ε_max/(√(B_n/B) + √(B/B_n)), for Adam, whose B_n is not tr(HΣ)/GᵀHG (Li et al.
            2024, arXiv:2405.14578). "sgd": ε = ε_max/(1 + B_n/B) (McCandlish et al. 2018, arXiv:1812.06162,
            eq. 2.6). "sqrt" and "constant" to compare with.
        found: the curve.

    Raises:
        ValueError: the best learning rate is inside its grid at fewer than three batch sizes.
    """
    log_rates, batches = np.log2(found.rates), found.batches
    inside = np.array([edge == "" for edge in found.rate_edges])
    if inside.sum() < LEAST:
        raise ValueError(
            f"a law needs {LEAST} batch sizes whose best learning rate is inside its grid; seen "
            f"{inside.sum()} of {len(inside)}. Extend the learning rates of the others"
        )
    has_noise = law in ("surge", "sgd")
    octaves = OCTAVES if has_noise else np.zeros(1)
    shapes = np.atleast_2d(np.log2(LAWS[law](batches, np.exp2(octaves)[:, None])))  # [G, J]
    place, peak, misfit = _fitted(shapes[:, inside], log_rates[inside])
    free, lost = int(inside.sum()) - 1 - has_noise, int((~inside).sum())
    left = math.sqrt(misfit / free)
    if not has_noise:
        return LawFit(law, 2.0**peak, Estimated(math.nan, math.nan, math.nan), left, lost)
    drawn = np.full(len(found.rate_draws), math.nan)
    for r, (rates, edge) in enumerate(zip(np.log2(found.rate_draws), found.edge_draws, strict=True)):
        if (~edge).sum() >= LEAST:
            drawn[r] = _open(octaves, _fitted(shapes[:, ~edge], rates[~edge])[0])
    low = interval(np.where(np.isnan(drawn), -math.inf, drawn))[0]
    high = interval(np.where(np.isnan(drawn), math.inf, drawn))[1]
    value = 2.0 ** float(octaves[place])
    note = "" if 0 < place < len(octaves) - 1 else "the rates do not bend within the grid"
    noise = Estimated(value, 2.0**low, 2.0**high, note, np.exp2(drawn))
    return LawFit(law, 2.0**peak, noise, left, lost)


def surface(cell: Cell, window: float = 0.1, draws: int = 500, seed: int = 0) -> Surface:
    """Fit a quadratic to validation losses within `window` of the smallest.

    Args:
        cell: whose runs.
        window: nats per token; runs above are left out, and diverged ones: a quadratic fits near a minimum.
        draws: bootstrap replicates; 0: no intervals.
        seed: of the draws.

    Raises:
        ValueError: fewer than seven points, or all at two batch sizes or learning rates.
    """
    losses = means(cell.validation)
    near = np.isfinite(losses) & (losses <= np.min(losses[np.isfinite(losses)], initial=math.inf) + window)
    x, y = np.meshgrid(np.log2(cell.batches), np.log2(cell.rates), indexing="ij")
    x, y = x[near], y[near]
    center = (float(x.mean()), float(y.mean())) if len(x) else (0.0, 0.0)
    x, y = x - center[0], y - center[1]
    design = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=1)
    if len(x) < 7 or np.linalg.matrix_rank(design) < 6:
        raise ValueError(
            f"a quadratic surface needs seven runs at three batch sizes and three learning rates within "
            f"{window} nats of the best; seen {len(x)}"
        )
    solve = np.linalg.pinv(design)
    coefficients = solve @ losses[near]
    left = losses[near] - design @ coefficients
    chosen = np.full(len(cell.batches), math.nan)
    for j, row in enumerate(np.where(near, losses, math.inf)):
        chosen[j] = row.argmin() if np.isfinite(row).any() else math.nan
    drawn = replicates(cell, chosen, draws, seed)[0][:, near] @ solve.T if draws else coefficients[None]
    places = np.array([_stationary(each) for each in drawn]) + center
    batch, rate = _stationary(coefficients) + np.array(center)
    batches, rates = (_from_log(v, d) for v, d in ((batch, places[:, 0]), (rate, places[:, 1])))
    misfit = math.sqrt(float(left @ left) / (len(x) - 6))
    return Surface(center, coefficients, batches, rates, misfit, len(x))


def _from_log(value: float, draws: Floats) -> Estimated:
    """Give a place and its draws out of log₂."""
    low, high = interval(draws)
    lost = float(np.isnan(draws).mean())
    note = "no minimum" if math.isnan(value) else f"no minimum in {lost:.0%} of the draws" if lost else ""
    return Estimated(2.0**value, 2.0**low, 2.0**high, note, np.exp2(draws))


def _stationary(coefficients: Floats) -> Floats:
    """(x, y) of a quadratic's minimum; NaN where it has none."""
    _, bx, by, cxx, cxy, cyy = coefficients
    hessian = np.array([[2 * cxx, cxy], [cxy, 2 * cyy]])
    if np.linalg.eigvalsh(hessian)[0] <= 0:
        return np.full(2, math.nan)
    return -np.linalg.solve(hessian, [bx, by])


def _fitted(shapes: Floats, log_rates: Floats) -> tuple[int, float, float]:
    """Place of the best shape, its log₂ peak, and its sum of squares."""
    left = log_rates - shapes
    peaks = left.mean(axis=-1)
    squares = ((left - peaks[:, None]) ** 2).sum(axis=-1)
    place = int(squares.argmin())
    return place, float(peaks[place]), float(squares[place])


def _open(octaves: Floats, place: int) -> float:
    """Give log₂ B_n, infinite at an end of what was tried."""
    if place == 0:
        return -math.inf
    return math.inf if place == len(octaves) - 1 else float(octaves[place])
