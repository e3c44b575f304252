"""Lemma 4.1, first half: from the data model to two independent χ² variables (steps 1 to 7)."""

from typing import Any

import sympy as sp

from theory.symbolic import (
    Formula,
    N,
    Step,
    chi_square_density,
    convergent_branch,
    gaussian_mean,
    q,
    r,
    s,
    same,
    u,
)


def gradient() -> Step:
    """Step 1: differentiate the loss at w = 0, for any dimension."""
    i, k = sp.symbols("i k", integer=True, positive=True)
    dim = sp.Symbol("d", integer=True, positive=True)
    w: Any = sp.IndexedBase("w")
    x: Any = sp.IndexedBase("x")
    y = sp.Symbol("y")
    residual = sp.Sum(w[i] * x[i], (i, 1, dim)) - y
    slope = sp.diff(residual**2 / 2, w[k]).replace(sp.KroneckerDelta, lambda a, b: sp.KroneckerDelta(a, b))
    at_zero = slope.xreplace({residual: -y}).doit()
    formula = at_zero.replace(sp.Piecewise, lambda *args: args[0][0])

    def check(claim: Formula) -> bool:
        for size in (1, 2, 3):
            ws, xs = sp.symbols(f"w1:{size + 1}"), sp.symbols(f"x1:{size + 1}")
            loss = (sum(a * b for a, b in zip(ws, xs, strict=True)) - y) ** 2 / 2
            zero = dict.fromkeys(ws, 0)
            for j in range(size):
                h = sp.Symbol("h", positive=True)
                up, down = ({**zero, ws[j]: h}, {**zero, ws[j]: -h})
                difference = sp.expand((loss.subs(up) - loss.subs(down)) / (2 * h))
                if sp.expand(difference - claim.subs(x[k], xs[j])) != 0:
                    return False
        return True

    return Step(
        "gradient",
        "The per-example gradient of ½(wᵀx̃ - y)² at w = 0 is -y x̃, component by component.",
        ("squared loss", "w = 0"),
        r"g_k = \partial_{w_k}\tfrac12(w^\top\tilde x-y)^2\big|_{w=0}",
        formula,
        "central differences, exact for a quadratic, in dimension 1 to 3",
        check,
    )


def per_example_law() -> Step:
    """Step 2: the sign flip by y leaves a centred Gaussian alone."""
    x = sp.Symbol("x", real=True)

    def check(claim: Formula) -> bool:
        """Given y = +1 and given y = -1 the transform is the same, so y drops out."""
        return all(same(gaussian_mean(sp.exp(-u * label * x), x), claim) for label in (1, -1))

    return Step(
        "per-example law",
        "Each coordinate of g = -yx is N(0, 1), whatever y is: the sign flip leaves a centred "
        "Gaussian alone, so g ~ N(0, I_r) is independent of the labels.",
        ("x ~ N(0, I_r)", "y = ±1 independent of x"),
        r"E[e^{u g_k}\mid y]",
        sp.exp(u**2 / 2),
        "the Gaussian integral, done for y = +1 and for y = -1",
        check,
    )


def _orthonormal(d: int, columns: int) -> sp.Matrix:
    """Rational orthonormal columns: the first ones of a Householder reflection."""
    v = sp.Matrix([sp.Integer(j + 1) for j in range(d)])
    return (sp.eye(d) - 2 * v * v.T / (v.T * v)[0]).extract(list(range(d)), list(range(columns)))


def covariance() -> Step:
    """Step 3: the population covariance is a projection of rank r."""

    def check(claim: Formula) -> bool:
        a, b = sp.symbols("a b", real=True)
        joint = sp.exp((a**2 + b**2) / 2)
        second = [sp.diff(joint, m, n).subs({a: 0, b: 0}) for m, n in ((a, a), (a, b))]
        for rank in (1, 2, 3):
            inner = sp.Matrix(rank, rank, lambda m, n: second[0] if m == n else second[1])
            basis = _orthonormal(4, rank)
            outer = basis * inner * basis.T
            if outer.trace() != claim.subs(r, rank) or outer**2 != outer:
                return False
        return True

    return Step(
        "covariance",
        "The population gradient is zero and Σ = UUᵀ, a projection of rank r; its trace does not see U.",
        ("per-example law", "UᵀU = I_r"),
        r"\operatorname{tr}\Sigma = E|g|^2",
        r,
        "second derivatives of the transform, carried through rational orthonormal U with d = 4, r = 1..3",
        check,
    )


