import math
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from gns.advice import advise
from gns.estimate import Estimate
from gns.tradeoff import LAWS, adam_square_root, adam_surge, examples_ratio, extra_cost, sgd, steps_ratio

MEASURED = Estimate(212, 160, 310, 0.95, "measured", 1.0, 0.005, 900, 50, 800)
BOUND = Estimate(math.nan, 175, math.inf, 0.95, "lower bound", 1.0, -0.001, 300, 50, 800)
NONE = replace(BOUND, status="not detectable", low=300.0)
EARLY = replace(MEASURED, status="collecting", n_steps=7)


@pytest.mark.parametrize("batch", [1, 16, 212, 5000])
@pytest.mark.parametrize("b_crit", [0.05, 3.0, 212.0])
def test_trade_off_law(batch, b_crit):
    assert (steps_ratio(batch, b_crit) - 1) * (examples_ratio(batch, b_crit) - 1) == pytest.approx(1)
    assert steps_ratio(b_crit, b_crit) == examples_ratio(b_crit, b_crit) == 2


def test_near_range_is_where_the_cost_is_within_five_percent():
    exact = replace(MEASURED, low=100.0, high=100.0, b_simple=100.0)
    near = advise(exact, batch_size=16).ranges[-1]
    assert extra_cost(near.low, 100) == pytest.approx(0.05)
    assert extra_cost(near.high, 100) == pytest.approx(0.05)
    assert extra_cost(100, 100) == 0
    assert near.high / near.low == pytest.approx(2.43, abs=0.01)  # at least 2.4 × wide, as the facts say
    assert near.sure == (near.low, near.high)


def test_ranges_are_bands_over_the_interval():
    five, twenty, near = advise(MEASURED, batch_size=16).ranges
    assert (five.priced, five.waste, five.high, five.sure) == ("examples", 0.05, 0.05 * 310, (0, 0.05 * 160))
    assert (twenty.waste, twenty.high, twenty.sure) == (0.2, 62, (0, 32))
    assert near.priced == "time and examples"
    assert near.low == pytest.approx(0.6417 * 160, rel=1e-3)
    assert near.high == pytest.approx(1.5583 * 310, rel=1e-3)
    assert near.sure == pytest.approx((0.6417 * 310, 1.5583 * 160), rel=1e-3)
    assert advise(replace(MEASURED, low=60), batch_size=16).ranges[-1].sure is None


def test_pick_is_a_power_of_two_and_its_price_holds_over_the_whole_interval():
    near = advise(MEASURED, batch_size=16).ranges[-1]
    assert near.pick == 256
    worst = max(extra_cost(256, b) for b in np.linspace(160, 310, 200))
    assert near.pick_extra_cost == pytest.approx(worst)
    assert advise(MEASURED, batch_size=16, dataset_size=200).ranges[-1].pick == 128


def test_the_point_alone_moves_nothing():
    assert (
        advise(replace(MEASURED, b_simple=170.0), batch_size=16).ranges
        == advise(MEASURED, batch_size=16).ranges
    )
    assert (
        advise(replace(MEASURED, b_simple=170.0), batch_size=16).table
        == advise(MEASURED, batch_size=16).table
    )


def test_table_stands_at_powers_of_two_with_bands():
    table = advise(MEASURED, batch_size=16).table
    batches = [row.batch_size for row in table]
    assert batches == [2**i for i in range(1, 13)]  # 2 … 4096
    row = table[batches.index(32)]
    assert row.examples == pytest.approx((1 + 32 / 310, 1 + 32 / 160))
    assert row.steps == pytest.approx((1 + 160 / 32, 1 + 310 / 32))


def test_huge_bound_keeps_the_table_short():
    table = advise(replace(BOUND, low=1e12), batch_size=8).table
    assert len(table) <= 24 and table[0].batch_size == 1


def test_dataset_size_gives_steps_per_epoch_and_bounds_the_table():
    table = advise(MEASURED, batch_size=16, dataset_size=1000).table
    assert table[-1].batch_size == 512
    row = next(r for r in table if r.batch_size == 64)
    assert (row.steps_per_epoch, row.share_of_data) == (16, 0.064)


