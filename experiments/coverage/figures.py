"""Figures of the coverage study, drawn from its rows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy import stats

from experiments.figures.palette import BLUE, GREEN, GREY, INK, LOOK, ORANGE, PURPLE, SKY, VERMILION

Row = dict[str, Any]
LEVEL = 2  # place of 95 % in the lists of a row
BAND = (93, 97)
SPECTRUM_STYLE = {"flat": (GREEN, "o"), "1/j": (BLUE, "s"), "1/j^2": (VERMILION, "^")}
METHOD_STYLE = {
    "toolkit": (BLUE, "o", "-"),
    "fieller": (SKY, "s", "--"),
    "bootstrap": (GREEN, "D", "-."),
    "delta": (ORANGE, "^", ":"),
    "clamped EMA": (VERMILION, "v", "--"),
    "EMA of ratios": (PURPLE, "x", ":"),
}
STATUS_COLOUR = {"measured": BLUE, "lower bound": SKY, "not detectable": ORANGE, "collecting": "#D0D0D0"}
LABEL = {
    "1/j^2": "j⁻²",
    "gaussian": "Gaussian",
    "t5": "t₅",
    "lognormal": "Lognormal",
    "fieller": "plain Fieller",
    "delta": "delta method",
}


def interval(hits: int, of: int, level: float = 0.95) -> tuple[float, float]:
    """Give the exact binomial interval of a share.

    Args:
        hits: successes.
        of: tries; 0 gives (0, 1).
        level: of the interval.

    Returns:
        (low, high), shares.

    Source: Clopper and Pearson 1934, Biometrika 26:404.
    """
    tail = (1 - level) / 2
    low = 0.0 if hits == 0 else float(stats.beta.ppf(tail, hits, of - hits + 1))
    high = 1.0 if hits == of else float(stats.beta.isf(tail, hits + 1, of - hits))
    return low, high


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Rows whose configuration has these values."""
    return [row for row in rows if all(row["config"][key] == value for key, value in wanted.items())]


def values_of(rows: Iterable[Row], key: str) -> list[Any]:
    """Give the values of one axis that occur, in the order of the study."""
    return list(dict.fromkeys(row["config"][key] for row in rows))


def named(key: str) -> str:
    """Name as a reader sees it."""
    return LABEL.get(key, key)


def stretched(axes: Axes, low: float) -> None:
    """Coverage axis in %, drawn out towards 100 where the differences are."""
    axes.set_yscale("function", functions=(lambda y: -np.log(104 - y), lambda z: 104 - np.exp(-z)))
    axes.set_ylim(low, 100.3)
    ticks = [t for t in (0, 50, 70, 80, 85, 90, 93, 95, 97, 100) if t >= low]
    axes.set_yticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()


def band(axes: Axes) -> None:
    """Shade the wanted 93–97 % and mark 95 %."""
    axes.axhspan(*BAND, color="#EFEFEF", zorder=0)
    axes.axhline(95, color=GREY, linewidth=0.8, zorder=1)


def truth_axis(axes: Axes, rows: Sequence[Row]) -> list[int]:
    """Horizontal axis over the true B, equally spaced; its values."""
    truths = values_of(rows, "b_simple")
    axes.set_xticks(range(len(truths)), [f"{b:,}" if b < 1000 else f"{b // 1000}k" for b in truths])
    axes.set_xlim(-0.4, len(truths) - 0.6)
    axes.grid(False, axis="x")
    return truths


def curve(axes: Axes, counts: Sequence[tuple[int, int]], shift: float, **style: Any) -> None:
    """Draw a share in % over the true B with its binomial interval.

    Args:
        axes: with `truth_axis`.
        counts: (hits, tries) for each true B; without tries there is no point.
        shift: sideways, so that intervals do not hide each other.
        **style: of the line, at least `color`.
    """
    drawn = [(i + shift, hits, of) for i, (hits, of) in enumerate(counts) if of]
    if not drawn:
        return
    x = [x for x, _, _ in drawn]
    ends = np.array([interval(hits, of) for _, hits, of in drawn]).T * 100
    axes.plot(x, [100 * hits / of for _, hits, of in drawn], markersize=3.2, linewidth=1.1, **style)
    axes.vlines(x, ends[0], ends[1], color=style["color"], linewidth=0.7)


