"""The derivation of Lemma 4.1: every step holds, every broken step is refused, symbols equal numbers."""

import pytest
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from theory import lemma
from theory.lemma_law import LemmaLaw, lemma_mean, lemma_mean_biased, lemma_variance

STEPS = {step.name: step for step in lemma.steps()}
r, N, z = lemma.r, lemma.N, lemma.z


@pytest.mark.parametrize("name", STEPS)
def test_step_survives_its_independent_route(name: str) -> None:
    """Formula and check arrive at the same expression."""
    assert STEPS[name].holds()


@pytest.mark.parametrize("name", STEPS)
def test_step_refuses_a_wrong_formula(name: str) -> None:
    """No check is vacuous: a perturbed formula fails every one of them."""
    step = STEPS[name]
    wrong = [step.formula + 1, 2 * step.formula + sp.Rational(1, 7)]
    if step.formula == sp.oo:
        wrong = [sp.Integer(7), N]
    assert not any(step.holds(w) for w in wrong)


CONTROLS = [
    ("reciprocal moment", 1 / r, "r instead of r-2"),
    ("population trace", N, "the expected |ḡ|² in place of |ḡ|²"),
    ("population trace", r * N / (r - 1), "r-1 instead of r-2"),
    ("unbiased covariance", (r * N / (r - 2)) * (N - 1) / N, "Bessel's factor dropped"),
    ("biased covariance", r * N / (r - 2), "Bessel's factor where there is none"),
    (
        "sample covariance",
        (1 + 2 * sp.Symbol("s", positive=True)) ** (-r * N / 2),
        "no degree of freedom spent",
    ),
    ("per-example law", sp.exp(sp.Symbol("u", real=True) ** 2), "variance 2"),
    ("variance", 2 * r**2 * N**2 / ((r - 2) ** 2 * (r - 4)), "population trace's variance"),
    ("gradient", sp.Integer(0), "no gradient"),
    ("covariance", r + 1, "one dimension too many"),
]


@pytest.mark.parametrize(("name", "wrong", "why"), CONTROLS, ids=[c[2] for c in CONTROLS])
def test_broken_lemma_is_refused(name: str, wrong: sp.Expr, why: str) -> None:
    """The mistakes that matter are caught symbolically."""
    assert not STEPS[name].holds(wrong), why


def test_derivation_is_complete_and_named_once() -> None:
    """Sixteen steps, distinct names, each with statement, assumptions and route."""
    proof = lemma.derivation()
    assert len(proof) == 16 and len({s.name for s in proof}) == 16
    for step in proof:
        assert step.statement and step.assumes and step.route and step.source
        assert step.statement in str(step) and "✓" in step._repr_markdown_()


def test_derivation_stops_at_a_broken_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """`derivation` raises and names the step."""
    broken = lemma.Step(
        "broken", "1 = 2", ("nothing",), "1", sp.Integer(2), "counting", lambda claim: claim == 1
    )
    monkeypatch.setattr(lemma, "steps", lambda: (broken,))
    with pytest.raises(lemma.DerivationError, match="broken"):
        lemma.derivation()


def test_condition_is_r_greater_than_two() -> None:
    """The existence condition is read off the symbolic integral."""
    assert lemma.reciprocal_moment_condition() == (r > 2)


def test_result_is_rn_over_r_minus_two() -> None:
    """Lemma 4.1: E[tr(S)/|ḡ|²] = rN/(r-2), with = and not ≈."""
    assert sp.simplify(STEPS["unbiased covariance"].formula - r * N / (r - 2)) == 0


def test_limits() -> None:
    """N for r → ∞, divergence at r → 2⁺, and a relative variance of 2/(r-4) that no N removes."""
    assert STEPS["limit r → ∞"].formula == N
    assert STEPS["limit r → 2⁺"].formula == sp.oo
    assert sp.simplify(STEPS["limit N → ∞"].formula - 2 / (r - 4)) == 0


def test_helmert_matrix_is_orthogonal() -> None:
    """The rotation behind N-1 degrees of freedom."""
    for n in (2, 3, 6):
        assert sp.simplify(lemma.helmert(n) * lemma.helmert(n).T - sp.eye(n)) == sp.zeros(n)


@given(st.integers(5, 400), st.integers(2, 10**6))
def test_symbolic_moments_equal_the_law(rank: int, n: int) -> None:
    """Route 1 (sympy, rational) equals route 2 (floating law) for mean, biased mean and variance."""
    at = {r: sp.Integer(rank), N: sp.Integer(n)}
    for name, value in (
        ("unbiased covariance", lemma_mean(rank, n)),
        ("biased covariance", lemma_mean_biased(rank, n)),
        ("variance", lemma_variance(rank, n)),
    ):
        assert value == pytest.approx(float(STEPS[name].formula.subs(at)), rel=1e-13)


@pytest.mark.parametrize(("rank", "n"), [(1, 2), (3, 5), (8, 20), (16, 100)])
def test_symbolic_density_equals_the_law(rank: int, n: int) -> None:
    """The density of step "exact law" is `LemmaLaw.pdf`."""
    density = STEPS["exact law"].formula.subs({r: rank, N: n})
    for ratio in (sp.Rational(1, 3), sp.Integer(1), sp.Rational(7, 2)):
        x = float(ratio) * n  # the step's z is the ratio itself, in examples
        assert LemmaLaw(rank, n).pdf(x) == pytest.approx(
            float(density.subs(z, ratio * n).evalf(30)), rel=1e-11
        )
