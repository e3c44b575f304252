"""Loss over batch size at the best learning rate; below it where the best batch is, and the noise scale."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.analysis.cells import Floats
from experiments.analysis.curves import Curve, Estimated, largest_within, optimum
from experiments.analysis.noise import measured
from experiments.figures.style import GREY, STYLES, batch_axis, figure_of, label, named

DELTA = 0.01  # nat per token: what B_max may cost


def draw(
    found: Sequence[Curve], series: Sequence[str], critical: Sequence[Estimated | None] | None = None
) -> Figure:
    """Draw the batch curves of a sweep, and accuracy where answers were generated.

    Args:
        found: a curve for each cell.
        series: fields that name the curves.
        critical: the critical batch size of each, where one was measured.
    """
    critical = critical or [None] * len(found)
    accurate = any(np.isfinite(curve.cell.right).any() for curve in found)
    figure = figure_of(11.0 if accurate else 6.6, 4.6 + 0.2 * len(found))
    panels = [["loss", "accuracy"], ["places", "accuracy"]] if accurate else [["loss"], ["places"]]
    axes = figure.subplot_mosaic(panels, height_ratios=[4, 0.5 + 0.45 * len(found)])
    axes["loss"].sharex(axes["places"])
    _losses(axes["loss"], found, series, axes["accuracy" if accurate else "loss"])
    _places(axes["places"], found, critical, 2 if accurate else 4)
    if accurate:
        _accuracies(axes["accuracy"], found)
    return figure


def _losses(axes: Axes, found: Sequence[Curve], series: Sequence[str], beside: Axes) -> None:
    """Test loss with intervals, a line for each cell; their names where there is more room."""
    batches = _tried(found)
    for curve, style in zip(found, _styles(len(found)), strict=True):
        low, high = curve.ends()
        axes.fill_between(curve.batches, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.plot(curve.batches, curve.loss, label=named(curve.cell, series), markersize=5, **style)
        edges = [bool(edge) for edge in curve.rate_edges]
        axes.plot(
            curve.batches[edges], curve.loss[edges], linestyle="", marker="o", markersize=10,
            fillstyle="none", markeredgecolor=style["color"], markeredgewidth=0.8,
        )  # fmt: skip
        if len(curve.diverged):  # an empty line that is not clipped takes the corner of the figure
            above = {"transform": axes.get_xaxis_transform(), "clip_on": False, "linestyle": ""}
            ones = np.ones(len(curve.diverged))
            axes.plot(curve.diverged, ones, marker="x", markersize=7, color=style["color"], **above)
    batch_axis(axes, batches)
    label(axes, "", "test loss (nats per token)\nat the best learning rate")
    handles, _ = axes.get_legend_handles_labels()
    if any(edge for curve in found for edge in curve.rate_edges):
        ring = {
            "marker": "o",
            "markersize": 10,
            "fillstyle": "none",
            "markeredgecolor": GREY,
            "linestyle": "",
        }
        handles.append(Line2D([], [], label="best rate at the edge of its grid", **ring))
    if any(len(curve.diverged) for curve in found):
        said = "every run of the batch diverged"
        handles.append(Line2D([], [], label=said, marker="x", markersize=7, color=GREY, linestyle=""))
    beside.legend(handles=handles, fontsize=8, loc="best")


def _places(axes: Axes, found: Sequence[Curve], critical: Sequence[Estimated | None], columns: int) -> None:
    """Best batch, largest batch within δ, noise scale and critical batch of each cell, with intervals.

    The legend stands above the panel, in so many columns: one wider than the panel leaves no room for any.
    """
    batches = _tried(found)
    low, high = min(batches) / 1.6, max(batches) * 1.6
    kinds = (("best batch", optimum, "*"), (f"B_max({DELTA:g} nat)", lambda c: largest_within(c, DELTA), ">"))
    for i, (curve, style, own) in enumerate(zip(found, _styles(len(found)), critical, strict=True)):
        marks = [(find(curve), marker) for _, find, marker in kinds]
        marks += [(place, marker) for place, marker in ((measured(curve.cell), "d"), (own, "P")) if place]
        for k, (place, marker) in enumerate(marks):
            _mark(axes, place, -i - 0.22 * (k - 1), marker, style["color"], (low, high))
        at = np.full(len(curve.diverged), -float(i))
        axes.plot(curve.diverged, at, marker="x", color=style["color"], linestyle="", markersize=6)
    axes.set_ylim(-len(found) + 0.45, 0.55)
    axes.set_xlim(low, high)
    axes.set_yticks([])
    axes.grid(False, axis="y")
    label(axes, "batch size B (examples a step)", "")
    handles = [Line2D([], [], color=GREY, marker=marker, label=name) for name, _, marker in kinds]
    if any(measured(curve.cell) is not None for curve in found):
        handles.append(Line2D([], [], color=GREY, marker="d", label="B_simple, factor B (measured)"))
    if any(critical):
        handles.append(Line2D([], [], color=GREY, marker="P", label="B_crit (constant rate)"))
    axes.legend(handles=handles, fontsize=7.5, loc="lower left", bbox_to_anchor=(-0.02, 0.97), ncols=columns)


def _mark(axes: Axes, place: Estimated, y: float, marker: str, color: str, ends: tuple[float, float]) -> None:
    """A place with its interval; an arrow where it goes on beyond the axis."""
    low, high = (min(max(end, ends[0]), ends[1]) for end in (place.low, place.high))
    axes.plot([low, high], [y, y], color=color, linewidth=1.4, solid_capstyle="butt")
    for at, end, arrow in ((low, place.low, "<"), (high, place.high, ">")):
        if end != at:
            axes.plot(at, y, marker=arrow, color=color, markersize=4, clip_on=False)
    inside = min(max(place.value, ends[0]), ends[1])
    empty = {} if inside == place.value else {"fillstyle": "none"}
    axes.plot(
        inside, y, marker=marker, color=color, markersize=8 if marker == "*" else 6, clip_on=False, **empty
    )


def _accuracies(axes: Axes, found: Sequence[Curve]) -> None:
    """Share of right answers at the rates that were chosen on validation loss, with its items' own noise."""
    for k, (curve, style) in enumerate(zip(found, _styles(len(found)), strict=True)):
        cell = curve.cell
        right = np.array([share(cell.right[curve.place(batch)]) for batch in curve.batches])
        items = max(1, cell.right.shape[2])
        error = 1.96 * np.sqrt(right * (1 - right) / items)  # all seeds answer the same items
        beside = curve.batches * 1.06 ** (k - (len(found) - 1) / 2)  # bars must not hide each other
        axes.errorbar(beside, 100 * right, 100 * error, capsize=2, markersize=5, linewidth=1.2, **style)
    batch_axis(axes, [float(b) for curve in found for b in curve.batches])
    label(axes, "batch size B (examples a step)", "right answers (%; bars: the noise of the items)")


def share(right: Floats) -> float:
    """Give the share of the answers that are right; NaN without any."""
    return float(np.nanmean(right)) if np.isfinite(right).any() else math.nan


def _tried(found: Sequence[Curve]) -> list[float]:
    """Give all batch sizes, rising, those included at which every run diverged."""
    return sorted({float(b) for curve in found for b in (*curve.batches, *curve.diverged)})


def _styles(n: int) -> list[dict]:
    """Give n styles; beyond those there are, they come again."""
    return [STYLES[i % len(STYLES)] for i in range(n)]
