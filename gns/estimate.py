"""From the sums of many steps to a value, a confidence set, a status and a detection limit. Pure functions.

Averages first, ratio last: X = Σ wₖ tr Σₖ, Y = Σ vₖ |G|²ₖ, B_simple = X / Y, with wₖ ∝ nₖ − 1 and
vₖ ∝ nₖ(nₖ − 1). The set is the hull of Fieller's and of its version with Hall's skewness correction.
A negative average of |G|² is legal; nothing is clamped. Unit of every B: examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gns.statistics import tails
from gns.statistics.moments import BETWEEN, Moments, exact_unit
from gns.statistics.sets import (
    MIN_STEPS,
    confidence_set,
    detection_limit,
    honest_set,
    inside,
    p_value,
    status_of,
    times_more,
)
from gns.sums import StepSums

if TYPE_CHECKING:
    from gns.curvature.result import CurvatureReading

__all__ = [
    "LOCAL",
    "MIN_STEPS",
    "STATUSES",
    "Estimate",
    "Moments",
    "confidence_set",
    "estimate",
    "format_count",
]

STATUSES = ("measured", "lower bound", "not detectable", "collecting")
LOCAL = "local statistics"
RATIO = "ratio of averages"


@dataclass(frozen=True)
class Estimate:
    """A noise scale with its confidence set, and what to believe of it.

    Args:
        b_simple: X / Y in examples; NaN where Y ≤ 0; below 0, and so outside of the set, where X is.
        low: lower end of the confidence set, in examples; where Y < 0, no more than Y := 0 would give.
        high: upper end; `inf` where the data set no upper bound, and always where Y < 0.
        level: nominal coverage of [low, high].
        status: "measured" (bounded set), "lower bound" (|G|² not distinguishable from 0), "not
            detectable" (|G|² averages so far below 0 that no positive B fits),
            "collecting" (fewer than `MIN_STEPS` usable steps: the set is not yet trustworthy).
        trace_sigma: X, in (loss / parameter)².
        grad_sq_norm: Y, in (loss / parameter)²; may be negative.
        detection_limit: largest B that these steps could tell from infinity, X / (t · se(Y)), in examples;
            NaN where X < 0.
        n_steps: usable steps in the averages.
        n_examples: examples in them.
        unit: what one "example" is, with its mean tokens where known.
        groups: the same for each parameter group, "A" and "B" for LoRA.
        n_skipped: steps left out because they carry a `reason`.
        loss_scaled: tr Σ and |G|² still carry an unknown loss scale; B_simple does not.
        steps: first and last step number in the averages, or None.
        history: the steps themselves, where the estimate was loaded from a run.
        curvature: the readings of B_noise, where the estimate was loaded from a run.
        coverage: share of the trainable parameters that is in the sums, or None where unknown.
        p_value: of "no signal at all", |G|² = 0: one-sided, studentised, of a single look; NaN without steps.
        tail_share: share of Σ‖gᵢ‖² that the top 1 % of the examples hold, at least; None where unknown.
        warnings: sentences that belong beside the number.
        view: what average over the steps this is.
        metric: in which the squared norms are taken.
        variance: what the spread was taken from, "between steps" or, where they drift, "successive
            differences".
        moments: what the set was made of; None for an estimate written by hand.
        set_level: level of this set by itself, where `level` is that of all looks together; None: the same.
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
    p_value: float = math.nan
    tail_share: float | None = None
    warnings: tuple[str, ...] = ()
    view: str = RATIO
    metric: str = "euclidean"
    variance: str = BETWEEN
    moments: Moments | None = field(default=None, repr=False, compare=False)
    curvature: tuple[CurvatureReading, ...] = field(default=(), repr=False, compare=False)
    set_level: float | None = None

    @property
    def point(self) -> float:
        """B_simple as texts and figures show it beside its set: NaN where it lies outside, below 0."""
        return inside(self.b_simple, self.low, self.high)

    @property
    def examples_per_step(self) -> float:
        """Mean number of examples in a step; NaN without steps."""
        return self.n_examples / self.n_steps if self.n_steps else math.nan

    @property
    def target(self) -> str:
        """What the number estimates: which average over which steps."""
        over = f"steps {self.steps[0]}–{self.steps[1]}" if self.steps else "no steps"
        return f"{self.view} over {over}; population gradient as long as no example was seen twice"

    def more_examples(self, width: float = 0.2) -> float:
        """Predict how many further examples the set needs, at this batch size, to be as narrow as ± width.

        The set is worked out anew for r times the steps with averages and spread as they are now, and r is
        solved for. Simulated for ±20 % (Gaussian; flat, 1/j and j⁻² spectra, B_simple 20 and 100, steps of
        16): the total is right within a factor of 1.5 in 87–95 % of the runs whose set is within about ±40 %,
        with a median of 0.96–1.06 of the truth; in 58–76 % of those with wider sets, and too low (0.3–0.8)
        where only a part of the runs is "measured" at all.

        Args:
            width: relative half-width wanted, (high − low) / 2B.

        Returns:
            Examples; 0 where the set is that narrow; `inf` where |G|² or tr Σ averages to no positive number,
            so that none can be named; NaN with fewer than 2 steps.

        Raises:
            ValueError: `width` is not positive.
        """
        if not width > 0:
            raise ValueError(f"width is {width}; a relative half-width above 0 is needed, e.g. 0.2 for ±20 %")
        return self._more(width, self.b_simple)

    def _more(self, width: float, truth: float) -> float:
        """Further examples to ± width, if the noise scale is `truth`."""
        if self.n_steps < 2:
            return math.nan
        if not 0 < truth < math.inf:
            return math.inf
        if self.moments is None:  # written by hand: the width goes with B and with the root of the steps
            times = ((self.high - self.low) / 2 / self.b_simple * truth / self.b_simple / width) ** 2
        else:
            level = self.level if self.set_level is None else self.set_level
            times = times_more(replace(self.moments, y=self.moments.x / truth), level, width)
        return max(0.0, (times - 1) * self.n_examples)

    def outlook(self, width: float = 0.2) -> str:
        """Say how many more examples make the set as narrow as ± width, and how sure that is: one sentence.

        Raises:
            ValueError: `width` is not positive.
        """
        more, aim = self.more_examples(width), f"±{100 * width:g} %"
        if math.isnan(more) or (self.status == "collecting" and self.n_steps < MIN_STEPS):
            least = 2 if math.isnan(more) else MIN_STEPS
            return f"How many examples {aim} takes cannot be said before {least} steps are measured."
        if more == 0:
            return f"The interval is no wider than {aim}."
        if self.b_simple <= 0 and math.isfinite(self.high):
            return f"No number of examples gives {aim}: tr Σ, and so B_simple, averages to no more than 0."
        if math.isinf(self.high) or math.isinf(more):
            least = self._more(width, self.low)
            number = f"At least {format_count(least)} more" if 0 < least < math.inf else "More"
            return f"{number} examples are needed for {aim}: |G|² cannot be told from 0 yet."
        ends = [more, *(self._more(width, b) for b in (self.low, self.high))]
        least, most = format_count(min(ends)), format_count(max(ends))
        return (
            f"About {format_count(more)} more examples for {aim}, at this batch size "
            f"({least} … {most} over the noise scales in the interval)."
        )

    def __str__(self) -> str:
        size = f"{self.n_steps} steps × {format_count(self.examples_per_step)}"
        if LOCAL in self.unit:
            size += f" on each rank alone ({LOCAL})"
        if self.metric != "euclidean":
            size += f", {in_metric(self.metric)}"
        percent = f"{100 * self.level:g} %"
        if self.n_steps < 2:
            return f"B_simple: collecting, {self.n_steps} usable step(s) so far ({self.n_skipped} left out)"
        if self.status in ("lower bound", "not detectable"):
            bound = f"B_simple ≥ {format_count(self.low)} examples ({percent})"
            limit = size  # where X < 0 there is no limit to name
            if not math.isnan(self.detection_limit):
                limit = f"detection limit {format_count(self.detection_limit)}, {size}"
            return f"{bound}; |G|² not distinguishable from 0 ({limit}); {self.status}"
        value = (
            "B_simple not resolved"
            if math.isnan(self.point)
            else f"B_simple = {format_count(self.point)} examples"
        )
        bounds = f"{format_count(self.low)} … {format_count(self.high)}"
        return f"{value} ({percent}: {bounds}), {size}; {self.status}"


