"""Figures over the course of training: the noise scale with its band, and the two parts of the ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from gns.estimate import MIN_STEPS, Estimate, estimate
from gns.report.figures.look import LIGHT, Theme, canvas, in_look, limits, log_axis
from gns.sums import StepSums

EVALUATIONS = 40  # points at which the estimate is computed anew along a run
SLICES = 10  # of the fade where a set has no upper end
DOTS = 2000  # raw points drawn at most


@dataclass(frozen=True)
class Course:
    """How the estimate came about: its value after each of some steps, and over a trailing window.

    Args:
        so_far: (step number, estimate over all usable steps up to it).
        trailing: (step number, estimate over the `window` usable steps up to it).
        window: usable steps in the window.
    """

    so_far: tuple[tuple[int, Estimate], ...]
    trailing: tuple[tuple[int, Estimate], ...]
    window: int

    @property
    def averages(self) -> tuple[tuple[int, Estimate], ...]:
        """The trailing estimates, or those so far in a run that is not longer than the window."""
        return self.trailing if len(self.trailing) > 1 else self.so_far


def course(steps: Sequence[StepSums], level: float) -> Course:
    """Compute the estimate anew at no more than `EVALUATIONS` places along a run.

    Args:
        steps: of the run.
        level: nominal coverage of each set on its own; the band as a whole covers less often.

    Returns:
        The course; from step `MIN_STEPS` on where there are so many.
    """
    usable = [replace(s, rows=None, layout=None) for s in steps if s.usable]
    window = max(MIN_STEPS, len(usable) // 5)
    first = MIN_STEPS if len(usable) > MIN_STEPS else 3
    if len(usable) < first:
        return Course((), (), window)
    ends = np.unique(np.linspace(first, len(usable), EVALUATIONS).round().astype(int))
    so_far = [(usable[k - 1].step, estimate(usable[:k], level=level)) for k in ends]
    trailing = [
        (usable[k - 1].step, estimate(usable[k - window : k], level=level)) for k in ends if k >= window
    ]
    return Course(tuple(so_far), tuple(trailing), window)


def _band(ax: Axes, run: Sequence[tuple[int, Estimate]], colour: str, label: str, *, main: bool) -> None:
    """Draw values with their sets; without an upper end, only the lower one, under arrows.

    The value is a thin line where its set has no upper end: it is hardly known there. The main band also
    fades out towards the top there.
    """
    bottom, top = ax.get_ylim()
    x = np.array([step for step, _ in run], dtype=float)
    value = np.array([r.point for _, r in run])
    low = np.array([bottom if math.isnan(r.low) else min(max(r.low, bottom), top) for _, r in run])
    high = np.array([r.high for _, r in run])
    bounded = np.isfinite(high)
    ax.plot(x, value, color=colour, linewidth=1, alpha=0.7)
    ax.plot(x, np.where(bounded, value, np.nan), color=colour, linewidth=2.4, label=label)
    ax.plot(x, low, color=colour, linewidth=1.2, alpha=0.8, linestyle=(0, (1, 1)))
    if bounded.any():
        ax.fill_between(x, low, high, where=list(bounded), color=colour, alpha=0.2, linewidth=0)
        ax.plot(
            x, np.where(bounded, high, np.nan), color=colour, linewidth=1.2, alpha=0.8, linestyle=(0, (1, 1))
        )
    if bounded.all():
        return
    edges = [low * (top / low) ** (i / SLICES) for i in range(SLICES + 1)]  # equal steps on the log axis
    for i in range(SLICES if main else 0):
        fade = 0.25 * (1 - (i + 0.5) / SLICES)
        ax.fill_between(
            x, edges[i], edges[i + 1], where=list(~bounded), color=colour, alpha=fade, linewidth=0
        )
    open_at = x[~bounded][0 if main else 1 :: max(2, int((~bounded).sum() // 8))]
    ax.plot(open_at, np.full(len(open_at), top), "^", color=colour, markersize=6, clip_on=False)


def _detection_limit(ax: Axes, run: Sequence[tuple[int, Estimate]], theme: Theme) -> None:
    """Draw the largest noise scale that the steps so far could give an upper end to."""
    known = [(step, r.detection_limit) for step, r in run if math.isfinite(r.detection_limit)]
    if known:
        x, y = (list(column) for column in zip(*known, strict=True))
        ax.plot(x, y, color=theme.grey, linewidth=1.4, linestyle="-.", label="detection limit, all so far")


@in_look
def noise_scale(
    run: Course, result: Estimate, batch_size: int | None, *, theme: Theme = LIGHT
) -> Figure | None:
    """Draw B_simple with its confidence band along the run, so far and over a trailing window."""
    if len(run.so_far) < 2:
        return None
    figure, (ax,) = canvas(height=4.2)
    shown = [r for _, r in (*run.so_far, *run.trailing)]
    bounded = [v for r in shown if math.isfinite(r.high) for v in (r.point, r.high)]
    ends = [r.low for r in shown] + [r.detection_limit for _, r in run.so_far[-1:]]
    low, high = limits([*bounded, *ends, float(batch_size or math.nan)])
    if len(bounded) < 2 * len(shown):
        high *= 4  # room for the fade
    low = max(low, high / 1e6)
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    log_axis(ax.yaxis, low, high)
    if len(run.trailing) > 1:
        _band(ax, run.trailing, theme.orange, f"last {run.window} steps", main=False)
    _band(ax, run.so_far, theme.blue, f"all steps so far, {100 * result.level:g} % band", main=True)
    if batch_size:
        ax.axhline(
            batch_size,
            color=theme.ink,
            linewidth=1.2,
            linestyle=(0, (4, 3)),
            label=f"batch in use, {batch_size}",
        )
    _detection_limit(ax, run.so_far, theme)
    if any(math.isinf(r.high) for r in shown):
        ax.plot([], [], "^", color=theme.grey, label="no upper end")
    ax.set_ylim(low, high)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel("B_simple (examples)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@in_look
def signal_and_noise(steps: Sequence[StepSums], run: Course, *, theme: Theme = LIGHT) -> Figure | None:
    """Draw tr Σ and |G|² of single steps as points, and their averages over the trailing window."""
    usable = [s for s in steps if s.usable]
    if not usable:
        return None
    picked = usable[:: math.ceil(len(usable) / DOTS)]
    figure, (above, below) = canvas(2, height=4.8)
    at, size = [s.step for s in picked], 6 if len(picked) > 50 else 10
    scaled = " × unknown loss scale²" if any(s.loss_scaled for s in usable) else ""
    which = f"average of the last {run.window} steps" if run.averages == run.trailing else "average so far"
    parts = (
        (above, "trace_sigma", theme.orange, "tr Σ, noise"),
        (below, "grad_sq_norm", theme.blue, "|G|², signal"),
    )
    for ax, name, colour, title in parts:
        raw = [getattr(s, name) for s in picked]
        ax.plot(at, raw, ".", color=colour, alpha=0.5, markersize=size, markeredgewidth=0, label="one step")
        means = [getattr(r, name) for _, r in run.averages]
        ax.plot([step for step, _ in run.averages], means, color=colour, linewidth=2, label=which)
        _signed_axis(ax, raw + means)
        ax.set_title(f"{title} (loss² / parameter²{scaled})")
        ax.legend(loc="upper right", ncols=2)
    below.axhline(0, color=theme.ink, linewidth=0.8)
    below.set_xlabel("optimizer step")
    below.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return figure


def _signed_axis(ax: Axes, values: Sequence[float]) -> None:
    """Choose a log axis for values above zero, else one that is linear around zero."""
    sizes = [abs(v) for v in values if v != 0 and math.isfinite(v)]
    if min(values) > 0:
        low, high = limits(values, 1.3)
        high *= (high / low) ** 0.25  # room for the legend
        ax.set_yscale("log")
        ax.set_ylim(low, high)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 50 else (1,)))
    else:
        nearest = 10.0 ** round(math.log10(float(np.median(sizes)))) if sizes else 1.0
        ax.set_yscale("symlog", linthresh=nearest, linscale=1)
        ax.margins(y=0.2)
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
