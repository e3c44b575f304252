import math
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gns.advice import advise
from gns.advising.capacity import AdaptedLayer, Capacity, step_cost
from gns.advising.tradeoff import (
    LAWS,
    Price,
    adam_square_root,
    adam_surge,
    examples_ratio,
    extra_cost,
    sgd,
    steps_ratio,
)
from gns.advising.wording import AS_IF
from gns.estimate import Estimate, format_count

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
    assert "about 212 examples, between 160 and 310 (95 % sure)" in text
    assert f"If time and examples matter equally{AS_IF}: a batch of 103 … 483; 256 costs at most 6 %" in text
    assert "up to 8 wastes at most 5 %, up to 32 wastes at most 20 %" in text
    assert "The batch of 16 in use takes 5 % … 10 % more examples" in text
    assert "79 optimizer steps" in text
    assert "(SGD law)" in text and "(Adam square-root law)" in text and "(Adam surge law)" in text
    assert "B_simple is not the critical batch size" in text and "0.05 (autoencoders) to 8 (SVHN)" in text
    assert "not established that the noise scale predicts the best batch size of LoRA" in text


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
    for known in (MEASURED, result, EARLY):
        text = str(advise(known, batch_size=16, dataset_size=20_000, learning_rate=2e-4, throughput={16: 1}))
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


def test_a_value_outside_of_its_interval_is_not_said():
    """tr Σ averages below 0."""
    below = replace(BOUND, status="measured", b_simple=-0.00046, low=0.0, high=0.0022, trace_sigma=-1e-6)
    headline = advise(below, batch_size=16).headline
    assert headline == f"The noise scale is between 0 and 0.0022 ({100 * below.level:g} % sure)."


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


def test_examples_that_come_again_are_warned_about():
    run = replace(MEASURED, steps=(0, 49))  # 50 steps × 16
    assert advise(run, batch_size=16, dataset_size=800).warnings == ()
    (said,) = advise(run, batch_size=16, dataset_size=300).warnings
    assert said.startswith("by the last of these steps 800 examples had been seen, of 300 in the data: what")
    later = replace(run, steps=(100, 149))  # the last third of a run
    assert "2,400 examples had been seen" in advise(later, batch_size=16, dataset_size=300).warnings[0]


def test_partial_coverage_is_warned_about():
    advice = advise(replace(MEASURED, coverage=0.5), batch_size=16)
    assert advice.warnings == ("only 50 % of the trainable numbers are in the sums.",)
    assert advise(replace(MEASURED, coverage=1.0), batch_size=16).warnings == ()


def test_what_was_checked_in_another_metric_is_not_claimed():
    plain, adam = (advise(replace(MEASURED, metric=m), batch_size=16) for m in ("euclidean", "adam"))
    assert str(adam).startswith("The noise scale in Adam's metric is about 212 examples, between 160 and 310")
    assert "Where both were measured" in {section.title for section in plain.sections}
    assert "Where both were measured" not in {section.title for section in adam.sections}
    assert any("this noise scale is in Adam's metric: the ranges take it as if" in w for w in adam.warnings)
    assert "metric" not in str(plain)
    bound = advise(replace(BOUND, metric="other"), batch_size=16)
    assert bound.headline.startswith("The noise scale in the metric 'other' is at least 175 examples")


def test_sections_hold_the_sentences_in_order():
    advice = advise(MEASURED, batch_size=16, dataset_size=20_000, learning_rate=2e-4)
    titles = [section.title for section in advice.sections]
    assert titles == [
        "Batch size", "The batch in use", "Where both were measured", "One epoch", "Learning rate",
    ]  # fmt: skip
    assert advice.sentences == tuple(line for section in advice.sections for line in section.sentences)
    assert str(advice).splitlines()[1 : 1 + len(advice.sentences)] == list(advice.sentences)


