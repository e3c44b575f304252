"""Which figures a report has, what each says, and their rendering for light and for dark pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure

from gns.report import figures
from gns.report.figures import DARK, LIGHT, Course, Theme
from gns.report.findings import Findings


@dataclass(frozen=True)
class Drawing:
    """One figure of a report.

    Args:
        name: of its file, without ".png".
        caption: what it shows, and how to read it.
        draw: from findings and course.
        place: "evidence" or "places", the part of the page it belongs to.
        training: whether it is about optimizer steps, which a frozen probe has none of.
    """

    name: str
    caption: str
    draw: Callable[[Findings, Course, Theme], Figure | None]
    place: str = "evidence"
    training: bool = False


@dataclass(frozen=True)
class Image:
    """A figure as PNGs.

    Args:
        drawing: what it is.
        light: PNG on white.
        dark: PNG on the card of a dark page.
    """

    drawing: Drawing
    light: bytes
    dark: bytes


DRAWINGS = (
    Drawing(
        "noise_scale",
        "The noise scale along the run. Each band is a confidence set of its point alone; where it lies "
        "under arrows it has no upper end. A drift of the orange line: the noise scale itself moves. Above "
        "the detection limit the steps so far can show no more than a lower bound.",
        lambda f, run, theme: figures.noise_scale(run, f.result, f.batch_size, theme=theme),
        training=True,
    ),
    Drawing(
        "curvature",
        "B_noise, which weighs gradient noise by the curvature of the loss, beside B_simple, which does "
        "not. The batch size law is B_noise's; B_simple stands in for it as far as their ratio stays put. "
        "Each bar and each band is a confidence set of its point alone; a reading of one batch is mostly "
        "noise. Bars of the ratio leave out how sure B_simple is.",
        lambda f, run, theme: figures.curvature(f.curvature, run, f.result.level, theme=theme),
        training=True,
    ),
    Drawing(
        "trade_off",
        "What a batch size costs: every doubling saves optimizer steps and spends examples. Inside the green "
        "span neither is wasted much.",
        lambda f, run, theme: figures.trade_off(f.advice, theme=theme),
    ),
    Drawing(
        "learning_rates",
        "The learning rate to go with another batch size, by three laws that start from the one in use. A "
        "band shows only how sure B_simple is; where the laws part, try several rates.",
        lambda f, run, theme: figures.learning_rates(f.advice, theme=theme),
    ),
    Drawing(
        "signal_and_noise",
        "The two parts of the ratio. One step alone says little, and |G|² may fall below zero by chance; "
        "only the averages count.",
        lambda f, run, theme: figures.signal_and_noise(f.steps, run, theme=theme),
        training=True,
    ),
    Drawing(
        "modules",
        "The noise scale of every adapted layer, over depth. Single cells are much less sure than the whole: "
        "look for patterns, not for one cell.",
        lambda f, run, theme: figures.heat_map(f.modules, theme=theme),
        "places",
    ),
    Drawing(
        "depth",
        "The noise scale of every block with its interval, each LoRA factor on its own. Blocks differ where "
        "their intervals do not meet.",
        lambda f, run, theme: figures.depth(f.layers, theme=theme),
        "places",
    ),
    Drawing(
        "factors",
        "The two LoRA factors apart. * All together is a convention: it depends on how the adapter's scale "
        "is split between A and B; the single factors do not.",
        lambda f, run, theme: figures.factors(f.result, theme=theme),
        "places",
    ),
)


def drawn(found: Findings) -> list[Image]:
    """Draw every figure there is enough data for, in both themes."""
    run = figures.course([] if found.frozen else found.steps, found.result.level)
    images = []
    for drawing in DRAWINGS:
        if drawing.training and found.frozen:
            continue
        light, dark = (_png(drawing, found, run, theme) for theme in (LIGHT, DARK))
        if light is not None and dark is not None:
            images.append(Image(drawing, light, dark))
    return images


def _png(drawing: Drawing, found: Findings, run: Course, theme: Theme) -> bytes | None:
    figure = drawing.draw(found, run, theme)
    return None if figure is None else figures.png(figure, theme)
