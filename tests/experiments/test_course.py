"""When a run is over, what has diverged, and where a target was reached."""

import dataclasses
import json
import math

import pytest

from experiments.configs import RunConfig
from experiments.course import Course, Evaluation, crossing

STEPS = RunConfig("b", "t", n_train=80, batch_size=8, protocol="steps", steps=10, evals=5)
TARGET = dataclasses.replace(STEPS, protocol="target", steps=None, target_loss=2.0)


def _played(config, losses, validation):
    """Play a run as an engine does; give its course."""
    course, validation = Course(config), iter(validation)
    course.evaluated(next(validation))
    for loss in losses:
        if course.over:
            break
        course.stepped(loss, 8, 40)
        if course.due:
            course.evaluated(next(validation))
    return course


def test_a_run_is_over_after_its_steps_and_evaluates_evenly():
    course = _played(STEPS, [1.0] * 99, [4, 3, 3, 3, 3, 3])
    row = course.row()
    assert (row["status"], row["steps_done"], row["examples_seen"], row["tokens_seen"]) == (
        "done",
        10,
        80,
        400,
    )
    assert [e["step"] for e in row["validation"]] == [0, 2, 4, 6, 8, 10]
    assert [e["examples"] for e in row["validation"]] == [0, 16, 32, 48, 64, 80]
    assert row["target_step"] is row["target_examples"] is None
    assert json.loads(json.dumps(row, allow_nan=False)) == row


@pytest.mark.parametrize(
    "losses, validation, steps, evaluations",
    [
        ([1, 1, math.nan, 1], [4, 3, 3], 3, 2),  # a step's loss
        ([1, math.inf, 1], [4, 3], 2, 1),  # also where an evaluation would be due
        ([1] * 9, [4, 3, 12.1, 3], 4, 3),  # an evaluation above three times the first
        ([1] * 9, [4, math.nan, 3], 2, 2),
        ([1] * 9, [math.nan], 0, 1),  # the base itself
    ],
)
def test_a_diverged_run_is_over_and_keeps_what_was_known(losses, validation, steps, evaluations):
    row = _played(STEPS, losses, validation).row()
    assert (row["status"], row["steps_done"]) == ("diverged", steps)
    assert len(row["validation"]) == evaluations


def test_three_times_the_first_loss_itself_is_no_divergence():
    assert _played(STEPS, [1] * 10, [4, 12, 12, 12, 12, 12]).row()["status"] == "done"


def test_a_target_ends_the_run():
    course = _played(TARGET, [1] * 10, [4, 3, 2.5, 1.5, 1])
    row = course.row()
    assert (row["status"], row["steps_done"]) == ("done", 6)
    assert row["target_examples"] == pytest.approx(32 * (48 / 32) ** 0.5)  # halfway in the logarithm
    assert row["target_step"] == pytest.approx(row["target_examples"] / 8)


def test_a_target_never_reached_is_censored():
    row = _played(TARGET, [1] * 10, [4, 3, 3, 3, 3, 3]).row()
    assert (row["status"], row["steps_done"], row["target_examples"]) == ("done", 10, None)


def _evaluations(*losses):
    return [Evaluation(2 * i, 20 * i, loss) for i, loss in enumerate(losses)]


@pytest.mark.parametrize(
    "losses, examples",
    [
        ((1.9,), 0),  # the base is there already
        ((4, 2.0), 20),
        ((4, 1), 20 * 2 / 3),  # from the start it is linear
        ((4, 3, 1), 20 * 2**0.5),
        ((4, 3, 3.5, 1), 40 * 1.5**0.5),  # the lowest so far counts, not the bump
        ((4, 3, 1, 5, 1), 20 * 2**0.5),  # the first crossing counts
        ((4, 3, 2.001), None),
        ((), None),
    ],
)
def test_where_the_lowest_loss_so_far_reaches_two(losses, examples):
    found = crossing(_evaluations(*losses), 2.0)
    assert found == (None if examples is None else pytest.approx((examples / 10, examples)))


def test_training_losses_keep_five_digits():
    course = Course(STEPS)
    course.stepped(1.23456789e-3, 8, 40)
    assert course.row()["train_loss"] == [1.2346e-3]
