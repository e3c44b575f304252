"""The noise scale of a cell: at the curve's own learning rate, and nothing made of nothing."""

import math

from experiments.analysis.cells import cells
from experiments.analysis.noise import measured
from tests.experiments.analysis.synthetic import rows

RATES = [1e-3, 1e-2]


def read(found, b_simple, status="measured", low=5.0, high=20.0):
    reading = {"b_simple": b_simple, "low": low, "high": high, "status": status}
    found["gns"] = {"metric": "euclidean", "progress_weighted": {"joint": reading}}
    return found


def runs(**changed):
    return rows(batches=[4], rates=RATES, seeds=2, shift=0.0, **changed)


def test_the_rate_is_the_one_that_is_best_over_all_seeds():
    made = runs(rate_of=lambda batch: 1e-2)  # 1e-2 is the better rate, but for a seed that diverged there
    for row in made:
        read(row, 500.0 if row["config"]["lr"] == 1e-2 else 10.0)
    assert math.isclose(measured(cells(made)[0]).value, 500.0)
    lost = next(row for row in made if row["config"]["lr"] == 1e-2)
    lost |= {"status": "diverged", "test_loss": None, "validation": [{"loss": None}]}
    assert math.isclose(measured(cells(made)[0]).value, 10.0)


def test_too_few_steps_are_no_reading():
    assert measured(cells([read(row, None, "collecting", None, None) for row in runs()])[0]) is None


def test_a_run_without_a_value_leaves_none_and_is_not_clamped():
    for value in (None, -3.0):
        made = [read(row, 10.0 if row["config"]["seed"] else value, low=0.0, high=None) for row in runs()]
        found = measured(cells(made)[0])
        assert math.isnan(found.value) and found.low == 0.0 and found.high == math.inf
