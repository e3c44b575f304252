"""Figures of the parts of a model: its LoRA factors, its depth, and every module over depth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from gns.estimate import Estimate, format_count
from gns.report.figures.look import LIGHT, Theme, canvas, in_look, limits, log_axis
from gns.report.places import block_labels, place_of, short_names
from gns.report.text import label_of

NUMBERED = 10  # columns up to which a cell of the map has room for its number
LABELS = 60  # rows up to which each has its label
MAP = "cividis"  # one hue to the eye of most colour-blind readers, and even in lightness
UNKNOWN, AT_LEAST = "....", "////"


def _colour(name: str, theme: Theme) -> str:
    return {"all": theme.ink, "A": theme.blue, "B": theme.orange}.get(name, theme.green)


@in_look
def factors(result: Estimate, *, theme: Theme = LIGHT) -> Figure | None:
    """Draw the noise scale of each LoRA factor beside the joint one, with sets and detection limits."""
    named = [("all", result), *result.groups.items()]
    named = [(name, r) for name, r in named if math.isfinite(r.low)]
    if not named:
        return None
    figure, (ax,) = canvas(height=1.6 + 0.5 * len(named))
    known = [v for _, r in named for v in (r.low, r.point, r.high, r.detection_limit)]
    low, high = limits(known, 1.5)
    low = max(low, high / 1e6)
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    log_axis(ax.xaxis, low, high)
    for y, (name, r) in enumerate(named):
        colour = _colour(name, theme)
        start, end = max(r.low, low), min(r.high, high)
        ax.plot([start, end], [y, y], color=colour, linewidth=5, alpha=0.4, solid_capstyle="butt")
        if math.isfinite(r.point):
            ax.plot([r.point], [y], "o", color=colour, markersize=9)
        if math.isinf(r.high):
            ax.plot([high], [y], ">", color=colour, markersize=9, clip_on=False)
        if low < r.detection_limit < high:
            ax.plot([r.detection_limit], [y], "|", color=theme.grey, markersize=16, markeredgewidth=1.6)
    labels = [label_of(name) + (" *" if name == "all" and len(named) > 1 else "") for name, _ in named]
    ax.set_yticks(range(len(named)), labels)
    ax.set_ylim(len(named) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(f"B_simple (examples), {100 * result.level:g} % interval")
    _key(figure, theme, any(math.isinf(r.high) for _, r in named))
    return figure


def _key(figure: Figure, theme: Theme, unbounded: bool) -> None:
    """Explain the marks: value, detection limit, an interval without an upper end."""
    ax = figure.axes[0]
    ax.plot([], [], "o", color=theme.grey, label="value")
    ax.plot([], [], "|", color=theme.grey, markersize=12, markeredgewidth=1.6, label="detection limit")
    if unbounded:
        ax.plot([], [], ">", color=theme.grey, label="no upper end")
    figure.legend(loc="outside lower center", ncols=3)


def _of_groups(parts: Mapping[str, Estimate]) -> dict[str, dict[str, Estimate]]:
    """Sort estimates of modules or layers by factor; by "all" where there are no factors."""
    names = list(dict.fromkeys(name for r in parts.values() for name in r.groups))
    if not names:
        return {"all": dict(parts)}
    return {name: {path: r.groups[name] for path, r in parts.items() if name in r.groups} for name in names}


@in_look
def depth(layers: Mapping[str, Estimate], *, theme: Theme = LIGHT) -> Figure | None:
    """Draw the noise scale of every block over depth, with its set; each LoRA factor on its own.

    Args:
        layers: path of a block, or of a module outside of blocks, → estimate, in the model's order.
        theme: colours.
    """
    series = _of_groups(layers)
    shown = [r for of_group in series.values() for r in of_group.values() if math.isfinite(r.low)]
    if len(layers) < 2 or not shown:
        return None
    figure, (ax,) = canvas(height=4.0)
    low, high = limits([v for r in shown for v in (r.low, r.point, r.high)], 1.4)
    if any(math.isinf(r.high) for r in shown):
        high *= 2
    low = max(low, high / 1e6)
    ax.set_yscale("log")
    for i, (name, of_group) in enumerate(series.items()):
        shift = 0.24 * (i - (len(series) - 1) / 2)
        _over_depth(ax, list(layers), of_group, (low, high), shift, _colour(name, theme), label_of(name))
    if any(math.isinf(r.high) for r in shown):
        ax.plot([], [], "^", color=theme.grey, label="no upper end")
    _block_ticks(ax, list(layers))
    ax.set_ylim(low, high)
    log_axis(ax.yaxis, low, high)
    ax.set_ylabel(f"B_simple (examples), {100 * shown[0].level:g} % interval")
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def _over_depth(
    ax: Axes,
    paths: Sequence[str],
    of_group: Mapping[str, Estimate],
    ends: tuple[float, float],
    shift: float,
    colour: str,
    label: str,
) -> None:
    """Draw one factor's values and sets, `shift` columns beside the middle."""
    at = [(x + shift, of_group[path]) for x, path in enumerate(paths) if path in of_group]
    at = [(x, r) for x, r in at if math.isfinite(r.low)]
    width = max(1.6, min(7.0, 150 / len(paths)))
    for x, r in at:
        y = [max(r.low, ends[0]), min(r.high, ends[1])]
        ax.plot([x, x], y, color=colour, linewidth=width, alpha=0.4, solid_capstyle="butt")
        if math.isinf(r.high):
            ax.plot([x], [ends[1]], "^", color=colour, markersize=min(6.0, width + 2), clip_on=False)
    resolved = [(x, r.point) for x, r in at if math.isfinite(r.point)]
    columns = [list(column) for column in zip(*resolved, strict=True)] or [[], []]
    ax.plot(columns[0], columns[1], "o", color=colour, markersize=min(7.0, width + 2.4), label=label)


