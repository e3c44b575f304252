"""Seeded simulation in bounded memory: run a sampler in chunks, keep mean, standard error and nothing else.

A *sampler* is a function (generator, size) → [size] or [size, k]; `theory.samplers` has those of the lemma's
data model and of every extension, and they can be imported from here.
"""

from collections.abc import Iterator

import numpy as np

from theory.domain import Floats, count
from theory.samplers import (
    Sampler,
    captured_share,
    gaussian_step,
    lemma_data,
    lemma_law,
    lora_null,
    noncentral_reciprocal,
    population_norm_control,
    regression_step,
    sgd_second_moment,
    spectrum_plugin,
    step_estimates,
)
from theory.verdict import Estimate

__all__ = [
    "Estimate",
    "Sampler",
    "chunks",
    "collect",
    "simulate",
    "simulate_columns",
    # samplers
    "captured_share",
    "gaussian_step",
    "lemma_data",
    "lemma_law",
    "lora_null",
    "noncentral_reciprocal",
    "population_norm_control",
    "regression_step",
    "sgd_second_moment",
    "spectrum_plugin",
    "step_estimates",
]

CHUNK_NUMBERS = 1 << 21


def chunks(sampler: Sampler, draws: int, seed: int, numbers_per_draw: int = 1) -> Iterator[Floats]:
    """The sampler's draws, a chunk at a time; a chunk holds about 2²¹ random numbers (16 MiB).

    Each chunk has its own stream spawned from the seed, so results depend on (seed, draws, numbers_per_draw)
    only.

    Args:
        sampler: (generator, size) → [size] or [size, k].
        draws: total number of draws, >= 1.
        seed: seed of the whole simulation.
        numbers_per_draw: random numbers behind one draw, which sets the chunk size.

    Yields:
        Arrays whose lengths add up to `draws`.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    draws = count("draws", draws)
    size = max(1, CHUNK_NUMBERS // count("numbers_per_draw", numbers_per_draw))
    sizes = [size] * (draws // size) + ([draws % size] if draws % size else [])
    streams = np.random.SeedSequence(count("seed", seed, 0)).spawn(len(sizes))
    for child, length in zip(streams, sizes, strict=True):
        yield np.asarray(sampler(np.random.default_rng(child), length))


def collect(sampler: Sampler, draws: int, seed: int, numbers_per_draw: int = 1) -> Floats:
    """All draws in one array, for distribution tests; arguments as in `chunks`."""
    return np.concatenate(list(chunks(sampler, draws, seed, numbers_per_draw)))


def simulate(sampler: Sampler, draws: int, seed: int, numbers_per_draw: int = 1) -> Estimate:
    """Mean of a scalar sampler; see `simulate_columns`."""
    return simulate_columns(sampler, draws, seed, numbers_per_draw)[0]


def simulate_columns(sampler: Sampler, draws: int, seed: int, numbers_per_draw: int = 1) -> list[Estimate]:
    """Means of a sampler's columns with standard errors, merged over chunks (Chan et al.).

    Args:
        sampler: (generator, size) → [size] or [size, k].
        draws: total number of draws, >= 2, fixed beforehand.
        seed: seed of the whole simulation.
        numbers_per_draw: random numbers behind one draw, which sets the chunk size.

    Returns:
        One `Estimate` a column.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    total, mean, scatter = 0, np.zeros(1), np.zeros(1)
    for values in chunks(sampler, count("draws", draws, 2), seed, numbers_per_draw):
        block = values.reshape(values.shape[0], -1)
        m, part = block.shape[0], block.mean(0)
        gap = part - mean
        scatter = scatter + ((block - part) ** 2).sum(0) + gap**2 * (total * m / (total + m))
        total, mean = total + m, mean + gap * (m / (total + m))
    se = np.sqrt(scatter / (total - 1) / total)
    return [Estimate(float(v), float(s), total) for v, s in zip(mean, se, strict=True)]
