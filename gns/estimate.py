"""From the sums of many steps to a value, a confidence set, a status and a detection limit. Pure functions.

Averages first, ratio last: X = Σ wₖ tr Σₖ, Y = Σ vₖ |G|²ₖ, B_simple = X / Y, with wₖ ∝ nₖ − 1 and
vₖ ∝ nₖ(nₖ − 1). The set is the hull of Fieller's and of its version with Hall's skewness correction.
A negative average of |G|² is legal; nothing is clamped. Unit of every B: examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import optimize, stats

from gns.sums import StepSums

MIN_STEPS = (
    20  # below it the set covers too rarely (simulated: 92 % of nominal 95 % at 10 steps, j⁻² spectrum)
)
STATUSES = ("measured", "lower bound", "not detectable", "collecting")
LOCAL = "local statistics"


@dataclass(frozen=True)
class Estimate:
    """A noise scale with its confidence set, and what to believe of it.

    Args:
        b_simple: X / Y in examples; NaN where Y ≤ 0.
        low: lower end of the confidence set, in examples; where Y < 0, no more than Y := 0 would give.
        high: upper end; `inf` where the data set no upper bound.
        level: nominal coverage of [low, high].
        status: "measured" (bounded set), "lower bound" (|G|² not distinguishable from 0), "not
            detectable" (|G|² averages so far below 0 that no positive B fits),
            "collecting" (fewer than `MIN_STEPS` usable steps: the set is not yet trustworthy).
        trace_sigma: X, in (loss / parameter)².
        grad_sq_norm: Y, in (loss / parameter)²; may be negative.
        detection_limit: largest B that these steps could tell from infinity, X / (t · se(Y)), in examples.
        n_steps: usable steps in the averages.
        n_examples: examples in them.
        unit: what one "example" is, with its mean tokens where known.
        groups: the same for each parameter group, "A" and "B" for LoRA.
        n_skipped: steps left out because they carry a `reason`.
        loss_scaled: tr Σ and |G|² still carry an unknown loss scale; B_simple does not.
        steps: first and last step number in the averages, or None.
        history: the steps themselves, where the estimate was loaded from a run.
        coverage: share of the trainable parameters that is in the sums, or None where unknown.
    """

    b_simple: float
    low: float
    high: float
    level: float
    status: str
    trace_sigma: float
    grad_sq_norm: float
    detection_limit: float
    n_steps: int
    n_examples: int
    unit: str = "examples"
    groups: dict[str, Estimate] = field(default_factory=dict)
    n_skipped: int = 0
    loss_scaled: bool = False
    steps: tuple[int, int] | None = None
    history: tuple[StepSums, ...] = field(default=(), repr=False, compare=False)
    coverage: float | None = None

    @property
    def examples_per_step(self) -> float:
        """Mean number of examples in a step; NaN without steps."""
        return self.n_examples / self.n_steps if self.n_steps else math.nan

    @property
    def target(self) -> str:
        """What the number estimates: which average over which steps."""
        over = f"steps {self.steps[0]}–{self.steps[1]}" if self.steps else "no steps"
        return f"ratio of averages over {over}; population gradient as long as no example was seen twice"

    def __str__(self) -> str:
        size = f"{self.n_steps} steps × {format_count(self.examples_per_step)}"
        if LOCAL in self.unit:
            size += f" on each rank alone ({LOCAL})"
        percent = f"{100 * self.level:g} %"
        if self.n_steps < 2:
            return f"B_simple: collecting, {self.n_steps} usable step(s) so far ({self.n_skipped} left out)"
        if self.status in ("lower bound", "not detectable"):
            bound = f"B_simple ≥ {format_count(self.low)} examples ({percent})"
            limit = f"detection limit {format_count(self.detection_limit)}, {size}"
            return f"{bound}; |G|² not distinguishable from 0 ({limit}); {self.status}"
        value = (
            "B_simple not resolved"
            if math.isnan(self.b_simple)
            else f"B_simple = {format_count(self.b_simple)} examples"
        )
        bounds = f"{format_count(self.low)} … {format_count(self.high)}"
        return f"{value} ({percent}: {bounds}), {size}; {self.status}"


def format_count(x: float) -> str:
    """Write a number of examples with the digits a reader can use: 0.052, 3.4, 212, 15,300, ∞."""
    if math.isnan(x):
        return "?"
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    if abs(x) >= 1000:
        return f"{float(f'{x:.3g}'):,.0f}"
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.2g}" if abs(x) < 10 else f"{x:.3g}"


@dataclass(frozen=True)
class Moments:
    """Weighted averages of tr Σ (x) and |G|² (y) over steps, and what the spread of X − θY is made of.

    D = X − θY has variance s(θ) = Σ (aₖ − θbₖ)² · K/(K−1) with aₖ = wₖ(xₖ − X), bₖ = vₖ(yₖ − Y): a sandwich,
    right for steps of unequal n. K is the effective number of steps, 1 / max(Σwₖ², Σvₖ²).
    """

    x: float
    y: float
    second: tuple[float, float, float]  # Σa², Σab, Σb²
    third: tuple[float, float, float, float]  # Σa³, Σa²b, Σab², Σb³
    k: float

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray, w: np.ndarray, v: np.ndarray) -> Moments:
        """Build from per-step x, y, [K] each, and unnormalised weights w (of x) and v (of y)."""
        w, v = w / w.sum(), v / v.sum()
        mean_x, mean_y = float(w @ x), float(v @ y)
        a, b = w * (x - mean_x), v * (y - mean_y)
        second = (float(a @ a), float(a @ b), float(b @ b))
        third = (float((a**3).sum()), float((a * a * b).sum()), float((a * b * b).sum()), float((b**3).sum()))
        return cls(mean_x, mean_y, second, third, 1 / max(float(w @ w), float(v @ v)))

    @property
    def df(self) -> float:
        """Degrees of freedom of the variance."""
        return self.k - 1

    def se_y(self) -> float:
        """Standard error of Y."""
        return math.sqrt(self.second[2] * self.k / self.df)

    def statistics(self, theta: np.ndarray, kappa: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Student's T and Hall's H of D = κX − θY, both [...]; κ = 0, θ = 1 is the point at infinity.

        H = √K (W + γW²/3 + γ²W³/27 + γ/(6K)) with W = T/√K and γ the skewness of the steps' D.
        Source: Hall 1992, J. R. Stat. Soc. B 54:221, eq. (2.3).
        """
        d = kappa * self.x - theta * self.y
        aa, ab, bb = self.second
        sum_sq = np.maximum(kappa**2 * aa - 2 * kappa * theta * ab + theta**2 * bb, 0)
        aaa, aab, abb, bbb = self.third
        cubes = kappa**3 * aaa - 3 * kappa**2 * theta * aab + 3 * kappa * theta**2 * abb - theta**3 * bbb
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            t = d / np.sqrt(sum_sq * self.k / self.df)
            gamma = np.nan_to_num(math.sqrt(self.k) * cubes / sum_sq**1.5)
            t = np.where(d == 0, 0.0, t)
            w = t / math.sqrt(self.k)
            h = math.sqrt(self.k) * (w + gamma * w**2 / 3 + gamma**2 * w**3 / 27 + gamma / (6 * self.k))
        return t, np.where(np.isfinite(t), h, t)


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
    t_level = float(stats.t.ppf((1 + level) / 2, moments.df))
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


