"""B_noise beside B_simple over a training, each with its band, and their ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gns.curvature.course import OverReadings, so_far
from gns.curvature.result import CurvatureReading
from gns.report.figures.look import LIGHT, Theme, canvas, in_look, limits, log_axis
from gns.report.figures.training import Course


@in_look
def curvature(
    readings: Sequence[CurvatureReading], run: Course, level: float, *, theme: Theme = LIGHT
) -> Figure | None:
    """Draw B_simple and B_noise with their bands, all so far, and their ratio below.

    Args:
        readings: of B_noise.
        run: course of B_simple.
        level: nominal coverage of the bands.
        theme: colours.

    Returns:
        The figure; None with too few readings or steps.
    """
    found = so_far(readings, level=level)
    if len(found) < 2 or len(run.so_far) < 2:
        return None
    simple = [(step, r.b_simple, r.low, r.high) for step, r in run.so_far]
    noise = [(r.step, r.b_noise, r.low, r.high) for r in found]
    ratio = _ratio(simple, noise)
    figure, panels = canvas(1 + (ratio is not None), height=6.2 if ratio is not None else 4.2)
    above, below = panels[0], panels[-1]
    low, high = _span([*simple, *noise])
    above.set_yscale("log")
    above.set_ylim(low, high)
    log_axis(above.yaxis, low, high)
    _banded(above, simple, theme.blue, f"B_simple, all steps so far ({100 * level:g} %)")
    _banded(above, noise, theme.orange, f"B_noise, all readings so far ({100 * level:g} %)")
    above.set_ylabel("examples")
    above.set_title(_cost(found[-1], readings))
    if ratio is not None:
        below.plot(*ratio, color=theme.ink, linewidth=2)
        below.axhline(1, color=theme.grey, linewidth=1, linestyle=(0, (4, 3)))
        below.set_ylim(bottom=0)
        below.set_ylabel("B_noise / B_simple")
    below.set_xlabel("optimizer step")
    below.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    figure.legend(loc="outside lower center", ncols=1)
    return figure


Rows = Sequence[tuple[int, float, float, float]]


def _span(rows: Rows) -> tuple[float, float]:
    low, high = limits(
        [v for _, value, a, b in rows for v in (value, a, b if math.isfinite(b) else math.nan)]
    )
    if any(math.isinf(b) for *_, b in rows):
        high *= 4  # room above for bands without an upper end
    return max(low, high / 1e5), high


def _banded(ax: Axes, rows: Rows, colour: str, label: str) -> None:
    """A line in its band; where there is no upper end the band runs to the top, fainter, under arrows."""
    bottom, top = ax.get_ylim()
    x, value, low, high = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    low = np.clip(np.nan_to_num(low, nan=bottom), bottom, top)
    open_ = ~np.isfinite(high)
    ax.plot(x, value, color=colour, linewidth=2.2, label=label)
    ax.fill_between(x, low, np.minimum(high, top), where=list(~open_), color=colour, alpha=0.22, linewidth=0)
    ax.fill_between(x, low, np.full_like(x, top), where=list(open_), color=colour, alpha=0.08, linewidth=0)
    at = x[open_][:: max(1, int(open_.sum()) // 8)]
    ax.plot(at, np.full_like(at, top), "^", color=colour, markersize=6, clip_on=False)


def _ratio(simple: Rows, noise: Rows) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps of the readings and the ratio there; None where it is resolved at fewer than two."""
    steps, values = np.array([(step, value) for step, value, *_ in simple]).T
    at = np.array([step for step, *_ in noise], dtype=float)
    ratio = np.array([value for _, value, *_ in noise]) / np.interp(at, steps, values)
    return (at, ratio) if np.isfinite(ratio).sum() > 1 else None


def _cost(last: OverReadings, readings: Sequence[CurvatureReading]) -> str:
    """What the readings cost, in words."""
    if math.isnan(last.steps_each):
        return ""
    apart = np.diff([r.step for r in readings])
    share = 100 * last.steps_each / float(np.median(apart))
    return f"{last.readings} readings of about {last.steps_each:.0f} steps each: {share:.0f} % more time"
