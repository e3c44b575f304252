"""Slow twins of the estimators: sums over pairs of examples, enumeration, sets by their definition."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy import stats


def pairwise(g: np.ndarray) -> tuple[float, float]:
    """(|G|², tr Σ) of examples' gradients [n, d] as U-statistics, pair by pair.

    |G|² = mean over i ≠ j of gᵢ·gⱼ,   tr Σ = mean over i < j of ‖gᵢ − gⱼ‖²/2
    """
    pairs = list(itertools.combinations(range(len(g)), 2))
    dots = [float(g[i] @ g[j]) for i, j in pairs]
    gaps = [float((g[i] - g[j]) @ (g[i] - g[j])) / 2 for i, j in pairs]
    return sum(dots) / len(pairs), sum(gaps) / len(pairs)


def pairwise_weighted(h: np.ndarray, a: np.ndarray) -> float:
    """|G|² where example i has weight aᵢ: Σ_{i≠j} aᵢaⱼ hᵢ·hⱼ / Σ_{i≠j} aᵢaⱼ."""
    pairs = [(i, j) for i in range(len(a)) for j in range(len(a)) if i != j]
    top = sum(float(a[i] * a[j] * (h[i] @ h[j])) for i, j in pairs)
    return top / sum(float(a[i] * a[j]) for i, j in pairs)


def ordered_batches(size: int, of: int) -> Iterator[tuple[int, ...]]:
    """All size-`of` ordered draws with replacement from range(size)."""
    return itertools.product(range(size), repeat=of)


def truth(data: np.ndarray) -> tuple[float, float]:
    """(|G|², tr Σ) of the uniform distribution on the rows of `data`."""
    mean = data.mean(0)
    return float(mean @ mean), float(((data - mean) ** 2).sum(1).mean())


def fieller(x: Sequence[float], y: Sequence[float], level: float) -> list[tuple[float, float]]:
    """Solve A θ² − 2Bθ + C ≤ 0 for steps of one size; the set as a list of disjoint closed intervals.

    A = ȳ² − t²v_yy, B = x̄ȳ − t²v_xy, C = x̄² − t²v_xx, with v the covariance of the means.
    """
    k = len(x)
    t2 = float(stats.t.ppf((1 + level) / 2, k - 1)) ** 2
    v = np.cov(x, y, ddof=1) / k
    mx, my = float(np.mean(x)), float(np.mean(y))
    a, b, c = my * my - t2 * v[1, 1], mx * my - t2 * v[0, 1], mx * mx - t2 * v[0, 0]
    inside = b * b - a * c
    if inside < 0:
        return [(-math.inf, math.inf)] if a < 0 else []
    lo, hi = sorted([(b - math.sqrt(inside)) / a, (b + math.sqrt(inside)) / a])
    return [(lo, hi)] if a > 0 else [(-math.inf, lo), (hi, math.inf)]


def positive_hull(parts: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """(low, high) of what lies at or above 0, or None."""
    there = [(max(lo, 0.0), hi) for lo, hi in parts if hi > 0]
    return (min(lo for lo, _ in there), max(hi for _, hi in there)) if there else None


def hall(x: np.ndarray, y: np.ndarray, theta: float) -> tuple[float, float]:
    """(T, H) at one θ, from the steps themselves: D = x − θy, its Student t and Hall's transform."""
    d = np.asarray(x) - theta * np.asarray(y)
    k = len(d)
    w = d.mean() / d.std(ddof=1)
    skew = float(stats.skew(d, bias=True))
    h = math.sqrt(k) * (w + skew * w**2 / 3 + skew**2 * w**3 / 27 + skew / (6 * k))
    return math.sqrt(k) * w, h


def accepted(x: np.ndarray, y: np.ndarray, theta: float, level: float) -> bool:
    """Whether θ is in the hull of Fieller's and Hall's sets, by definition."""
    t = float(stats.t.ppf((1 + level) / 2, len(x) - 1))
    found = hall(x, y, theta)
    return not (min(found) > t or max(found) < -t)


