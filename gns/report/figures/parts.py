"""Figures of the parts of a model: its LoRA factors."""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from gns.estimate import Estimate
from gns.report.figures.look import LIGHT, Theme, canvas, in_look, limits, log_axis
from gns.report.text import label_of


@in_look
def factors(result: Estimate, *, theme: Theme = LIGHT) -> Figure | None:
    """Draw the noise scale of each LoRA factor beside the joint one, with their sets."""
    named = [("all", result), *result.groups.items()]
    named = [(name, r) for name, r in named if math.isfinite(r.low)]
    if not named:
        return None
    figure, (ax,) = canvas(height=1.5 + 0.55 * len(named))
    low, high = limits([v for _, r in named for v in (r.low, r.b_simple, r.high)], 2)
    low = max(low, high / 1e6)
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    log_axis(ax.xaxis, low, high)
    for y, (name, r) in enumerate(named):
        colour = (
            theme.ink
            if name == "all"
            else theme.blue
            if name == "A"
            else theme.orange
            if name == "B"
            else theme.green
        )
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
