"""The confidence set of a ratio of averages, its status and its detection limit: arithmetic of `estimate`.

The set is the hull of Fieller's and of its version with Hall's skewness correction. Nothing here knows what a
step is: per-step numbers and their weights come in, sets in the unit of x / y go out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy import optimize, special

from gns.statistics.moments import Moments

MIN_STEPS = 20
"""Fewer steps are "collecting": at 10 the worst cells of nominal 95 % cover 93.7 % (Gaussian), 92.8 % (t₅)
and 84 % (lognormal, j⁻²), at 20 steps 94.0, 93.5 and 86 %: `experiments/results/coverage`.

No spectrum asks for more. Simulated at 20 steps of 4, 16 and 64 Gaussian examples, B_simple 5 … 5,000, with G
spread over all directions or along the first: one direction (r_eff 1, the most skewed there is), two (1.2),
j⁻² (2.5), 1/j (14): nominal 95 % covers 93.2–96.4 %, standard error 0.2–0.5 %. Where the spectrum is too
narrow for the batch, |G|² is not significant and the status says "lower bound" (one direction, B_simple 50, n
= 16: 4 % of the sets are bounded): a second rule would only hide sets that hold.
"""


def confidence_set(moments: Moments, level: float) -> tuple[float, float, bool]:
    """Find the positive part of the set {θ : not rejected}, the hull of Fieller's and Hall's sets.

    θ is rejected as too small only if T > t and H > t, as too large only if both are < −t, with one two-sided
    Student quantile t. On θ = tan φ, 0 ≤ φ ≤ π/2, the point at infinity is an ordinary point.

    Args:
        moments: of the steps.
        level: nominal coverage, in (0, 1).

    Returns:
        (low, high, empty): the ends in examples (`high` may be `inf`), and whether no θ > 0 survives.

    Source: Fieller 1954; Hall 1992; the simulations behind the choice are in the project's facts.
    """
    t_level = _quantile(moments, level)
    if not math.isfinite(t_level):  # one step has about all the weight
        return 0.0, math.inf, False
    scale = _scale(moments)

    def margins(phi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        kappa = np.where(phi == math.pi / 2, 0.0, np.cos(phi))  # exactly the point at infinity
        t, h = moments.statistics(np.sin(phi) * scale, kappa)
        return np.minimum(t, h) - t_level, np.maximum(t, h) + t_level  # > 0: too small; < 0: too large

    def outside(phi: np.ndarray) -> np.ndarray:
        return np.maximum(margins(phi)[0], -margins(phi)[1])  # > 0: rejected, on either side

    phi = np.arctan(np.concatenate([[0.0], np.logspace(-9, 9, 2001), [np.inf]]))
    too_small, too_large = margins(phi)
    inside = np.flatnonzero((too_small <= 0) & (too_large >= 0))
    if not len(inside):
        return _between_grid_points(moments, too_small, phi, scale)
    first, last = inside[0], inside[-1]
    low = 0.0 if first == 0 else _crossing(outside, float(phi[first - 1]), float(phi[first]), scale)
    if last == len(phi) - 1:
        return low, math.inf, False
    return low, _crossing(outside, float(phi[last]), float(phi[last + 1]), scale), False


def _quantile(moments: Moments, level: float) -> float:
    """Give the two-sided Student quantile t of the steps."""
    return float(special.stdtrit(moments.df, (1 + level) / 2))


def _scale(moments: Moments) -> float:
    """Give a positive B near the middle of the set's scale, so that the search grid is centred on it."""
    size = max(abs(moments.y), math.sqrt(moments.second[2]))
    return abs(moments.x) / size if moments.x != 0 and size > 0 else 1.0


def _crossing(margin: Callable[[np.ndarray], np.ndarray], left: float, right: float, scale: float) -> float:
    """Solve margin(φ) = 0 between two grid points and give the B there."""
    phi = optimize.brentq(lambda p: float(margin(np.array(p))), left, right, xtol=1e-15)
    return math.tan(float(phi)) * scale  # type: ignore[arg-type]


def _between_grid_points(
    moments: Moments, too_small: np.ndarray, phi: np.ndarray, scale: float
) -> tuple[float, float, bool]:
    """Handle a set narrower than the grid (noiseless steps), or one with no positive member."""
    flips = np.flatnonzero((too_small[:-1] > 0) & (too_small[1:] <= 0))
    if moments.y > 0 and moments.x >= 0 and len(flips):
        point = moments.x / moments.y
        return point, point, False
    return math.nan, math.inf, True


