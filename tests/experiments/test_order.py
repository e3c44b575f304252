"""The order of the examples: common to all runs of a sweep, nested in the size of the training set."""

import dataclasses

import pytest

from experiments.configs import RunConfig
from experiments.order import batches_of, epoch_batches, order

RUN = RunConfig("1m", "wordmath", n_train=33, batch_size=8, epochs=2)


@pytest.mark.parametrize("n", [1, 2, 17, 100])
@pytest.mark.parametrize("m", [1, 2, 9, 50])
def test_a_smaller_set_is_passed_through_like_the_larger_one(n, m):
    assert sorted(order(n, 3, 1)) == list(range(n))
    if m <= n:
        assert [i for i in order(n, 3, 1) if i < m] == order(m, 3, 1)


def test_each_seed_and_each_epoch_has_an_order_of_its_own():
    orders = {tuple(order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert tuple(range(50)) not in orders


def test_a_batch_size_cuts_and_does_not_reorder():
    for size in (1, 8, 32, 33):
        batches = epoch_batches(33, size, 0, 0)
        assert [i for batch in batches for i in batch] == order(33, 0, 0)
        assert {len(batch) for batch in batches[:-1]} <= {size}


@pytest.mark.parametrize(
    "changed, sizes",
    [
        ({}, [8, 8, 8, 8, 1] * 2),
        ({"batch_size": 33}, [33, 33]),
        ({"protocol": "steps", "steps": 7}, [8, 8, 8, 8, 1, 8, 8]),
        ({"protocol": "steps", "steps": 2}, [8, 8]),
    ],
)
def test_a_run_has_as_many_batches_as_steps(changed, sizes):
    config = dataclasses.replace(RUN, **changed)
    batches = list(batches_of(config))
    assert [len(batch) for batch in batches] == sizes
    assert len(batches) == config.n_steps


def test_neither_learning_rate_nor_rank_nor_seed_moves_the_order():
    moved = dataclasses.replace(RUN, lr=0.1, rank=3, seed=9, adapter="dora")
    assert list(batches_of(moved)) == list(batches_of(RUN))
    assert list(batches_of(dataclasses.replace(RUN, data_seed=1))) != list(batches_of(RUN))
