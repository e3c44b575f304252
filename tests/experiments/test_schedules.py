"""Learning rates against the library's own schedulers, and where evaluations fall."""

import dataclasses
import warnings

import pytest
import torch
import transformers

from experiments.configs import SCHEDULES, RunConfig
from experiments.schedules import evaluation_steps, lr_at, warmup_steps

RUN = RunConfig("1m", "wordmath", lr=0.5, protocol="steps", steps=40, warmup=0.1)
THEIRS = {
    "constant": "constant_with_warmup",
    "linear": "linear",
    "cosine": "cosine",
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
def test_after_the_warmup_the_rate_is_the_librarys(schedule, warmup):
    config = dataclasses.replace(RUN, schedule=schedule, warmup=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    theirs = transformers.get_scheduler(THEIRS[schedule], optimizer, warmup_steps(config), config.n_steps)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of", UserWarning)  # no step is made here
        for step in range(config.n_steps):
            if step >= warmup_steps(config):
                assert lr_at(config, step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
            theirs.step()


def test_a_warmup_rises_evenly_to_the_full_rate():
    assert [lr_at(RUN, step) for step in range(5)] == [0.125, 0.25, 0.375, 0.5, 0.5]
    assert warmup_steps(dataclasses.replace(RUN, warmup=0.0)) == 0


def test_no_step_of_a_run_is_without_a_rate():
    for schedule in SCHEDULES:
        config = dataclasses.replace(RUN, schedule=schedule, warmup=0)
        assert all(lr_at(config, step) > 0 for step in range(config.n_steps))
        assert lr_at(config, 0) == 0.5
        assert lr_at(config, 1_000) >= 0


@pytest.mark.parametrize(
    "steps, evals, found",
    [
        (40, 1, [40]),
        (40, 4, [10, 20, 30, 40]),
        (10, 3, [4, 7, 10]),
        (3, 10, [1, 2, 3]),
        (1, 1, [1]),
    ],
)
def test_evaluations_are_spread_and_the_last_is_at_the_end(steps, evals, found):
    assert evaluation_steps(dataclasses.replace(RUN, steps=steps, evals=evals)) == found
