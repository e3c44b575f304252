"""Minutes are shared: what is needed is done in any case, what is wished for where there is time."""

from dataclasses import replace

import pytest

from experiments.overhead import bench
from experiments.overhead.budget import MARGIN, Budget, Part, work
from experiments.overhead.presets import PRESETS, SLOTS, kinds
from experiments.overhead.sweeps import SWEEPS

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


def test_a_slow_machine_does_what_is_needed_and_no_more():
    given, spent = run(90, 0.5)
    assert given == {"table: a": 20, "table: b": 40, "counts": 20, "sweep: x": 20} and spent == 100


def test_parts_are_taken_in_their_order():
    budget = Budget(10, PARTS, 1)
    with pytest.raises(ValueError, match="part 'counts' is not next: .*table: a"):
        budget.take("counts")


def test_work_grows_with_what_a_step_does():
    base = PRESETS["cpu"][0]
    assert work(replace(base, rank=None)) > work(base) > work(replace(base, layers=1))
    assert work(replace(base, accumulate=3)) == pytest.approx(3 * work(base))
    assert work(replace(base, tokens=4_096)) > 40 * work(base)  # 32 times the tokens, and attention


def test_the_plan_fits_a_machine_of_the_planned_speed_with_twenty_pairs_and_one_half_as_fast():
    """Reckoned, not run: with what the budget itself reckons with."""
    cpu = PRESETS["cpu"]
    parts = [bench._part(f"table: {s.name}", s, kinds("cpu", s), 20, SLOTS.get(s.name, {})) for s in cpu]
    parts += [
        Part("counts", bench._counting(cpu[0], 5)),
        Part("memory", bench.IMPORTS + sum(map(bench._resident, cpu))),
    ]
    for name, sweep in SWEEPS.items():
        parts += [bench._part(f"sweep: {name} {x}", s, sweep.arms, 12) for x, s in sweep.settings()]
    given, spent = run(876, bench.SECOND, parts)
    assert spent <= 876
    for part in parts[: len(cpu)]:
        assert given[part.name] > part.need / bench.SECOND + 0.7 * part.wish / bench.SECOND, part.name
    _, slow = run(876, bench.SECOND / 2, parts)
    assert slow <= 920
