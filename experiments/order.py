"""The order of the training examples: the same for every run of a sweep, whatever its batch size.

Every example has a random key in every epoch, and an epoch is the examples sorted by key. So the order of the
first m of n examples is the order of the n without the others: a smaller training set is passed through like
the larger one, minus what it lacks. Batches are consecutive slices; the last of an epoch may be smaller.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from experiments.configs import RunConfig


def order(n: int, data_seed: int, epoch: int) -> list[int]:
    """Give the order of one epoch.

    Args:
        n: examples of the training set.
        data_seed: of the set and its order, 0 or more.
        epoch: from 0.

    Returns:
        [n], each of 0 … n − 1 once; without the numbers from m on it is `order(m, data_seed, epoch)`.
    """
    keys = np.random.default_rng([data_seed, epoch]).random(n)  # a shorter draw is the beginning of a longer
    return np.argsort(keys, kind="stable").tolist()


def epoch_batches(n: int, batch_size: int, data_seed: int, epoch: int) -> list[list[int]]:
    """Cut one epoch into batches: which examples each optimizer step sees; the last may have fewer."""
    numbers = order(n, data_seed, epoch)
    return [numbers[start : start + batch_size] for start in range(0, n, batch_size)]


def batches_of(config: RunConfig) -> Iterator[list[int]]:
    """Yield the examples of each optimizer step, `config.n_steps` lists, epoch after epoch."""
    left, epoch = config.n_steps, 0
    while left > 0:
        found = epoch_batches(config.n_train, config.batch_size, config.data_seed, epoch)[:left]
        yield from found
        left, epoch = left - len(found), epoch + 1