def covered(method: str) -> Callable[[Row], tuple[int, int]]:
    """(sets that hold the truth, all sets) of a method."""
    return lambda row: (row["methods"][method]["covered"][LEVEL], row["config"]["repeats"])


def given_bounded(row: Row) -> tuple[int, int]:
    """(bounded sets of the toolkit that hold the truth, bounded sets)."""
    tally = row["methods"]["toolkit"]
    return tally["covered_bounded"][LEVEL], tally["bounded"][LEVEL]


def _grid(rows: Sequence[Row], title: str, y_label: str, draw: Callable[[Axes, list[Row]], None]) -> Figure:
    """Small multiples, n down and K across."""
    ns, ks = values_of(rows, "n"), values_of(rows, "k")
    figure = Figure(figsize=(2.5 * len(ks) + 1.2, 2.05 * len(ns) + 1.3), layout="constrained")
    panels = figure.subplots(len(ns), len(ks), sharex=True, sharey=True, squeeze=False)
    for i, n in enumerate(ns):
        for j, k in enumerate(ks):
            axes = panels[i, j]
            axes.set_title(f"n = {n}, K = {k}")
            draw(axes, select(rows, n=n, k=k))
            if i == len(ns) - 1:
                axes.set_xlabel("true B (examples)")
            if j == 0:
                axes.set_ylabel(y_label)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.5)
    return figure


def legend(figure: Figure, handles: Sequence[Any]) -> None:
    """Put one legend below all panels."""
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def by_law(rows: Sequence[Row], law: str) -> Figure:
    """Coverage of the toolkit's 95 % sets under one law, over the true B."""
    rows = select(rows, law=law)
    floor = min(100 * hits / of for hits, of in map(covered("toolkit"), rows))

    def draw(axes: Axes, some: list[Row]) -> None:
        band(axes)
        for i, spectrum in enumerate(values_of(some, "spectrum")):
            colour, marker = SPECTRUM_STYLE[spectrum]
            for direction, dash, fill in (("even", "-", colour), ("top", ":", "white")):
                line = select(some, spectrum=spectrum, direction=direction)
                shift = (i - 1) * 0.16 + (0.05 if direction == "top" else -0.05)
                style = {"color": colour, "marker": marker, "linestyle": dash, "markerfacecolor": fill}
                curve(axes, [covered("toolkit")(row) for row in line], shift, **style)
        stretched(axes, min(88.0, floor - 1))
        truth_axis(axes, some)

    title = f"{named(law)} gradients: coverage of the toolkit's nominal 95 % set"
    figure = _grid(rows, title, "coverage (%)", draw)
    handles: list[Any] = [
        Line2D([], [], color=c, marker=m, label=f"spectrum {named(s)}")
        for s, (c, m) in SPECTRUM_STYLE.items()
        if s in values_of(rows, "spectrum")
    ]
    handles += [
        Line2D([], [], color=INK, marker="o", label="G spread evenly"),
        Line2D(
            [],
            [],
            color=INK,
            marker="o",
            markerfacecolor="white",
            linestyle=":",
            label="G where noise is largest",
        ),
        Patch(color="#EFEFEF", label="93–97 %"),
    ]
    legend(figure, handles)
    return figure


def by_method(rows: Sequence[Row]) -> Figure:
    """Coverage of all methods' 95 % sets, Gaussian, 1/j, over the true B."""
    rows = select(rows, law="gaussian", spectrum="1/j", direction="even")

    def draw(axes: Axes, some: list[Row]) -> None:
        band(axes)
        for i, (method, (colour, marker, dash)) in enumerate(METHOD_STYLE.items()):
            style = {"color": colour, "marker": marker, "linestyle": dash}
            curve(axes, [covered(method)(row) for row in some], (i - 2.5) * 0.07, **style)
        stretched(axes, -2)
        truth_axis(axes, some)

    title = "Methods side by side: coverage of nominal 95 % sets\n"
    title += "(Gaussian gradients, 1/j spectrum, G spread evenly)"
    figure = _grid(rows, title, "coverage (%)", draw)
    handles: list[Any] = [
        Line2D([], [], color=c, marker=m, linestyle=d, label=named(name))
        for name, (c, m, d) in METHOD_STYLE.items()
    ]
    legend(figure, [*handles, Patch(color="#EFEFEF", label="93–97 %")])
    return figure


