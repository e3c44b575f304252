import math
from dataclasses import replace

import pytest

from gns.advice import advise
from gns.advising.wording import START
from gns.estimate import STATUSES, Estimate, estimate
from gns.report import tables
from gns.report.text import basis, outlook, render, signal, verdict
from gns.statistics.drift import Drift

MEASURED = Estimate(212, 160, 310, 0.95, "measured", 1.0, 0.005, 900, 50, 800, steps=(0, 49))
WORDS = {
    "measured": (
        "Noise scale ≈ 212 examples",
        "95 % sure that its average over these steps lies between 160 and 310 examples",
        "good",
    ),
    "lower bound": ("Noise scale ≥ 160 examples", "no upper end is known", "open"),
    "not detectable": ("No signal seen; noise scale ≥ 160 examples", "no upper end is known", "open"),
    "collecting": ("Too early to tell", "50 usable steps so far; 20 of equal size are needed", "early"),
}


@pytest.mark.parametrize("status", STATUSES)
def test_every_status_has_its_words(status):
    high = math.inf if status in ("lower bound", "not detectable") else 310.0
    said = verdict(replace(MEASURED, status=status, high=high))
    title, sure, tone = WORDS[status]
    assert said.title == title and sure in said.sure and said.tone == tone


def test_a_value_outside_of_its_interval_is_not_said():
    """tr Σ averages below 0."""
    below = replace(MEASURED, b_simple=-0.00046, low=0.0, high=0.0022, trace_sigma=-1e-6)
    said = verdict(below)
    assert said.title == "Noise scale is resolved only roughly" and "between 0 and 0.0022" in said.sure
    assert tables.value_of(below) == "≤ 0.0022"
    assert tables.factor_row("A", below)["value"] == "not resolved"
    assert tables.value_of(MEASURED) == "212" and tables.value_of(replace(MEASURED, high=math.inf)) == "≥ 160"


def test_unknown_status_raises():
    with pytest.raises(ValueError, match="status is 'odd'"):
        verdict(replace(MEASURED, status="odd"))


def test_nothing_measured_is_told_from_nothing_usable():
    assert verdict(estimate([])).title == "Nothing measured yet"
    skipped = replace(estimate([]), n_skipped=12)
    assert "None of the 12 recorded steps" in verdict(skipped).sure


def test_basis_names_steps_unit_and_what_was_left_out():
    assert basis(MEASURED) == "50 optimizer steps × 16 examples (steps 0–49)"
    odd = replace(MEASURED, unit="examples (mean 187 tokens)", n_skipped=3)
    assert basis(odd) == "50 optimizer steps × 16 examples (mean 187 tokens) (steps 0–49, 3 left out)"


def test_terminal_summary_holds_estimate_range_factors_and_place(runs):
    result = estimate(runs["measured"])
    advice = advise(result, batch_size=16)
    text = render(result, advice, page="runs/a/report.html")
    assert text.startswith(verdict(result).title)
    assert advice.sentences[0] in text and "If time and examples matter equally" in text
    assert f"factor A: {result.groups['A']}" in text and "factor B: B_simple" in text
    assert text.endswith("Report: runs/a/report.html")
    lines = text.splitlines()
    assert f"{START} The rest of the advice: gns advise runs/a" in lines
    advice = advise(result, batch_size=16, dataset_size=5000, learning_rate=1e-4)
    shown = [line for section in advice.sections for line in section.brief]
    assert {section.title for section in advice.sections if section.brief} == {
        "Batch size", "The batch in use", "Where both were measured", "One epoch",
    }  # fmt: skip
    assert [line[4:] for line in render(result, advice).splitlines() if line.startswith("  - ")] == shown
    assert render(result, advice).endswith("gns advise RUN") and len(shown) < len(advice.sentences)


def test_terminal_summary_without_advice_promises_nothing(runs):
    result = estimate(runs["collecting"])
    text = render(result, advise(result, batch_size=16))
    assert "What batch size pays" not in text and "Report:" not in text and "Too early" in text


def test_terminal_summary_says_signal_outlook_and_warnings(runs):
    result = replace(estimate(runs["measured"]), warnings=("Heavy tails: so.",))
    lines = render(result).splitlines()
    assert f"Any signal at all: {signal(result.p_value)}. {result.outlook()}" in lines
    assert "  ! Heavy tails: so." in lines
    assert "signal at all" not in render(estimate([]))


def test_the_outlook_of_a_run_that_moved_is_that_of_its_last_third():
    first, last = (replace(MEASURED, b_simple=b, low=b - 1, high=b + 1) for b in (20.0, 400.0))
    said = outlook(MEASURED, Drift(first, last))
    assert said == f"For the last third of the run, steps 0–49: {last.outlook()}"
    assert outlook(MEASURED, Drift(first, first)) == outlook(MEASURED, None) == MEASURED.outlook()


def test_a_p_value_has_no_more_digits_than_it_bears():
    shown = [signal(p) for p in (1e-9, 0.0012345, 0.5, math.nan)]
    assert shown == ["p < 0.001", "p = 0.0012", "p = 0.5", "p unknown"]
