"""What the package says of measured batch sizes: never more than the study does."""

import json
import math
from dataclasses import asdict, replace

import pytest

from gns import advise
from gns.advising import wording
from gns.advising.calibration import Calibration, calibrations, parsed
from tests.gns.test_advice import MEASURED

UNDECIDED = Calibration(
    "the critical batch size", 1.04, 0.312, 1.5, 0.667, 0.0, 1.0, 3, 16, (254_400, 254_400), "undecided"
)
PREDICTS = replace(
    UNDECIDED,
    share=0.9,
    share_low=0.8,
    configurations=14,
    parameters=(254_400, 1_053_824),
    verdict="predicts",
)


def test_a_study_that_has_not_decided_corrects_nothing():
    text = UNDECIDED.sentence((100.0, 200.0))
    assert text.startswith(
        "The critical batch size was 1.04 (0.312 … 1.5) times B_simple of factor B in 3 of 16"
    )
    assert "in 3 configurations, of models" in replace(UNDECIDED, planned=None).sentence((1.0, 2.0))
    assert "of models with 0.25 M parameters; 67 % (0 … 100 %) lay within a factor of two" in text
    assert text.endswith(
        ": undecided, so nothing is corrected by it. If it holds here, that is batch 31 … 300."
    )
    for ends, said in (
        ((0.5, 1.0), "batch 1 … 2."),
        ((1.0, 1.1), "batch 1 … 2."),
        ((9.0, math.inf), "batch at least 3."),
    ):
        assert UNDECIDED.sentence(ends).endswith(said)
    assert "it does not predict, so nothing" in replace(UNDECIDED, verdict="does not").sentence((1.0, 2.0))


def test_it_is_said_in_short_in_a_summary():
    said = UNDECIDED.brief((100.0, 200.0))
    assert said.startswith(
        "Where both were measured (models of 0.25 M parameters), the critical batch size was"
    )
    assert said.endswith(
        "0.312 … 1.5 × B_simple of factor B. If it holds here, which is undecided, that is batch 31 … 300."
    )
    assert replace(UNDECIDED, verdict="does not").brief((1.0, 2.0)).endswith("which does not predict it.")
    assert PREDICTS.brief((100.0, math.inf)).endswith("× B_simple of factor B: batch at least 31 here.")


def test_one_that_predicts_says_what_a_reading_speaks_for():
    assert PREDICTS.applied((100.0, 200.0)) == pytest.approx((31.2, 300.0))
    text = PREDICTS.sentence((100.0, 200.0))
    assert "models with 0.25 M to 1.1 M parameters" in text and text.endswith(
        "by that, 31 … 300 examples here."
    )


def test_advice_names_what_ships_and_where_nothing_ships_is_silent(monkeypatch):
    shipped = calibrations()
    assert shipped and all(0 < each.low <= each.constant <= each.high for each in shipped)
    sections = {s.title: s.sentences for s in advise(MEASURED, batch_size=16).sections}
    assert len(sections[wording.CHECKED]) == len(shipped)
    assert sections[wording.CHECKED][0] == shipped[0].sentence((MEASURED.low, MEASURED.high))
    monkeypatch.setattr(wording, "calibrations", lambda: ())
    without = advise(MEASURED, batch_size=16)
    assert wording.CHECKED not in {s.title for s in without.sections}


def test_what_ships_is_read_back_and_damage_is_named():
    text = json.dumps([asdict(UNDECIDED), asdict(PREDICTS)])
    assert parsed(text) == (UNDECIDED, PREDICTS)
    with pytest.raises(
        ValueError, match=r"calibration.json: no list of calibrations: .*'parameters'.*reinstall"
    ):
        parsed('[{"says": "x"}]')
    with pytest.raises(ValueError, match="no list of calibrations"):
        parsed("{")
    with pytest.raises(ValueError, match="a constant without a finite interval"):
        parsed(text.replace("0.312", "Infinity"))
