"""Several runs side by side: the noise scale of each with its interval, and the batch each one used."""

from __future__ import annotations

import math
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gns.estimate import Estimate
from gns.report.figures.look import LIGHT, Theme, canvas, in_look, limits, log_axis
from gns.report.text import label_of

NAME = 28  # letters of a run's name that have room beside the axis


@in_look
def compared(
    runs: Mapping[str, Estimate], batches: Mapping[str, int | None], *, theme: Theme = LIGHT
) -> Figure | None:
    """Draw the noise scales of runs under each other, all together and each LoRA factor.

    Args:
        runs: name → estimate.
        batches: name → batch in use, examples a step.
        theme: colours.
    """
    shown = {name: _parts(result) for name, result in runs.items()}
    known = [r for parts in shown.values() for r in parts.values()]
    if not known:
        return None
    kinds = list(dict.fromkeys(kind for parts in shown.values() for kind in parts))
    figure, (ax,) = canvas(height=1.6 + len(runs) * (0.35 + 0.2 * len(kinds)))
    used = [float(b) for b in batches.values() if b]
    low, high = limits([v for r in known for v in (r.low, r.point, r.high)] + used, 1.5)
    low = max(low, high / 1e6)
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    log_axis(ax.xaxis, low, high)
    for row, (name, parts) in enumerate(shown.items()):
        for i, kind in enumerate(kinds):
            if kind in parts:
                y = row + 0.22 * (i - (len(kinds) - 1) / 2)
                _interval(ax, y, parts[kind], kind, (low, high), theme)
        if batch := batches.get(name):
            ax.plot([batch] * 2, [row - 0.38, row + 0.38], color=theme.ink, linewidth=1.6)
    ax.set_yticks(range(len(shown)), [_shortened(name, runs[name]) for name in shown])
    ax.set_ylim(len(shown) - 0.45, -0.55)
    ax.grid(axis="y", visible=False)
    levels = {f"{100 * r.level:g} %" for r in runs.values()}
    ax.set_xlabel(f"B_simple (examples), {' or '.join(sorted(levels))} interval")
    _key(figure, ax, kinds, known, bool(used), theme)
    return figure


def _parts(result: Estimate) -> dict[str, Estimate]:
    parts = {"all": result, **result.groups}
    return {kind: r for kind, r in parts.items() if math.isfinite(r.low)}


def _look(kind: str, theme: Theme) -> tuple[str, str]:
    """Give colour and mark, so that kinds differ in more than colour."""
    known = {"all": (theme.ink, "o"), "A": (theme.blue, "s"), "B": (theme.orange, "D")}
    return known.get(kind, (theme.green, "v"))


def _interval(ax: Axes, y: float, r: Estimate, kind: str, ends: tuple[float, float], theme: Theme) -> None:
    colour, mark = _look(kind, theme)
    ax.plot(
        [max(r.low, ends[0]), min(r.high, ends[1])],
        [y, y],
        color=colour,
        linewidth=4,
        alpha=0.4,
        solid_capstyle="butt",
    )
    if math.isfinite(r.point):
        ax.plot([r.point], [y], mark, color=colour, markersize=6)
    if math.isinf(r.high):
        ax.plot([ends[1]], [y], ">", color=colour, markersize=7, clip_on=False)


def _key(figure: Figure, ax: Axes, kinds: list[str], known: list[Estimate], used: bool, theme: Theme) -> None:
    for kind in kinds:
        colour, mark = _look(kind, theme)
        ax.plot([], [], mark, color=colour, label=label_of(kind))
    if used:
        ax.plot([], [], "|", color=theme.ink, markersize=12, markeredgewidth=1.6, label="batch in use")
    if any(math.isinf(r.high) for r in known):
        ax.plot([], [], ">", color=theme.grey, label="no upper end")
    figure.legend(loc="outside lower center", ncols=3)


def _shortened(name: str, result: Estimate) -> str:
    """Keep the end of a long name, where runs differ; say what is too early."""
    kept = name if len(name) <= NAME else f"…{name[-NAME:]}"
    return f"{kept}\n(too early)" if result.status == "collecting" else kept
