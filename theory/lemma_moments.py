"""Lemma 4.1, second half: from two independent χ² variables to mean, law and limits (steps 8 on)."""

import sympy as sp

from theory.symbolic import (
    Formula,
    N,
    Step,
    chi_square_density,
    chi_square_mean,
    convergent_branch,
    q,
    r,
    s,
    same,
    z,
)


def reciprocal_moment_condition() -> sp.Basic:
    """The condition under which E[1/χ²_r] converges, read off the symbolic integral.

    Returns:
        The relational `r > 2`.
    """
    pieces = chi_square_mean(1 / q, r).atoms(sp.Piecewise)
    return next(iter(pieces)).args[0][1]


def reciprocal_moment() -> Step:
    """Step 8: the only place where r > 2 enters."""

    def check(claim: Formula) -> bool:
        direct = convergent_branch(chi_square_mean(1 / q, r))
        laplace = sp.integrate((1 + 2 * s) ** (-(sp.Symbol("m", positive=True) + 2) / 2), (s, 0, sp.oo))
        laplace = convergent_branch(laplace).subs(sp.Symbol("m", positive=True), r - 2)
        diverges = sp.integrate(chi_square_density(sp.Integer(2)) / q, (q, 0, sp.oo)) == sp.oo
        return (
            same(direct, claim)
            and same(laplace, claim)
            and diverges
            and (reciprocal_moment_condition() == (r > 2))
        )

    return Step(
        "reciprocal moment",
        "E[1/χ²_r] is 1/(r-2) for r > 2; for r <= 2 the integral diverges at 0 and the mean is infinite.",
        ("r > 2",),
        r"E\left[1/\chi^2_r\right]",
        1 / (r - 2),
        "the density integral with sympy's own condition, ∫E[e^(-sQ)]ds, and divergence at r = 2",
        check,
    )


def population() -> Step:
    """Step 9: the mean with the population trace on top."""

    def check(claim: Formula) -> bool:
        """Laplace route: N r ∫₀^∞ (1+2s)^(-r/2) ds, for whole r."""
        values = [
            (k, k * N * sp.integrate((1 + 2 * s) ** sp.Rational(-k, 2), (s, 0, sp.oo))) for k in (3, 4, 8)
        ]
        return all(same(claim.subs(r, k), value) for k, value in values)

    return Step(
        "population trace",
        "With the population trace trΣ = r on top, the mean is r·N·E[1/χ²_r].",
        ("covariance", "norm law", "reciprocal moment", "r > 2"),
        r"E[\operatorname{tr}\Sigma/|\bar g|^2] = r\,N\,E[1/\chi^2_r]",
        sp.factor(r * N * reciprocal_moment().formula),
        "∫E[e^(-sQ)]ds for r = 3, 4, 8",
        check,
    )


def _chi_square_first_moment(dof: Formula) -> Formula:
    return sp.simplify(sp.gammasimp(convergent_branch(chi_square_mean(q, dof))))


def _f_mean(top: Formula) -> Formula:
    """Mean of (χ²_{r(N-1)}/top)/(χ²_r/N), from the two χ² integrals."""
    dof = sp.Symbol("nu", positive=True)
    numerator = _chi_square_first_moment(dof).subs(dof, r * (N - 1))
    return sp.factor(numerator / top * N * convergent_branch(chi_square_mean(1 / q, r)).simplify())


def unbiased() -> Step:
    """Step 10: the mean with the unbiased sample covariance on top; the ≈ becomes =."""

    def check(claim: Formula) -> bool:
        return same(_f_mean(N - 1), claim)

    return Step(
        "unbiased covariance",
        "With the unbiased S on top the mean is the same, without approximation: E[tr S] = r, and "
        "independence lets the expectation of the ratio factorise. The paper's ≈ becomes =.",
        ("independence", "sample covariance", "S divides by N-1", "r > 2"),
        r"E[\operatorname{tr}S/|\bar g|^2]",
        r * N / (r - 2),
        "product of the two χ² integrals",
        check,
    )


def biased() -> Step:
    """Step 11: the mean with the biased one."""

    def check(claim: Formula) -> bool:
        return same(_f_mean(N), claim)

    return Step(
        "biased covariance",
        "With S dividing by N the mean is smaller by exactly (N-1)/N: the noise scale of sampling with "
        "replacement from the N examples.",
        ("independence", "sample covariance", "S divides by N", "r > 2"),
        r"E[\tfrac{N-1}{N}\operatorname{tr}S/|\bar g|^2]",
        sp.factor((r * N / (r - 2)) * (N - 1) / N),
        "product of the two χ² integrals with the other divisor",
        check,
    )