@pytest.mark.parametrize(
    ("price", "said", "best"),
    [
        ({}, "If time and examples matter equally", "the noise scale itself"),
        ({"time_price": 1}, "If time and examples matter equally", "the noise scale itself"),
        ({"time_price": 4}, "If time matters 4 × as much as examples", "2 × the noise scale"),
        ({"time_price": 0.25}, "If examples matter 4 × as much as time", "0.5 × the noise scale"),
        ({"step_price": 40}, "If the time of one step is worth 40 examples", "√(40 × the noise scale)"),
    ],
)
def test_the_price_is_named_and_the_range_is_its(price, said, best):
    advice = advise(MEASURED, batch_size=16, **price)
    first = advice.sections[0].sentences
    near = advice.ranges[-1]
    assert first[0].startswith(
        f"{said}{AS_IF}: a batch of {near.low:.0f} … {near.high:.0f}; {near.pick} costs at most"
    )
    assert any(line.endswith(f"At this price the best batch is {best}.") for line in first)
    expected = Price(time=price.get("time_price", 1.0)) if "step_price" not in price else Price(step=40)
    assert near.price == expected
    assert (near.low, near.high) == (expected.near(160, 0.05)[0], expected.near(310, 0.05)[1])
    assert advice.ranges[:2] == advise(MEASURED, batch_size=16).ranges[:2]  # where only examples cost


def test_how_sure_the_range_is():
    sure = advise(MEASURED, batch_size=16).sections[0].sentences[1]
    assert sure == "Sure: 199 … 249 is within 5 % of the least cost wherever in 160 … 310 the noise scale is."
    unsure = advise(replace(MEASURED, low=60), batch_size=16).sections[0].sentences[1]
    assert unsure == "Not sure: in 60 … 310 no batch is within 5 % of the least cost everywhere."


@pytest.mark.parametrize(
    ("estimate", "batch", "said"),
    [
        (MEASURED, 16, "It is below the range above: a larger one would pay"),
        (MEASURED, 220, "It is well within the range above: no need to change it"),
        (MEASURED, 400, "It is within the range above."),
        (MEASURED, 2000, "It is above the range above: a smaller one would pay"),
        (BOUND, 16, "It is below the range above: a larger one would pay"),
        (BOUND, 200, "It is above the lower end of the range above; whether it is too large is not known."),
    ],
)
def test_where_the_batch_in_use_lies(estimate, batch, said):
    line = advise(estimate, batch_size=batch).sections[1].sentences[0]
    assert said in line
    for b_crit in (160, 310) if estimate is MEASURED else (175,):
        # along the trade-off law 1 % fewer steps cost −d ln E / d ln S % more examples
        examples, steps = (
            math.log(f(batch * 1.0001, b_crit) / f(batch, b_crit)) for f in (examples_ratio, steps_ratio)
        )
        assert -examples / steps == pytest.approx(batch / b_crit, rel=1e-3)
        assert f"{format_count(batch / b_crit)} %" in line


def test_learning_rates_come_as_curves_too():
    advice = advise(MEASURED, batch_size=16, learning_rate=1e-4)
    assert [curve.law for curve in advice.rates] == list(LAWS)
    for curve in advice.rates:
        assert curve.batches[0] == advice.table[0].batch_size
        assert curve.batches[-1] == pytest.approx(advice.table[-1].batch_size)
        for row in advice.table:
            at = min(range(len(curve.batches)), key=lambda i: abs(curve.batches[i] - row.batch_size))
            assert (curve.low[at], curve.high[at]) == pytest.approx(row.learning_rates[curve.law], rel=1e-6)
    assert advise(MEASURED, batch_size=16).rates == ()


def test_one_epoch_with_a_loss_to_aim_at():
    advice = advise(MEASURED, batch_size=16, dataset_size=20_000, examples_needed=8000)
    assert advice.plan.largest == pytest.approx((160 * 1.5 + 40, 310 * 1.5 + 40))
    line = next(s for s in advice.sentences if s.startswith("A loss that takes"))
    assert line == (
        "A loss that takes 8,000 examples at batch 16 is reached in one epoch of 20,000 with batches up to "
        "280, perhaps up to 505 (twice the data: 2.6 × that)."
    )
    assert "38 % … 55 % of the data" in str(advice) and "91 % … 95 % of the data" in str(advice)
    assert any(note.startswith("the plan of one epoch assumes: every batch size") for note in advice.caveats)


