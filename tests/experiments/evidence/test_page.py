"""The page and the figures are made from rows, and say what is missing."""

import math
from dataclasses import replace

import pytest

from experiments import rows as files
from experiments import rowsfile
from experiments.analysis.curves import Estimated
from experiments.evidence import figures
from experiments.evidence.__main__ import main
from experiments.evidence.configurations import CONFIGURATIONS
from experiments.evidence.front import elsewhere, front, taken_as_it_is
from experiments.evidence.measured import measured
from experiments.evidence.page import harmless_table
from experiments.evidence.practice import BY_NOISE, SMALLEST, Price
from experiments.evidence.readout import read_out
from experiments.evidence.sentences import of_seeds, percent, shown
from experiments.markdown import marks
from tests.experiments.evidence.synthetic import rows
from tests.experiments.evidence.test_practice import bowls
from tests.experiments.evidence.test_predictions import frozen
from tests.experiments.evidence.test_tuned import rows as whole


def test_the_page_says_what_was_found_and_what_is_missing(tmp_path, capsys):
    made = rows(8.0, 8.0, noise=0.03, n=1) + rows(16.0, 16.0, noise=0.03, n=2, dials={"label_noise": 0.2})
    made += rows(9.0, 8.0, noise=0.03, n=3, rank=4) + rows(8.0, 9.0, noise=0.03, n=4, rank=64)
    files.write(tmp_path / "laptop-critical.jsonl.gz", made)
    files.write(tmp_path / "frozen.jsonl.gz", frozen())
    other = tmp_path / "docs" / "OTHER.md"
    other.parent.mkdir()
    other.write_text("\n".join(("before", *marks("evidence"), "after")))
    main(["--folder", str(tmp_path), "--pages", str(other)])
    text = (tmp_path / "README.md").read_text()
    short = other.read_text()
    assert short.startswith("before\n") and short.endswith("\nafter") and "](../front.png)" in short
    assert "from 4 of 16 configurations" in short and "| smaller is better | 1 |" in short
    assert "from 4 of 16 configurations" in text
    assert "Not run yet: noise 0.5; merged" in text and "No branched runs yet: reference" in text
    assert "a predictor without error would show about" in short
    assert "Their critical batch sizes do differ (p = " in short and "; their noise scales do (p = " in short
    assert "times the factor by which one batch size for all does (not told apart: 1 lies inside)." in short
    harmless = text.partition("## Predictors of the largest harmless batch")[2]
    assert "| constant | B_simple, factor B" in harmless and "| constant | rival: one batch" in harmless
    assert "| P8 | B_crit, rank 64 over rank 4 |" in text
    assert "Each has 2 seeds. All draw adapters alone and share data and their order" in text
    assert "nan" not in text and "inf" not in text
    for name in ("front", "referee", "efficiency", "frozen"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        assert f"({name}.png)" in text


def test_the_front_says_in_a_sentence_what_rules_cost_under_another_schedule():
    nan, some = Estimated(math.nan, math.nan, math.nan), Estimated(0.25, 0.125, 0.5)
    price = Price(BY_NOISE, some, 0.5, some, 8.0, "one", 3, 3, Estimated(0.5, 0.25, 0.75))
    others = (
        replace(price, rule=SMALLEST, answers=nan, constant=0.25),
        replace(price, rule="16, always"),
    )
    assert elsewhere("cosine", [price, *others], 3) == (
        "Given away under a cosine learning rate, over 3 configurations: "
        f"B_simple as it is read: 0.25 (0.125 … 0.5) nat and right answers to {percent(price.answers)} "
        "of the problems; smaller is better (k = 0.25): 0.25 (0.125 … 0.5) nat."
    )
    assert percent(price.answers).replace("\N{NO-BREAK SPACE}", " ") == "50 % (25 … 75 %)"


def test_the_front_says_what_the_noise_scale_is_worth_as_a_batch_size():
    """B_max is an octave above the best batch, 4 · B_simple in all: B_simple is a quarter of it."""
    said = front(read_out(bowls(), []), "there")
    assert "that costs no more than 0.01 nat: 0.25 (0.2" in said and "mean of 4 configurations)" in said
    assert ") times that under a cosine learning rate (geometric" in said
    open_ = front(read_out(bowls() + whole(512.0, noise=4.0, rank=2), []), "there")
    assert "mean of 4 configurations of the 5; in the others one of the two has no end)" in open_
    assert "taken as a batch size" not in front(read_out(rows(8.0), []), "there")


def test_the_noise_scale_is_set_beside_one_batch_for_all_as_a_predictor_of_the_harmless_batch():
    """B_max is four times B_simple, and spans three octaves: the one is exact, the other is not."""
    beside = read_out(bowls(), []).harmless["cosine"]
    assert beside.scale.off.value == pytest.approx(1, rel=0.05) and beside.fixed.off.value > 1.5
    assert beside.gain.value == pytest.approx(beside.scale.off.value / beside.fixed.off.value)
    table = harmless_table(read_out(bowls(), []))
    assert f"by {shown(beside.gain)} times under a cosine learning rate." in table
    assert "| cosine | B_simple, factor B (preregistered) |" in table
    assert beside.gain.high < 1 and "not told apart" not in table
    level = harmless_table(read_out(rows(8.0) + rows(9.0, rank=4), []))
    assert "| constant | B_simple, factor B (exploratory) |" in level
    assert "misses" not in harmless_table(read_out(rows(8.0), []))


def test_the_ends_of_a_reciprocal_change_places():
    found = read_out(bowls(), [])
    cosine = found.harmless["cosine"]
    scale = replace(cosine.scale, constant=Estimated(0.2, 0.1, 0.5))
    said = taken_as_it_is(replace(found, harmless={"cosine": cosine._replace(scale=scale)}))
    assert "0.01 nat: 5 (2 … 10) times that under a cosine" in said


def test_no_share_is_a_negative_zero():
    assert percent(Estimated(-0.002, -0.004, 0.004)) == "0 % (0 … 0 %)"
    assert percent(Estimated(0.5, -0.054, math.inf)) == "50 % (−5 … ∞ %)"


def test_the_front_prices_the_schedule_of_most_configurations():
    constant = [
        row
        for r in (2, 3, 5, 6, 7)
        for row in whole(8.0, noise=4.0, schedule="constant", rank=r, n_train=2_048)
    ]  # of ranks that are not compared
    shorter = whole(8.0, noise=4.0, schedule="constant", rank=8, n_train=1_024)  # of a sweep over schedules
    said = front(read_out(bowls() + constant + shorter, []), "there")
    assert "over 5 configurations (one epoch, constant learning rate" in said
    assert said.count("Given away under a ") == 1
    assert "Given away under a cosine learning rate, over 4 configurations: B_simple as it is read: " in said


def test_what_cannot_be_read_is_named_and_the_rest_is_shown(tmp_path):
    made = rows(8.0, n=1)
    made += [row | {"validation": row["validation"][:3]} for row in rows(8.0, n=2, dials={"merged": 2})]
    files.write(tmp_path / "laptop-critical.jsonl.gz", made)
    main(["--folder", str(tmp_path)])
    text = (tmp_path / "README.md").read_text()
    assert "merged cannot be read: " in text and "| reference |" in text


def test_seeds_that_draw_data_are_told_from_those_that_do_not():
    made, other = rows(8.0, seeds=4), rows(8.0, n=2, rank=4)
    for row in made:
        row["config"] |= {"data_seed": row["config"]["seed"] // 2}
    compared = read_out(made + other, []).compared
    said = of_seeds(compared)
    assert said.startswith("Each has 2 or 4 seeds. Those of rank 4 draw adapters alone")
    assert said.endswith(
        "Elsewhere seeds draw data too, of which those that share their data count as one draw."
    )
    assert of_seeds({"reference": compared["reference"]}).startswith(
        "Each has 4 seeds. They draw data too, of"
    )
    (full,) = read_out(rows(8.0, adapter="full"), []).compared.values()
    assert (full.doubled.low, full.doubled.high) == (0, math.inf)
    assert of_seeds({"full": full}).endswith("full have no adapter to draw, and are one run: no interval.")


def test_a_configuration_has_one_mark_in_every_panel_whichever_others_are_there():
    """Three panels show two configurations of three: marks are not dealt out panel by panel."""
    every = {"reference": measured(rows(8.0), 1_024), "rank 4": measured(rows(9.0, n=1, rank=4), 1_024)}
    every["merged"] = measured(rows(9.0, n=2, dials={"merged": 2}), 512)
    some = {name: each for name, each in every.items() if name != "rank 4"}
    lacking = replace(every["merged"], noise={"B": every["merged"].noise["B"]})
    seen: dict[str, set] = {}
    for these in (every, some, {"merged": lacking, "rank 4": every["rank 4"]}):
        for axes in figures.referee(these, {}).axes:
            for line in axes.get_lines():
                if line.get_label() in CONFIGURATIONS:
                    seen.setdefault(line.get_label(), set()).add((line.get_marker(), line.get_color()))
    assert len(seen) == 3 and all(len(marks) == 1 for marks in seen.values())
    assert len(set.union(*seen.values())) == 3


def test_without_readings_the_question_is_not_answered(tmp_path):
    files.write(tmp_path / "frozen.jsonl.gz", frozen())
    main(["--folder", str(tmp_path)])
    assert "**Not answered yet**: 0 of 16" in (tmp_path / "README.md").read_text()


def test_rows_of_a_sweep_are_taken_over_once_and_without_failures(tmp_path):
    sweep = tmp_path / "laptop-critical"
    sweep.mkdir()
    made = rows(8.0)[:6]
    made[0] = made[0] | {"status": "failed"}
    rowsfile.append(sweep / "rows.jsonl", [*made, made[1]])
    main(["--collect", str(sweep), "--folder", str(tmp_path / "out")])
    kept = files.read(tmp_path / "out" / "laptop-critical.jsonl.gz")
    assert [row["hash"] for row in kept] == [row["hash"] for row in made[1:]]


def test_nothing_to_read_is_said(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--folder", str(tmp_path)])
    assert "no rows; run a sweep" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["--collect", str(tmp_path / "none"), "--folder", str(tmp_path)])
    assert "rows.jsonl: no such file of rows" in capsys.readouterr().err


def test_an_open_end_runs_to_the_frame_and_does_not_widen_it():
    found = read_out(rows(), []).compared["reference"]
    open_ = replace(found, noise={"B": replace(found.noise["B"], high=math.inf)})
    for each in (found, open_):
        axes = figures.efficiency({"reference": each}).axes[0]
        assert axes.get_xlim() == pytest.approx((1 / 1.3, 128 * 1.3))
    (span,) = [line for line in axes.lines if 1e6 in list(line.get_xdata())]
    assert span.get_xdata()[0] == pytest.approx(open_.noise["B"].low)
    far = replace(found, doubled=replace(found.doubled, value=500.0))
    assert figures.efficiency({"reference": far}).axes[0].get_xlim()[1] == pytest.approx(650)