def _block_ticks(ax: Axes, paths: Sequence[str]) -> None:
    """Label columns by the number of their block, those outside of blocks by name."""
    places = [place_of(path) for path in paths]
    blocks = block_labels(place for place in places if place)
    names = short_names(path for path, place in zip(paths, places, strict=True) if place is None)
    labels = [
        blocks[place.stack, place.number] if place else names[path] or "model"
        for path, place in zip(paths, places, strict=True)
    ]
    every = max(1, math.ceil(len(labels) / 16))
    turned = max(len(label) for label in labels[::every]) > 3
    ax.set_xticks(range(0, len(labels), every), labels[::every], rotation=40 if turned else 0)
    if turned:
        for label in ax.get_xticklabels():
            label.set_horizontalalignment("right")
    ax.set_xlim(-0.6, len(labels) - 0.4)
    ax.set_xlabel("block, in order of depth")


@in_look
def heat_map(modules: Mapping[str, Estimate], *, theme: Theme = LIGHT) -> Figure | None:
    """Draw the noise scale of every module: blocks across, projections down, one panel a LoRA factor.

    A cell whose set has no upper end has the colour of its lower end, hatched; one of which nothing is known
    is dotted. Modules outside of numbered blocks have no place in it.

    Args:
        modules: path of a module → estimate, in the model's order.
        theme: colours.
    """
    placed = {path: place for path in modules if (place := place_of(path))}
    panels = _of_groups({path: modules[path] for path in placed})
    cells = [_cell(r) for panel in panels.values() for r in panel.values()]
    values = [value for value, _ in cells if math.isfinite(value)]
    if len(placed) < 2 or not values:
        return None
    blocks = block_labels(placed.values())
    keys = list(blocks)
    rows = short_names(place.name for place in placed.values())
    height = 1.3 + len(panels) * (0.55 + min(6.0, max(0.9, 0.27 * len(rows))))
    figure, axes = canvas(len(panels), height=height)
    low, high = limits(values, 1.05)
    norm = LogNorm(low, high)
    for ax, (group, of_group) in zip(axes, panels.items(), strict=True):
        ax.grid(visible=False)
        at = {path: (keys.index((p.stack, p.number)), list(rows).index(p.name)) for path, p in placed.items()}
        grid = np.full((len(rows), len(blocks)), math.nan)
        for path, r in of_group.items():
            grid[at[path][::-1]] = _cell(r)[0]
        ax.pcolormesh(
            np.arange(len(blocks) + 1) - 0.5,
            np.arange(len(rows) + 1) - 0.5,
            grid,
            cmap=MAP,
            norm=norm,
            edgecolors=theme.card,
            linewidth=1.2,
        )
        for path, r in of_group.items():
            _mark_cell(ax, *at[path], r, norm, theme, numbered=len(blocks) <= NUMBERED)
        ax.set_title("every module" if group == "all" else label_of(group))
        _map_ticks(ax, list(blocks.values()), list(rows.values()))
    axes[-1].set_xlabel("block, in order of depth")
    _map_key(figure, axes, cells, norm, theme)
    return figure


