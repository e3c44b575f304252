"""What the rows of the evidence say in words: the answer, and what tables leave out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from experiments.analysis.cells import independent
from experiments.analysis.curves import Estimated
from experiments.analysis.resampling import LEVEL
from experiments.evidence.configurations import CONFIGURATIONS, SIZES
from experiments.evidence.judged import WANTED, Judged
from experiments.evidence.measured import PRIMARY, Measured
from experiments.evidence.practice import DELTA, Price
from experiments.evidence.readout import BY_DEFAULT, BY_SIZE, Readout


def answer(found: Readout) -> str:
    """Answer the title's question in a paragraph, with numbers."""
    primary = found.judged.get(PRIMARY)
    if primary is None or math.isnan(primary.share.value):
        n = len(found.compared)
        return f"**Not answered yet**: {n} of {len(CONFIGURATIONS)} configurations have been measured."
    said = {
        "predicts": "**Yes, by the rule fixed beforehand**",
        "does not": "**No, by the rule fixed beforehand**",
        "undecided": "**Undecided by the rule fixed beforehand**",
    }[primary.verdict]
    fixed = found.judged[BY_DEFAULT]
    only = f" ({primary.bounds} with no more than a lower bound)" if primary.bounds else ""
    return (
        f"{said}, from {primary.pairs + primary.bounds} of {len(CONFIGURATIONS)} configurations{only}: "
        f"{percent(primary.share)} of the measured critical batch sizes lie within a factor of two of c · "
        f"B_simple, with c fitted to the other configurations (to all: c = {shown(primary.constant)}); "
        f"{100 * WANTED:.0f} % was wanted, and at intervals as wide as these a predictor without error would "
        f"show about {100 * primary.ceiling:.0f} %. One batch size for all does so for "
        f"{percent(fixed.share)}. The rank correlation of noise scale and critical batch size is "
        f"{shown(primary.correlation)}.{_beats(found)}{_apart(found)}{_more(primary)}"
    )


def _apart(found: Readout) -> str:
    """Whether the configurations' critical batch sizes differ at all, and whether their noise scales do."""
    p, n = found.critical_apart
    if math.isnan(p):
        return ""
    no_more = "by no more than their intervals let them"
    said = f" Their critical batch sizes {'do differ' if p < 1 - LEVEL else f'differ {no_more}'}"
    said += f" (p = {p:.2g}, {n} of them)"
    p, n = found.noise_apart
    if not math.isnan(p):
        said += f"; their noise scales {'do' if p < 1 - LEVEL else f'differ {no_more}'} (p = {p:.2g}, {n})"
    return f"{said}."


def _beats(found: Readout) -> str:
    """Whether B_simple comes closer than one batch size for all."""
    gain = found.gains[BY_DEFAULT]
    if math.isnan(gain.value):
        return ""
    said = f" B_simple misses by {shown(gain)} times the factor by which one batch size for all does"
    return f"{said}{_told(gain)}."


def _more(primary: Judged) -> str:
    """What would decide, where nothing is decided yet."""
    if primary.verdict != "undecided":
        return ""
    needed = primary.needed
    if math.isinf(needed.value):
        return " Were all to stay as it is, no number of configurations would decide."
    if needed.value <= primary.pairs:
        return ""
    return (
        f" Were all to stay as it is, about {needed.value:.0f} configurations would decide in half of the "
        f"cases ({number(needed.low)} … {number(needed.high)} over the interval of what decides)."
    )


def beside(found: Readout) -> str:
    """Say what the tables of predictors do not: their words, and whether B_simple beats the data size."""
    parts = [
        "Off: the factor by which the calibrated predictor misses, on average; ceiling: the share that one "
        "without error would show at these intervals. At one N a batch in proportion to the data is one "
        "batch size for all."
    ]
    if not math.isnan(found.gains[BY_SIZE].value):
        gain = shown(found.gains[BY_SIZE])
        told = _told(found.gains[BY_SIZE])
        parts.append(f"Over all N, B_simple misses by {gain} times the factor by which c · N does{told}.")
    return " ".join(parts)


