"""Lemma 4.1 derived: E[tr(S)/|ḡ|²] = rN/(r-2), as named symbolic steps that check themselves.

Setting (arXiv:2602.09492, §4 and Lemma 4.1): x ~ N(0, I_r), x̃ = Ux with orthonormal columns U [d, r], labels
y = ±1 independent of x, loss ½ mean (wᵀx̃ - y)², gradient taken at w = 0. N examples form the data set,
g₁..g_N are their gradients, ḡ the mean of those (the paper's full gradient), S their covariance.

Every step carries a formula, what it assumes, and a check by another route (`theory.symbolic`).
`derivation()` builds all steps and raises if one fails; print them one by one.
"""

from collections.abc import Callable

from theory import lemma_data, lemma_moments
from theory.lemma_data import helmert
from theory.lemma_moments import reciprocal_moment_condition
from theory.symbolic import N, Step, r, z

__all__ = [
    "DerivationError",
    "N",
    "Step",
    "derivation",
    "helmert",
    "r",
    "reciprocal_moment_condition",
    "steps",
    "z",
]


class DerivationError(AssertionError):
    """A step's formula disagrees with the independent route that checks it."""


_BUILDERS: tuple[Callable[[], Step], ...] = (
    lemma_data.gradient,
    lemma_data.per_example_law,
    lemma_data.covariance,
    lemma_data.full_gradient,
    lemma_data.norm_law,
    lemma_data.sample_covariance,
    lemma_data.independence,
    lemma_moments.reciprocal_moment,
    lemma_moments.population,
    lemma_moments.unbiased,
    lemma_moments.biased,
    lemma_moments.exact_law,
    lemma_moments.variance,
)


def steps() -> tuple[Step, ...]:
    """All steps in order, unchecked; `derivation` checks them.

    Returns:
        The thirteen steps of the proof and the three limits.
    """
    return tuple(build() for build in _BUILDERS) + lemma_moments.limits()


def derivation() -> tuple[Step, ...]:
    """The whole proof, every step checked.

    Returns:
        The steps, in the order in which they build on one another.

    Raises:
        DerivationError: if a step's formula disagrees with its independent route.
    """
    proof = steps()
    for step in proof:
        if not step.holds():
            raise DerivationError(f"{step.name}: {step.formula} does not survive: {step.route}")
    return proof
