"""Rules that choose a batch size, on curves whose regret is known."""

import math

import pytest

from experiments.evidence import calibrated
from experiments.evidence.page import prices_table
from experiments.evidence.practice import (
    BY_FITTED,
    BY_NOISE,
    BY_PROXY,
    SMALLEST,
    prices,
)
from experiments.evidence.readout import read_out
from experiments.evidence.tuned import tuned
from gns.advising.calibration import parsed
from tests.experiments.evidence.test_tuned import rows


def priced(made):
    return {each.rule: each for each in prices(tuned(made))}


def bowls(**fields):
    """Loss 1 + 0.01·(octaves from the best)²; the noise scale is half the best batch."""
    made = rows(4.0, noise=2.0, rank=4, **fields) + rows(8.0, noise=4.0, **fields)
    made += rows(16.0, noise=8.0, rank=64, **fields)
    return made + rows(32.0, noise=16.0, base="math-1m", **fields)


def test_every_rule_costs_what_its_batch_costs():
    found = priced(bowls())
    assert found[BY_NOISE].regret.value == pytest.approx(0.01, abs=1e-6)  # an octave below the best
    assert found[BY_NOISE].steps.value == pytest.approx(4.0, rel=0.02)  # B_max is an octave above it
    assert found[BY_NOISE].batch == pytest.approx(2.0 * 2**1.5, rel=1e-6)
    # c is fitted to the largest harmless batch, an octave above the best: 4 in every configuration
    assert found[BY_FITTED].batch == pytest.approx(8.0 * 2**1.5, rel=0.02)
    assert found[BY_FITTED].steps.value == pytest.approx(1.0, rel=0.02)
    assert found[BY_FITTED].note.startswith("k = 4: B_max over B_simple of the whole run")
    assert found[SMALLEST].regret.value == pytest.approx(0.01 * (4 + 9 + 16 + 25) / 4, abs=1e-6)
    assert found[SMALLEST].worst == pytest.approx(0.25, abs=1e-6)
    assert found["16, always"].regret.value == pytest.approx(0.01 * (4 + 1 + 0 + 1) / 4, abs=1e-6)
    assert found["128, always"].worst == pytest.approx(0.25, abs=1e-6)
    assert all(each.of == 4 for each in found.values())


def test_the_proxy_is_the_smallest_model_at_the_lowest_rank_on_the_same_data():
    found = priced(bowls())[BY_PROXY]
    assert found.used == 3  # rank 4 of the smallest model has none that is smaller
    assert found.batch == pytest.approx(4.0)
    assert found.regret.value == pytest.approx(0.01 * (1 + 4 + 9) / 3, abs=1e-6)
    assert found.runs == "about 40 of the proxy"
    smallest = priced([row for row in bowls() if row["config"]["rank"] != 4])[SMALLEST]
    assert found.smallest.value == pytest.approx(smallest.regret.value, abs=1e-6)  # in the same three
    others = rows(8.0, rank=4, dials={"label_noise": 0.5}) + rows(8.0, n_train=512)
    assert BY_PROXY not in priced(others + rows(8.0, rank=64))  # other data, or other amounts of them


def test_a_rule_without_an_answer_is_priced_where_it_has_one():
    made = rows(8.0, noise=None) + rows(8.0, noise=8.0, rank=4) + rows(8.0, noise=math.nan, rank=64)
    found = priced(made)
    assert (found[BY_NOISE].used, found[BY_NOISE].of) == (1, 3)
    assert BY_FITTED not in found  # one other is not enough to fit c


def test_right_answers_are_priced_where_there_are_any():
    silent = bowls()
    assert all(math.isnan(each.answers.value) for each in prices(tuned(silent)))
    assert "right answers" not in prices_table(prices(tuned(silent)))
    made = [
        row | {"items_right": [int(row["config"]["batch_size"] < 64)] * 4, "accuracy": 1.0} for row in silent
    ]
    found = priced(made)
    assert found["128, always"].answers.value == 1.0 and found[SMALLEST].answers.value == 0.0
    table = prices_table(list(found.values()))
    assert "| right answers given away |" in table and "| 100 % (100 … 100 %) |" in table
    assert "| 0 % (0 … 0 %) |" in table
    part = priced(rows(16.0, noise=8.0, rank=2) + made)
    assert "| 100 % (100 … 100 %), 4 of 5 configurations |" in prices_table(list(part.values()))


