"""The page of the evidence: what was asked, what came out, with every number from rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from experiments.analysis.curves import Estimated
from experiments.evidence.configurations import SIZE
from experiments.evidence.judged import Judged
from experiments.evidence.measured import CURVED, PRIMARY, SAME, SECOND, VARIANTS, Measured
from experiments.evidence.paper import Drawn
from experiments.evidence.practice import DELTA, Price
from experiments.evidence.predictions import Prediction
from experiments.evidence.readout import BY_DEFAULT, BY_SIZE, Readout
from experiments.evidence.sentences import (
    answer,
    beside,
    harmless_gains,
    notes,
    number,
    of_bounds,
    of_seeds,
    percent,
    shown,
)
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
HARMLESS = {  # registered for a cosine alone
    "cosine": WORDS["B"],
    "constant": "B_simple, factor B (exploratory)",
}
ANSWERED = (
    "Right answers given away: share of exact matches at the best batch less that at the rule's, paired item "
    "by item; Student's interval with configurations and items as random effects, the best batch and what "
    "the rule is fitted to as they are."
)

WHOLE = (
    "One pass over the data unless a title says otherwise, each batch size at its best learning rate. Best "
    "test loss: in nats per token, of the batch size that is best on validation data; right answers: there, "
    "of the problems of the test split, all seeds together. Best batch: where the test loss has its minimum; "
    f"B_max: the largest batch within {DELTA:g} nat of it; both of the curve in the figure, and so maybe "
    "another than the one of the two columns before. B_simple: of factor B over a whole run at batch 4 "
    "(of all weights under full fine-tuning). To extend: batch sizes whose best learning rate ε is the "
    "lowest or the highest, or the only one, of its grid, or where every run diverged; first, where "
    "the best batch or B_max, or the interval of one, lies beyond the largest batch that was tried."
)


def page(found: Readout, drawn: Mapping[str, Drawn]) -> str:
    """Write the page.

    Args:
        found: what the rows say.
        drawn: the figures beside it, by their names.
    """
    parts = ["# Does the measured noise scale predict the critical batch size of LoRA?", answer(found)]
    parts.append(
        "Questions, design and the rule by which each number is judged were fixed before the runs, in "
        "[PREREGISTRATION.md](../../PREREGISTRATION.md). This page and its figures are made by `python -m "
        "experiments.evidence` from the rows in this folder."
    )
    if found.compared:
        parts += [f"## Predictors, at N = {SIZE:,}", judged_table(found.judged), beside(found)]
        parts += ["## Predictors, over all data sizes", judged_table(found.over_sizes)]
        parts += [of_bounds(found)] if of_bounds(found) else []
        parts += ["## Predictors of the largest harmless batch", harmless_table(found)]
    parts += ["## Predictions", predictions_table(found)]
    for schedule, (priced, curves) in found.priced.items():
        parts += [f"## Rules that choose a batch size, {schedule} learning rate", prices_table(priced)]
        parts.append(
            f"Priced on {len(curves)} configurations, tuned in learning rate at every batch size. Regret: "
            "test loss at the rule's batch less that at the batch best on validation data, mean (95 %, "
            "bootstrap over configurations, seeds and what the rule is fitted to; replicates choose the best "
            "batch anew and lean high by that, which is taken out) and worst. Steps: over those of the "
            f"largest batch within {DELTA} nat of the best; above 1 the rule is slower than it need be. "
            "Runs: spent on choosing a batch, one seed."
            + (" " + ANSWERED if any(_answered(each) for each in priced) else "")
            + "".join(f" {said}" for said in notes(priced))
        )
    if found.compared:
        parts += [f"## Configurations, at N = {SIZE:,}", configurations_table(found.compared, found.branched)]
        parts += [of_seeds(found.compared), *unread(found.compared)]
    if found.missing:
        parts.append(f"Not run yet: {'; '.join(found.missing)}.")
    if without := [name for name in found.compared if name not in found.branched]:
        parts.append(f"No branched runs yet: {'; '.join(without)}.")
    parts += [f"{name} cannot be read: {why}." for name, why in found.broken.items()]
    parts += [f"![{each.title}]({name}.png)" for name, each in drawn.items() if not each.table]
    if whole := {name: each for name, each in drawn.items() if each.table}:
        parts += ["## Whole runs, by batch size", WHOLE]
        for name, each in whole.items():
            parts += [f"### {each.title}", f"![{each.title}]({name}.png)", each.table]
    if found.commits:
        parts.append(
            f"Rows of {found.runs:,} runs, {found.diverged} diverged; commits {', '.join(found.commits)}."
        )
    return "\n\n".join(parts) + "\n"


ALIKE = (
    f", and so is a run that does not come out the same when it is made again (each step's loss within "
    f"{100 * SAME:g} %)"
)


def unread(compared: Mapping[str, Measured]) -> list[str]:
    """Name the configurations without a reading of the runs and the way that count now.

    Args:
        compared: configuration → reading.
    """
    said = []
    of_adam = {name: each for name, each in compared.items() if each.cell.fields["optimizer"] == "adamw"}
    asked = ((SECOND, "in Adam's metric", of_adam), (CURVED, "of B_noise", compared))
    for variant, words, among in asked:
        if without := [name for name, each in among.items() if variant not in each.noise]:
            said.append(
                f"No reading {words} of all seeds on the way to these targets: {'; '.join(without)}. What "
                "was read before seeds were added is left out" + (f"{ALIKE}." if variant == CURVED else ".")
            )
    return said


def harmless_table(found: Readout) -> str:
    """Tabulate B_simple beside B_max, by schedule."""
    lines = [
        (
            schedule,
            HARMLESS[schedule] if each is scale else WORDS[BY_DEFAULT],
            shown(each.correlation),
            shown(each.constant),
            percent(each.share),
            number(each.off.value),
            f"{each.pairs} of {each.of}",
            each.verdict,
        )
        for schedule, (scale, fixed, _) in found.harmless.items()
        for each in (scale, fixed)
    ]
    head = ("schedule", "predictor", "rank correlation", "c", "within a factor of two", "off", "pairs")
    words = (
        f"B_simple of factor B over the whole run beside B_max({DELTA}), the largest batch whose loss after "
        "one epoch is within that of the best, in nats; open ends are left out."
    )
    if not lines:
        return f"{words} Not measured."
    said = harmless_gains(found)
    return "\n\n".join([words, table((*head, "verdict"), lines), *([said] if said else [])])


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
                    number(each.off.value),
                    "–" if math.isnan(each.ceiling) else f"{100 * each.ceiling:.0f} %",
                    f"{each.pairs} of {each.of}",
                    each.verdict,
                )
            )
    head = (
        "predictor",
        "rank correlation",
        "c",
        "within a factor of two",
        "off",
        "ceiling",
        "pairs",
        "verdict",
    )
    return table(head, lines)


def predictions_table(found: Readout) -> str:
    """Tabulate the predictions with their ranges and verdicts."""
    lines = [(p.name, p.says, _measured(p), _range(p), f"**{p.verdict}**") for p in found.predicted]
    return table(("", "number", "measured", "predicted", "verdict"), lines)


def _measured(of: Prediction) -> str:
    """The number; of what is only shown with what it is of."""
    return shown(of.number) + (f", {of.number.note}" if of.open and of.number.note else "")


def _range(of: Prediction) -> str:
    """What was predicted, in words."""
    if of.open:
        return "nothing: the spread is the result"
    if of.zero is not None:
        return f"0 {'inside' if of.zero else 'outside'}"
    return f"at most {number(of.high)}" if math.isinf(of.low) else f"{number(of.low)} … {number(of.high)}"


def _answered(price: Price) -> bool:
    """Whether any configuration was asked for answers."""
    return not math.isnan(price.answers.value)


def prices_table(priced: Sequence[Price]) -> str:
    """Tabulate what rules cost; in right answers too, where any were asked for."""
    answered = any(_answered(each) for each in priced)
    lines = []
    for each in priced:
        steps = shown(each.steps) + (f"; {each.steps.note}" if each.steps.note else "")
        used = f"{each.used} of {each.of}"
        answers = percent(each.answers) + (f", {each.answers.note}" if each.answers.note else "")
        losses = shown(each.regret), number(each.worst), *([answers] if answered else [])
        lines.append((each.rule, number(each.batch), *losses, steps, each.runs, used))
    losses = "regret, nats", "worst", *(["right answers given away"] if answered else [])
    head = ("rule", "batch it chose", *losses, "steps", "runs", "configurations")
    return table(head, lines)


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