def in_metric(name: str) -> str:
    """Say in which metric a noise scale is, where it is not the Euclidean one: "in Adam's metric"."""
    return "in Adam's metric" if name == "adam" else f"in the metric {name!r}"


def format_count(x: float) -> str:
    """Write a number of examples with the digits a reader can use: 0.052, 3.4, 212, 15,300, ∞."""
    if math.isnan(x):
        return "?"
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    if abs(x) >= 1000:
        return f"{float(f'{x:.3g}'):,.0f}"
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.2g}" if abs(x) < 10 else f"{x:.3g}"


def estimate(steps: Iterable[StepSums], *, level: float = 0.95) -> Estimate:
    """Estimate B_simple = tr Σ / |G|² from the sums of many steps.

    Args:
        steps: records of steps; those that carry a `reason` are left out and counted.
        level: nominal coverage of the confidence set.

    Returns:
        The estimate; with fewer than two usable steps all its figures are NaN and its status "collecting".

    Raises:
        ValueError: `level` is outside (0, 1), or the steps are not all in one metric.
        TypeError: `steps` holds something else than `StepSums`.

    Source: McCandlish et al. 2018, arXiv:1812.06162, appendix A, for the averages.
    """
    usable, skipped = usable_of(steps, level)
    return with_groups(usable, skipped, lambda part: summarise(part, level=level))


