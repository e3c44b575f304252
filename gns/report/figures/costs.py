"""Figures of what a batch size costs, and of the learning rate that goes with it."""

from __future__ import annotations

import math
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from gns.advice import Advice
from gns.advising.rates import spread
from gns.advising.tradeoff import EQUAL
from gns.advising.wording import DISAGREE
from gns.report.figures.look import LIGHT, Theme, canvas, in_look, limits, log_axis


@in_look
def trade_off(advice: Advice | None, *, theme: Theme = LIGHT) -> Figure | None:
    """Draw steps and examples relative to their minima against the batch size, each with its band."""
    if advice is None or not advice.table:
        return None
    figure, (ax,) = canvas(height=4.2)
    if advice.span:
        ax.set_title(f"For {advice.span}")
    batches = [row.batch_size for row in advice.table]
    top = 2.0 ** min(12, math.ceil(math.log2(limits([row.steps[0] for row in advice.table])[1])))
    for name, colour, label in (
        ("steps", theme.blue, "optimizer steps, S / S_min"),
        ("examples", theme.orange, "examples, E / E_min"),
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
        color=theme.ink,
        linewidth=1.2,
        linestyle=(0, (4, 3)),
        label=f"batch in use, {advice.batch_size}",
    )
    near = advice.ranges[-1]
    ends = (max(near.low, batches[0]), min(near.high, batches[-1]))
    if ends[0] < ends[1]:
        ax.axvspan(
            *ends,
            color=theme.green,
            alpha=0.12,
            linewidth=0,
            label="pays if both matter equally"
            if near.price == EQUAL
            else "pays at the price that is stated",
        )
    ax.set_yscale("log", base=2)
    ax.set_ylim(0.9, top)
    log_axis(ax.yaxis, 0.9, top)
    _batch_axis(ax, (batches[0], batches[-1]))
    ax.set_ylabel("times the fewest possible")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@in_look
def learning_rates(advice: Advice | None, *, theme: Theme = LIGHT) -> Figure | None:
    """Draw the learning rate that each law gives a batch size, with its band, and where the laws disagree.

    All laws start from the learning rate and the batch in use, so they meet there.
    """
    if advice is None or not advice.rates:
        return None
    figure, (ax,) = canvas(height=4.4)
    batches = np.array(advice.rates[0].batches)
    lows, highs = np.array([c.low for c in advice.rates]), np.array([c.high for c in advice.rates])
    apart = [spread(batch, advice.batch_size, (advice.low, advice.high)) > DISAGREE for batch in batches]
    bottom, top = float(lows.min()) / 1.5, float(highs.max()) * 1.5
    ax.fill_between(
        batches,
        bottom,
        top,
        where=apart,
        color=theme.grey,
        alpha=0.14,
        linewidth=0,
        label=f"laws differ by more than {DISAGREE:g}×",
    )
    looks = zip((theme.blue, theme.orange, theme.green), ("-", "--", "-."), strict=True)
    for curve, low, high, (colour, line) in zip(advice.rates, lows, highs, cycle(looks), strict=False):
        ax.fill_between(batches, low, high, color=colour, alpha=0.25, linewidth=0)
        ax.plot(batches, np.sqrt(low * high), color=colour, linewidth=2, linestyle=line, label=curve.law)
    at = int(np.argmin(np.abs(batches - advice.batch_size)))
    ax.plot([batches[at]], [lows[0][at]], "o", color=theme.ink, markersize=8, label="in use")
    _batch_axis(ax, (batches[0], batches[-1]))
    ax.set_yscale("log")
    ax.set_ylim(bottom, top)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top / bottom < 200 else (1,)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylabel("learning rate")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _batch_axis(ax: Axes, ends: tuple[float, float]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xlim(*ends)
    log_axis(ax.xaxis, *ends)
    ax.set_xlabel("batch size (examples per optimizer step)")
