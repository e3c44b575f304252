"""The one picture of the front page: whether the noise scale predicts, and what each rule costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments.analysis.curves import Estimated
from experiments.evidence import figures
from experiments.evidence.judged import Judged
from experiments.evidence.measured import PRIMARY
from experiments.evidence.practice import BY_FITTED, BY_NOISE, BY_PROXY, DELTA, SMALLEST, Price
from experiments.evidence.readout import BY_DEFAULT, Readout
from experiments.figures.style import GREY, INK, STYLES, batch_axis, figure_of, label, plain

NAMES = {  # short enough for an axis
    BY_PROXY: "best of the smallest proxy",
    BY_NOISE: "B_simple as read",
    BY_FITTED: "k · B_simple",
    SMALLEST: "batch 1",
}
REACH = 4  # room beyond a value, as a factor: bars that go on are cut off at the frame
PREDICTS = (
    "Line: c · B_simple, fitted to the full marks; band: within a factor of two of it; dashed: one batch "
    "size for all. Open marks: B_crit is only bounded below. Bars: 95 %; those that reach the frame go on."
)
COSTS = (
    "Given away: against the best batch size tried; steps: over those of the largest within {delta} nat of "
    "it, for k · B_simple 1 by construction; in brackets, of how many configurations where not of all."
)


def picture(found: Readout) -> Figure:
    """Draw measured critical batch size over B_simple, and beside it loss and steps that rules cost.

    Args:
        found: what the rows say; something has been compared in it.
    """
    schedules = sorted(found.priced, key=lambda name: -len(found.priced[name][1]))
    figure = figure_of(10.4 if schedules else 4.4, 4.1)
    if not schedules:
        _predicts(figure.subplots(), found)
        return figure
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 1.35, 0.9))
    _predicts(left, found)
    rules = list(dict.fromkeys(each.rule for name in schedules for each in found.priced[name][0]))
    for i, name in enumerate(schedules):
        priced, curves = found.priced[name]
        said = f"{name} ({len(curves)})"
        up = (len(schedules) - 1) / 2 - i
        _bars(middle, rules, priced, [each.regret for each in priced], up, i, said)
        _bars(right, rules, priced, [each.steps for each in priced], up, i, said)
    lines = [_line(rule, [found.priced[name][0] for name in schedules]) for rule in rules]
    middle.axvline(0, color=INK, linewidth=0.8)
    right.axvline(1, color=INK, linewidth=0.8)
    right.set_xscale("log", base=4)
    right.xaxis.set_major_formatter(lambda value, _: f"1/{plain(1 / value)}" if value < 1 else plain(value))
    right.xaxis.set_minor_locator(NullLocator())
    for axes in (middle, right):
        axes.set_yticks(range(len(rules)), lines)
        axes.set_ylim(len(rules) - 0.4, -0.6)
    right.tick_params(labelleft=False)
    title = "learning rate (configurations)"
    middle.legend(fontsize=7.5, loc="upper right", title=title, title_fontsize=7.5, alignment="left")
    label(middle, "test loss given away (nats a token)", "", "What does a rule give away?")
    label(right, "optimizer steps, ×", "", "And how many steps?")
    return figure


def below(found: Readout) -> str:
    """Say under the picture what is in it."""
    costs = f" {COSTS.format(delta=DELTA)}" if found.priced else ""
    return f"{found.runs:,} runs. {PREDICTS}{costs}"


def title(found: Readout) -> str:
    """Give the picture's question."""
    costs = ", and what do rules for it cost" if found.priced else ""
    return f"Does the noise scale predict the batch size that pays{costs}?"


def _predicts(axes: Axes, found: Readout) -> None:
    """Critical batch size over B_simple, with what either predictor would have."""
    both = {n: (m.noise[PRIMARY], m.doubled) for n, m in found.compared.items() if PRIMARY in m.noise}
    pairs = {n: each for n, each in both.items() if all(0 < number.value < math.inf for number in each)}
    across = figures.ends_of([noise for noise, _ in pairs.values()], REACH)
    up = figures.ends_of([critical for _, critical in pairs.values()], REACH)
    style = {key: STYLES[0][key] for key in ("color", "marker")}
    for name, (noise, critical) in pairs.items():
        figures.cross(axes, noise, critical, across, up, name, style)
    line = np.array(across)
    c, one = (_constant(found.judged.get(name)) for name in (PRIMARY, BY_DEFAULT))
    if math.isfinite(c):
        axes.plot(line, c * line, color=INK, linewidth=1)
        axes.fill_between(line, c * line / 2, c * line * 2, color=GREY, alpha=0.15, linewidth=0)
    if math.isfinite(one):
        axes.axhline(one, color=INK, linewidth=1, linestyle="--")
    axes.set_xlim(*across)
    axes.set_ylim(*up)
    batch_axis(axes, figures.octaves(across))
    batch_axis(axes, figures.octaves(up), "y")
    above = f"Does B_simple predict? {len(pairs)} of {len(found.compared)} configurations"
    label(axes, "B_simple of factor B (rows)", "measured B_crit (rows a step)", above)


def _line(rule: str, priced: Sequence[Sequence[Price]]) -> str:
    """Name a rule; with how many configurations it was priced in, where not in all."""
    own = [each for prices in priced for each in prices if each.rule == rule]
    some = any(each.used < each.of for each in own)
    return NAMES.get(rule, rule) + (f" ({', '.join(str(each.used) for each in own)})" if some else "")


def _constant(judged: Judged | None) -> float:
    return math.nan if judged is None else judged.constant.value


def _bars(
    axes: Axes,
    rules: Sequence[str],
    priced: Sequence[Price],
    numbers: Sequence[Estimated],
    up: float,
    i: int,
    said: str,
) -> None:
    """One number a rule with its interval, of one schedule."""
    style = STYLES[i]
    known = [x for n in numbers for x in (n.low, n.value, n.high) if math.isfinite(x)]
    for each, number in zip(priced, numbers, strict=True):
        at = rules.index(each.rule) - 0.28 * up
        ends = [min(max(end, min(known)), max(known)) for end in (number.low, number.high)]
        axes.plot(ends, [at] * 2, color=style["color"], linewidth=1.6, alpha=0.6)
        axes.plot(number.value, at, marker=style["marker"], color=style["color"], markersize=5.5)
    axes.plot([], [], marker=style["marker"], color=style["color"], linewidth=1.6, label=said)
