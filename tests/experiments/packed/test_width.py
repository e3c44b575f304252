"""Which width is chosen, from clocks that are made up; real clocks on a tiny base."""

import dataclasses

import pytest
import torch

from experiments import engines, loop, packed
from experiments.packed import width as module
from experiments.packed.width import best_width, packed_clock, solo_clock
from tests.experiments.small_runs import config


@pytest.fixture
def clocks(monkeypatch):
    """Replace the clocks: seconds a step of a program of each width, 1 for the solo loop."""
    asked = []

    def set_(seconds):
        def packed(given, width, device):
            asked.append(width)
            if width not in seconds:
                raise torch.OutOfMemoryError("out of memory")
            return lambda n: n * seconds[width]

        monkeypatch.setattr(module, "solo_clock", lambda *_: lambda n: n * seconds[1])
        monkeypatch.setattr(module, "packed_clock", packed)
        module._search.cache_clear()
        return asked

    yield set_
    module._search.cache_clear()


@pytest.mark.parametrize(
    "seconds, chosen, tried",
    [
        ({1: 1.0, 2: 1.95, 4: 3.9, 8: 1.0}, 1, [2, 4]),  # saturated: two at once take twice as long
        ({1: 1.0, 2: 1.1, 4: 1.3, 8: 2.7}, 4, [2, 4, 8, 16]),
        (
            {1: 1.0, 2: 2.0, 4: 2.2, 8: 4.3, 16: 8.6, 32: 9.0},
            4,
            [2, 4, 8, 16],
        ),  # one slow timing is passed over
        ({1: 1.0, 2: 1.1}, 2, [2, 4]),  # no memory for four
        ({1: 1.0, **{w: 1.0 for w in module.WIDTHS}}, 64, list(module.WIDTHS)),
    ],
)
def test_the_widest_that_pays_is_chosen(clocks, seconds, chosen, tried):
    asked = clocks(seconds)
    assert best_width(config("x"), "cpu") == chosen
    assert asked == tried


def test_no_wider_program_is_timed_than_there_are_runs_for(clocks):
    """At the end of a sweep a few long runs are left: timing 64 of them would take longer than they do."""
    asked = clocks(dict.fromkeys((1, *module.WIDTHS), 1.0))
    assert best_width(config("x"), "cpu", 1) == 1 and asked == []
    assert best_width(config("x"), "cpu", 3) == 2 and asked == [2]
    assert best_width(config("x"), "cpu", 2) == 2 and asked == [2]
    assert best_width(config("x"), "cpu", 9) == 8 and asked == [2, 4, 8]
    assert best_width(config("x"), "cpu", 5) == 5 and best_width(config("x"), "cpu", 1) == 1
    assert best_width(config("x"), "cpu", 63) == 32 and best_width(config("x"), "cpu") == 64
    assert best_width(config("x"), "cpu", 63) == 63  # a program of 64 is known to pay: one of 63 does


@pytest.mark.parametrize(("seconds", "times"), [(0.1, module.REPEATS), (0.6, 2), (5.0, 1)])
def test_long_timings_are_repeated_less(seconds, times):
    asked = []
    assert module._fastest(lambda n: asked.append(n) or seconds, 2) == seconds
    assert asked == [2] * times


def test_runs_of_one_kind_are_timed_once(clocks):
    asked = clocks({1: 1.0, 2: 1.99})
    first = config("x", dials={"answered": True})
    for changed in ({}, {"lr": 3.0}, {"seed": 4, "data_seed": 4}, {"epochs": 3}, {"evals": 3, "n_eval": 9}):
        best_width(dataclasses.replace(first, **changed), "cpu")
    assert asked == [2, 4]
    best_width(dataclasses.replace(first, batch_size=2), "cpu")
    best_width(dataclasses.replace(first, rank=2), "cpu")
    assert asked == [2, 4] * 3


@pytest.mark.parametrize(("most", "slots"), [(5, 4), (2, 3)])
def test_a_sweep_asks_for_no_more_slots_than_there_are_runs_for(monkeypatch, most, slots):
    asked = []
    monkeypatch.setattr(packed, "best_width", lambda config, device, most: asked.append(most) or 2)
    runs = [config("x", lr=lr) for lr in (1e-3, 2e-3, 3e-3, 4e-3)]
    other = config("x", batch_size=2)  # no companion
    assert engines.companions(runs[0], [*runs[1:], other], "cpu", most) == runs[1:2] and asked == [slots]
    assert not engines.companions(runs[0], [other], "cpu", most) and len(asked) == 1


def test_companions_that_see_the_same_examples_come_first(monkeypatch):
    monkeypatch.setattr(packed, "best_width", lambda config, device, most: most)
    first = config("x", data_seed=1)
    else_ = [config("x", data_seed=0), config("x", data_seed=1, dials={"answered": False})]
    same = [config("x", data_seed=1, lr=lr) for lr in (2e-3, 3e-3)]
    waiting = [else_[0], same[0], else_[1], same[1]]
    assert engines.companions(first, waiting, "cpu", 9) == [*same, *else_]
    assert engines.companions(first, waiting, "cpu", 2) == same


@pytest.mark.usefixtures("sentences")
def test_real_clocks_run_and_count_steps(tiny_base):
    given = config(tiny_base, protocol="target", target_loss=0.1)
    for clock in (solo_clock(given, torch.device("cpu")), packed_clock(given, 2, torch.device("cpu"))):
        one, many = (min(clock(n) for _ in range(3)) for n in (1, 20))
        assert 0 < one < many


@pytest.mark.usefixtures("sentences")
def test_a_solo_run_is_timed_with_one_optimizer_as_a_program_is(tiny_base, monkeypatch):
    """Moments that are made anew in every timing would make packing look faster than it is."""
    made, of = [], loop.optimizer_of
    monkeypatch.setattr(loop, "optimizer_of", lambda *given: made.append(of(*given)) or made[-1])
    clock = solo_clock(config(tiny_base), torch.device("cpu"))
    for _ in range(3):
        clock(2)
    (optimizer,) = made
    assert {float(state["step"]) for state in optimizer.state.values()} == {7.0}
