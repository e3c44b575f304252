"""The verdict on a run in words, for the terminal and for the top of the page. No numbers are made here."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from gns.advice import Advice
from gns.advising.wording import START, movement
from gns.estimate import MIN_STEPS, Estimate, format_count
from gns.probing.result import FrozenEstimate
from gns.statistics.drift import Drift

__all__ = ["Verdict", "basis", "label_of", "movement", "outlook", "pays", "render", "signal", "verdict"]

WIDTH = 0.2  # relative half-width of the interval that further examples are counted for


@dataclass(frozen=True)
class Verdict:
    """What a reader takes home in ten seconds.

    Args:
        title: the answer.
        sure: how sure it is.
        meaning: what that means, in a sentence or two.
        tone: "good", "open" or "early", for the colour and the mark beside it.
    """

    title: str
    sure: str
    meaning: str
    tone: str


def verdict(result: Estimate, change: Drift | None = None) -> Verdict:
    """Put an estimate into words, by its status and by how the noise scale moved along the run."""
    said = _still(result)
    moved = movement(change)
    if change is None or moved is None or result.status == "collecting":
        return said
    between = f"is at least {format_count(result.low)}"
    if math.isfinite(result.high):
        between = f"lies between {format_count(result.low)} and {format_count(result.high)}"
    return replace(
        said,
        title=f"{said.title} on average, and {change.direction}",
        sure=moved,
        meaning=f"The average over all steps {between} examples ({100 * result.level:g} % sure); the advice "
        f"is for {change.span}.",
        tone="open",
    )


def _still(result: Estimate) -> Verdict:
    """Put an estimate into words, by its status alone.

    Raises:
        ValueError: the status is unknown.
    """
    percent = f"{100 * result.level:g} %"
    low = format_count(result.low)
    if result.n_steps == 0:
        return _nothing(result)
    if result.status == "collecting":
        known = (
            "" if math.isnan(result.low) else f" So far the data allow {low} … {format_count(result.high)}."
        )
        return Verdict(
            "Too early to tell",
            f"{result.n_steps} usable steps so far; {MIN_STEPS} of equal size are needed.",
            f"Fewer steps do not show their own spread well enough to be believed.{known}",
            "early",
        )
    if result.status == "measured":
        about = (
            "is resolved only roughly"
            if math.isnan(result.point)
            else f"≈ {format_count(result.point)} examples"
        )
        return Verdict(
            f"Noise scale {about}",
            f"{percent} sure that {_which(result)} lies between {low} and "
            f"{format_count(result.high)} examples.",
            "A batch far smaller than this makes good use of every example, but needs many optimizer steps. "
            "A batch far larger needs many more examples, and saves hardly any steps.",
            "good",
        )
    if result.status == "lower bound":
        return Verdict(
            f"Noise scale ≥ {low} examples",
            f"{percent} sure that it is at least that; no upper end is known.",
            "The gradient's mean does not stand out of the noise, so this run cannot tell a large noise "
            "scale from a very large one.",
            "open",
        )
    if result.status == "not detectable":
        return Verdict(
            f"No signal seen; noise scale ≥ {low} examples",
            f"{percent} sure that it is at least that; no upper end is known.",
            "The estimate of |G|² came out below zero, as chance makes it where the gradient's mean is tiny: "
            "these steps hold no sign of a direction they share.",
            "open",
        )
    raise ValueError(f"status is {result.status!r}; one of gns.estimate.STATUSES is needed")


def _which(result: Estimate) -> str:
    """Name what the interval is of."""
    return "it, at these weights," if isinstance(result, FrozenEstimate) else "its average over these steps"


def _nothing(result: Estimate) -> Verdict:
    if result.n_skipped:
        return Verdict(
            "Nothing could be measured",
            f"None of the {result.n_skipped} recorded steps can be used.",
            "Why is listed under the steps left out.",
            "early",
        )
    return Verdict(
        "Nothing measured yet",
        "No optimizer step has been recorded.",
        "A step counts once a backward pass has run through measured layers and the optimizer has stepped.",
        "early",
    )


def basis(result: Estimate) -> str:
    """Say what the verdict rests on: steps, examples, unit."""
    if not result.n_steps:
        return "no usable step"
    each = format_count(result.examples_per_step)
    left = f", {result.n_skipped} left out" if result.n_skipped else ""
    span = f" (steps {result.steps[0]}–{result.steps[1]}{left})" if result.steps else ""
    what = "batches at frozen weights" if isinstance(result, FrozenEstimate) else "optimizer steps"
    return f"{result.n_steps:,} {what} × {each} {result.unit}{span}"


def outlook(result: Estimate, change: Drift | None) -> str:
    """Say how many more examples make the interval narrow: that of the part of the run to go by."""
    if change is None or not change.moved:
        return result.outlook(WIDTH)
    return f"For {change.span}: {change.last.outlook(WIDTH)}"


def signal(p_value: float) -> str:
    """Write the p-value of "no signal at all".

    >>> signal(0.00002), signal(0.034)
    ('p < 0.001', 'p = 0.034')
    """
    if math.isnan(p_value):
        return "p unknown"
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"


def render(
    result: Estimate,
    advice: Advice | None = None,
    *,
    change: Drift | None = None,
    page: str | Path | None = None,
) -> str:
    """Write the summary for a terminal: the estimate, what batch range it suggests, where the rest lies.

    Of the advice it holds the first subjects alone, to be read in half a minute; `gns advise` says it all.

    Args:
        result: the estimate of the run.
        advice: from `advise`, or None.
        change: from `drift`, or None.
        page: path of the report, or None.

    Returns:
        Some lines of plain text, without a newline at the end.
    """
    said = verdict(result, change)
    lines = [said.title, said.sure, said.meaning, f"Measured over {basis(result)}."]
    lines += [f"  {label_of(name)}: {group}" for name, group in result.groups.items()]
    if result.n_steps > 1:
        lines.append(f"Any signal at all: {signal(result.p_value)}. {outlook(result, change)}")
    repeated = advice.warnings if advice is not None and advice.table else ()
    lines += [f"  ! {w}" for w in result.warnings if w not in repeated]
    if advice is not None and advice.table:
        lines += ["", *pays(advice, None if page is None else Path(page).parent)]
    if page is not None:
        lines += ["", f"Report: {page}"]
    return "\n".join(lines)


def pays(advice: Advice, run: str | Path | None = None) -> list[str]:
    """Give the first subjects of the advice as lines for a terminal, and say where the rest is.

    Args:
        advice: with sections.
        run: folder of the run, or None.
    """
    first = [line for section in advice.sections for line in section.brief]
    return [
        f"What batch size pays{f', for {advice.span}' if advice.span else ''}:",
        *(f"  - {line}" for line in first),
        *(f"  ! {w}" for w in advice.warnings),
        f"{START} The rest of the advice: gns advise {run or 'RUN'}",
    ]


def label_of(group: str) -> str:
    """Name a group of parameters for a reader."""
    return {"all": "all together", "A": "factor A", "B": "factor B"}.get(group, group)
