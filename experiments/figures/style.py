"""What the figures share: colours that colour-blind readers tell apart, axes in octaves, names with units."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.analysis.cells import Cell
from experiments.figures.palette import BLUE, GREEN, GREY, INK, LOOK, ORANGE, PURPLE, SKY, VERMILION
from experiments.tasks import default_dial

__all__ = [
    "GREY",
    "INK",
    "LOOK",
    "STYLES",
    "batch_axis",
    "figure_of",
    "heading",
    "label",
    "named",
    "plain",
    "rate",
    "rate_axis",
]

# Okabe and Ito's colours; marker and dash differ as well
STYLES = [
    {"color": BLUE, "marker": "o", "linestyle": "-"},
    {"color": VERMILION, "marker": "s", "linestyle": "--"},
    {"color": GREEN, "marker": "^", "linestyle": "-."},
    {"color": PURPLE, "marker": "D", "linestyle": ":"},
    {"color": ORANGE, "marker": "v", "linestyle": "-"},
    {"color": SKY, "marker": "P", "linestyle": "--"},
    {"color": INK, "marker": "X", "linestyle": "-."},
]
NAMES = {
    "n_train": "N",
    "dials.label_noise": "label noise",
    "dials.merged": "merged per row",
    "dials.copies": "copies",
    "dials.difficulty": "difficulty",
    "weight_decay": "weight decay",
    "optimizer": "",
    "adapter": "",
    "schedule": "",
    "base": "",
    "task": "",
    "protocol": "",
}
SPELT = {
    "lora": "LoRA",
    "pissa": "PiSSA",
    "milora": "MiLoRA",
    "rslora": "rsLoRA",
    "dora": "DoRA",
    "sgd": "SGD",
}
SPELT |= {"epochs": "fixed sample", "steps": "fixed steps", "target": "to a target loss"}
SPELT |= {"full": "full fine-tuning", "adamw": "AdamW", "foundation": "foundation"}

# what is not "name value": (at None, else)
SAID = {"beta2_batch": ("β₂ fixed", "β₂^(B/{})")}


def named(cell: Cell, fields: Sequence[str]) -> str:
    """Name a cell by the fields that tell it from others: "rank 8", "LoRA, N 1,024"."""
    parts = []
    for field in fields:
        value = _value(cell, field)
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        shown = SPELT.get(
            str(shown), f"{shown:g}" if isinstance(shown, float) else str(shown).rpartition("/")[2]
        )
        if field in SAID:
            parts.append(SAID[field][value is not None].format(shown))
            continue
        if value is None:
            shown = "none"
        parts.append(f"{NAMES.get(field, field.removeprefix('dials.'))} {shown}".strip())
    return ", ".join(parts) or "all runs"


def _value(cell: Cell, field: str) -> Any:
    """Give what a cell has in a field; a dial that its runs do not name has its task's default."""
    value = cell.fields.get(field)
    if value is None and field.startswith("dials."):
        return default_dial(cell.fields.get("task", ""), field.removeprefix("dials."))
    return value


def plain(value: float) -> str:
    """Write a batch size or a count: 12, 1.4, 1,024; ∞."""
    if math.isinf(value):
        return "∞"
    return f"{value:,.0f}" if value >= 10 or value == round(value) else f"{value:.2g}"


def label(axes: Axes, x: str, y: str, title: str = "") -> None:
    """Name axes, with their units, and panel."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if title:
        axes.set_title(title)


def batch_axis(axes: Axes, batches: Sequence[float], which: str = "x") -> None:
    """Make an axis of batch sizes: octaves, every tried size a tick where there is room."""
    shown = sorted(set(batches))
    shown = shown[:: math.ceil(len(shown) / 10)]
    set_scale, axis = (axes.set_xscale, axes.xaxis) if which == "x" else (axes.set_yscale, axes.yaxis)
    set_scale("log", base=2)
    axis.set_ticks(shown)
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_tick_params(which="minor", length=0)


def rate_axis(axes: Axes, rates: Sequence[float]) -> None:
    """Make a y axis of learning rates, not wider than these and half an octave."""
    axes.set_yscale("log")
    axes.set_ylim(min(rates) / 1.5, max(rates) * 1.5)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: rate(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", which="minor", length=0)


def rate(value: float) -> str:
    """Write a learning rate: 1e-3, 1.4e-3."""
    mantissa, _, power = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(power)}"


def figure_of(width: float, height: float) -> Figure:
    """Make an empty figure that can be saved without a display, inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panels_of(count: int, most: int, size: float, edge: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """Make a figure with a panel for each of `count` cells, those of a line on one scale.

    Args:
        count: panels.
        most: in a line.
        size: width of a panel, inches; its height, less a little, follows.
        edge: what the figure is wider and higher beyond its panels, inches.

    Returns:
        The figure, and the panels line by line; `at_left` tells the first of each.
    """
    columns = min(most, count)
    lines = -(-count // columns)
    figure = figure_of(edge[0] + size * columns, edge[1] + 0.95 * size * lines)
    panels = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
    for empty in panels[count:]:
        empty.axis("off")
    return figure, panels[:count]


def at_left(axes: Axes) -> bool:
    """Whether a panel is the first of its line."""
    spec = axes.get_subplotspec()
    return spec is not None and spec.is_first_col()


def heading(figure: Figure, title: str, below: str) -> None:
    """Write a figure's title, and in small what was run."""
    width = int(figure.get_figwidth() * 15)
    said = "\n".join(textwrap.wrap(title, int(figure.get_figwidth() * 9)))
    figure.suptitle(said, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    figure.supxlabel("\n".join(textwrap.wrap(below, width)), x=0.01, ha="left", fontsize=7.5, color=GREY)


def fixed(found: Sequence[Cell], but: Sequence[str]) -> str:
    """Say what all cells have in common and a reader must know."""
    shown: Mapping[str, Any] = found[0].fields
    words = []
    for field in ("base", "task", "adapter", "rank", "n_train", "optimizer", "schedule", "protocol"):
        if field in but or len({repr(cell.fields.get(field)) for cell in found}) > 1:
            continue
        if field == "rank" and shown["adapter"] == "full":
            continue
        words.append(named(found[0], [field]))
    return ", ".join(words)