def estimate(steps: Iterable[StepSums], *, level: float = 0.95) -> Estimate:
    """Estimate B_simple = tr Σ / |G|² from the sums of many steps.

    Args:
        steps: records of steps; those that carry a `reason` are left out and counted.
        level: nominal coverage of the confidence set.

    Returns:
        The estimate; with fewer than two usable steps all its figures are NaN and its status "collecting".

    Raises:
        ValueError: `level` is outside (0, 1).
        TypeError: `steps` holds something else than `StepSums`.

    Source: McCandlish et al. 2018, arXiv:1812.06162, appendix A, for the averages.
    """
    steps = list(steps)
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; a coverage in (0, 1) is needed, e.g. 0.95")
    foreign = {type(s).__name__ for s in steps if not isinstance(s, StepSums)}
    if foreign:
        raise TypeError(
            f"steps holds {', '.join(sorted(foreign))}; StepSums are needed, e.g. monitor.history"
        )
    usable = [s for s in steps if s.usable]
    joint = _estimate(usable, level)
    of_step = [s.groups for s in usable]
    names = of_step[0] if of_step else ()
    by_name = {name: [groups[name] for groups in of_step if name in groups] for name in names}
    groups = {name: _estimate(of_group, level) for name, of_group in by_name.items()}
    return replace(joint, groups=groups, n_skipped=len(steps) - len(usable))


