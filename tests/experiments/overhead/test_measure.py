"""Arms take turns, each step between two untouched ones; what cannot run is a row with its error."""

import gc
from types import SimpleNamespace

import pytest

from experiments.overhead import measure, rounds
from experiments.overhead.arms import Arm, Monitored, Tenth
from experiments.overhead.measure import AA, compare, describe
from tests.experiments.overhead.rows_by_hand import setting as setting_of


def setting():
    """One layer: here it is the order of the steps that counts, and how many there are."""
    return setting_of(layers=1)


class Broken(Arm):
    name = "broken"

    def watch(self):
        raise ValueError("planted")


class Late(Arm):
    name = "late"

    def step(self, ids):
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps > self.warm + 2:
            raise ValueError("planted late")
        super().step(ids)


class Unwatchable(Arm):
    """What it saves cannot be looked at, though its step works."""

    name = "unwatchable"

    def backward(self, ids):
        super().backward(ids)
        if getattr(self, "looked_at", False):
            raise RuntimeError("no hooks on saved tensors")


def quiet(_):
    return None


def test_rows_hold_times_of_both_and_the_error_of_what_cannot_run():
    said = []
    rows = compare(setting(), (Broken, Late), device="cpu", pairs=3, say=said.append)
    assert [r["arm"] for r in rows] == [AA, "broken", "late"]
    assert [r["status"] for r in rows] == ["ok", "failed", "failed"]
    assert [rows[1]["error"], rows[2]["error"]] == ["ValueError: planted", "ValueError: planted late"]
    assert len(rows[0]["untouched_s"]) == len(rows[0]["arm_s"]) == 3
    assert said == [describe(r) for r in rows] and "failed, ValueError: planted" in said[1]


def test_an_arm_whose_saved_bytes_cannot_be_counted_is_timed_all_the_same(monkeypatch):
    own = measure.saved

    def refusing(arm, ids):
        if isinstance(arm, Unwatchable):
            arm.looked_at = True
        return own(arm, ids)

    monkeypatch.setattr(measure, "saved", refusing)
    _, row = compare(setting(), (Unwatchable,), device="cpu", pairs=3, say=quiet)
    assert row["status"] == "ok" and len(row["arm_s"]) == 3
    assert "arm_saved_bytes" not in row


def test_arms_come_as_often_as_asked_and_blocks_have_turns_of_their_own():
    slots = {Arm: 2, Monitored: 3}
    rows = compare(setting(), (Monitored, Tenth), device="cpu", pairs=2, slots=slots, say=quiet)
    assert [len(row["arm_s"]) for row in rows] == [4, 6, 30]
    assert rows[1]["arm_saved_bytes"] == rows[1]["untouched_saved_bytes"] > 0


def test_time_that_is_gone_leaves_five_pairs():
    rows = compare(setting(), (Monitored, Tenth), device="cpu", pairs=60, seconds=0.0, say=quiet)
    assert [len(row["arm_s"]) for row in rows] == [5, 5, 20]


def test_a_point_of_a_sweep_may_have_fewer():
    rows = compare(
        setting(), (Monitored,), device="cpu", pairs=9, least=3, seconds=0.0, second=False, say=quiet
    )
    assert [len(row["arm_s"]) for row in rows] == [2, 3]
    assert all(describe(row) for row in rows)


def test_without_a_second_loop_the_untouched_steps_stand_beside_themselves():
    rows = compare(setting(), (Monitored,), device="cpu", pairs=6, second=False, say=quiet)
    assert [row["arm"] for row in rows] == [AA, "monitor"]
    assert [len(row["arm_s"]) for row in rows] == [5, 6]
    assert "arm_saved_bytes" not in rows[1]


@pytest.fixture
def clock(monkeypatch):
    """Steps of two arms by name, each of a second that the test chooses; the order in which they came."""
    came, seconds = [], iter([])

    def timed(arm, ids):
        came.append((arm.name, gc.isenabled()))
        return next(seconds), 0

    monkeypatch.setattr(rounds, "timed", timed)

    def run(given, arms, **more):
        nonlocal seconds
        seconds = iter(given)
        base, *others = [type("Named", (), {"name": name})() for name in ("U", *arms)]
        return rounds.rounds(base, others, [None], **more), came

    return run


def test_a_step_is_divided_by_the_mean_of_the_untouched_before_and_after(clock):
    found, came = clock([1, 5, 3, 6, 4, 7, 8], "a", pairs=3)
    assert "".join(name for name, _ in came) == "UaUaUaU"
    assert found.arms[0].arm == [5, 6, 7] and found.arms[0].untouched == [2, 3.5, 6]
    itself = found.itself()
    assert itself.arm == [3, 4] and itself.untouched == [2.5, 5.5]


def test_the_order_of_arms_changes_and_the_collector_is_off(clock):
    assert gc.isenabled()
    found, came = clock([1.0] * 200, "abc", pairs=12)
    assert gc.isenabled() and not any(on for _, on in came)
    names = "".join(name for name, _ in came)
    assert names[::2] == "U" * 37
    orders = {names[i : i + 6] for i in range(1, 73, 6)}
    assert len(orders) > 3 and all(sorted(order.replace("U", "")) == ["a", "b", "c"] for order in orders)
    assert [len(times.arm) for times in found.arms] == [12] * 3


@pytest.mark.parametrize(("seconds", "made"), [(0, 2), (24, 2), (26, 3), (34, 3), (36, 4), (900, 9)])
def test_no_round_starts_of_which_less_than_half_fits(monkeypatch, seconds, made):
    """Two rounds at the least, nine at the most, each of ten seconds: five a step."""
    now = [0.0]

    def timed(arm, ids):
        now[0] += 5
        return 5.0, 0

    monkeypatch.setattr(rounds, "timed", timed)
    monkeypatch.setattr(rounds, "time", SimpleNamespace(monotonic=lambda: now[0]))
    found = rounds.rounds(
        *two_arms(), [None], pairs=9, least=2, seconds=seconds + 5
    )  # the first step is none's
    assert len(found.arms[0].arm) == made


def two_arms():
    base, other = (SimpleNamespace(name=name) for name in "Ua")
    return base, [other]
