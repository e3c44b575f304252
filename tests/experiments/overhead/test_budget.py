"""Minutes are shared: what is needed is done in any case, what is wished for where there is time."""

from dataclasses import replace

import pytest

from experiments.overhead import bench
from experiments.overhead.arms import PEERS, Arm, Monitored
from experiments.overhead.budget import MARGIN, Budget, Part, work
from experiments.overhead.presets import PRESETS, SHARED, SLOTS, kinds
from experiments.overhead.rounds import LEAST

PARTS = [Part("table: a", 10, 30), Part("table: b", 20, 30), Part("counts", 10), Part("sweep: x", 10, 40)]


def run(seconds, speed, parts=PARTS):
    """Seconds of each part on a machine that does `speed` of the work that is reckoned, and those of all."""
    now, given = [0.0], {}
    budget = Budget(seconds, parts, speed, clock=lambda: now[0])
    for part in parts:
        given[part.name] = budget.take(part.name)
        now[0] += min(given[part.name], (part.need + part.wish) / speed)
    return given, now[0]


def test_all_get_what_they_wish_for_where_there_is_time():
    given, spent = run(1_000, 1)
    assert given == {"table: a": 40, "table: b": 50, "counts": 10, "sweep: x": 50} and spent == 150


def test_what_is_spare_goes_to_what_comes_first_and_is_shared_by_what_is_alike():
    given, spent = run(90, 1)
    spare = 90 - 10 - MARGIN * 40
    assert given["table: a"] == pytest.approx(10 + spare / 2)
    assert given["table: b"] > 20 and given["counts"] == 10
    assert given["sweep: x"] == pytest.approx(90 - (spent - given["sweep: x"]))


def test_where_not_all_fits_each_part_gets_its_share_of_what_is_left():
    """Needs are 20, 40, 20 and 20 s on a machine half as fast: 100, or 105 with the margin, in 90."""
    given, spent = run(90, 0.5)
    needs = {"table: a": 20, "table: b": 40, "counts": 20, "sweep: x": 20}
    shares = [given[name] / need for name, need in needs.items()]
    assert 0.85 < min(shares) and max(shares[:3]) < 0.95
    assert spent <= 90 and given["sweep: x"] > 18


def test_where_there_is_no_time_left_nothing_is_given():
    budget = Budget(0.0, PARTS, 1, clock=lambda: 5.0)
    assert [budget.take(part.name) for part in PARTS] == [0, 0, 0, 0]
    late = iter([0.0, 5.0])
    assert Budget(1.0, [Part("wished for", 0, 10)], 1, clock=lambda: next(late)).take("wished for") == 0


def test_parts_are_taken_in_their_order():
    budget = Budget(10, PARTS, 1)
    with pytest.raises(ValueError, match="part 'counts' is not next: .*table: a"):
        budget.take("counts")


def test_work_grows_with_what_a_step_does():
    base = PRESETS["cpu"][0]
    assert work(replace(base, rank=None)) > work(base) > work(replace(base, layers=1))
    assert work(replace(base, accumulate=3)) == pytest.approx(3 * work(base))
    assert work(replace(base, tokens=4_096)) > 40 * work(base)  # 32 times the tokens, and attention


def test_a_forecast_is_of_sections_and_of_what_there_is_time_for():
    def forecast(seconds):
        return Budget(seconds, PARTS, 1, clock=lambda: 0.0).forecast()

    assert forecast(1_000) == {"table": 90, "counts": 10, "sweep": 50}
    assert forecast(10) == {"table": 30, "counts": 10, "sweep": 10}
    half = forecast(MARGIN * 50 + 50)  # wished for: 100 seconds more
    assert half == {"table": pytest.approx(60), "counts": 10, "sweep": pytest.approx(30)}


def plan():
    """Everything that `make bench` does, without doing it."""
    return [part for part, _ in bench._parts(lambda rows: None, bench.SECOND, 8, 8)]


def test_what_is_judged_has_twenty_pairs_in_the_fewest_rounds():
    for each in PRESETS["cpu"]:
        slots = SLOTS[each.name]
        assert {slots[kind] * LEAST for kind in (Monitored, *SHARED)} == {20}
        assert slots[Arm] * LEAST == 10 and {Monitored, *SHARED} < set(kinds("cpu", each))
    assert set(kinds("cpu", PRESETS["cpu"][0])) >= set(PEERS)


def test_the_plan_fits_its_minutes_and_a_machine_that_does_three_fifths_of_it():
    """Reckoned, not run: with what the budget itself reckons with."""
    given, spent = run(720, bench.SECOND, plan())
    assert spent <= 720
    for part in plan()[: len(PRESETS["cpu"])]:
        assert given[part.name] > part.need / bench.SECOND + 0.7 * part.wish / bench.SECOND, part.name
    _, slow = run(720, 0.6 * bench.SECOND, plan())
    assert slow <= 840  # what must be done takes longer than it may, but not the 15 minutes of the Makefile
