"""What the records of a run tell the advice."""

import pytest

from gns.advising.capacity import StepCost
from gns.advising.recorded import inputs
from gns.coverage import Coverage
from gns.sums import StepSums
from tests.gns.commands.running import of

ALONE = StepSums(step=99, n_examples=1, mean_sq_norm=1.0, sq_norm_of_mean=1.0, learning_rate=5e-3)


def test_without_a_step_nothing_is_known():
    assert set(inputs([], {}).values()) == {None}


def test_the_steps_tell_batch_and_highest_learning_rate():
    told = inputs([*of(100), ALONE], {})
    assert (told["batch_size"], told["learning_rate"]) == (16, 5e-3)
    told = inputs(of(100), {"learning_rate": 0.5}, 8)
    assert (told["batch_size"], told["learning_rate"]) == (8, 0.5)


@pytest.mark.parametrize(
    ("size", "known"), [(16, 16), (2000, 2000), (15, None), ("many", None), (None, None)]
)
def test_data_of_less_than_a_batch_are_no_data(size, known):
    assert inputs(of(100), {"dataset_size": size})["dataset_size"] == known


def test_adapters_are_counted_by_the_settings_else_by_the_coverage():
    settings = {"first_epoch_loss": 2.0, "loss_tokens": 1000, "adapted_layers": [[8, 8, 2, 3]]}
    assert inputs(of(100), settings)["capacity"] is None
    coverage = Coverage({"a": 70}, {"b": 30}, {"b": "no rule"})
    told = inputs(of(100), settings, coverage=coverage)
    assert told["capacity"].parameters == 100 and told["cost"] == StepCost(3 * 224, 3 * 192)
    settings["trainable_parameters"] = 7
    assert inputs(of(100), settings, coverage=coverage)["capacity"].parameters == 7