@pytest.mark.parametrize(
    ("estimate", "needed", "said"),
    [
        (
            MEASURED,
            30_000,
            "is reached in one epoch of 20,000 at no batch: more data, or more than one epoch",
        ),
        (replace(MEASURED, low=2.0), 25_000, "with batches up to 12 at best, and perhaps at none."),
        (MEASURED, 10, "with batches up to all the data at once."),
        (MEASURED, 20_000, "with batches up to 16 (twice the data"),
        (BOUND, 10_000, "with batches up to 207, perhaps far larger ones (twice the data"),
        (BOUND, 30_000, "is reached in one epoch of 20,000 at no batch"),
        (MEASURED, None, "say how many examples that loss takes at batch 16 (`examples_needed`, `--"),
    ],
)
def test_what_one_epoch_affords(estimate, needed, said):
    advice = advise(estimate, batch_size=16, dataset_size=20_000, examples_needed=needed)
    (section,) = (s for s in advice.sections if s.title == "One epoch")
    assert any(said in line for line in section.sentences), section.sentences


def test_a_loss_to_aim_at_gives_goodput_a_time():
    advice = advise(MEASURED, batch_size=16, throughput={16: 100.0, 64: 300.0}, examples_needed=60_000)
    (section,) = (s for s in advice.sections if s.title == "Wall-clock time")
    first, *others = section.sentences
    assert first == "On this machine the soonest in wall-clock time among the batches timed: 64."
    assert others == [
        "The batch of 16 in use takes 136 % … 161 % longer than the soonest to the same loss.",
        "The loss aimed at takes about 3.8 min … 4.2 min of training at batch 64.",
        "64 is the largest batch timed: a larger one may be sooner still.",
        "That is below the range under “Batch size”, which takes every step to last as long as any other. If "
        "what counts is the time on this machine, go by what was timed here.",
    ]
    within = advise(MEASURED, batch_size=16, throughput={16: 10.0, 256: 300.0})
    assert not any("go by what was timed here" in line for line in within.sentences)
    above = advise(MEASURED, batch_size=16, throughput={16: 10.0, 2048: 9000.0})
    assert any(line.startswith("That is above the range under") for line in above.sentences)
    assert advice.goodput[0].seconds == pytest.approx((600, 600))
    assert not any(note.startswith("fewer steps save time") for note in advice.caveats)
    assert any(note.startswith("fewer steps save time") for note in advise(MEASURED, batch_size=16).caveats)


def test_soonest_where_the_ends_disagree():
    advice = advise(BOUND, batch_size=16, throughput={16: 100.0, 64: 300.0, 256: 400.0, 1024: 410.0})
    assert advice.soonest.batch_size == 256
    assert any(line.startswith("256 is at most 35 % later than the soonest") for line in advice.sentences)


def test_capacity_and_cost_are_shown_also_when_it_is_too_early():
    capacity, cost = Capacity(3.6e6, 78_000), step_cost([AdaptedLayer(128, 128, 16)])
    for estimate in (MEASURED, BOUND, EARLY):
        advice = advise(estimate, batch_size=16, capacity=capacity, cost=cost)
        (section,) = (s for s in advice.sections if s.title == "Capacity and cost of LoRA")
        assert "at most 3.6 Mbit" in section.sentences[0] and "156 kbit" in section.sentences[0]
        assert ": 23.1 × too much. LoRA may fall behind full fine-tuning" in section.sentences[0]
        assert "92 % of the multiply-adds" in section.sentences[1]
    room = advise(MEASURED, batch_size=16, capacity=replace(capacity, data_bits=78_000.0))
    assert any("they have room for 2 × as much." in line for line in room.sentences)


