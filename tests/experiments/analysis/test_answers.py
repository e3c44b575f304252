"""Right answers given away: paired item by item, at the rates that were chosen without them."""

import math

import numpy as np
import pytest

from experiments.analysis.answers import answers_lost
from experiments.analysis.cells import cells
from experiments.analysis.curves import curve
from tests.experiments.analysis import synthetic

ITEMS = 40


def swept(share_of, seeds=2, answered=True, items=ITEMS, **more):
    """A bowl about batch 8 at rate 1e-3, whose runs there get so many items right, the first ones."""
    made = synthetic.rows(best=8.0, seeds=seeds, **more)
    for row in made:
        config = row["config"]
        n = round(items * share_of(config["batch_size"])) if config["lr"] == pytest.approx(1e-3) else items
        row["items_right"] = [int(i < n) for i in range(items)] if answered else None
    (cell,) = cells(made)
    return curve(cell, draws=20)


def falling(batch):
    return 0.8 - 0.1 * abs(math.log2(batch / 8))


def test_what_a_choice_costs_is_paired_and_read_between_batches_and_at_the_edges():
    found = swept(falling)
    for batch, lost in ((8, 0.0), (4, 0.1), (32, 0.2), (8 * 2**0.5, 0.05), (0, 0.3), (math.inf, 0.4)):
        assert answers_lost([found], [batch]).value == pytest.approx(lost, abs=1e-9)
    one = answers_lost([found], [32])
    # 8 of 40 items are lost, all others are the same in both: binomial, not the difference of two shares
    half = 2.0227 * math.sqrt(0.2 * 0.8 / (ITEMS - 1))
    assert (one.low, one.high) == pytest.approx((0.2 - half, 0.2 + half), abs=1e-4)


def test_the_rate_is_chosen_by_loss_not_by_answers():
    """Every other rate answers all, but for batch 1, where it answers none."""
    found = swept(falling)
    for row in found.cell.rows:
        if row["config"]["batch_size"] == 1 and row["config"]["lr"] != pytest.approx(1e-3):
            row["items_right"] = [0] * ITEMS
    (cell,) = cells(found.cell.rows)
    again = curve(cell, draws=20)
    assert answers_lost([again], [1]).value == pytest.approx(0.3)
    assert answers_lost([again], [64]).value == pytest.approx(0.3)


def test_configurations_are_averaged_and_those_without_answers_left_out_and_counted():
    flat, steep, silent = swept(lambda b: 0.5), swept(falling), swept(falling, answered=False)
    found = answers_lost([flat, steep, silent], [32, 32, 32])
    assert found.value == pytest.approx(0.1) and found.note == "2 of 3 configurations"
    assert found.low < 0 < 0.2 < found.high  # two configurations that differ say little of a third
    nothing = answers_lost([silent], [8])
    assert math.isnan(nothing.value) and nothing.note == ""


def test_a_configuration_with_fewer_items_counts_as_one_more():
    few, many = swept(falling, items=10), swept(falling)
    assert answers_lost([few, many], [32, 64]).value == pytest.approx((0.2 + 0.3) / 2)


def made_of(losses):
    """A curve for each row of losses [K, items]: right at the best batch, lost at 64 where it says 1."""
    found = []
    for row in losses:
        rows = synthetic.rows(best=8.0, seeds=1)
        for each in rows:
            lost = row if each["config"]["batch_size"] == 64 else 0 * row
            each["items_right"] = list(0.5 - lost)
        (cell,) = cells(rows)
        found.append(curve(cell, draws=2))
    return found


@pytest.mark.parametrize(
    ("own", "item", "rest"), [(0.2, 0.0, 0.5), (0.0, 0.3, 0.3), (0.1, 0.2, 0.5), (0.0, 0.0, 0.5)]
)
def test_intervals_cover_with_configurations_and_items_as_random_effects(own, item, rest):
    random, hits, widths, k, n = np.random.default_rng(0), 0, [], 8, 30
    truth = math.sqrt(own**2 / k + item**2 / n + rest**2 / (k * n))
    for _ in range(60):
        x = own * random.standard_normal((k, 1)) + item * random.standard_normal((1, n))
        found = answers_lost(made_of(x + rest * random.standard_normal((k, n))), [64] * k)
        hits += found.low <= 0 <= found.high
        widths.append((found.high - found.low) / (2 * 1.96 * truth))
    assert hits >= 51  # fewer has a probability below 0.001 at 95 %
    assert 0.9 < np.mean(widths) < 1.4  # Student's at 7 degrees of freedom: 1.21


def test_all_configurations_answer_the_same_items():
    """Ten alike are no surer of the items than one."""
    one, ten = (answers_lost([swept(falling)] * k, [32] * k) for k in (1, 10))
    assert ten.high - ten.low == pytest.approx(one.high - one.low, rel=0.05)


def test_seeds_that_share_their_data_count_as_one_draw_and_all_of_them_count():
    """Two on one data set, the second all wrong at batch 64, and one on another."""
    made = list(swept(falling, seeds=3).cell.rows)
    for row in made:
        row["config"]["data_seed"] = row["config"]["seed"] // 2
        if row["config"]["batch_size"] == 64 and row["config"]["seed"] == 1:
            row["items_right"] = [0] * ITEMS
    (cell,) = cells(made)
    lost = answers_lost([curve(cell, draws=20)], [64])
    assert lost.value == pytest.approx((0.3 + 0.8 + 2 * 0.3) / 4)


def test_a_batch_at_which_a_seed_has_no_answers_is_not_priced():
    found = swept(falling)
    for row in found.cell.rows:
        if row["config"]["seed"] == 1 and row["config"]["batch_size"] == 64:
            row["items_right"] = None
    (cell,) = cells(found.cell.rows)
    assert math.isnan(answers_lost([curve(cell, draws=20)], [64]).value)
    assert answers_lost([curve(cell, draws=20)], [32]).value == pytest.approx(0.2)


def test_a_choice_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="a number for each configuration"):
        answers_lost([swept(falling)], [math.nan])
