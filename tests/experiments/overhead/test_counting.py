"""What needs no clock is counted: operations, saved bytes, calls of hooks."""

from experiments.overhead.arms import Arm, Between, Monitored
from experiments.overhead.counting import idle, operations, saved
from experiments.overhead.measure import warmed
from experiments.overhead.settings import batches, build
from tests.experiments.overhead.rows_by_hand import setting


def test_a_step_between_measured_ones_does_nothing_more_and_keeps_nothing_more():
    model, data = build(setting(), "cpu"), batches(setting(), "cpu")
    plain, between = warmed(Arm(setting(), model), data), warmed(Between(setting(), model), data)
    found = idle(plain, between, data[0])
    assert found["extra_operations"] == {} and found["extra_saved"] == [0, 0]
    assert found["hook_calls"] == {"RootInput": 1, "RootOutput": 1, "InputHook": 28, "OutputHook": 28}
    assert all(0 < seconds < 1e-3 for seconds in found["hook_seconds"].values())
    between.close()


def test_a_measured_step_does_more_and_keeps_no_bytes_more():
    model, data = build(setting(), "cpu"), batches(setting(), "cpu")
    plain, watched = warmed(Arm(setting(), model), data), warmed(Monitored(setting(), model), data)
    more = operations(watched, data[0])
    more.subtract(operations(plain, data[0]))
    assert more["aten.bmm.default"] == 28  # one product a factor
    (few, size), (many, same) = saved(plain, data[0]), saved(watched, data[0])
    assert many == few + 28 and same == size > 0  # the layers' own inputs
    watched.close()