def test_what_to_measure_next_is_said_with_numbers():
    section = advise(BOUND, batch_size=16).sections[-1]
    assert section.title == "To know more"
    gain = math.sqrt(50 * 16 / 15)  # √(n²/2) pairs at one point against √(K·b(b − 1)/2) within steps
    said = f"as many as here (800) show noise scales up to about {format_count(gain * 300)}"
    assert said in section.sentences[1] and f"{format_count(gain)} × as large" in section.sentences[1]
    assert all(s.title != "To know more" for s in advise(MEASURED, batch_size=16).sections)


def test_an_interval_too_wide_for_a_sure_range_says_how_much_more():
    wide = replace(MEASURED, low=60)
    section = advise(wide, batch_size=16).sections[-1]
    assert (section.title, section.sentences) == (
        "To know more",
        (f"To name a range that is sure, measure on. {wide.outlook()}",),
    )
    assert "more examples for ±20 %" in wide.outlook()
    tiny = replace(MEASURED, low=0.01, high=0.5)
    assert all(s.title != "To know more" for s in advise(tiny, batch_size=16).sections)  # batch 1, surely


def test_a_probes_bound_asks_for_more_examples_not_for_a_probe():
    probed = replace(BOUND, view="all pairs of examples at one parameter point")
    (line,) = advise(probed, batch_size=16).sections[-1].sentences
    assert line.startswith("To know more, give the probe more examples") and "gns probe" not in line


def test_warnings_of_the_estimate_are_passed_on():
    advice = advise(replace(MEASURED, warnings=("heavy tails", "another.")), batch_size=16)
    assert advice.estimate_warnings == ("heavy tails", "another.") and advice.warnings == ()
    assert "Warning: heavy tails\nWarning: another.\n" in str(advice)


@given(
    st.floats(1, 1e5), st.floats(1, 30), st.floats(0.01, 100), st.integers(1, 12), st.sampled_from([2, 8, 64])
)
def test_counting_in_packs_of_examples_changes_no_choice(low, wide, p, power, factor):
    one = advise(replace(MEASURED, low=low, high=low * wide), batch_size=2**power, time_price=p)
    packs = replace(MEASURED, low=low * factor, high=low * wide * factor)
    many = advise(packs, batch_size=2**power * factor, time_price=p)
    a, b = one.ranges[-1], many.ranges[-1]
    assert (b.low, b.high) == pytest.approx((a.low * factor, a.high * factor))
    if a.pick is not None and a.pick > 1:
        assert b.pick_extra_cost == pytest.approx(a.pick_extra_cost, rel=1e-6, abs=1e-12)


