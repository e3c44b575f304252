"""Figures of the evidence: the referee figure, examples to the target over batch size, and frozen probes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.analysis.curves import Estimated
from experiments.analysis.resampling import interval
from experiments.evidence.configurations import CONFIGURATIONS, RANK
from experiments.evidence.judged import Judged
from experiments.evidence.measured import PRIMARY, Measured
from experiments.figures.style import (
    GREY,
    INK,
    STYLES,
    at_left,
    batch_axis,
    figure_of,
    label,
    panels_of,
    plain,
)

FACES = ("full", "left", "bottom")  # of marks, once the styles have been through
TITLES = {
    "B": "B_simple, factor B (preregistered)",
    "adam": "the same in Adam's metric",
    "joint": "joint",
    "A": "factor A",
    "plug-in": "plug-in of each step",
    "B_noise": "B_noise, on the way",
}


def referee(found: Mapping[str, Measured], judged: Mapping[str, Judged]) -> Figure:
    """Draw measured critical batch sizes over each noise scale, a point a configuration.

    Args:
        found: by name.
        judged: variant → what became of it, for the calibration line.
    """
    variants = [v for v in TITLES if any(v in each.noise for each in found.values())]
    figure, (*panels, last) = panels_of(len(variants) + 1, 4, 2.7, (0.6, 1.0))
    ends = ends_of([each.doubled for each in found.values()])
    for axes, variant in zip(panels, variants, strict=True):
        pairs = {
            name: (each.noise[variant], each.doubled) for name, each in found.items() if variant in each.noise
        }
        across = ends_of([noise for noise, _ in pairs.values()])
        for name, (noise, critical) in pairs.items():
            cross(axes, noise, critical, across, ends, name)
        constant = judged[variant].constant.value if variant in judged else math.nan
        if math.isfinite(constant):
            line = np.array(across)
            axes.plot(line, constant * line, color=INK, linewidth=1)
            axes.fill_between(
                line, constant * line / 2, constant * line * 2, color=GREY, alpha=0.15, linewidth=0
            )
        axes.set_xlim(*across)
        axes.set_ylim(*ends)
        batch_axis(axes, octaves(across))
        batch_axis(axes, octaves(ends), "y")
        shown = "measured B_crit (rows a step)" if at_left(axes) else ""
        label(axes, "noise scale up to the target (rows)", shown, TITLES[variant])
    last.axis("off")
    marks = [Line2D([], [], markersize=6, linestyle="none", **mark(name)) for name in found]
    last.legend(
        marks,
        list(found),
        fontsize=7.5,
        loc="upper left",
        title="configuration",
        ncols=1 + (len(marks) > 8),
        columnspacing=1.0,
        handletextpad=0.3,
        borderaxespad=0.0,
    )
    said = "Line: c · noise scale; band: within a factor of two.\nOpen marks: bounded on one side only."
    last.text(0, 0, said, fontsize=8, transform=last.transAxes, verticalalignment="top")
    return figure


def mark(name: str) -> dict[str, Any]:
    """Give the mark of a configuration, the same in every panel and however many have been run."""
    i = list(CONFIGURATIONS).index(name)
    style = STYLES[i % len(STYLES)]
    return {"marker": style["marker"], "color": style["color"], "fillstyle": FACES[i // len(STYLES)]}


def efficiency(found: Mapping[str, Measured]) -> Figure:
    """Draw E(B) of each configuration, with B_crit and B_simple of factor B on the axis of batch sizes."""
    figure, panels = panels_of(len(found), 4, 2.5, (0.6, 0.9))
    for axes, (name, each) in zip(panels, found.items(), strict=True):
        part = each.examples
        relative = np.exp(part.log_examples - part.log_examples[0])
        seen = ~part.censored
        blue, orange, green = (STYLES[i]["color"] for i in (0, 1, 2))
        if len(part.draws):
            draws = np.exp(part.draws - part.draws[:, :1])
            low, high = np.array([interval(column) for column in draws.T]).T
            axes.fill_between(part.batches[seen], low[seen], high[seen], color=blue, alpha=0.2, linewidth=0)
        axes.plot(part.batches[seen], relative[seen], marker="o", color=blue, markersize=4, linewidth=1.2)
        axes.plot(
            part.batches[~seen], relative[~seen], linestyle="none", marker="^", color=blue, fillstyle="none"
        )
        axes.axhline(2, color=GREY, linewidth=0.8, linestyle=":")
        _span(axes, each.doubled, green, 0.06)
        if PRIMARY in each.noise:
            _span(axes, each.noise[PRIMARY], orange, 0.14)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: plain(value))
        batch_axis(axes, part.batches)
        told = [n.value for n in (each.doubled, each.noise.get(PRIMARY)) if n and math.isfinite(n.value)]
        axes.set_xlim(
            part.batches[0] / 1.3, 1.3 * max(part.batches[-1], *told, 1.0)
        )  # open ends run to the frame
        axes.set_ylim(0.5, 12)
        shown = "examples to the target, over batch 1" if at_left(axes) else ""
        label(axes, "batch size (rows a step)", shown, name)
    for color, text in ((green, "B_crit"), (orange, "B_simple, factor B")):
        panels[0].plot([], [], color=color, linewidth=3, label=text)
    panels[0].plot(
        [], [], marker="^", color=blue, fillstyle="none", linestyle="none", label="at least: censored"
    )
    panels[0].legend(fontsize=6.5, loc="upper left")
    return figure


def frozen(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw noise scales at initialisation over rank, and unbiased and plug-in ones over the data's size."""
    figure = figure_of(7.6, 3.3)
    left, right = figure.subplots(1, 2)
    largest = max(row["n"] for row in rows)
    for i, base in enumerate(sorted({row["base"] for row in rows})):
        style, mine = STYLES[i], [row for row in rows if row["base"] == base and row["adapter"] == "lora"]
        for row in (r for r in mine if r["n"] == largest and r["data_seed"] == 0):
            at = row["rank"] * 1.08 ** (row["seed"] - 1 + 0.3 * i)
            _reading(left, at, row, style)
        left.plot([], [], marker=style["marker"], color=style["color"], linestyle="none", label=base)
        full = [r for r in rows if r["base"] == base and r["adapter"] == "full"]
        for row in full:
            left.axhline(row["b_simple"], color=style["color"], linewidth=0.9, linestyle=style["linestyle"])
        for row in (r for r in mine if r["seed"] == 0 and r["rank"] == RANK):
            _reading(right, row["n"] * 1.05 ** (row["data_seed"] - 1.5 + 0.4 * i), row, style)
            right.plot(row["n"], row["plug_in"], marker="x", color=style["color"], markersize=4)
    if any(row["adapter"] == "full" for row in rows):
        left.plot([], [], color=GREY, linewidth=0.9, label="full fine-tuning")
    right.plot([], [], marker="x", color=GREY, linestyle="none", label="plug-in over all N")
    batch_axis(left, sorted({row["rank"] for row in rows if row["adapter"] == "lora"}))
    batch_axis(right, sorted({row["n"] for row in rows}))
    top = 1.25 * max(row["high"] for row in rows if row["high"] is not None and math.isfinite(row["high"]))
    for axes in (left, right):
        axes.set_ylim(0, top)
        axes.legend(fontsize=7.5)
    label(left, "LoRA rank", "B_simple, factor B (rows), 95 % sets", "three adapters a rank")
    label(right, "N, rows of data in the probe", "", f"four data sets, rank {RANK}")
    return figure


