"""Best batch, largest harmless batch and noise scale against what was varied."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.analysis.curves import Curve, Estimated, largest_within, optimum
from experiments.analysis.noise import measured
from experiments.figures.curves import DELTA
from experiments.figures.style import GREY, STYLES, batch_axis, figure_of, label, named


def draw(found: Sequence[Curve], series: Sequence[str]) -> Figure:
    """Draw the three batch sizes of every cell, one above the other, on one axis of batch sizes.

    Args:
        found: a curve for each cell.
        series: fields that name the cells.
    """
    kinds = [
        ("best batch", [optimum(curve) for curve in found]),
        (
            f"B_max: largest within {DELTA:g} nat of the best",
            [largest_within(curve, DELTA) for curve in found],
        ),
        ("B_simple, factor B, measured at the smallest batch", [measured(curve.cell) for curve in found]),
    ]
    kinds = [(name, places) for name, places in kinds if any(place is not None for place in places)]
    figure = figure_of(7.6, 1.5 + 0.32 * len(found) * len(kinds) / 2 + 0.2 * len(found))
    axes = figure.subplots()
    batches = [float(b) for curve in found for b in (*curve.batches, *curve.diverged)]
    noise = [p.value for _, places in kinds[2:] for p in places if p is not None and math.isfinite(p.value)]
    low, high = min([*batches, *noise]) / 1.5, max([*batches, *noise]) * 1.5
    for k, (name, places) in enumerate(kinds):
        _kind(axes, places, k, len(kinds), name, (low, high))
    axes.set_yticks([-i for i in range(len(found))], [named(curve.cell, series) for curve in found])
    axes.set_ylim(-len(found) + 0.45, 0.55)
    axes.axvspan(min(batches), max(batches), color=GREY, alpha=0.07, linewidth=0, label="tried")
    ticks = [2.0**i for i in range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)]
    batch_axis(axes, ticks)
    axes.set_xlim(low, high)
    label(axes, "batch size (examples a step); arrows: beyond what was tried, or no end", "")
    axes.legend(fontsize=7.5, loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=2)
    return figure


def _kind(
    axes: Axes, places: Sequence[Estimated | None], k: int, of: int, name: str, ends: tuple[float, float]
) -> None:
    """One number of every cell."""
    style = STYLES[k]
    axes.plot([], [], color=style["color"], marker=style["marker"], linewidth=1.4, label=name)
    for i, place in enumerate(places):
        if place is None:
            continue
        y = -i + 0.24 * ((of - 1) / 2 - k)
        low, high = (min(max(end, ends[0]), ends[1]) for end in (place.low, place.high))
        axes.plot([low, high], [y, y], color=style["color"], linewidth=1.4)
        for at, end, arrow in ((low, place.low, "<"), (high, place.high, ">")):
            if end != at:
                axes.plot(at, y, marker=arrow, color=style["color"], markersize=4, clip_on=False)
        at = min(max(place.value, ends[0]), ends[1])
        fill = "full" if at == place.value else "none"
        axes.plot(
            at, y, marker=style["marker"], color=style["color"], markersize=6, fillstyle=fill, clip_on=False
        )