def full_gradient() -> Step:
    """Step 4: the mean of N of them."""

    def check(claim: Formula) -> bool:
        moments = [(sp.diff(claim, u, order) if order else claim).subs(u, 0) for order in (0, 1, 2, 3, 4)]
        for n in (1, 2, 3, 5):
            variance = sum(sp.KroneckerDelta(i, j) for i in range(n) for j in range(n)) / sp.Integer(n) ** 2
            gaussian = (1, 0, variance, 0, 3 * variance**2)
            if any(m.subs(N, n) != expected for m, expected in zip(moments, gaussian, strict=True)):
                return False
        return True

    return Step(
        "full gradient",
        "The mean of N independent per-example gradients is N(0, I_r/N): the full gradient is pure noise "
        "around a population gradient of zero.",
        ("per-example law", "independent examples"),
        r"E[e^{u\bar g_k}] = \left(e^{(u/N)^2/2}\right)^N",
        sp.powsimp(sp.exp(N * (u / N) ** 2 / 2)),
        "first four moments against the double sum Σᵢⱼ δᵢⱼ/N² and the Gaussian 3σ⁴, N = 1, 2, 3, 5",
        check,
    )


def norm_law() -> Step:
    """Step 5: its squared length, times N."""
    x = sp.Symbol("x", real=True)

    def check(claim: Formula) -> bool:
        one = gaussian_mean(sp.exp(-s * x**2), x)
        density = sp.integrate(sp.powsimp(sp.exp(-s * q) * chi_square_density(r)), (q, 0, sp.oo))
        return same(sp.log(one) * r, sp.expand_log(sp.log(claim))) and same(convergent_branch(density), claim)

    return Step(
        "norm law",
        "N|ḡ|² is χ² with r degrees of freedom.",
        ("full gradient",),
        r"E[e^{-sN|\bar g|^2}]",
        (1 + 2 * s) ** (-r / 2),
        "the Gaussian integral to the power r, and the Laplace transform of the χ²_r density",
        check,
    )


def helmert(n: int) -> sp.Matrix:
    """The n × n Helmert matrix: orthogonal, first row (1, .., 1)/√n.

    Args:
        n: size, >= 2.

    Returns:
        Row k >= 1 is (1, .., 1, -k, 0, .., 0)/√(k(k+1)) with k ones.
    """
    rows: list[list[Any]] = [[1 / sp.sqrt(n)] * n]
    for k in range(1, n):
        rows.append([1 / sp.sqrt(k * (k + 1))] * k + [-k / sp.sqrt(k * (k + 1))] + [0] * (n - k - 1))
    return sp.Matrix(rows)


def sample_covariance() -> Step:
    """Step 6: the scatter around the mean, and what Bessel's N-1 is for."""

    def check(claim: Formula) -> bool:
        """Σ(gᵢ-ḡ)² is a sum of n-1 squares of Helmert contrasts, each N(0, 1)."""
        for n in (2, 3, 4, 5):
            examples = sp.symbols(f"g1:{n + 1}")
            rotated = helmert(n) * sp.Matrix(examples)
            mean = sum(examples) / n
            scatter = sum((v - mean) ** 2 for v in examples)
            contrasts = [rotated[k] ** 2 for k in range(1, n)]
            if sp.expand(scatter - sum(contrasts)) != 0 or sp.expand(rotated[0] ** 2 - n * mean**2) != 0:
                return False
            if not same(sp.log((1 + 2 * s) ** (-r * len(contrasts) / 2) / claim.subs(N, n)), sp.Integer(0)):
                return False
        return True

    return Step(
        "sample covariance",
        "(N-1) tr S = Σ|gᵢ - ḡ|² is χ² with r(N-1) degrees of freedom: one is spent on the mean per "
        "coordinate, which is what dividing by N-1 repairs.",
        ("per-example law", "S divides by N-1"),
        r"E[e^{-s(N-1)\operatorname{tr}S}]",
        (1 + 2 * s) ** (-r * (N - 1) / 2),
        "Helmert contrasts written out for N = 2..5",
        check,
    )


def independence() -> Step:
    """Step 7: mean and scatter are independent."""
    k, j, i = sp.symbols("k j i", integer=True, positive=True)

    def check(claim: Formula) -> bool:
        """Inner products of Helmert rows for every k, and for j < k, by symbolic sums."""
        ones = sp.Sum(1, (i, 1, k)).doit()
        with_mean = ones - k
        with_shorter = sp.Sum(1, (i, 1, j)).doit() - j
        norm = (ones + k**2) / (k * (k + 1))
        return same(with_mean, claim) and same(with_shorter, claim) and same(norm, sp.Integer(1))

    return Step(
        "independence",
        "ḡ and S are independent: the contrasts that make up S are orthogonal to the one that makes up "
        "ḡ, and uncorrelated jointly Gaussian variables are independent (Cochran).",
        ("per-example law (Gaussian: for other data this fails)",),
        r"\operatorname{Cov}(h_k\cdot g,\ \bar g)",
        sp.Integer(0),
        "orthonormality of the Helmert rows for all k by symbolic sums",
        check,
        "W. G. Cochran 1934",
    )