def test_the_constant_is_fitted_without_the_configuration_that_is_priced():
    """B_max/B_simple is 4, 4 and 16: the first two get 8 · 4 = 32, the third 4 · 1 = 4; the best is 8."""
    found = priced(rows(8.0, noise=4.0) + rows(8.0, noise=4.0, rank=4) + rows(8.0, noise=1.0, rank=64))
    assert found[BY_FITTED].regret.value == pytest.approx(0.01 * (4 + 4 + 1) / 3, abs=2e-4)


def test_the_constant_is_fitted_anew_in_each_replicate():
    """B_max/B_simple is 4, 4, 4 and 32: whether the odd one is drawn moves what the rule chooses."""
    made = rows(8.0, noise=4.0) + rows(8.0, noise=4.0, rank=4) + rows(8.0, noise=4.0, rank=64)
    found = priced(made + rows(8.0, noise=0.5, base="math-1m"))[BY_FITTED]
    assert found.steps.high / found.steps.low > 4


def test_where_one_configuration_is_priced_the_constant_alone_spreads():
    """B_max/B_simple of the two others is 4 and 16: two of them drawn make 4, 8 or 16; 8 · 4 of 128 is 4."""
    found = priced(rows(512.0, noise=4.0) + rows(8.0, noise=4.0, rank=4) + rows(8.0, noise=1.0, rank=64))
    steps = found[BY_FITTED].steps
    assert found[BY_FITTED].used == 1
    assert (steps.low, steps.value, steps.high) == pytest.approx((2.0, 4.0, 8.0), rel=1e-6)


def test_each_configuration_draws_with_its_own_noise_scale():
    """B_max is 4 · B_simple in all: whatever is drawn, the rule chooses B_max of that configuration."""
    found = priced(rows(8.0, noise=4.0) + rows(2.0, noise=1.0, rank=4) + rows(32.0, noise=16.0, rank=64))
    steps = found[BY_FITTED].steps
    assert (steps.low, steps.high) == pytest.approx((1.0, 1.0), rel=1e-6)


def test_configurations_that_cannot_be_priced_still_fit_the_constant():
    """The third has no end, so that the first two have one other each, and it two."""
    made = rows(8.0, noise=4.0) + rows(8.0, noise=4.0, rank=4) + rows(512.0, noise=4.0, rank=64)
    found = priced(made)[BY_FITTED]
    assert found.used == 1 and found.note.startswith("k = 4") and math.isfinite(found.regret.low)


def test_an_answer_beyond_the_grid_is_priced_at_its_edge():
    found = priced(rows(8.0, noise=1e6) + rows(8.0, noise=1e-6, rank=4))
    assert found[BY_NOISE].worst == pytest.approx(0.01 * 16, abs=1e-6)
    assert found[BY_NOISE].batch == pytest.approx(math.sqrt(128), rel=1e-6)


def test_a_curve_without_an_end_makes_the_steps_a_bound():
    found = priced(rows(128.0) + rows(128.0, rank=4))[SMALLEST]
    assert found.steps.value == pytest.approx(128.0) and found.steps.note.startswith("at least, in 2")


def test_a_readout_prices_each_schedule_and_leaves_recipes_out():
    made = bowls() + rows(1.0, warmup=0.05) + rows(1.0, beta2_batch=16)
    made += rows(1.0, noise=1.0, adapter="foundation", init="there")
    found = read_out(made, [])
    assert set(found.priced) == {"cosine"} and len(found.priced["cosine"][1]) == 4


def test_constants_for_the_package_come_from_rows_with_both_numbers(tmp_path):
    """B_max is an octave above the best batch, and that twice the noise scale."""
    found = read_out(bowls() + bowls(n_train=2_048), [])
    (harmless,) = calibrated.calibrations(found)
    assert harmless.says.startswith("the largest batch whose loss")
    assert harmless.constant == pytest.approx(4.0, rel=0.02) and harmless.share == 1.0
    assert (harmless.configurations, harmless.planned) == (8, None)
    assert harmless.parameters == (254_400, 1_053_824)
    path = calibrated.write(found, tmp_path / "calibration.json")
    assert parsed(path.read_text()) == (harmless,)
    assert calibrated.calibrations(read_out(bowls(), [])) == []  # of four nothing is shipped
