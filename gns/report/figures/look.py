"""The look of every figure: canvas, colours for light and dark pages, axes in plain numbers, PNG.

Agg canvases of their own: no pyplot, no backend, no setting of the user changed. The colours are Okabe and
Ito's, which colour-blind readers tell apart; on dark cards their lighter relatives.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from gns.estimate import format_count

P = ParamSpec("P")
DPI, WIDTH = 160, 6.0  # inches; letters stay readable where a phone shrinks the figure to its width
_SHAPE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "text.usetex": False,
    "text.parse_math": False,  # names come from outside, and a `$` would start a formula
    "axes.unicode_minus": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
}


@dataclass(frozen=True)
class Theme:
    """Colours of a figure; `card` is that of the page's card it lies on.

    Args:
        name: "light" or "dark".
        card: background.
        ink: text and marks.
        grey: what recedes.
        grid: lines of the grid.
        blue: first colour.
        orange: second colour.
        green: third colour.
    """

    name: str
    card: str
    ink: str
    grey: str
    grid: str
    blue: str
    orange: str
    green: str

    @property
    def settings(self) -> Any:
        """Give the settings of matplotlib that make this look."""
        return _SHAPE | {
            "text.color": self.ink,
            "axes.titlecolor": self.ink,
            "axes.edgecolor": self.grey,
            "axes.labelcolor": self.ink,
            "xtick.color": self.ink,
            "ytick.color": self.ink,
            "grid.color": self.grid,
            "figure.facecolor": self.card,
            "axes.facecolor": self.card,
            "savefig.facecolor": self.card,
        }


LIGHT = Theme("light", "#ffffff", "#222222", "#767676", "#E4E4E4", "#0072B2", "#D55E00", "#009E73")
DARK = Theme("dark", "#1e2227", "#e4e7eb", "#98a1ab", "#343a41", "#56B4E9", "#F0A35E", "#3CCB9F")


def png(figure: Figure, theme: Theme = LIGHT) -> bytes:
    """Render a figure to the bytes of a PNG, 160 dots per inch."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(theme.settings):  # ticks are made while drawing
        canvas = FigureCanvasAgg(figure)
        layout = figure.get_layout_engine()
        if layout is not None:
            layout.execute(
                figure
            )  # the first pass does not know the legend's size yet; drawing makes a second
        canvas.print_png(buffer)
    return buffer.getvalue()


def in_look(draw: Callable[P, Figure | None]) -> Callable[P, Figure | None]:
    """Draw in our look, whatever style the user's process has set; his comes back afterwards."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure | None:
        theme = kwargs.get("theme", LIGHT)
        assert isinstance(theme, Theme)
        with matplotlib.rc_context(theme.settings):
            return draw(*args, **kwargs)

    return drawn


def canvas(rows: int = 1, height: float = 3.9) -> tuple[Figure, list[Axes]]:
    """Give a figure of rows that share their x axis."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(rows, 1, sharex=True)))


def log_axis(axis: Any, low: float, high: float) -> None:
    """Label a logarithmic axis in plain numbers: powers of two, or of four or ten where there are many."""
    doublings = math.log2(high / low)
    room = 8 if axis.axis_name == "x" else 11  # labels side by side need more of it
    base = 2 if doublings <= room else 4 if doublings <= 2 * room else 10
    axis.set_major_locator(LogLocator(base=base, numticks=13))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 1000 else format_count(x)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def limits(values: Sequence[float], room: float = 1.6) -> tuple[float, float]:
    """Give log-axis limits around the positive finite values."""
    good = [v for v in values if math.isfinite(v) and v > 0] or [1.0]
    return min(good) / room, max(good) * room