def usable_of(steps: Iterable[StepSums], level: float) -> tuple[list[StepSums], int]:
    """Check what an estimate is asked for; give the usable steps, and how many are not.

    Raises:
        ValueError: `level` is outside (0, 1), or the steps are not all in one metric.
        TypeError: `steps` holds something else than `StepSums`.
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
    metrics = sorted({s.metric for s in usable})
    if len(metrics) > 1:
        raise ValueError(
            f"the steps are in {len(metrics)} metrics, {', '.join(metrics)}: their sums do not add. Estimate "
            f"each alone, e.g. [s for s in steps if s.metric == {metrics[0]!r}]"
        )
    return usable, len(steps) - len(usable)


def with_groups(
    usable: list[StepSums], skipped: int, summary: Callable[[list[StepSums]], Estimate]
) -> Estimate:
    """Summarise the steps and each of their parameter groups alike.

    Args:
        usable: steps.
        skipped: how many steps were left out.
        summary: of usable steps, in their order.

    Returns:
        The summary of the steps with those of the groups in it.
    """
    groups = {name: summary(of_group) for name, of_group in groups_of(usable).items()}
    return replace(summary(usable), groups=groups, n_skipped=skipped)


def groups_of(usable: list[StepSums]) -> dict[str, list[StepSums]]:
    """Group name → its records, of the steps that have it."""
    found: dict[str, list[StepSums]] = {}
    for step in usable:
        for name, group in step.groups.items():
            found.setdefault(name, []).append(group)
    return found


def summarise(
    steps: list[StepSums],
    *,
    level: float,
    weights: np.ndarray | None = None,
    influence: tuple[np.ndarray, np.ndarray] | None = None,
    view: str = RATIO,
) -> Estimate:
    """Estimate from usable steps, without their groups: the core of `estimate` and of every view.

    Args:
        steps: usable, in their order.
        level: nominal coverage of the confidence set.
        weights: [K], of the steps, beyond those by their size n; by default all 1.
        influence: [K] each, in the place of tr Σ and |G|² for the spread alone, where `weights` come from the
            same steps and so have errors of their own.
        view: name of the average.

    Returns:
        The estimate, with variance by successive differences where the steps drift.
    """
    n = np.array([s.n_examples for s in steps], dtype=np.float64)
    about = {
        "level": level,
        "n_steps": len(steps),
        "n_examples": int(n.sum()),
        "unit": _unit(steps),
        "loss_scaled": any(s.loss_scaled for s in steps),
        "steps": (steps[0].step, steps[-1].step) if steps else None,
        "view": view,
        "metric": steps[0].metric if steps else "euclidean",
    }
    nan = math.nan
    if len(steps) < 2:
        x, y = (steps[0].trace_sigma, steps[0].grad_sq_norm) if steps else (nan, nan)
        sums = {"trace_sigma": x, "grad_sq_norm": y, "detection_limit": nan}
        return Estimate(nan, nan, math.inf, status="collecting", **sums, **about)
    x = np.array([s.trace_sigma for s in steps])
    y = np.array([s.grad_sq_norm for s in steps])
    unit = exact_unit(x, y)
    w = n - 1 if weights is None else weights * (n - 1)
    spread = None if influence is None else (influence[0] * unit, influence[1] * unit)
    moments = Moments.of(x * unit, y * unit, w, w * n, variance="auto", influence=spread)
    heavy = tails.of(steps, moments, float((w * n).sum() ** 2 / (w * w * n / (n - 1)).sum()))
    return Estimate(
        **concluded(moments, unit, level), tail_share=heavy.share, warnings=heavy.warnings, **about
    )


def concluded(moments: Moments, unit: float, level: float) -> dict[str, Any]:
    """Give the fields of an `Estimate` that follow from the moments of its steps.

    Args:
        moments: of tr Σ and |G|², each times `unit`.
        unit: from `exact_unit`.
        level: nominal coverage of the confidence set.
    """
    low, high, empty = honest_set(moments, level)
    return {
        "b_simple": moments.x / moments.y if moments.y > 0 else math.nan,
        "low": low,
        "high": high,
        "status": status_of(moments, high, empty),
        "trace_sigma": float(moments.x / unit),
        "grad_sq_norm": float(moments.y / unit),
        "detection_limit": detection_limit(moments, level),
        "p_value": p_value(moments),
        "variance": moments.variance,
        "moments": moments,
    }


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