BAD = [
    ({"batch_size": 0}, "batch_size is 0; a whole number, 1 or more, is needed"),
    ({"batch_size": 1.5}, "batch_size is 1.5"),
    ({"batch_size": True}, "batch_size is True"),
    ({"batch_size": "16"}, "batch_size is '16'"),
    ({"dataset_size": -1}, "dataset_size is -1"),
    ({"dataset_size": 8}, "batch_size is 16.*dataset_size of 8"),
    ({"learning_rate": 0.0}, "learning_rate is 0.0; a finite number > 0 is needed"),
    ({"learning_rate": math.nan}, "learning_rate is nan"),
    ({"time_price": 0}, "time_price is 0; a finite number > 0 is needed"),
    ({"step_price": math.nan}, "step_price is nan; a finite number > 0 is needed"),
    ({"time_price": 1, "step_price": 1}, "time_price is 1 and step_price is 1; exactly one of the two is"),
    ({"examples_needed": 0}, "examples_needed is 0; a finite number > 0 is needed"),
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


def said_of(low, high, **given):
    return advise(replace(MEASURED, b_simple=math.sqrt(low * high), low=low, high=high), **given).sentences


def test_a_band_whose_ends_read_alike_is_one_number():
    (line,) = (s for s in said_of(50, 50.2, batch_size=8) if s.startswith("The batch of 8"))
    assert line.startswith("The batch of 8 in use takes 16 % more examples than the fewest, 7.2 … 7.3 ×")
    (line,) = (s for s in said_of(500, 500.2, batch_size=8) if s.startswith("The batch of 8"))
    assert "2 % more examples than the fewest, 63.5 × the fewest steps" in line


def test_a_learning_rate_has_no_more_digits_than_matter():
    lines = said_of(50, 60, batch_size=8, learning_rate=0.000192686)
    assert any(s.startswith("Learning rate 0.000193 at batch 8 becomes") for s in lines)


def test_a_range_beyond_the_data_promises_no_batch_larger_than_they_are():
    lines = said_of(1000, 2000, batch_size=8, dataset_size=50)
    assert lines[0] == (
        f"If time and examples matter equally{AS_IF}: a batch of 642 … 3,120. That is more than the 50 "
        "examples of the data: no batch of them is too large at this price."
    )
    assert not any(s.startswith(("Sure", "Not sure")) for s in lines)
    assert "If only examples matter, not time: a small batch; up to 50 wastes at most 5 %." in lines
    lines = said_of(1000, 2000, batch_size=8, dataset_size=1400)
    assert "a batch of 642 … 3,120 (no more than the 1,400 examples of the data); 1024 costs" in lines[0]
    assert lines[1].startswith("Sure: 1,280 … 1,400 is within 5 %")
    assert lines[3].endswith("up to 50 wastes at most 5 %, up to 200 wastes at most 20 %.")
    bound = advise(BOUND, batch_size=16, dataset_size=100, learning_rate=1e-3).sentences
    assert "That is more than the 100 examples of the data" in bound[0]
    assert any(
        s.startswith("One epoch of 100 examples at batch 100 is 1 optimizer step of 100 %.") for s in bound
    )
    assert any("becomes at batch 100:" in s for s in bound)


def test_nothing_is_said_of_a_batch_below_one():
    for low, high in ((0.3, 0.5), (0.5, 0.8)):
        lines = said_of(low, high, batch_size=1)
        assert lines[0] == f"If time and examples matter equally{AS_IF}: batch 1, the smallest there is."
        assert not any(s.startswith(("Sure", "Not sure", "Why", "To name")) for s in lines)
        assert any("It is the smallest there is: no need to change it." in s for s in lines)
        warned = advise(replace(MEASURED, low=low, high=high), batch_size=1).warnings
        assert not any("smaller batch" in w for w in warned)


def test_a_batch_within_the_range_as_it_is_written_is_within_it():
    lines = said_of(51.5, 92.6, batch_size=33)  # the range begins at 33.04
    assert "a batch of 33 … 144" in lines[0] and any("It is within the range above." in s for s in lines)
    assert any("It is below the range above" in s for s in said_of(51.5, 92.6, batch_size=32))


def test_without_a_lower_end_no_batch_is_put_forward():
    odd = replace(MEASURED, b_simple=math.nan, low=0.0, high=50.0)
    lines = advise(odd, batch_size=16, dataset_size=1000, learning_rate=1e-3).sentences
    assert any(s.startswith("One epoch of 1,000 examples at batch 16 is 63 optimizer steps") for s in lines)
    assert not any("at batch 1 " in s or "becomes" in s or "∞" in s for s in lines)
    assert any("takes at least 32 % more examples than the fewest" in s for s in lines)


@pytest.mark.parametrize(("price", "best"), [({}, 175), ({"time_price": 4}, 350), ({"step_price": 10}, 42)])
def test_a_lower_bound_is_carried_over_at_the_price_that_is_stated(price, best):
    lines = advise(BOUND, batch_size=16, learning_rate=1e-3, **price).sentences
    assert any(f"becomes at batch {best}:" in s for s in lines)


def test_laws_that_agree_at_one_batch_alone_name_one():
    (warning,) = advise(replace(MEASURED, low=0.0, high=50.0), batch_size=16, learning_rate=1e-3).warnings
    assert "outside batch 16 (up to" in warning
