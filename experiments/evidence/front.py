"""The evidence in short, for pages written by hand: the answer, what rules cost, one picture."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from experiments import markdown
from experiments.analysis.curves import Estimated
from experiments.evidence.configurations import SIZE
from experiments.evidence.practice import BY_FITTED, BY_NOISE, DELTA, SMALLEST, Price
from experiments.evidence.readout import Readout
from experiments.evidence.sentences import answer, harmless_gains, notes, number, percent, shown

NAME = "evidence"  # of the part; see `experiments.markdown.insert`
PICTURE = "front"
PREDICTS = (
    f"Left: measured critical batch size over the noise scale at N = {SIZE:,}, a point a configuration."
)
RULES = (
    " Middle and right: test loss that each rule for the batch size gives away, and the optimizer steps it "
    "takes, with 95 % intervals"
)


def insert(found: Readout, folder: Path, pages: Sequence[Path]) -> list[Path]:
    """Put the answer, the priced rules and the picture between the marks of pages.

    Args:
        found: what the rows say.
        folder: of the figures.
        pages: Markdown files that have the marks.

    Raises:
        ValueError: one has not.
    """
    for path in pages:
        there = Path(os.path.relpath(folder, path.parent or Path())).as_posix()
        markdown.insert(path, NAME, front(found, there))
    return list(pages)


def front(found: Readout, folder: str) -> str:
    """Write the part.

    Args:
        found: what the rows say.
        folder: of the figures and of the page, as seen from the page that it is put into.
    """
    parts = [f"{answer(found)} [Every number, figure and verdict]({folder}/README.md)."]
    if found.priced:
        schedule = max(found.priced, key=lambda name: len(found.priced[name][1]))  # of most configurations
        priced, curves = found.priced[schedule]
        parts.append(
            f"What a rule for the batch size costs, over {len(curves)} configurations (one epoch, {schedule} "
            "learning rate, tuned at every batch size): loss given away against the best batch size tried, "
            f"and optimizer steps over those of the largest batch within {DELTA} nat of the best, with 95 % "
            "intervals:"
        )
        parts.append(prices(priced))
        said = (taken_as_it_is(found), harmless_gains(found))
        parts += [" ".join(each for each in said if each)] if any(said) else []
        parts += notes(priced)
        parts += [
            elsewhere(name, priced, len(curves))
            for name, (priced, curves) in found.priced.items()
            if name != schedule
        ]
    if any(each.noise for each in found.compared.values()):
        rules = RULES if found.priced else ""
        parts.append(f"![{PREDICTS}{rules}]({folder}/{PICTURE}.png)")
    return "\n\n".join(parts)


def taken_as_it_is(found: Readout) -> str:
    """Say in a sentence what B_simple is worth as a batch size, under each schedule; "" if unknown."""
    said = []
    for schedule, each in found.harmless.items():
        c, of = each.scale.constant, each.scale
        if not math.isfinite(c.value):
            continue
        times = Estimated(1 / c.value, 1 / c.high, 1 / c.low)
        left = f" of the {of.of}; in the others one of the two has no end" if of.pairs < of.of else ""
        what = f"a {schedule} learning rate (geometric mean of {of.pairs} configurations{left})"
        said.append(f"{shown(times)} times that under {what}")
    if not said:
        return ""
    return (
        f"B_simple, taken as a batch size, beside the largest batch that costs no more than {DELTA} nat: "
        f"{', '.join(said)}."
    )


def elsewhere(schedule: str, priced: Sequence[Price], configurations: int) -> str:
    """Say in a sentence what the rules of one run or none cost under another schedule.

    Args:
        schedule: its name.
        priced: the rules.
        configurations: that they were priced on.
    """
    said = []
    for each in priced:
        if each.rule in (BY_NOISE, BY_FITTED, SMALLEST):
            answered = not math.isnan(each.answers.value)
            more = f" and right answers to {percent(each.answers)} of the problems" if answered else ""
            own = "" if math.isnan(each.constant) else f" (k = {each.constant:.2g})"  # another one there
            said.append(f"{each.rule}{own}: {shown(each.regret)} nat{more}")
    where = f"under a {schedule} learning rate, over {configurations} configurations"
    return f"Given away {where}: {'; '.join(said)}."


def prices(priced: Sequence[Price]) -> str:
    """Tabulate rules in short."""
    lines = [
        (each.rule, number(each.batch), shown(each.regret), shown(each.steps), each.runs, str(each.used))
        for each in priced
    ]
    head = ("rule", "batch (mean)", "loss given away, nats", "steps, ×", "runs spent on it", "configurations")
    return markdown.table(head, lines)