def exact_law() -> Step:
    """Step 12: the density of the ratio."""
    a, b = r * (N - 1) / 2, r / 2
    scaled = (N - 1) * z / N
    formula = (
        ((N - 1) / N)
        * scaled ** (a - 1)
        * (1 + scaled) ** (-(a + b))
        * sp.gamma(a + b)
        / (sp.gamma(a) * sp.gamma(b))
    )

    def check(claim: Formula) -> bool:
        """Density of a ratio: ∫ (dX/dz) f_X(c z q) f_Y(q) dq with X = c z Y, c = (N-1)/N."""
        for rank, n in ((2, 2), (3, 3), (4, 5), (8, 4)):
            c = sp.Rational(n - 1, n)
            top = chi_square_density(sp.Integer(rank * (n - 1))).subs(q, c * z * q)
            ratio = sp.integrate(
                sp.powsimp(c * q * top * chi_square_density(sp.Integer(rank))), (q, 0, sp.oo)
            )
            if not same(ratio, claim.subs({r: rank, N: n})):
                return False
        return True

    return Step(
        "exact law",
        "tr(S)/|ḡ|² is N times an F variable with (r(N-1), r) degrees of freedom; this is its density at z.",
        ("independence", "norm law", "sample covariance"),
        "f(z)",
        formula,
        "the ratio integral of two χ² densities for four pairs (r, N)",
        check,
    )


def variance() -> Step:
    """Step 13: the variance."""

    def check(claim: Formula) -> bool:
        dof = sp.Symbol("nu", positive=True)
        second = (
            sp.gammasimp(convergent_branch(chi_square_mean(q**2, dof))).subs(dof, r * (N - 1)) / (N - 1) ** 2
        )
        inverse = convergent_branch(chi_square_mean(q**-2, r))
        return same(second * N**2 * inverse - (r * N / (r - 2)) ** 2, claim)

    return Step(
        "variance",
        "The variance of tr(S)/|ḡ|²; it is infinite for r <= 4.",
        ("independence", "r > 4"),
        r"\operatorname{Var}[\operatorname{tr}S/|\bar g|^2]",
        N**2 * 2 * r**2 * (r * N - 2) / (r * (N - 1) * (r - 2) ** 2 * (r - 4)),
        "second moments of the two χ² integrals",
        check,
    )


def _limit(name: str, statement: str, symbol: str, of: Formula, where: tuple, assumes: str) -> Step:
    value = sp.limit(of, *where)

    def check(claim: Formula) -> bool:
        """Approach the limit numerically, in exact arithmetic, and see the distance shrink."""
        variable, target, *side = where
        points = [target + sp.Rational(1, 10**k) if side else sp.Integer(10**k) for k in (6, 9, 12)]
        seen = [of.subs(variable, p) for p in points]
        if claim == sp.oo:
            fixed = [v.subs({N: 7, r: 7}) for v in seen]
            return fixed[0] > 10**5 and fixed[2] > fixed[1] > fixed[0]
        gaps = [abs((v - claim).subs({N: 7, r: 7})) for v in seen]
        return gaps[2] < gaps[1] < gaps[0] and gaps[2] < sp.Rational(1, 10**8)

    return Step(name, statement, (assumes,), symbol, value, "exact arithmetic along a sequence", check)


def limits() -> tuple[Step, ...]:
    """The limits of the mean and of the relative variance."""
    mean = r * N / (r - 2)
    return (
        _limit(
            "limit r → ∞",
            "For large r the mean is N: the plug-in number reads the size of the data set.",
            r"\lim_{r\to\infty} \frac{rN}{r-2}",
            mean,
            (r, sp.oo),
            "N fixed",
        ),
        _limit(
            "limit r → 2⁺",
            "Towards r = 2 the mean diverges; the median does not.",
            r"\lim_{r\to2^+} \frac{rN}{r-2}",
            mean,
            (r, 2, "+"),
            "N fixed",
        ),
        _limit(
            "limit N → ∞",
            "The mean per example, r/(r-2), does not depend on N, and its relative variance does not vanish "
            "either: the number never settles, since the population it approaches has no signal.",
            r"\lim_{N\to\infty} \operatorname{Var}/\operatorname{mean}^2",
            sp.simplify(variance().formula / mean**2),
            (N, sp.oo),
            "r > 4 fixed",
        ),
    )
