"""The best learning rate over batch size, and the laws that claim to know it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments.analysis.curves import Curve
from experiments.analysis.fits import LEAST, fit_law
from experiments.analysis.resampling import interval
from experiments.figures.style import (
    GREY,
    STYLES,
    at_left,
    batch_axis,
    label,
    named,
    panels_of,
    plain,
    rate_axis,
)

DASHES = {"surge": "-", "sgd": "--", "sqrt": ":"}
SAID = {"surge": "surge law", "sgd": "SGD law", "sqrt": "∝ √B"}


def draw(found: Sequence[Curve], series: Sequence[str]) -> Figure:
    """Draw a panel for each cell: measured best rates, fitted laws, and how far the laws are off.

    Args:
        found: a curve for each cell.
        series: fields that name the panels.
    """
    figure, panels = panels_of(len(found), 3, 3.6, (0.6, 0.8))
    rates = [end for curve in found for column in curve.rate_draws.T for end in interval(column)]
    for place, (axes, curve) in enumerate(zip(panels, found, strict=True)):
        style = STYLES[place % len(STYLES)]
        ends = np.array([interval(column) for column in curve.rate_draws.T])
        low, high = curve.rates - ends[:, 0], ends[:, 1] - curve.rates
        axes.errorbar(
            curve.batches, curve.rates, [np.maximum(low, 0), np.maximum(high, 0)], color=style["color"],
            marker=style["marker"], linestyle="", capsize=2.5, markersize=5, zorder=3,
        )  # fmt: skip
        edges = np.array([edge != "" for edge in curve.rate_edges])
        axes.plot(
            curve.batches[edges], curve.rates[edges], marker=style["marker"], color=style["color"],
            linestyle="", markersize=5, markerfacecolor="white", zorder=4,
            label=f"at the edge of its grid ({edges.sum()}, in no fit)" if edges.any() else None,
        )  # fmt: skip
        fine = np.geomspace(curve.batches.min(), curve.batches.max(), 200)
        for law, dash in DASHES.items():
            if (~edges).sum() < LEAST:
                break
            fit = fit_law(law, curve)
            said = f"{SAID[law]}, off by ×{2**fit.misfit:.2f}"
            if law != "sqrt":
                said += f"\n  B_n {plain(fit.noise.value)} ({plain(fit.noise.low)}–{plain(fit.noise.high)})"
            axes.plot(fine, fit.rate(fine), color=GREY, linestyle=dash, linewidth=1.1, label=said)
        batch_axis(axes, list(curve.batches))
        rate_axis(axes, rates)
        label(axes, "batch size B (examples a step)", "best learning rate ε" if at_left(axes) else "")
        axes.set_title(named(curve.cell, series))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, loc="best")
    return figure