@pytest.mark.parametrize("name", LAWS)
def test_laws_keep_the_reference_and_the_small_batch_limit(name):
    law = LAWS[name]
    assert law(16, 16, 212) == pytest.approx(1)
    power = 1 if name == "SGD law" else 0.5
    assert law(64, 16, math.inf) == pytest.approx(4**power)
    assert law(64, 16, 1e12) == pytest.approx(4**power)


def test_laws_against_their_formulas():
    def eps_sgd(b: float) -> float:
        return 1 / (1 + 212 / b)

    def eps_surge(b: float) -> float:
        return 2 / (math.sqrt(212 / b) + math.sqrt(b / 212))

    for batch in (1, 16, 64, 212, 4096):
        assert sgd(batch, 16, 212) == pytest.approx(eps_sgd(batch) / eps_sgd(16))
        assert adam_surge(batch, 16, 212) == pytest.approx(eps_surge(batch) / eps_surge(16))
        assert adam_square_root(batch, 16, 212) == pytest.approx(math.sqrt(batch / 16))


def test_learning_rates_are_bands_and_their_disagreement_is_warned_about():
    advice = advise(MEASURED, batch_size=16, learning_rate=1e-4)
    row = next(r for r in advice.table if r.batch_size == 1024)
    assert set(row.learning_rates) == {"SGD law", "Adam square-root law", "Adam surge law"}
    expected = sorted(1e-4 * sgd(1024, 16, b) for b in (160, 310))
    assert row.learning_rates["SGD law"] == pytest.approx(tuple(expected))
    warning = next(w for w in advice.warnings if "learning-rate laws disagree" in w)
    assert "outside batch 8 … 32" in warning
    for batch, over in ((4, True), (8, False), (32, False), (64, True)):
        ratios = [[law(batch, 16, b) for law in LAWS.values()] for b in (160, 310)]
        assert (max(max(r) / min(r) for r in ratios) > 1.5) is over
    assert not any("laws disagree" in w for w in advise(MEASURED, batch_size=16).warnings)


def test_goodput_is_throughput_times_pollux_efficiency():
    speeds = {16: 100.0, 64: 300.0, 256: 400.0, 1024: 410.0}
    advice = advise(MEASURED, batch_size=16, throughput=speeds)
    for g in advice.goodput:
        low, high = (speeds[g.batch_size] * (b + 16) / (b + g.batch_size) for b in (160, 310))
        assert g.useful == pytest.approx((low, high))
    assert advice.goodput[0].useful == (100, 100)  # the batch in use is its own measure
    assert advice.best_goodput == (64, 64)
    assert "soonest in wall-clock time among the batches timed: 64." in str(advice)
    assert advise(BOUND, batch_size=16, throughput=speeds).best_goodput == (64, 1024)


def test_measured_advice_reads_well():
    text = str(advise(MEASURED, batch_size=16, dataset_size=20_000, learning_rate=2e-4))
    assert "about 212 examples, between 160 … 310 (95 % sure)" in text
    assert "If time and examples matter equally: a batch of 103 … 483; 256 costs at most 6 % more" in text
    assert "up to 8 wastes at most 5 %, up to 32 wastes at most 20 %" in text
    assert "The batch of 16 in use takes 5 % … 10 % more examples" in text
    assert "79 optimizer steps" in text
    assert "(SGD law)" in text and "(Adam square-root law)" in text and "(Adam surge law)" in text
    assert "B_simple is not the critical batch size" in text and "0.05 (autoencoders) to 8 (SVHN)" in text
    assert "no published evidence ties the best batch size of LoRA" in text


def test_the_learning_rate_says_what_its_range_leaves_out():
    advice = advise(MEASURED, batch_size=16, learning_rate=2e-4)
    line = next(s for s in advice.sentences if s.startswith("Learning rate"))
    assert "B_simple stands in for the noise scales of the laws" in line and "surge law" in line
    assert "ranges show only how sure B_simple is" in line
    ratios = [[law(256, 16, b) for law in LAWS.values()] for b in (160, 310)]
    worst = max(max(r) / min(r) for r in ratios)
    assert f"the laws differ from each other by up to {worst:.2g}×" in line


