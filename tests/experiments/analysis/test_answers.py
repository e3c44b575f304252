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
        row["accuracy"] = n / items if answered else None
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
    assert np.std(one.draws) == pytest.approx(math.sqrt(0.2 * 0.8 / ITEMS), rel=0.1)
    assert one.low < 0.2 < one.high


def test_the_rate_is_chosen_by_loss_not_by_answers():
    """Every other rate answers all: none of them is looked at."""
    assert answers_lost([swept(lambda batch: 0.5)], [1]).value == 0.0


def test_configurations_are_averaged_and_drawn_and_those_without_answers_left_out():
    flat, steep, silent = swept(lambda b: 0.5), swept(falling), swept(falling, answered=False)
    found = answers_lost([flat, steep, silent], [32, 32, 32])
    assert found.value == pytest.approx(0.1)
    assert found.low == 0.0 and found.high > 0.2  # both draws of the one without a loss
    assert math.isnan(answers_lost([silent], [8]).value)


def test_all_configurations_answer_the_same_items():
    """Ten alike are no surer of the items than one."""
    widths = [np.std(answers_lost([swept(falling)] * k, [32] * k).draws) for k in (1, 10)]
    assert widths[1] == pytest.approx(widths[0], rel=0.1)


def test_a_seed_without_answers_leaves_the_configuration_out():
    found = swept(falling)
    for row in found.cell.rows:
        if row["config"]["seed"] == 1 and row["config"]["batch_size"] == 64:
            row["items_right"] = None
    assert math.isnan(answers_lost([found], [8]).value)