def _cell(r: Estimate) -> tuple[float, str | None]:
    """Give the value that colours a cell and its hatching: B_simple, or the lower end where it is all."""
    if not math.isfinite(r.low) or r.status == "collecting":
        return math.nan, UNKNOWN
    if math.isfinite(r.high) and math.isfinite(r.point):
        return r.point, None
    return (r.low, AT_LEAST) if r.low > 0 else (math.nan, UNKNOWN)


def _mark_cell(ax: Axes, x: int, y: int, r: Estimate, norm: LogNorm, theme: Theme, *, numbered: bool) -> None:
    """Hatch a cell without an upper end or without a value, and write its number where there is room."""
    value, hatch = _cell(r)
    known = math.isfinite(value)
    face = to_hex(colormaps[MAP](norm(value))) if known else theme.card
    dark = known and sum(to_rgb(face)) < 1.5
    mark = ("#ffffff" if dark else "#111111") if known else theme.grey
    if hatch:
        shape = {"fill": False, "hatch": hatch, "edgecolor": mark, "linewidth": 0}
        ax.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, **shape))
    if numbered:
        text = f"{'≥ ' if hatch else ''}{format_count(value)}" if known else "?"
        back = {"facecolor": face, "edgecolor": "none", "pad": 1.2} if hatch else None
        ax.text(x, y, text, ha="center", va="center", fontsize=9, color=mark, bbox=back)


def _map_ticks(ax: Axes, blocks: Sequence[str], rows: Sequence[str]) -> None:
    every, each = max(1, math.ceil(len(blocks) / 16)), max(1, math.ceil(len(rows) / LABELS))
    small = 10 if len(rows) <= 20 else 6
    ax.set_yticks(range(0, len(rows), each), rows[::each], fontsize=small)
    turned = max(map(len, blocks[::every])) > 3
    ax.set_xticks(
        range(0, len(blocks), every),
        blocks[::every],
        rotation=40 if turned else 0,
        ha="right" if turned else "center",
    )
    ax.set_xlim(-0.5, len(blocks) - 0.5)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _map_key(
    figure: Figure,
    axes: list[Axes],
    cells: Sequence[tuple[float, str | None]],
    norm: LogNorm,
    theme: Theme,
) -> None:
    """Draw the colour bar and, where they occur, what the hatchings mean."""
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(ScalarMappable(norm, colormaps[MAP]), ax=axes, pad=0.02, aspect=30)
    assert norm.vmin is not None and norm.vmax is not None
    log_axis(bar.ax.yaxis, float(norm.vmin), float(norm.vmax))
    if norm.vmax / norm.vmin < 4:
        bar.set_ticks(list(np.geomspace(norm.vmin, norm.vmax, 4)))
    bar.set_label("B_simple (examples)")
    bar.outline.set_visible(False)  # type: ignore[operator]
    meanings = ((AT_LEAST, "at least this: no upper end"), (UNKNOWN, "nothing known yet"))
    seen = [
        Patch(facecolor=theme.card, edgecolor=theme.ink, hatch=hatch, label=meaning, linewidth=0.6)
        for hatch, meaning in meanings
        if any(h == hatch for _, h in cells)
    ]
    if seen:
        figure.legend(handles=seen, loc="outside lower center", ncols=2)