def by_differences(x: np.ndarray, y: np.ndarray, theta: float) -> tuple[float, float, float]:
    """(T, H, degrees of freedom) at one θ, variance by neighbouring steps of D = x − θy, step by step."""
    d = [float(a) - theta * float(b) for a, b in zip(x, y, strict=True)]
    k = len(d)
    gaps = sum((d[i + 1] - d[i]) ** 2 for i in range(k - 1)) / 2
    bends = [d[i] - (d[i - 1] + d[i + 1]) / 2 for i in range(1, k - 1)]
    third = sum(u**3 for u in bends) / (k - 2) / 0.75  # a bend has 1 − 2/8 of the third cumulant
    skew = third / (gaps / k) ** 1.5
    w = sum(d) / k / math.sqrt(gaps / (k - 1))
    h = math.sqrt(k) * (w + skew * w**2 / 3 + skew**2 * w**3 / 27 + skew / (6 * k))
    return math.sqrt(k) * w, h, 2 * (k - 1) ** 2 / (3 * k - 4)


def neighbours_closer(values: np.ndarray, shuffles: int, seed: int) -> float:
    """Share of random orders in which neighbours' ranks are as close as in the given one: a p-value."""
    ranks = stats.rankdata(values)
    rng = np.random.default_rng(seed)
    orders = rng.permuted(np.tile(ranks, (shuffles, 1)), axis=1)
    return float((np.square(np.diff(orders)).sum(1) <= np.square(np.diff(ranks)).sum()).mean())


def top_share(sq_norms: np.ndarray, part: float = 0.01) -> float:
    """Share of the sum that the largest `part` of all entries hold, from all of them."""
    flat = sorted((float(s) for s in np.ravel(sq_norms)), reverse=True)
    return sum(flat[: math.ceil(part * len(flat))]) / sum(flat)


def progress_mean(b: np.ndarray, batch: float) -> float:
    """Mean of the noise scales b with weights 1/(1 + b/batch)."""
    weights = [1 / (1 + float(each) / batch) for each in b]
    return sum(w * float(each) for w, each in zip(weights, b, strict=True)) / sum(weights)


def drifting_steps(
    rng: np.random.Generator, spectrum: np.ndarray, b_simple: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """(m, q) of one step a noise scale, as `gaussian_steps` of each."""
    made = [gaussian_steps(rng, spectrum, float(b), n, 1) for b in b_simple]
    return np.array([float(m[0]) for m, _ in made]), np.array([float(q[0]) for _, q in made])


def delta_method(x: np.ndarray, y: np.ndarray, level: float) -> tuple[float, float]:
    """The interval that others print: ratio ± t · first-order standard error. A control, not a twin."""
    k, mx, my = len(x), float(np.mean(x)), float(np.mean(y))
    ratio = mx / my
    se = float(np.std(np.asarray(x) - ratio * np.asarray(y), ddof=1)) / math.sqrt(k) / abs(my)
    t = float(stats.t.ppf((1 + level) / 2, k - 1))
    return ratio - t * se, ratio + t * se


def gaussian_steps(
    rng: np.random.Generator, spectrum: np.ndarray, b_simple: float, n: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """(m, q) of k steps of n Gaussian gradients with tr Σ / |G|² = b_simple; G has equal entries.

    ḡ ~ N(G, Λ/n) and Σ(gᵢ − ḡ)² ~ λ χ²_{n−1} are independent, so that no example need be drawn.
    """
    d = len(spectrum)
    mean = np.full(d, math.sqrt(spectrum.sum() / b_simple / d))
    centre = mean + rng.standard_normal((k, d)) * np.sqrt(spectrum / n)
    scatter = (rng.chisquare(n - 1, (k, d)) * spectrum).sum(1)
    q = (centre**2).sum(1)
    return q + scatter / n, q


def misses(covered: Callable[[int], bool], repeats: int) -> int:
    """Count the repeats that are not covered."""
    return sum(not covered(r) for r in range(repeats))