def cross(
    axes: Axes,
    x: Estimated,
    y: Estimated,
    across: tuple[float, float],
    up: tuple[float, float],
    name: str,
    style: Mapping[str, Any] | None = None,
) -> None:
    """Mark one configuration, both numbers with their intervals; open where a number is only bounded.

    Args:
        axes: where.
        x: noise scale.
        y: critical batch size.
        across: ends of the axis of x.
        up: of y.
        name: of the configuration.
        style: of its mark; None: its own.
    """
    style = dict(style or mark(name))
    place = [inside(each.value, ends) for each, ends in ((x, across), (y, up))]
    open_ = y.at_least or not (math.isfinite(x.value) and math.isfinite(y.value))
    line = {"color": style["color"], "linewidth": 0.9}
    axes.plot([inside(x.low, across), inside(x.high, across)], [place[1]] * 2, **line)
    axes.plot([place[0]] * 2, [inside(y.low, up), inside(y.high, up)], **line)
    style |= {"fillstyle": "none"} if open_ else {}
    axes.plot(*place, markersize=6, linestyle="none", label=name, **style)


def _span(axes: Axes, number: Estimated, color: str, height: float) -> None:
    """An interval on the axis of batch sizes, its value a tick."""
    if math.isnan(number.value):
        return
    across = axes.get_xaxis_transform()
    low, high = max(number.low, 1e-3), min(number.high, 1e6)
    axes.plot(
        [low, high],
        [height] * 2,
        color=color,
        linewidth=3,
        alpha=0.6,
        transform=across,
        solid_capstyle="butt",
    )
    if math.isfinite(number.value):
        axes.plot(number.value, height, marker="|", color=color, markersize=9, transform=across)


def _reading(axes: Axes, at: float, row: Mapping[str, Any], style: Mapping[str, Any]) -> None:
    high = row["high"] or math.inf  # null: no upper end
    axes.plot([at] * 2, [row["low"], min(high, 1e6)], color=style["color"], linewidth=1.2, alpha=0.5)
    axes.plot(at, row["b_simple"], marker=style["marker"], color=style["color"], markersize=4)


def ends_of(numbers: Sequence[Estimated], reach: float = 8) -> tuple[float, float]:
    """Room for values and their intervals, up to a factor `reach` beyond a value, in whole octaves."""
    known = [each for each in numbers if 0 < each.value < math.inf]
    if not known:
        return 0.5, 2.0
    low = min(max(each.low, each.value / reach) for each in known)
    high = max(min(each.high, each.value * reach) for each in known)
    return 2.0 ** math.floor(math.log2(low)), 2.0 ** math.ceil(math.log2(high))


def octaves(ends: tuple[float, float]) -> list[float]:
    """Powers of two between two ends."""
    return [2.0**i for i in range(math.floor(math.log2(ends[0])), math.ceil(math.log2(ends[1])) + 1)]


def inside(value: float, ends: tuple[float, float]) -> float:
    """Put a number between two ends; NaN at the upper one."""
    return ends[1] if math.isnan(value) else min(max(value, ends[0]), ends[1])