@pytest.mark.parametrize("result", [BOUND, NONE])
def test_plain_english(result):
    for given in (MEASURED, result, EARLY):
        text = str(advise(given, batch_size=16, dataset_size=20_000, learning_rate=2e-4, throughput={16: 1}))
        for hard in ("dearer", "from infinity", "alike", "mostly noise"):
            assert hard not in text


@pytest.mark.parametrize("result", [BOUND, NONE])
def test_lower_bound_says_at_least_and_how_to_know_more(result):
    advice = advise(result, batch_size=16, learning_rate=1e-4)
    near = advice.ranges[-1]
    assert (near.high, near.pick, near.sure) == (math.inf, None, None)
    text = str(advice)
    assert f"at least {result.low:.0f} examples" in text
    assert "a batch of at least" in text and "where it stops paying is not known" in text
    assert "measure with a larger batch or more steps" in text and "now 300 examples" in text
    assert "∞" not in text and "inf" not in text and "nan" not in text
    assert advice.table[0].steps[1] == math.inf


def test_collecting_gives_no_range():
    advice = advise(EARLY, batch_size=16, learning_rate=1e-4, throughput={16: 1.0})
    assert (advice.table, advice.ranges, advice.goodput) == ((), (), ())
    assert "7 usable step(s) so far, 20 are needed" in str(advice)
    assert "unequal size" in str(advise(replace(EARLY, n_steps=40), batch_size=16))


def test_whole_line_gives_no_range():
    advice = advise(replace(BOUND, low=0.0), batch_size=16)
    assert advice.ranges == () and "say nothing about the noise scale" in advice.headline


@pytest.mark.parametrize("low,high", [(0.0, 0.0), (0.03, 0.08), (0.0, 9.0)])
def test_tiny_noise_scales_do_not_break_the_text(low, high):
    advice = advise(
        replace(MEASURED, b_simple=high / 2, low=low, high=high), batch_size=16, learning_rate=1e-4
    )
    assert all(row.batch_size >= 1 for row in advice.table)
    assert (advice.ranges[-1].pick is None) is (low == 0 or high < 1)
    assert "batch 1" in str(advice) and "nan" not in str(advice)
    assert any("above the whole interval" in w for w in advice.warnings)


def test_partial_coverage_is_warned_about():
    advice = advise(replace(MEASURED, coverage=0.5), batch_size=16)
    assert advice.warnings == ("only 50 % of the trainable numbers are in the sums.",)
    assert advise(replace(MEASURED, coverage=1.0), batch_size=16).warnings == ()


BAD = [
    ({"batch_size": 0}, "batch_size is 0; a whole number, 1 or more, is needed"),
    ({"batch_size": 1.5}, "batch_size is 1.5"),
    ({"batch_size": True}, "batch_size is True"),
    ({"batch_size": "16"}, "batch_size is '16'"),
    ({"dataset_size": -1}, "dataset_size is -1"),
    ({"dataset_size": 8}, "batch_size is 16.*dataset_size of 8"),
    ({"learning_rate": 0.0}, "learning_rate is 0.0; a finite number > 0 is needed"),
    ({"learning_rate": math.nan}, "learning_rate is nan"),
    ({"throughput": {}}, "throughput is empty"),
    ({"throughput": {0: 3.0}}, "a batch size in throughput is 0"),
    ({"throughput": {16: math.inf}}, "throughput at batch 16 is inf"),
]


@pytest.mark.parametrize("given,message", BAD)
def test_bad_arguments_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        advise(MEASURED, **{"batch_size": 16, **given})


def test_estimate_is_needed_and_numpy_numbers_are_welcome():
    with pytest.raises(TypeError, match="estimate is a float; an Estimate is needed"):
        advise(212.0, batch_size=16)  # type: ignore[arg-type]
    assert advise(MEASURED, batch_size=np.int64(16)).table == advise(MEASURED, batch_size=16).table


def test_advice_is_frozen():
    with pytest.raises(FrozenInstanceError):
        advise(MEASURED, batch_size=16).batch_size = 3  # type: ignore[misc]
