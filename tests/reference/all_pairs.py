"""Slow twin of the frozen probe: every pair of examples, one product at a time. Imports nothing of gns."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np


def joined(
    contributions: Sequence[np.ndarray], weights: Sequence[np.ndarray], mass: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Make one batch of many.

    Args:
        contributions: one [n, d] a batch, the rows cᵢ.
        weights: one [n] a batch, the examples' weights in its loss; they add to 1.
        mass: weight of each batch in the whole.

    Returns:
        (cᵢ, aᵢ) of the joined batch, [N, d] and [N].
    """
    total = sum(mass)
    c = [m / total * row for m, rows in zip(mass, contributions, strict=True) for row in rows]
    a = [m / total * v for m, of_batch in zip(mass, weights, strict=True) for v in of_batch]
    return np.array(c), np.array(a)


def trace_and_grad(c: np.ndarray, a: np.ndarray) -> tuple[float, float]:
    """(tr Σ, |G|²) of one batch of contributions cᵢ with weights aᵢ.

    |G|² = Σ_{i≠j} cᵢ·cⱼ / Σ_{i≠j} aᵢaⱼ,   tr Σ = N (‖Σcᵢ‖² − |G|²)
    """
    pairs = list(itertools.permutations(range(len(a)), 2))
    grad = sum(float(c[i] @ c[j]) for i, j in pairs) / sum(float(a[i] * a[j]) for i, j in pairs)
    total = c.sum(0)
    return len(a) * (float(total @ total) - grad), grad


def leave_one_out(
    contributions: Sequence[np.ndarray], weights: Sequence[np.ndarray], mass: Sequence[float]
) -> list[tuple[float, float]]:
    """(tr Σ, |G|²) without each batch in turn, from its own examples."""
    rest = [[i for i in range(len(mass)) if i != k] for k in range(len(mass))]
    return [
        trace_and_grad(*joined([contributions[i] for i in r], [weights[i] for i in r], [mass[i] for i in r]))
        for r in rest
    ]


def flips(gradients: np.ndarray, mass: Sequence[float]) -> float:
    """p-value over all 2ᴷ sign patterns of the batches' gradients [K, d], each product anew."""
    k, found = len(mass), []
    for signs in itertools.product((1, -1), repeat=k):
        rows = [s * m * g for s, m, g in zip(signs, mass, gradients, strict=True)]
        found.append(sum(float(rows[i] @ rows[j]) for i, j in itertools.permutations(range(k), 2)))
    seen = found[0]
    return sum(f >= seen - 1e-9 * abs(seen) for f in found) / len(found)


def within_and_across(contributions: Sequence[np.ndarray], n: Sequence[int]) -> tuple[float, float]:
    """Mean product of two examples' gradients gᵢ = nₖcᵢ in one batch, and in two, with equal weights."""
    rows = [(k, n[k] * c) for k, of_batch in enumerate(contributions) for c in of_batch]
    same, other = [], []
    for (k, a), (m, b) in itertools.permutations(rows, 2):
        (same if k == m else other).append(float(a @ b))
    return sum(same) / len(same), sum(other) / len(other)
