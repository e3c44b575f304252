"""Sweeps vary one thing."""

from experiments.overhead.arms import Monitored
from experiments.overhead.settings import SHAPES
from experiments.overhead.sweeps import SWEEPS


def test_every_sweep_names_settings_that_differ_in_x():
    for name, sweep in SWEEPS.items():
        settings = [s for _, s in sweep.settings()]
        assert len({s.name for s in settings}) == len(settings) == len(sweep.points), name
        assert all(s.shape in SHAPES for s in settings)
        assert Monitored in sweep.arms


def test_no_point_has_one_example_and_tokens_reach_8192():
    assert all(each.batch > 1 for sweep in SWEEPS.values() for _, each in sweep.settings())
    assert max(SWEEPS["tokens"].points) == 8_192
