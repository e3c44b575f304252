"""The page of the evidence: what was asked, what came out, with every number from rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from experiments.analysis.curves import Estimated
from experiments.evidence.configurations import CONFIGURATIONS, SIZE
from experiments.evidence.judged import WANTED, Judged
from experiments.evidence.measured import PRIMARY, VARIANTS, Measured
from experiments.evidence.practice import DELTA, Price
from experiments.evidence.predictions import Prediction
from experiments.evidence.readout import BY_DEFAULT, BY_SIZE, Readout
from experiments.markdown import table

WORDS = {
    "B": "B_simple, factor B (preregistered)",
    "adam": "the same in Adam's metric (second)",
    "joint": "joint (exploratory)",
    "A": "factor A (exploratory)",
    "plug-in": "plug-in of each step (exploratory)",
    "B_noise": "B_noise, on the way (exploratory)",
    BY_SIZE: "rival: proportional to the data",
    BY_DEFAULT: "rival: one batch size for all",
}


def page(found: Readout, drawn: Mapping[str, str]) -> str:
    """Write the page.

    Args:
        found: what the rows say.
        drawn: names of the figures beside it, and their titles.
    """
    parts = ["# Does the measured noise scale predict the critical batch size of LoRA?", answer(found)]
    parts.append(
        "Questions, design and the rule by which each number is judged were fixed before the runs, in "
        "[PREREGISTRATION.md](../../PREREGISTRATION.md). This page and its figures are made by `python -m "
        "experiments.evidence` from the rows in this folder."
    )
    if found.compared:
        parts += [f"## Predictors, at N = {SIZE:,}", judged_table(found.judged)]
        parts += ["## Predictors, over all data sizes", judged_table(found.over_sizes)]
    parts += ["## Predictions", predictions_table(found)]
    for schedule, (priced, curves) in found.priced.items():
        parts += [f"## Rules that choose a batch size, {schedule} learning rate", prices_table(priced)]
        parts.append(
            f"Priced on {len(curves)} configurations, tuned in learning rate at every batch size. Regret: "
            "test loss at the rule's batch less that at the batch best on validation data, mean (95 %, "
            "bootstrap over configurations and seeds; replicates choose the best batch anew and so lean high "
            "where the regret is small) and worst. Steps: over those of the largest batch "
            f"within {DELTA} nat of the best; above 1 the rule is slower than it need be. Runs: spent on "
            "choosing a batch, one seed."
        )
    if found.compared:
        parts += [f"## Configurations, at N = {SIZE:,}", configurations_table(found.compared, found.branched)]
        parts.append(of_seeds(found.compared))
    if found.missing:
        parts.append(f"Not run yet: {', '.join(found.missing)}.")
    parts += [f"{name} cannot be read: {why}." for name, why in found.broken.items()]
    parts += [f"![{title}]({name}.png)" for name, title in drawn.items()]
    if found.commits:
        parts.append(
            f"Rows of {found.runs:,} runs, {found.diverged} diverged; commits {', '.join(found.commits)}."
        )
    return "\n\n".join(parts) + "\n"


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
    return (
        f"{said}, from {primary.pairs} of {len(CONFIGURATIONS)} configurations: {percent(primary.share)} of "
        "the measured critical batch sizes lie within a factor of two of c · B_simple, with c fitted to the "
        f"other configurations ({shown(primary.constant)}; {100 * WANTED:.0f} % was wanted); one batch size "
        f"for all does so for {percent(fixed.share)}. The rank correlation of noise scale and critical batch "
        f"size is {shown(primary.correlation)}.{_more(primary)}"
    )


def _more(primary: Judged) -> str:
    """What would decide, where nothing is decided yet."""
    if primary.verdict != "undecided":
        return ""
    if math.isinf(primary.needed):
        return " Were both to stay as they are, no number of configurations would decide."
    if primary.needed <= primary.pairs:
        return ""
    return f" Were both to stay as they are, about {primary.needed:.0f} configurations would decide."


def judged_table(judged: Mapping[str, Judged]) -> str:
    """Tabulate predictors and rivals."""
    lines = []
    for name in (*VARIANTS, BY_SIZE, BY_DEFAULT):
        if name in judged:
            each = judged[name]
            lines.append(
                (
                    WORDS[name],
                    shown(each.correlation),
                    shown(each.constant),
                    percent(each.share),
                    f"{each.pairs} of {each.of}",
                    each.verdict,
                )
            )
    head = ("predictor", "rank correlation", "c", "within a factor of two", "pairs", "verdict")
    return table(head, lines)


def predictions_table(found: Readout) -> str:
    """Tabulate the predictions with their ranges and verdicts."""
    lines = [(p.name, p.says, shown(p.number), _range(p), f"**{p.verdict}**") for p in found.predicted]
    return table(("", "number", "measured", "predicted", "verdict"), lines)


def _range(of: Prediction) -> str:
    """What was predicted, in words."""
    if of.open:
        return "nothing: the spread is the result"
    if of.zero is not None:
        return f"0 {'inside' if of.zero else 'outside'}"
    return f"at most {number(of.high)}" if math.isinf(of.low) else f"{number(of.low)} … {number(of.high)}"


def prices_table(priced: Sequence[Price]) -> str:
    """Tabulate what rules cost."""
    lines = []
    for each in priced:
        steps = shown(each.steps) + (f"; {each.steps.note}" if each.steps.note else "")
        used = f"{each.used} of {each.of}"
        lines.append(
            (each.rule, number(each.batch), shown(each.regret), number(each.worst), steps, each.runs, used)
        )
    head = ("rule", "batch it chose", "regret, nats", "worst", "steps", "runs", "configurations")
    return table(head, lines)


def of_seeds(compared: Mapping[str, Measured]) -> str:
    """Say what the seeds draw, and so what the intervals of B_crit hold.

    Args:
        compared: configuration → reading.
    """
    data = {name: len({drawn for _, drawn in each.cell.seeds}) for name, each in compared.items()}
    seeds = sorted({len(each.cell.seeds) for each in compared.values()})
    counted = " or ".join(map(str, seeds))
    shared = [name for name, draws in data.items() if draws < 2]
    if not shared:
        return f"Each has {counted} seeds, some of which draw data of their own."
    where = "All" if len(shared) == len(data) else f"Those of {', '.join(shared)}"
    return (
        f"Each has {counted} seeds. {where} draw adapters alone and share data and their order: what another "
        "draw of the data would do is not in the intervals of B_crit there."
    )


def configurations_table(found: Mapping[str, Measured], branched: Mapping[str, Estimated]) -> str:
    """Tabulate what was measured in each configuration.

    Args:
        found: configuration → reading.
        branched: configuration → the third definition of its critical batch, as far as it was measured.
    """
    nothing, lines = Estimated(math.nan, -math.inf, math.inf), []
    for name, each in found.items():
        noise = [shown(each.noise[v]) if v in each.noise else "–" for v in (PRIMARY, "adam", "joint")]
        fit = "–" if each.fit is None else f"{shown(each.fit.b_crit)}, off by {each.fit.misfit:.2f}"
        others = shown(each.fifth), fit, shown(branched.get(name, nothing))
        lines.append((name, f"{each.target:.3f}", shown(each.doubled), *others, *noise, each.doubled.note))
    head = (
        "configuration",
        "target, nats",
        "B_crit",
        "20 % more",
        "hyperbola",
        "branches within 0.01 nat",
        *(WORDS[v].split(" (")[0] for v in (PRIMARY, "adam", "joint")),
        "",
    )
    return table(head, lines)


def shown(value: Estimated) -> str:
    """A number with its interval."""
    if math.isnan(value.value) and math.isinf(value.low) and math.isinf(value.high):
        return "–"
    return f"{number(value.value)} ({number(value.low)} … {number(value.high)})"


def percent(value: Estimated) -> str:
    """A share with its interval."""
    if math.isnan(value.value):
        return "–"
    return f"{100 * value.value:.0f} % ({100 * value.low:.0f} … {100 * value.high:.0f} %)"


def number(value: float) -> str:
    """Three digits; ∞ and – where there is none."""
    if math.isnan(value):
        return "–"
    return ("−" if value < 0 else "") + "∞" if math.isinf(value) else f"{value:.3g}".replace("-", "−")
