"""All sweeps in one figure, from rows only: each arm's ratio along x, the untouched step's in grey."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from experiments.figures.palette import BLUE, GREEN, GREY, INK, VERMILION
from experiments.overhead.measure import AA
from experiments.overhead.presets import SHARED_NAME
from experiments.overhead.ratios import Ratio, ratio
from experiments.overhead.sweeps import SWEEPS

SAME = "untouched beside itself"
COLUMNS = 4
ROOM = 0.1  # around the medians; an interval beyond it is cut off, so that one does not set the scale
STYLE = {
    "monitor": (BLUE, "o", "-"),
    SHARED_NAME: ("#CC79A7", "D", "-"),
    "monitor, product only": (VERMILION, "s", "--"),
    "monitor, Gram form only": (GREEN, "^", ":"),
}
Rows = Sequence[Mapping[str, Any]]


def figure(rows: Rows) -> Figure:
    """Draw the sweeps that have rows, a panel each, all with one scale of the ratio.

    Args:
        rows: of sweeps; those that failed are left out.
    """
    there = [row for row in rows if row["status"] == "ok"]
    names = [name for name in SWEEPS if any(row["sweep"] == name for row in there)]
    lines = -(-len(names) // COLUMNS)
    columns = min(COLUMNS, len(names))
    made = Figure(figsize=(0.8 + 2.9 * columns, 0.7 + 2.5 * lines), dpi=160, layout="constrained")
    panels = list(made.subplots(lines, columns, sharey=True, squeeze=False).flat)
    shown: dict[str, Any] = {}
    for ax, name in zip(panels, names, strict=False):
        shown |= _panel(ax, name, [row for row in there if row["sweep"] == name])
    middles = [ratio(row).middle for row in there]
    panels[0].set_ylim(min(*middles, 1) - ROOM, max(*middles, 1) + ROOM)
    for empty in panels[len(names) :]:
        empty.axis("off")
    for ax in panels[::columns]:
        ax.set_ylabel("time of a step, × untouched", fontsize=8)
    made.legend(
        shown.values(), shown.keys(), loc="outside upper left", ncols=len(shown), frameon=False, fontsize=8
    )
    return made


def _panel(ax: Axes, name: str, rows: Rows) -> dict[str, Any]:
    """Draw one sweep; give what its legend needs."""
    sweep, shown = SWEEPS[name], {}
    same = _line(rows, AA)
    xs = [x for x, _ in same]
    shown[SAME] = ax.fill_between(
        xs, [r.least for _, r in same], [r.most for _, r in same], color=GREY, alpha=0.3, linewidth=0
    )
    ax.axhline(1, color=INK, linewidth=0.8)
    for arm, (colour, marker, dashes) in STYLE.items():
        found = _line(rows, arm)
        if not found:
            continue
        middle = [r.middle for _, r in found]
        below, above = [r.middle - r.least for _, r in found], [r.most - r.middle for _, r in found]
        shown[arm] = ax.errorbar(
            [x for x, _ in found],
            middle,
            yerr=[below, above],
            color=colour,
            marker=marker,
            markersize=4,
            linestyle=dashes,
            linewidth=1.2,
            capsize=2,
        )
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(xs))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    ax.set_xlabel(sweep.xlabel, fontsize=8)
    ax.set_title(sweep.title, loc="left", fontsize=7.5)
    ax.tick_params(labelsize=8)
    ax.grid(axis="y", color="#E4E4E4")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    return shown


def _line(rows: Rows, arm: str) -> list[tuple[float, Ratio]]:
    """Points of an arm in the order of x: x, ratio."""
    return sorted(((row["x"], ratio(row)) for row in rows if row["arm"] == arm), key=lambda point: point[0])
