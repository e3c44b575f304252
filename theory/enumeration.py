"""Exact enumeration: the estimators of one step averaged over every possible batch of a tiny data set.

Rational arithmetic, no sampling: what is unbiased comes out equal, not nearly equal.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import permutations, product
from numbers import Real

from theory.domain import choice, count

Vector = tuple[Fraction, ...]


@dataclass(frozen=True)
class StepEstimates:
    """Averages over all batches of what one step estimates.

    Attributes:
        grad_sq_norm: mean of (n·q - m)/(n-1).
        trace_sigma: mean of n(m - q)/(n-1).
        ratio: mean of trace_sigma/grad_sq_norm over the batches where it exists, None if there are none.
        undefined: share of batches with grad_sq_norm = 0, where there is no ratio.
    """

    grad_sq_norm: Fraction
    trace_sigma: Fraction
    ratio: Fraction | None
    undefined: Fraction


def as_vectors(examples: Sequence[Sequence[int | Fraction]]) -> tuple[Vector, ...]:
    """Per-example gradients as exact vectors.

    Args:
        examples: [N][d], at least two, all of one length.

    Returns:
        The same numbers as fractions.

    Raises:
        ValueError: if there are fewer than two, their lengths differ, or an entry is no finite number.
    """
    try:
        if any(not isinstance(v, Real) or isinstance(v, bool) for g in examples for v in g):
            raise TypeError("text and truth values are no numbers")
        vectors = tuple(tuple(Fraction(v) for v in g) for g in examples)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"examples: needs vectors of finite numbers, got {examples!r}") from None
    if len(vectors) < 2 or len({len(g) for g in vectors}) != 1 or not vectors[0]:
        raise ValueError(f"examples: needs at least 2 vectors of one length >= 1, got {examples!r}")
    return vectors


def population(examples: Sequence[Sequence[int | Fraction]]) -> tuple[Fraction, Fraction]:
    """(|G|², trΣ) of the finite population: every example equally likely, trΣ dividing by N.

    Args:
        examples: [N][d], per-example gradients.

    Returns:
        The squared norm of their mean and the trace of their covariance. {1, 3} gives (4, 1).

    Raises:
        ValueError: if an argument is outside its domain.
    """
    vectors = as_vectors(examples)
    q, m = _sums(vectors)
    return q, m - q


def average_over_batches(
    examples: Sequence[Sequence[int | Fraction]], batch: int, draw: str = "with"
) -> StepEstimates:
    """The estimators of one step, averaged over all ordered batches.

    With replacement (Nᵇ batches, independent draws) both are exactly unbiased for `population`; their ratio
    is not. Without replacement |G|² is low by S²/N, S² = N trΣ/(N-1), and trΣ reads S².

    Args:
        examples: [N][d], per-example gradients.
        batch: examples per batch, >= 2; at most N without replacement.
        draw: "with" or "without" replacement.

    Returns:
        Exact averages.

    Raises:
        ValueError: if the batch is larger than the data set and draws are without replacement.
    """
    vectors, b = as_vectors(examples), count("batch", batch, 2)
    draw = choice("draw", draw, ("with", "without"))
    if draw == "without" and b > len(vectors):
        raise ValueError(f"batch: needs at most N = {len(vectors)} without replacement, got {b}")
    batches: Iterator[tuple[Vector, ...]] = (
        product(vectors, repeat=b) if draw == "with" else permutations(vectors, b)
    )
    grad, trace, ratios, total = Fraction(0), Fraction(0), [], 0
    for chosen in batches:
        q, m = _sums(chosen)
        g, t = (b * q - m) / (b - 1), b * (m - q) / (b - 1)
        grad, trace, total = grad + g, trace + t, total + 1
        if g != 0:
            ratios.append(t / g)
    mean_ratio = sum(ratios, Fraction(0)) / len(ratios) if ratios else None
    return StepEstimates(grad / total, trace / total, mean_ratio, Fraction(total - len(ratios), total))


def _sums(vectors: Sequence[Vector]) -> tuple[Fraction, Fraction]:
    """Q = |mean|² and m = mean of |g|²."""
    n = len(vectors)
    mean = [sum(column, Fraction(0)) / n for column in zip(*vectors, strict=True)]
    q = sum((v * v for v in mean), Fraction(0))
    m = sum((v * v for g in vectors for v in g), Fraction(0)) / n
    return q, m