def honest_set(moments: Moments, level: float) -> tuple[float, float, bool]:
    """Widen the set where an average lies on the impossible side of zero.

    With Y < 0 the positive part slides to infinity before it vanishes, and may lose infinity first (one step
    of huge noise): no more is claimed than Y := 0 would, whose set always reaches infinity.
    With X < 0 (tr Σ, by chance and only under unequal weights) no less is allowed than X := 0 would.
    """
    low, high, empty = confidence_set(moments, level)
    if moments.y < 0:
        low, high = float(np.fmin(low, confidence_set(replace(moments, y=0.0), level)[0])), math.inf
    elif moments.x < 0:
        wide = confidence_set(replace(moments, x=0.0), level)[1]
        low, high, empty = 0.0, wide if empty else max(high, wide), False
    return low, high, empty


def inside(point: float, low: float, high: float) -> float:
    """Give a ratio X / Y to be shown beside its set, or NaN where it lies outside of that, as with X < 0.

    Otherwise it lies inside, but for rounding: X − θY is 0 there, which no set rejects.
    """
    slack = 1e-9 * abs(point)
    return point if low - slack <= point <= high + slack else math.nan


def status_of(moments: Moments, high: float, empty: bool) -> str:
    """Say what the set is worth."""
    if moments.k < MIN_STEPS * (1 - 1e-9):
        return "collecting"
    if empty:
        return "not detectable"
    return "lower bound" if math.isinf(high) else "measured"


def satterthwaite(variance: float, squares: float) -> float:
    """Degrees of freedom of a sum of independent variances v, `squares` being Σ v²/df; 0 where all are 0.

    Source: Satterthwaite 1946, Biometrics Bull. 2:110.
    """
    return variance**2 / squares if squares > 0 else 0.0


def indefinite(moments: Moments, level: float) -> bool:
    """Whether X or Y is significantly below 0: a noise scale in a metric that is none (a Hessian)."""
    t, se_x = _quantile(moments, level), math.sqrt(moments.second[0] * moments.k / moments.df)
    return moments.y < -t * moments.se_y() or moments.x < -t * se_x


def detection_limit(moments: Moments, level: float) -> float:
    """Largest B that these steps could tell from infinity: X / (t · se(Y)), in examples; NaN where X < 0.

    tr(HΣ) may well be; tr Σ where examples of unequal weight make few steps.
    """
    se = moments.se_y()
    if moments.x < 0:
        return math.nan
    return moments.x / (_quantile(moments, level) * se) if se > 0 else math.inf


def p_value(moments: Moments) -> float:
    """One-sided p-value of |G|² = 0 against |G|² > 0, studentised: of the set's own statistics at infinity.

    B = ∞ is D = −Y; the larger p of Student's T and Hall's H, so that p < (1 − level)/2 exactly where the set
    of that level rejects infinity as too large, and so has an upper end. Except where no positive B survives
    (noiseless steps): such a set has no upper end, whatever p.

    Returns:
        In [0, 1]; NaN where one step has all the weight.
    """
    t, h = moments.statistics(np.array(1.0), np.array(0.0))
    return float(special.stdtr(moments.df, max(float(t), float(h))))


def half_width(moments: Moments, level: float) -> float:
    """Relative half-width of the set, (high − low) / 2B; `inf` where it has no upper end."""
    if not moments.y > 0 or not moments.x > 0:
        return math.inf
    low, high, _ = honest_set(moments, level)
    return (high - low) / 2 * moments.y / moments.x


def times_more(moments: Moments, level: float, width: float) -> float:
    """How many times the steps a set of this relative half-width takes, averages and spread as they are.

    Returns:
        At least 0 (1: it has that width); `inf` where X or Y is not positive, so that no number will do.
    """
    if half_width(moments.scaled(1e12), level) > width:
        return math.inf

    def excess(log_times: float) -> float:
        wide = half_width(moments.scaled(math.exp(log_times)), level)
        return min(math.log(wide / width), 50.0) if wide > 0 else -50.0

    least = math.log(3 / moments.k)  # the set of fewer than 3 steps is of no use
    if excess(least) <= 0:
        return math.exp(least)
    return math.exp(optimize.brentq(excess, least, math.log(1e12), xtol=1e-4))  # type: ignore[arg-type]