def harmless_gains(found: Readout) -> str:
    """Say whether B_simple predicts the largest harmless batch better than a constant; "" if unknown."""
    gains = [
        f"by {shown(each.gain)} times under a {schedule} learning rate{_told(each.gain)}"
        for schedule, each in found.harmless.items()
        if not math.isnan(each.gain.value)
    ]
    if not gains:
        return ""
    return (
        f"As a predictor of the largest batch that costs no more than {DELTA} nat B_simple misses, against "
        f"one batch size for all, {' and '.join(gains)}."
    )


def notes(priced: Sequence[Price]) -> list[str]:
    """Say what a reader of the rules' prices must know: what k is, and which are of fewer configurations."""
    said = [f"{each.rule}: {each.note}." for each in priced if each.note]
    for each in priced:
        if each.smallest is not None:
            where = f"In the {each.used} configurations where “{each.rule}” has an answer"
            said.append(f"{where}, the smallest batch gives away {shown(each.smallest)} nat.")
    return said


def _told(gain: Estimated) -> str:
    """Whether two predictors can be told apart."""
    return " (not told apart: 1 lies inside)" if gain.low <= 1 <= gain.high else ""


def of_bounds(found: Readout) -> str:
    """Say how many critical batch sizes are lower bounds, over all sizes; nothing where none is."""
    bounds = sum(each.doubled.at_least for by in found.found.values() for each in by.values())
    if not bounds:
        return ""
    return (
        f"{bounds} of these critical batch sizes are lower bounds: a run sees {SIZES[-1]:,} examples, so "
        f"that those to the target of N = {SIZES[-1]:,} can hardly double. They count as misses for the "
        "lower end of a share and, where they may be near, as hits for its upper end; in nothing else."
    )


def of_seeds(compared: Mapping[str, Measured]) -> str:
    """Say what the seeds draw, and so what the intervals of B_crit hold.

    Args:
        compared: configuration → reading.
    """
    data = {name: len({drawn for _, drawn in each.cell.seeds}) for name, each in compared.items()}
    cells = {name: each.cell for name, each in compared.items()}
    alone = [name for name, cell in cells.items() if len(independent(cell)) < 2 <= len(cell.seeds)]
    seeds = sorted({len(each.cell.seeds) for each in compared.values()})
    counted = " or ".join(map(str, seeds))
    shared = [name for name, drawn in data.items() if drawn < 2 and name not in alone]
    own = "of which those that share their data count as one draw"
    parts = [f"Each has {counted} seeds."]
    if shared:
        where = "All" if len(shared) == len(data) else f"Those of {'; '.join(shared)}"
        parts.append(
            f"{where} draw adapters alone and share data and their order: what another draw of the data "
            "would do is not in the intervals of B_crit there."
        )
    if alone:
        parts.append(f"Those of {'; '.join(alone)} have no adapter to draw, and are one run: no interval.")
    if len(shared) + len(alone) < len(data):
        parts.append(f"{'Elsewhere seeds' if len(parts) > 1 else 'They'} draw data too, {own}.")
    return " ".join(parts)


def shown(value: Estimated) -> str:
    """A number with its interval."""
    if math.isnan(value.value) and math.isinf(value.low) and math.isinf(value.high):
        return "–"
    return f"{number(value.value)} ({number(value.low)} … {number(value.high)})"


def percent(value: Estimated) -> str:
    """A share with its interval."""
    if math.isnan(value.value):
        return "–"
    low, high = _rounded(value.low), _rounded(value.high)
    return f"{_rounded(value.value)} % ({low} … {high} %)"


def _rounded(share: float) -> str:
    """A share in percent, without digits; no zero is negative."""
    return number(share) if math.isinf(share) else f"{round(100 * share)}".replace("-", "−")


def number(value: float) -> str:
    """Three digits; ∞ and – where there is none."""
    if math.isnan(value):
        return "–"
    return ("−" if value < 0 else "") + "∞" if math.isinf(value) else f"{value:.3g}".replace("-", "−")
