"""The figure of one sweep, from rows only: each arm's ratio along x, and the untouched step beside itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from experiments.overhead.measure import ratio
from experiments.overhead.sweeps import SWEEPS
from experiments.overhead.table import AA, BLUE, GREEN, GREY, INK, ORANGE

SAME = "untouched beside itself (quartiles)"
STYLE = {
    "monitor": (BLUE, "o", "-"),
    "monitor, product only": (ORANGE, "s", "--"),
    "monitor, Gram form only": (GREEN, "^", ":"),
}


def figure(name: str, rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw a sweep.

    Args:
        name: one of `SWEEPS`.
        rows: of that sweep; those that failed are left out.
    """
    sweep = SWEEPS[name]
    there = [row for row in rows if row["status"] == "ok"]
    made = Figure(figsize=(6.2, 3.6), dpi=160, layout="constrained")
    ax = made.subplots()
    same = _line(there, AA)
    xs = [x for x, *_ in same]
    low, high = [each[2] for each in same], [each[3] for each in same]
    ax.fill_between(xs, low, high, color=GREY, alpha=0.25, linewidth=0, label=SAME)
    ax.axhline(1, color=INK, linewidth=0.8)
    for arm, (colour, marker, dashes) in STYLE.items():
        found = _line(there, arm)
        if not found:
            continue
        x, middle, low, high = (list(each) for each in zip(*found, strict=True))
        below = [m - a for m, a in zip(middle, low, strict=True)]
        above = [b - m for m, b in zip(middle, high, strict=True)]
        ax.errorbar(
            x,
            middle,
            yerr=[below, above],
            color=colour,
            marker=marker,
            linestyle=dashes,
            capsize=3,
            label=f"{arm}, every step" if arm == "monitor" else arm,
        )
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(xs))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    ax.set_xlabel(sweep.xlabel)
    ax.set_ylabel("time of a step, × untouched")
    ax.set_title(sweep.title, loc="left", fontsize=10)
    ax.grid(axis="y", color="#E4E4E4")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
    return made


def _line(rows: Sequence[dict[str, Any]], arm: str) -> list[tuple[float, float, float, float]]:
    """Points of an arm in the order of x: x, median, quartiles."""
    return sorted((row["x"], *ratio(row)) for row in rows if row["arm"] == arm)
