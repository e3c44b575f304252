"""B_noise beside B_simple over a training, single readings and all together, and their ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gns.curvature.course import cost_in_words, so_far
from gns.curvature.result import CurvatureReading
from gns.report.figures.look import LIGHT, Theme, canvas, in_look, limits, log_axis
from gns.report.figures.training import Course

Rows = Sequence[tuple[int, float, float, float]]  # step, value, lower and upper end
BEYOND = 30  # times what is known: a single reading's upper end further up is not worth the room
RATIO = 100.0  # largest ratio drawn


@in_look
def curvature(
    readings: Sequence[CurvatureReading], run: Course, level: float, *, theme: Theme = LIGHT
) -> Figure | None:
    """Draw B_simple and B_noise with their sets, and their ratio below.

    Single readings have bars of their own; from the third reading on there is the band of all so far.

    Args:
        readings: of B_noise.
        run: course of B_simple.
        level: nominal coverage of the bands; bars have that of the readings.
        theme: colours.

    Returns:
        The figure; None without a reading, or with too few steps.
    """
    if not readings or len(run.so_far) < 2:
        return None
    simple = [(step, r.point, r.low, r.high) for step, r in run.so_far]
    courses = [r for r in so_far(readings, level=level) if r.status != "indefinite"]
    together = [(r.step, r.b_noise, r.low, r.high) for r in courses]
    estimates = [(r.step, r.estimate) for r in readings]
    single = [(step, e.b_noise, e.low, e.high) for step, e in estimates if e.status != "indefinite"]
    off = [step for step, e in estimates if e.status == "indefinite"]
    ratios = [_over(rows, simple) for rows in (together, single)]
    known = any(math.isfinite(value) for rows in ratios for _, value, *_ in rows)
    figure, panels = canvas(1 + known, height=6.6 if known else 4.4)
    above, below = panels[0], panels[-1]
    low, high = _span([*simple, *together], single)
    _log(above, low, high)
    _banded(above, simple, theme.blue, f"B_simple, all steps so far ({100 * level:g} %)")
    if single:
        _bars(above, single, theme.orange, f"B_noise, one reading ({100 * readings[0].estimate.level:g} %)")
    if together:
        _banded(above, together, theme.green, f"B_noise, all readings so far ({100 * level:g} %)")
    if off:
        above.plot(
            off, [low] * len(off), "x", color=theme.orange, clip_on=False, label="reading is indefinite"
        )
    if any(not b <= high for *_, b in (*simple, *together, *single)):
        above.plot([], [], "^", color=theme.grey, label="goes on, or has no upper end")
    above.set_ylabel("examples")
    above.set_title("\n".join([*_in_words(ratios, len(readings)), cost_in_words(readings)]).strip())
    if known:
        _ratios(below, ratios[0], ratios[1], theme)
    below.set_xlabel("optimizer step")
    below.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    figure.legend(loc="outside lower center", ncols=1)
    return figure


def _log(ax: Axes, low: float, high: float) -> None:
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    log_axis(ax.yaxis, low, high)


def _span(bands: Rows, single: Rows) -> tuple[float, float]:
    def good(rows: Rows, most: float = math.inf) -> list[float]:
        return [v for row in rows for v in row[1:] if 0 < v < most and math.isfinite(v)]

    known = good(bands)
    low, high = limits([*known, *good(single, BEYOND * max(known, default=1.0))])
    if any(not b <= high for *_, b in (*bands, *single)):
        high *= 4  # room above for what has no upper end
    return max(low, high / 1e5), high


def _bars(ax: Axes, rows: Rows, colour: str, label: str) -> None:
    """A point and a bar a row; no point where nothing positive was found, an arrow where the bar goes on."""
    bottom, top = ax.get_ylim()
    x, value, low, high = np.array(rows, dtype=float).reshape(-1, 4).T
    low = np.clip(np.nan_to_num(low, nan=bottom), bottom, top)
    ax.vlines(x, low, np.where(high <= top, high, top), color=colour, linewidth=1.4, alpha=0.7)
    ax.plot(x, np.where((value > 0) & (value <= top), value, np.nan), "o", color=colour, label=label)
    _arrows(ax, x[~(high <= top)], colour)


def _arrows(ax: Axes, at: np.ndarray, colour: str) -> None:
    """Arrows at the top; an unclipped line without a point would still claim room in the layout."""
    if len(at):
        ax.plot(at, np.full_like(at, ax.get_ylim()[1]), "^", color=colour, markersize=6, clip_on=False)


def _banded(ax: Axes, rows: Rows, colour: str, label: str) -> None:
    """A line in its band, or a bar where there is one row.

    Where there is no upper end the band runs to the top, fainter, under arrows.
    """
    if len(rows) == 1:
        _bars(ax, rows, colour, label)
        return
    bottom, top = ax.get_ylim()
    x, value, low, high = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    low = np.clip(np.nan_to_num(low, nan=bottom), bottom, top)
    open_ = ~(high <= top)
    ax.plot(x, value, color=colour, linewidth=2.2, label=label)
    ax.fill_between(x, low, np.minimum(high, top), where=list(~open_), color=colour, alpha=0.22, linewidth=0)
    ax.fill_between(x, low, np.full_like(x, top), where=list(open_), color=colour, alpha=0.08, linewidth=0)
    _arrows(ax, x[open_][:: max(1, int(open_.sum()) // 8)], colour)


def _over(noise: Rows, simple: Rows) -> Rows:
    """Divide B_noise with its ends by the B_simple of that step; the set of B_simple is not in it."""
    steps, values = np.array([(step, value) for step, value, *_ in simple]).T
    below = np.interp([step for step, *_ in noise], steps, values)
    below = np.where(below > 0, below, np.nan)
    return [(step, v / b, low / b, high / b) for (step, v, low, high), b in zip(noise, below, strict=True)]


def _ratios(ax: Axes, together: Rows, single: Rows, theme: Theme) -> None:
    ends = [v for rows in (together, single) for _, *values in rows for v in values]
    low, high = limits([1.0, *(v for v in ends if 1 / RATIO <= v <= RATIO)])
    _log(ax, low, high)
    if together:
        _banded(ax, together, theme.green, "_")
    if single:
        _bars(ax, single, theme.orange, "_")
    ax.axhline(1, color=theme.grey, linewidth=1, linestyle=(0, (4, 3)))
    ax.set_ylabel("B_noise / B_simple")


def _in_words(ratios: Sequence[Rows], readings: int) -> list[str]:
    """The last ratio of all readings, or of the last that has one, in words; nothing where there is none."""
    for rows, many in zip(ratios, (True, False), strict=True):
        if rows and math.isfinite(rows[-1][1]):
            _, value, low, high = rows[-1]
            found = f"≥ {low:.2g}" if math.isinf(high) else f"{value:.2g} ({low:.2g} … {high:.2g})"
            which = f"all {readings} readings" if many else f"the reading at step {rows[-1][0]}"
            return [f"B_noise / B_simple {found} by {which}"]
    return []
