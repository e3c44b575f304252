"""The numbers behind the figures of a sweep, as a table in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from experiments import markdown
from experiments.analysis.curves import Curve, Estimated, largest_within, optimum
from experiments.analysis.noise import measured
from experiments.figures.curves import DELTA, share
from experiments.figures.style import named, plain

HEAD = (
    "cell",
    "seeds",
    "best test loss",
    "right answers there",
    "best batch",
    f"B_max({DELTA:g} nat)",
    "B_simple, factor B",
    "to extend",
)


def table(found: Sequence[Curve], series: Sequence[str]) -> str:
    """Write a line for each cell.

    The last column names what a better answer needs: batch sizes at which the best learning rate is at the
    edge of its grid, and edges of the batch grid.

    Args:
        found: a curve for each cell.
        series: fields that name the cells.
    """
    lines = []
    for curve in found:
        best, largest = optimum(curve), largest_within(curve, DELTA)
        loss = f"{curve.loss[curve.validation.argmin()]:.3f}"  # no choice is made on the test data
        rates = [f"ε {e} at {plain(b)}" for b, e in zip(curve.batches, curve.rate_edges, strict=True) if e]
        lost = [f"ε high at {plain(b)}: every run diverged" for b in curve.diverged]
        edges = ", ".join([note for note in (best.note, largest.note) if note][:1] + rates + lost)
        ends = curve.batches[0], curve.batches[-1]
        right = share(curve.cell.right[curve.place(curve.batches[curve.validation.argmin()])])
        answered = "–" if math.isnan(right) else f"{100 * right:.0f}\N{NO-BREAK SPACE}%"
        cells = [named(curve.cell, series), str(len(curve.cell.seeds)), loss, answered]
        cells += [_said(place, ends) for place in (best, largest)] + [
            _said(measured(curve.cell), (0, math.inf))
        ]
        lines.append([*cells, edges or "–"])
    return markdown.table(HEAD, lines)


def _said(place: Estimated | None, ends: tuple[float, float]) -> str:
    """A batch size with its interval; beyond what was tried nothing is known."""
    if place is None:
        return "–"
    low, high = ("" if end in (0, math.inf) else plain(end) for end in (place.low, place.high))
    value = f"≤ {plain(ends[0])}" if place.value == 0 else plain(place.value)
    value = f"≥ {plain(ends[1])}" if math.isinf(place.value) and math.isfinite(ends[1]) else value
    return f"{value} ({low or '…'}–{high or '…'})"