def _estimate(steps: list[StepSums], level: float) -> Estimate:
    n = np.array([s.n_examples for s in steps], dtype=np.float64)
    about = {
        "level": level,
        "n_steps": len(steps),
        "n_examples": int(n.sum()),
        "unit": _unit(steps),
        "loss_scaled": any(s.loss_scaled for s in steps),
        "steps": (steps[0].step, steps[-1].step) if steps else None,
    }
    nan = math.nan
    if len(steps) < 2:
        x, y = (steps[0].trace_sigma, steps[0].grad_sq_norm) if steps else (nan, nan)
        return Estimate(
            nan,
            nan,
            math.inf,
            status="collecting",
            trace_sigma=x,
            grad_sq_norm=y,
            detection_limit=nan,
            **about,
        )
    x = np.array([s.trace_sigma for s in steps])
    y = np.array([s.grad_sq_norm for s in steps])
    unit = 2.0 ** -np.ceil(np.log2(np.abs(np.concatenate([x, y])).max() or 1.0))  # exact: cubes stay in range
    moments = Moments.of(x * unit, y * unit, n - 1, n * (n - 1))
    low, high, empty = _honest_set(moments, level)
    return Estimate(
        b_simple=moments.x / moments.y if moments.y > 0 else nan,
        low=low,
        high=high,
        status=_status(moments, high, empty),
        trace_sigma=float(moments.x / unit),
        grad_sq_norm=float(moments.y / unit),
        detection_limit=_detection_limit(moments, level),
        **about,
    )


def _honest_set(moments: Moments, level: float) -> tuple[float, float, bool]:
    """Widen the set where an average lies on the impossible side of zero.

    With Y < 0 the positive part slides to infinity before it vanishes: no more is claimed than Y := 0 would.
    With X < 0 (tr Σ, by chance and only under unequal weights) no less is allowed than X := 0 would.
    """
    low, high, empty = confidence_set(moments, level)
    if moments.y < 0:
        low = float(np.fmin(low, confidence_set(replace(moments, y=0.0), level)[0]))
    elif moments.x < 0:
        wide = confidence_set(replace(moments, x=0.0), level)[1]
        low, high, empty = 0.0, wide if empty else max(high, wide), False
    return low, high, empty


def _status(moments: Moments, high: float, empty: bool) -> str:
    if moments.k < MIN_STEPS * (1 - 1e-9):
        return "collecting"
    if empty:
        return "not detectable"
    return "lower bound" if math.isinf(high) else "measured"


def _detection_limit(moments: Moments, level: float) -> float:
    """Largest B that these steps could tell from infinity: X / (t · se(Y)), in examples."""
    se = moments.se_y()
    return moments.x / (float(stats.t.ppf((1 + level) / 2, moments.df)) * se) if se > 0 else math.inf


def _unit(steps: list[StepSums]) -> str:
    """Say what one example is, "examples (mean 187 tokens)", and whether steps are real ones."""
    if any(s.local for s in steps):
        return f"{_counted(steps)}, {LOCAL}: `.grad` is hidden, so each rank's own batch stands for a step"
    return _counted(steps)


def _counted(steps: list[StepSums]) -> str:
    """Say what one example is."""
    if any(not s.call_seen for s in steps):
        return "rows of the layers' input (the model's own call was not seen: equal weights assumed)"
    counted = [(s.n_tokens, s.n_examples) for s in steps if s.n_tokens is not None]
    if not counted or len(counted) < len(steps):
        return "examples"
    tokens, examples = (sum(column) for column in zip(*counted, strict=True))
    return f"examples (mean {tokens / examples:.0f} tokens)"
