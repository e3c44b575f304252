"""Figures of a run, on Agg canvases of their own: no pyplot, no backend, no setting of the user changed.

Every function takes steps or results and gives a `Figure`, or None where there is too little to draw.
Colours are Okabe and Ito's, which colour-blind readers tell apart; each axis says its unit.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from gns.advice import Advice
from gns.estimate import MIN_STEPS, Estimate, estimate, format_count
from gns.report.text import label_of
from gns.sums import StepSums

P = ParamSpec("P")
BLUE, ORANGE, GREEN, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#767676", "#222222"
EVALUATIONS = 40  # points at which the estimate is computed anew along a run
SLICES = 10  # of the fade where a set has no upper end
DOTS = 2000  # raw points drawn at most
_LOOK: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.usetex": False,
    "axes.unicode_minus": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
}


def png(figure: Figure) -> bytes:
    """Render a figure to the bytes of a PNG, 160 dots per inch."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_LOOK):
        canvas = FigureCanvasAgg(figure)
        figure.draw_without_rendering()  # the first layout does not know the legend's size yet
        canvas.print_png(buffer)
    return buffer.getvalue()


def _looks(draw: Callable[P, Figure | None]) -> Callable[P, Figure | None]:
    """Draw in our look, whatever style the user's process has set; his comes back afterwards."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure | None:
        with matplotlib.rc_context(_LOOK):
            return draw(*args, **kwargs)

    return drawn


def _canvas(rows: int = 1, height: float = 3.9) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(6.8, height), dpi=160, layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(rows, 1, sharex=True)))


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


def _log_axis(axis: Any, low: float, high: float) -> None:
    """Label a logarithmic axis in plain numbers: powers of two, or of ten where there are many."""
    base = 2 if math.log2(high / low) <= 11 else 10
    axis.set_major_locator(LogLocator(base=base, numticks=13))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 1000 else format_count(x)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _limits(values: Sequence[float], room: float = 1.6) -> tuple[float, float]:
    """Give log-axis limits around the positive finite values."""
    good = [v for v in values if math.isfinite(v) and v > 0] or [1.0]
    return min(good) / room, max(good) * room


def _band(ax: Axes, run: Sequence[tuple[int, Estimate]], colour: str, label: str, *, main: bool) -> None:
    """Draw values with their sets; without an upper end, only the lower one, under arrows.

    The value is a thin line where its set has no upper end: it is hardly known there. The main band also
    fades out towards the top there.
    """
    bottom, top = ax.get_ylim()
    x = np.array([step for step, _ in run], dtype=float)
    value = np.array([r.b_simple for _, r in run])
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


@_looks
def noise_scale(run: Course, result: Estimate, batch_size: int | None) -> Figure | None:
    """Draw B_simple with its confidence band along the run, so far and over a trailing window."""
    if len(run.so_far) < 2:
        return None
    figure, (ax,) = _canvas(height=4.2)
    shown = [r for _, r in (*run.so_far, *run.trailing)]
    bounded = [v for r in shown if math.isfinite(r.high) for v in (r.b_simple, r.high)]
    low, high = _limits([*bounded, *(r.low for r in shown), float(batch_size or math.nan)])
    if len(bounded) < 2 * len(shown):
        high *= 4  # room for the fade
    low = max(low, high / 1e6)
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    _log_axis(ax.yaxis, low, high)
    if len(run.trailing) > 1:
        _band(ax, run.trailing, ORANGE, f"last {run.window} steps", main=False)
    _band(ax, run.so_far, BLUE, f"all steps so far, {100 * result.level:g} % band", main=True)
    if batch_size:
        ax.axhline(
            batch_size, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label=f"batch in use, {batch_size}"
        )
    if any(math.isinf(r.high) for r in shown):
        ax.plot([], [], "^", color=GREY, label="no upper end")
    ax.set_ylim(low, high)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel("B_simple (examples)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@_looks
def signal_and_noise(steps: Sequence[StepSums], run: Course) -> Figure | None:
    """Draw tr Σ and |G|² of single steps as points, and their averages over the trailing window."""
    usable = [s for s in steps if s.usable]
    if not usable:
        return None
    picked = usable[:: math.ceil(len(usable) / DOTS)]
    figure, (above, below) = _canvas(2, height=4.8)
    at, size = [s.step for s in picked], 6 if len(picked) > 50 else 10
    scaled = " × unknown loss scale²" if any(s.loss_scaled for s in usable) else ""
    which = f"average of the last {run.window} steps" if run.averages == run.trailing else "average so far"
    parts = (
        (above, "trace_sigma", ORANGE, "tr Σ, noise"),
        (below, "grad_sq_norm", BLUE, "|G|², signal"),
    )
    for ax, name, colour, title in parts:
        raw = [getattr(s, name) for s in picked]
        ax.plot(at, raw, ".", color=colour, alpha=0.5, markersize=size, markeredgewidth=0, label="one step")
        means = [getattr(r, name) for _, r in run.averages]
        ax.plot([step for step, _ in run.averages], means, color=colour, linewidth=2, label=which)
        _signed_axis(ax, raw + means)
        ax.set_title(f"{title} (loss² / parameter²{scaled})")
        ax.legend(loc="upper right", ncols=2)
    below.axhline(0, color=INK, linewidth=0.8)
    below.set_xlabel("optimizer step")
    below.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return figure


def _signed_axis(ax: Axes, values: Sequence[float]) -> None:
    """Choose a log axis for values above zero, else one that is linear around zero."""
    sizes = [abs(v) for v in values if v != 0 and math.isfinite(v)]
    if min(values) > 0:
        low, high = _limits(values, 1.3)
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


@_looks
def trade_off(advice: Advice | None) -> Figure | None:
    """Draw steps and examples relative to their minima against the batch size, each with its band."""
    if advice is None or not advice.table:
        return None
    figure, (ax,) = _canvas(height=4.2)
    if advice.span:
        ax.set_title(f"For {advice.span}")
    batches = [row.batch_size for row in advice.table]
    top = 2.0 ** min(12, math.ceil(math.log2(_limits([row.steps[0] for row in advice.table])[1])))
    for name, colour, label in (
        ("steps", BLUE, "optimizer steps, S / S_min"),
        ("examples", ORANGE, "examples, E / E_min"),
    ):
        low, high = np.array([getattr(row, name) for row in advice.table]).T
        shown = np.minimum(high, top * 4)
        ax.fill_between(
            batches, low, shown, color=colour, alpha=0.18 if np.isfinite(high).all() else 0.09, linewidth=0
        )
        ax.plot(batches, low, color=colour, linewidth=1.6, label=label)
        ax.plot(batches, np.where(np.isfinite(high), high, np.nan), color=colour, linewidth=1.6)
    ax.axvline(
        advice.batch_size,
        color=INK,
        linewidth=1.2,
        linestyle=(0, (4, 3)),
        label=f"batch in use, {advice.batch_size}",
    )
    near = advice.ranges[-1]
    ends = (max(near.low, batches[0]), min(near.high, batches[-1]))
    if ends[0] < ends[1]:
        ax.axvspan(
            *ends, color=GREEN, alpha=0.12, linewidth=0, label="pays if time and examples matter equally"
        )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xlim(batches[0], batches[-1])
    ax.set_ylim(0.9, top)
    _log_axis(ax.xaxis, 1, 2)
    _log_axis(ax.yaxis, 1, 2)
    ax.set_xlabel("batch size (examples per optimizer step)")
    ax.set_ylabel("times the fewest possible")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@_looks
def factors(result: Estimate) -> Figure | None:
    """Draw the noise scale of each LoRA factor beside the joint one, with their sets."""
    named = [("all", result), *result.groups.items()]
    named = [(name, r) for name, r in named if math.isfinite(r.low)]
    if not named:
        return None
    figure, (ax,) = _canvas(height=1.5 + 0.55 * len(named))
    low, high = _limits([v for _, r in named for v in (r.low, r.b_simple, r.high)], 2)
    low = max(low, high / 1e6)
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    _log_axis(ax.xaxis, low, high)
    for y, (name, r) in enumerate(named):
        colour = INK if name == "all" else BLUE if name == "A" else ORANGE if name == "B" else GREEN
        start, end = max(r.low, low), min(r.high, high)
        ax.plot([start, end], [y, y], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
        if math.isfinite(r.b_simple):
            ax.plot([r.b_simple], [y], "o", color=colour, markersize=9)
        if math.isinf(r.high):
            ax.plot([high], [y], ">", color=colour, markersize=9, clip_on=False)
    ax.set_yticks(range(len(named)), [label_of(name) for name, _ in named])
    ax.set_ylim(len(named) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(f"B_simple (examples), {100 * result.level:g} % interval; ▸ no upper end")
    return figure