def by_status(rows: Sequence[Row]) -> Figure:
    """What the toolkit says, and how often it is right when it says `measured`; Gaussian, 1/j."""
    rows = select(rows, law="gaussian", spectrum="1/j", direction="even")

    def draw(axes: Axes, some: list[Row]) -> None:
        truths = truth_axis(axes, some)
        bottom = np.zeros(len(truths))
        for status, colour in STATUS_COLOUR.items():
            counts = [row["statuses"][LEVEL].get(status, 0) / row["config"]["repeats"] for row in some]
            axes.bar(range(len(truths)), 100 * np.array(counts), 0.8, bottom=bottom, color=colour)
            bottom += 100 * np.array(counts)
        if "collecting" not in some[0]["statuses"][LEVEL]:
            style = {"color": INK, "marker": "o", "linestyle": "", "markeredgecolor": "white"}
            curve(axes, [given_bounded(row) for row in some], 0.0, **style)
        axes.axhline(95, color=INK, linewidth=0.7, linestyle=":")
        axes.set_ylim(0, 101)

    title = "What the toolkit says of the truth, and how often it is right when it says “measured”\n"
    title += "(nominal 95 %, Gaussian gradients, 1/j spectrum, G spread evenly)"
    figure = _grid(rows, title, "share of runs (%)", draw)
    handles: list[Any] = [Patch(color=c, label=s) for s, c in STATUS_COLOUR.items()]
    handles.append(
        Line2D(
            [],
            [],
            color=INK,
            marker="o",
            linestyle="",
            label="coverage given “measured”, with its 95 % interval",
        )
    )
    legend(figure, handles)
    return figure


def widths(rows: Sequence[Row]) -> Figure:
    """Median relative width of all methods' 95 % sets, Gaussian, 1/j, over the true B."""
    rows = select(rows, law="gaussian", spectrum="1/j", direction="even")
    top = 300.0  # where an infinite median is drawn

    def draw(axes: Axes, some: list[Row]) -> None:
        axes.axhspan(100, 1000, color="#F4F4F4", zorder=0)
        for i, (method, (colour, marker, dash)) in enumerate(METHOD_STYLE.items()):
            found = [row["methods"][method]["width"][LEVEL] for row in some]
            y = [top * 0.8**i if w is None else w for w in found]
            axes.plot(
                range(len(y)), y, color=colour, marker=marker, linestyle=dash, markersize=3.2, linewidth=1.1
            )
        axes.set_yscale("log")
        axes.set_ylim(2e-3, 500)
        axes.set_yticks([0.01, 0.1, 1, 10, 200], ["0.01", "0.1", "1", "10", "∞"])
        axes.minorticks_off()
        truth_axis(axes, some)

    title = "Median width of nominal 95 % sets, (high − low)/B (Gaussian, 1/j spectrum, G spread evenly);\n"
    title += "a narrow set beyond what the data can resolve is a wrong one (compare the coverage)"
    figure = _grid(rows, title, "median width / B", draw)
    handles: list[Any] = [
        Line2D([], [], color=c, marker=m, linestyle=d, label=named(name))
        for name, (c, m, d) in METHOD_STYLE.items()
    ]
    legend(figure, handles)
    return figure


def save(figure: Figure, path: Any) -> None:
    """Write a PNG of 110 dots per inch without date or version: the bytes follow from the rows."""
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110, metadata={"Software": None}, pil_kwargs={"optimize": True})


def draw_all(rows: Sequence[Row]) -> dict[str, Figure]:
    """Give every figure that the rows suffice for, by file name.

    Args:
        rows: finished rows of one number of repeats.

    Returns:
        File name → figure.
    """
    with matplotlib.rc_context(LOOK):
        drawn = {f"coverage_{law}.png": by_law(rows, law) for law in values_of(rows, "law")}
        if select(rows, law="gaussian", spectrum="1/j", direction="even"):
            drawn |= {
                "methods.png": by_method(rows),
                "status.png": by_status(rows),
                "widths.png": widths(rows),
            }
    return drawn
