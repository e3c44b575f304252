"""The shipped presets: each loads, is what its scale promises, and draws what it names."""

import functools

import pytest

from experiments import forecast, grids

NAMES = grids.names()
FIGURES = ("Fig. 1", "Fig. 2", "Fig. 3", "Fig. 4", "Fig. 5")
load = functools.cache(grids.load)  # when a test asks: expanding them all takes seconds of each collection


def of_scale(scale):
    """Those whose names begin with it; the first test holds names and scales together."""
    return [name for name in NAMES if name.partition("-")[0] == scale]


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_says_what_it_asks_and_draws_something(name):
    preset = load(name)
    assert preset.question.endswith("?") and preset.title and preset.figures
    assert preset.name == preset.scale or preset.name.startswith(preset.scale + "-")
    assert preset.least_steps == 16
    assert min(config.n_steps for config in preset.configs) >= 16
    fields = {name for name in preset.series if not name.startswith("dials.")}
    for name in fields:  # a curve's name must tell it from another
        assert len({getattr(config, name) for config in preset.configs}) > 1 or preset.series == (name,), name


@pytest.mark.parametrize("name", ["laptop-noise", "laptop-merged"])
def test_the_reference_is_the_same_runs_in_every_sweep_of_whole_runs(name):
    """A dial written out at its default is another hash, and 80 runs made again."""
    own, shared = ({config.hash for config in load(each).configs} for each in (name, "laptop-rank"))
    assert len(own & shared) == 80


@pytest.mark.parametrize("scale", ["laptop", "gpu", "paper"])
def test_each_figure_of_the_paper_is_there_at_each_scale(scale):
    assert {load(name).paper for name in of_scale(scale)} >= set(FIGURES)


@pytest.mark.parametrize("name", of_scale("laptop"))
def test_a_laptop_preset_takes_less_than_an_hour(name):
    """On two cores, by the model of `experiments.forecast`, whose costs were measured."""
    preset = load(name)
    assert {config.base for config in preset.configs} <= set(forecast.CORE)
    assert forecast.sweep_seconds(preset.configs, "laptop") < 3_600
    assert len({(config.seed, config.data_seed) for config in preset.configs}) >= 2


def test_the_smoke_preset_takes_less_than_two_minutes():
    smoke = load("smoke")
    assert forecast.sweep_seconds(smoke.configs, "smoke") < 80  # the rest is starting and drawing
    assert {config.base for config in smoke.configs} == {"1m"}  # ships with the package


def test_the_papers_own_models_data_and_rates():
    runs = [config for name in of_scale("paper") for config in load(name).configs]
    assert {"meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-13b-hf"} <= {config.base for config in runs}
    assert {"Qwen/Qwen3-0.6B", "google/gemma-3-1b-pt"} <= {config.base for config in runs}
    assert {config.task for config in runs} == {"metamath-gsm8k", "codefeedback-humaneval"}
    rates = sorted({config.lr for config in runs})
    assert rates == [1e-5, 2e-5, 3e-5, 5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3, 3e-3]
    assert {config.scale / config.rank for config in runs} == {1.0}
    assert {config.rank for config in runs} == {32, 64, 128, 256}
    assert {config.n_train for config in runs} == {25_000, 50_000, 100_000, 102_400, 200_000}
