"""Confidence sets for B_simple over many simulated runs at once: the toolkit's own, and what others print.

Each method takes tr Σ and |G|² of the steps, [repeats, K] each, and gives the ends of its sets for every
level. Whether they hold the truth is counted elsewhere, in `experiments.coverage`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from scipy import stats

from gns.estimate import MIN_STEPS, Moments

DECAY = 0.99  # of both exponential averages; their bias at the start is corrected
RESAMPLES = 999
GRID = np.concatenate([[0.0], np.logspace(-4, 4, 161), [np.inf]])
HALVINGS = 40


@dataclass(frozen=True)
class Sets:
    """Sets of one method for many runs.

    Args:
        low: [levels, repeats], lower ends in examples; NaN where the set is empty.
        high: [levels, repeats], upper ends, may be `inf`; NaN where the set is empty.
        point: [repeats], the number that the method would print.
        empty: [levels, repeats], where no positive B fits and (low, ∞) is what is still claimed; else None.
    """

    low: np.ndarray
    high: np.ndarray
    point: np.ndarray
    empty: np.ndarray | None = None


def hull(x: np.ndarray, y: np.ndarray, levels: Sequence[float]) -> Sets:
    """Give the toolkit's set, `gns.estimate.confidence_set` with the widening of `estimate`, for every run.

    T and H come from the package's own `Moments.statistics`, whose arithmetic is elementwise: its fields hold
    [repeats] here. Only the search for the ends is written anew, on the same circle, all runs at a time.

    Args:
        x: [repeats, K], tr Σ of the steps, all of one size.
        y: [repeats, K], |G|² of the steps.
        levels: nominal coverages.

    Returns:
        The sets.

    Slow twin: `gns.estimate.estimate`, run by run, in tests/experiments/coverage/test_sets.py.
    """
    return hull_of(moments_of(x, y), levels)


def hull_of(moments: Moments, levels: Sequence[float]) -> Sets:
    """Give the toolkit's sets of many runs from their `moments_of`."""
    t = stats.t.ppf((1 + np.asarray(levels)) / 2, moments.df)
    low, high, empty = _ends(moments, t)
    below = np.flatnonzero(moments.y < 0)
    if len(below):  # with Y < 0 no more is claimed than Y := 0 would, which has no upper end
        high[:, below] = np.inf
        zero = _rows(moments, below)
        low[:, below] = np.fmin(low[:, below], _ends(replace(zero, y=np.zeros(len(below))), t)[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        point = np.where(moments.y > 0, moments.x / moments.y, np.inf)
    return Sets(low, np.where(empty, np.inf, high), point, empty)


def moments_of(x: np.ndarray, y: np.ndarray) -> Moments:
    """Moments of many runs of equal steps in one record whose fields are arrays, [repeats] each."""
    k = x.shape[1]
    a, b = (x - x.mean(1, keepdims=True)) / k, (y - y.mean(1, keepdims=True)) / k
    second = tuple(np.einsum("rk,rk->r", f, g) for f, g in ((a, a), (a, b), (b, b)))
    aa, bb = a * a, b * b
    third = tuple(np.einsum("rk,rk->r", f, g) for f, g in ((aa, a), (aa, b), (a, bb), (bb, b)))
    return Moments(x.mean(1), y.mean(1), second, third, float(k))  # type: ignore[arg-type]


def _rows(moments: Moments, rows: np.ndarray) -> Moments:
    """Some runs of `moments_of`, or of a kind of moments with more fields."""

    def some(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(some(v) for v in value)
        return value[rows] if isinstance(value, np.ndarray) else value

    return replace(moments, **{f.name: some(getattr(moments, f.name)) for f in fields(moments)})


def _ends(moments: Moments, t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(low, high, empty), [levels, repeats] each, of the positive part of every run's set."""
    size = np.maximum(np.abs(moments.y), np.sqrt(moments.second[2]))
    scale = np.abs(moments.x) / size
    phi = np.arctan(GRID)
    student, hall = _statistics(moments, phi[:, None], scale)
    least, most = np.minimum(student, hall), np.maximum(student, hall)
    levels, last = len(t), len(phi) - 1
    low, high = np.zeros((levels, len(scale))), np.full((levels, len(scale)), np.inf)
    empty = np.zeros(low.shape, dtype=bool)
    for i, quantile in enumerate(t):
        inside = (least <= quantile) & (most >= -quantile)
        first, final = inside.argmax(0), last - inside[::-1].argmax(0)
        empty[i] = ~inside.any(0)
        rising = np.flatnonzero(~empty[i] & (first > 0))
        low[i, rising] = _crossing(_rows(moments, rising), phi, first[rising], -1, quantile, scale[rising])
        falling = np.flatnonzero(~empty[i] & (final < last))
        high[i, falling] = _crossing(
            _rows(moments, falling), phi, final[falling], 1, quantile, scale[falling]
        )
    low[empty] = np.nan
    return low, high, empty


def _statistics(moments: Moments, phi: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kappa = np.where(phi == math.pi / 2, 0.0, np.cos(phi))
    return moments.statistics(np.sin(phi) * scale, kappa)


def _crossing(
    moments: Moments, phi: np.ndarray, index: np.ndarray, side: int, quantile: float, scale: np.ndarray
) -> np.ndarray:
    """[runs], the B between grid point `index`, which is inside, and its rejected neighbour on that side."""
    inner, outer = phi[index], phi[index + side]
    for _ in range(HALVINGS):
        middle = (inner + outer) / 2
        student, hall = _statistics(moments, middle, scale)
        inside = (np.minimum(student, hall) <= quantile) & (np.maximum(student, hall) >= -quantile)
        inner, outer = np.where(inside, middle, inner), np.where(inside, outer, middle)
    return np.tan(inner) * scale


def fieller(x: np.ndarray, y: np.ndarray, levels: Sequence[float]) -> Sets:
    """Give the positive part of Fieller's set; empty where |G|² is significantly negative.

    Aθ² − 2Bθ + C ≤ 0 with A = ȳ² − t²v_yy, B = x̄ȳ − t²v_xy, C = x̄² − t²v_xx.

    Args:
        x: [repeats, K], tr Σ of the steps.
        y: [repeats, K], |G|² of the steps.
        levels: nominal coverages.

    Returns:
        The sets; NaN ends where empty.

    Source: Fieller 1954, J. R. Stat. Soc. B 16:175.
    """
    k, mx, my = x.shape[1], x.mean(1), y.mean(1)
    vxx, vxy, vyy = _covariance(x, y)
    t2 = stats.t.ppf((1 + np.asarray(levels)[:, None]) / 2, k - 1) ** 2
    a, b, c = my**2 - t2 * vyy, mx * my - t2 * vxy, mx**2 - t2 * vxx
    with np.errstate(divide="ignore", invalid="ignore"):
        inner = b * b - a * c
        inner = np.where(
            a > 0, np.maximum(inner, 0), inner
        )  # the ratio itself is inside: below 0 is rounding
        far = b + np.copysign(np.sqrt(inner), b)
        one, two = far / a, c / far
    low, high = np.fmin(one, two), np.fmax(one, two)
    # a ≤ 0: all but what lies between the roots (everything without real ones); only θ ≥ 0 counts, and the
    # hull of what is left of it
    rays = a <= 0
    out_low = np.where(rays, np.where((low <= 0) & (high > 0), high, 0.0), np.maximum(low, 0))
    out_high = np.where(rays, np.inf, high)
    gone = ~rays & (high < 0)
    return Sets(np.where(gone, np.nan, out_low), np.where(gone, np.nan, out_high), _ratio(mx, my), gone)


def delta(x: np.ndarray, y: np.ndarray, levels: Sequence[float]) -> Sets:
    """Ratio ± t · first-order standard error: always bounded.

    Args:
        x: [repeats, K], tr Σ of the steps.
        y: [repeats, K], |G|² of the steps.
        levels: nominal coverages.

    Returns:
        The sets.
    """
    return _first_order(x, y, np.full(x.shape[1], 1 / x.shape[1]), levels)


def bootstrap(x: np.ndarray, y: np.ndarray, levels: Sequence[float]) -> Sets:
    """Percentiles of the ratio over resampled steps, a resample with |G|² ≤ 0 counted as B = ∞.

    That is the kindest reading: taken as they are, negative ratios would sit at the wrong end. Every run of a
    call uses the same 999 resamples of its step numbers, drawn from a fixed seed.

    Args:
        x: [repeats, K], tr Σ of the steps.
        y: [repeats, K], |G|² of the steps.
        levels: nominal coverages; (1 − level)/2 · 1,000 should be whole.

    Returns:
        The sets.
    """
    k = x.shape[1]
    rng = np.random.default_rng(np.random.SeedSequence([k, RESAMPLES]))
    weights = rng.multinomial(k, np.full(k, 1 / k), RESAMPLES).T.astype(np.float32)
    top, bottom = (np.asarray(v, dtype=np.float32) @ weights for v in (x, y))
    with np.errstate(divide="ignore"):
        ratios = np.sort(np.where(bottom > 0, top / bottom, np.inf), axis=1)
    cut = np.rint((1 - np.asarray(levels)) / 2 * (RESAMPLES + 1)).astype(int)
    low, high = ratios[:, cut - 1].T, ratios[:, RESAMPLES - cut].T
    return Sets(low.astype(float), high.astype(float), _ratio(x.mean(1), y.mean(1)))


def clamped_ema(x: np.ndarray, y: np.ndarray, levels: Sequence[float]) -> Sets:
    """Exponential averages of tr Σ and of |G|² clamped at 0 step by step, then their ratio.

    Such code prints a bare number. It is given the interval it would have: first order, with the weights of
    the average in the variance and their effective number in the degrees of freedom.

    Args:
        x: [repeats, K], tr Σ of the steps.
        y: [repeats, K], |G|² of the steps.
        levels: nominal coverages.

    Returns:
        The sets.
    """
    return _first_order(x, np.maximum(y, 0), ema_weights(x.shape[1]), levels)


def ema_of_ratios(x: np.ndarray, y: np.ndarray, levels: Sequence[float]) -> Sets:
    """Give the exponential average of tr Σ / |G|² step by step, with its weighted t interval.

    Args:
        x: [repeats, K], tr Σ of the steps.
        y: [repeats, K], |G|² of the steps.
        levels: nominal coverages.

    Returns:
        The sets.
    """
    return _first_order(x / y, np.ones_like(y), ema_weights(x.shape[1]), levels)


def ema_weights(k: int) -> np.ndarray:
    """[K], weights of an exponential average with `DECAY` after its bias correction; they add up to 1."""
    weights = DECAY ** np.arange(k - 1, -1, -1.0)
    return weights / weights.sum()


def _first_order(x: np.ndarray, y: np.ndarray, w: np.ndarray, levels: Sequence[float]) -> Sets:
    """Interval of the delta method around Σwx / Σwy, with the effective number of steps, 1/Σw²."""
    mx, my, k = x @ w, y @ w, 1 / float(w @ w)
    with np.errstate(divide="ignore", invalid="ignore"):
        point = mx / my
        spread = w * (x - mx[:, None] - point[:, None] * (y - my[:, None]))
        se = np.sqrt(np.einsum("rk,rk->r", spread, spread) * k / (k - 1)) / np.abs(my)
        half = stats.t.ppf((1 + np.asarray(levels)[:, None]) / 2, k - 1) * se
        return Sets(point - half, point + half, point)


def _covariance(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Covariances of the two means, (v_xx, v_xy, v_yy), [repeats] each."""
    k, dx, dy = x.shape[1], x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    xx, xy, yy = (np.einsum("rk,rk->r", f, g) / (k * (k - 1)) for f, g in ((dx, dx), (dx, dy), (dy, dy)))
    return xx, xy, yy


def _ratio(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.where(y > 0, x / y, np.inf)


Method = Callable[[np.ndarray, np.ndarray, Sequence[float]], Sets]
METHODS: dict[str, Method] = {
    "toolkit": hull,
    "fieller": fieller,
    "delta": delta,
    "bootstrap": bootstrap,
    "clamped EMA": clamped_ema,
    "EMA of ratios": ema_of_ratios,
}


def statuses(sets: Sets, k: int) -> np.ndarray:
    """[levels, repeats], status of each of the toolkit's sets, as `gns.estimate.estimate` gives it."""
    assert sets.empty is not None
    found = np.where(np.isinf(sets.high), "lower bound", "measured")
    found = np.where(sets.empty, "not detectable", found)
    return np.full_like(found, "collecting") if k < MIN_STEPS else found
