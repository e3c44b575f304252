"""Validation loss over batch size and learning rate: the grid, its edges, and where runs diverge."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from experiments.analysis.curves import Curve
from experiments.figures.style import GREY, INK, at_left, label, named, panels_of, plain, rate

DEEP = 0.5  # nats above the best: colours end there


def draw(found: Sequence[Curve], series: Sequence[str]) -> Figure:
    """Draw a panel for each cell: loss above its best, the best rate of each batch as a line.

    Args:
        found: a curve for each cell.
        series: fields that name the panels.
    """
    figure, panels = panels_of(len(found), 4, 2.9, (1.2, 0.9))
    mesh: QuadMesh | None = None
    for axes, curve in zip(panels, found, strict=True):
        mesh = _panel(axes, curve)
        label(axes, "batch size B", "learning rate ε" if at_left(axes) else "", named(curve.cell, series))
    assert mesh is not None
    bar = figure.colorbar(mesh, ax=panels, extend="max", shrink=0.9)
    bar.set_label("validation loss above the best\n(nats per token)")
    return figure


def _panel(axes: Axes, curve: Curve) -> QuadMesh:
    """One cell."""
    cell = curve.cell
    losses = cell.validation.mean(axis=-1)  # [J, L]
    above = losses - losses[np.isfinite(losses)].min()
    colours = matplotlib.colormaps["cividis_r"].with_extremes(bad="white")
    shown = np.ma.masked_invalid(np.where(np.isinf(above), math.nan, above).T)
    x, y = np.arange(len(cell.batches)), np.arange(len(cell.rates))
    mesh = axes.pcolormesh(x, y, shown, cmap=colours, vmin=0, vmax=DEEP, shading="nearest")
    for j, i in zip(*np.nonzero(np.isinf(losses)), strict=True):
        axes.text(j, i, "×", ha="center", va="center", color=GREY, fontsize=9)
    best = [int(np.where(np.isfinite(row), row, math.inf).argmin()) for row in losses]
    kept = [j for j in x if np.isfinite(losses[j]).any()]
    axes.plot(kept, [best[j] for j in kept], color=INK, marker="o", markersize=3.5, linewidth=1)
    axes.set_xticks(x, [plain(b) for b in cell.batches], fontsize=7)
    every = max(1, len(y) // 8)
    axes.set_yticks(y[::every], [rate(each) for each in cell.rates[::every]], fontsize=7)
    axes.grid(False)
    return mesh
