"""Random numbers of a run's own."""

import random

import numpy as np
import pytest
import torch

from experiments.seeding import seeded


def _draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_seed_draws_the_same_numbers_and_leaves_the_programs_alone():
    with seeded(3):
        first = _draw()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with seeded(3):
        assert _draw() == first
    with seeded(4):
        assert not {*_draw()} & {*first}
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert after == states


def test_an_error_inside_leaves_them_alone_too():
    states = random.getstate(), torch.get_rng_state().tolist()
    with pytest.raises(KeyboardInterrupt), seeded(2**40):
        _draw()
        raise KeyboardInterrupt
    assert (random.getstate(), torch.get_rng_state().tolist()) == states
