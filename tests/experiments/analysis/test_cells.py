"""Rows become arrays: nothing is mixed, lost or invented."""

import math

import numpy as np

from experiments.analysis.cells import by_data, cells, independent, varied
from tests.experiments.analysis.synthetic import rows


def test_cells_differ_in_what_is_no_axis_and_no_seed():
    made = rows(seeds=2, rank=8) + rows(seeds=2, rank=16, dials={"noise": 0.2}) + rows(seeds=2, rank=16)
    found = cells(made)
    assert [(c.fields["rank"], c.fields.get("dials.noise")) for c in found] == [
        (8, None),
        (16, 0.2),
        (16, None),
    ]
    assert varied(found) == ["rank", "dials.noise"]
    assert found[0].validation.shape == (8, 9, 2)


def test_seeds_that_share_data_are_one_draw_among_others_and_seeds_where_there_are_no_others():
    made = rows(seeds=4)
    (shared,) = cells(made)
    assert by_data(shared) is shared and independent(shared) == [[0], [1], [2], [3]]
    (full,) = cells(rows(seeds=2, adapter="full"))  # nothing of it is drawn: one run, made twice
    assert independent(full) == [[0, 1]] and by_data(full).validation.shape == (8, 9, 1)
    for adapter in ("foundation", "pissa", "milora"):
        (same,) = cells(rows(seeds=2, adapter=adapter))
        assert independent(same) == [[0, 1]]
    (dropped,) = cells(rows(seeds=2, adapter="full", dropout=0.1))
    assert independent(dropped) == [[0], [1]]
    for row in made:
        row["config"]["data_seed"] = {1: 0}.get(row["config"]["seed"], row["config"]["seed"])
    (cell,) = cells([r for r in made if (r["config"]["seed"], r["config"]["batch_size"]) != (1, 8)])
    found = by_data(cell)
    assert independent(cell) == [[0, 1], [2], [3]]
    assert found.seeds == ((0, 0), (2, 2), (3, 3)) and found.validation.shape == (8, 9, 3)
    inside = [j for j, batch in enumerate(cell.batches) if batch != 8]
    np.testing.assert_allclose(found.test[inside, :, 0], shared.test[inside, :, :2].mean(axis=-1))
    np.testing.assert_array_equal(found.test[..., 1:], shared.test[..., 2:])
    assert np.isnan(found.validation[cell.batches.index(8), :, 0]).all()  # one of the two is missing


def test_each_run_is_at_its_place_in_whatever_order_rows_come():
    made = rows(sigma=0.1)
    (found,) = cells(reversed(made))
    for row in made:
        config = row["config"]
        at = found.batches.index(config["batch_size"]), found.rates.index(config["lr"]), config["seed"]
        assert (found.validation[at], found.test[at]) == (row["validation"][-1]["loss"], row["test_loss"])


def test_diverged_runs_are_censored_and_failed_ones_are_no_results():
    made = rows(seeds=2, diverges=3e-3)
    made[0] = made[0] | {"status": "failed", "error": "no memory", "validation": None, "test_loss": None}
    (found,) = cells(made)
    assert math.isnan(found.validation[0, 0, 0]) and np.isinf(found.validation[:, -1]).all()
    assert list(found.tried(0)) == list(range(1, 9)) and list(found.tried(1)) == list(range(9))


def test_how_often_a_run_is_evaluated_tells_cells_apart_only_where_it_can_end_a_run():
    to_target = {"protocol": "target", "target_loss": 0.5}
    assert len(cells(rows(evals=4, **to_target) + rows(evals=64, **to_target))) == 2
    assert varied(cells(rows(evals=4, **to_target) + rows(evals=64, **to_target))) == ["evals"]
    assert len(cells(rows(evals=4, protocol="epochs") + rows(evals=64, protocol="epochs"))) == 1


def test_a_row_without_answers_does_not_hide_those_of_another():
    answered = [r | {"accuracy": 0.5, "items_right": [0, 1]} for r in rows(generate=2)]
    for made in (answered + rows(generate=0), rows(generate=0) + answered):
        (found,) = cells(made)
        assert (found.right == [[0], [1]]).all() and found.right.shape[2] == 2


def test_answers_are_kept_by_item_and_those_of_the_fuller_row():
    made = [row | {"items_right": [1, 0, 1], "accuracy": 2 / 3} for row in rows(seeds=2)]
    fewer = [row | {"items_right": [0], "accuracy": 0.0} for row in made[:1]]
    (cell,) = cells(made + fewer)
    assert cell.right.shape == (*cell.test.shape[:2], 3, 2)
    assert (cell.right[:, :, :, 0] == [1, 0, 1]).all()
    (silent,) = cells(rows(seeds=2))
    assert silent.right.shape[2] == 0
    for row in made:
        row["items_right"] = row["items_right"][: 3 - 2 * (row["config"]["seed"] == 1)]
    (uneven,) = cells(made)
    assert np.isnan(uneven.right[..., 1:, 1]).all() and not np.isnan(uneven.right[..., 0]).any()
