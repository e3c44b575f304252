"""Figures of what a batch size costs."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from gns.advice import Advice
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
            label="pays if time and examples matter equally",
        )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xlim(batches[0], batches[-1])
    ax.set_ylim(0.9, top)
    log_axis(ax.xaxis, 1, 2)
    log_axis(ax.yaxis, 1, 2)
    ax.set_xlabel("batch size (examples per optimizer step)")
    ax.set_ylabel("times the fewest possible")
    figure.legend(loc="outside lower center", ncols=2)
    return figure
