"""The exact law of Lemma 4.1's quantity: tr(S)/|ḡ|² ~ N · F(r(N-1), r).

S is the unbiased sample covariance of the N per-example gradients, ḡ their mean. Under the lemma's
data (gᵢ ~ N(0, I_r), see `theory.lemma`) N|ḡ|² ~ χ²_r and (N-1) tr S ~ χ²_{r(N-1)} are independent, so
their ratio is an F variable times N. Nothing here is asymptotic. r may be any real number > 0, so that
an effective rank can be put in; the lemma itself has whole r.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from theory.domain import Floats, count, positive, probability, real_array

_STIRLING_FROM = 16.0
_SMALLEST_RANK, _LARGEST_RANK = 0.1, 1e9


def lemma_mean(r: float, n: int) -> float:
    """E[tr(S)/|ḡ|²] = rN/(r-2); infinite for r <= 2.

    E[1/χ²_r] = ∫ q^(r/2-2) e^(-q/2) dq / (2^(r/2) Γ(r/2)) diverges at q = 0 when r <= 2: with one or
    two directions the gradient comes too close to zero too often. The median stays finite.

    Args:
        r: rank, > 0.
        n: number of examples N in the data set, >= 2.

    Returns:
        The mean, in examples.

    Raises:
        ValueError: if an argument is outside its domain.

    Source: arXiv:2602.09492, Lemma 4.1 (there with "≈"; `theory.lemma` shows it is "=").
    """
    r, n = positive("r", r), count("n", n, 2)
    return float("inf") if r <= 2 else n * (r / (r - 2))


def lemma_mean_biased(r: float, n: int) -> float:
    """The mean when S divides by N instead of N-1: rN/(r-2) · (N-1)/N = r(N-1)/(r-2).

    Args:
        r: rank, > 0.
        n: number of examples N, >= 2.

    Returns:
        The mean, in examples; `inf` for r <= 2, for `lemma_mean`'s reason.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    r, n = positive("r", r), count("n", n, 2)
    return float("inf") if r <= 2 else (n - 1) * (r / (r - 2))


def lemma_variance(r: float, n: int) -> float:
    """Var[tr(S)/|ḡ|²] = N² · 2r²(rN-2) / (r(N-1)(r-2)²(r-4)); infinite for r <= 4.

    E[1/(χ²_r)²] diverges for r <= 4, so no standard error of a simulated mean can be trusted there.

    Args:
        r: rank, > 0.
        n: number of examples N, >= 2.

    Returns:
        The variance, in examples².

    Raises:
        ValueError: if an argument is outside its domain.
    """
    r, n = positive("r", r), count("n", n, 2)
    if r <= 4:
        return float("inf")
    return n * (n / (n - 1)) * 2 * (r / (r - 2)) * (n / (1 - 2 / r) - 2 / (r - 2)) / (r - 4)


@dataclass(frozen=True)
class LemmaLaw:
    """The distribution N · F(r(N-1), r), stable from r = 1 to 10⁶ and N to 10⁹.

    Attributes:
        r: rank, in [0.1, 10⁹]; beyond, the incomplete beta function gives out.
        n: number of examples N, >= 2.

    Raises:
        ValueError: if r or n is outside its domain.
    """

    r: float
    n: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "r", positive("r", self.r))
        object.__setattr__(self, "n", count("n", self.n, 2))
        if not _SMALLEST_RANK <= self.r <= _LARGEST_RANK:
            domain = (
                f"a number from {_SMALLEST_RANK:g} to {_LARGEST_RANK:g}, where the law is computed stably"
            )
            raise ValueError(f"r: needs {domain}, got {self.r!r}")

    @property
    def dof(self) -> tuple[float, float]:
        """Degrees of freedom (r(N-1), r) of the F variable."""
        return self.r * (self.n - 1), self.r

    @property
    def mean(self) -> float:
        """See `lemma_mean`."""
        return lemma_mean(self.r, self.n)

    @property
    def variance(self) -> float:
        """See `lemma_variance`."""
        return lemma_variance(self.r, self.n)

    @property
    def median(self) -> float:
        """The median, in examples; finite for every r > 0, also where the mean is not."""
        return self.quantile(0.5)

    def cdf(self, x: ArrayLike) -> Floats:
        """P(tr(S)/|ḡ|² <= x), by the incomplete beta function.

        Args:
            x: any shape, in examples; below zero the answer is 0.

        Returns:
            The probabilities, in x's shape.

        Raises:
            ValueError: if x holds nan or is no array of numbers.
        """
        return special.fdtr(*self.dof, np.maximum(_places(x), 0.0) / self.n)

    def sf(self, x: ArrayLike) -> Floats:
        """P(tr(S)/|ḡ|² > x), accurate in the far tail; arguments and errors as in `cdf`."""
        return special.fdtrc(*self.dof, np.maximum(_places(x), 0.0) / self.n)

    def quantile(self, p: float) -> float:
        """The value below which the quantity falls with probability p.

        Args:
            p: in (0, 1).

        Returns:
            The quantile, in examples.

        Raises:
            ValueError: if an argument is outside its domain.
        """
        value = float(self.n * special.fdtri(*self.dof, probability("p", p)))
        if not np.isfinite(value):
            raise ValueError(f"p: needs a quantile within the range of a float, got {p!r} at r = {self.r:g}")
        return value

    def logpdf(self, x: ArrayLike) -> Floats:
        """Log density at x > 0 (-inf elsewhere); see `log_f_density` for why it is stable.

        Args:
            x: any shape, in examples.

        Returns:
            Log of the density per example, in x's shape.

        Raises:
            ValueError: if x holds nan or is no array of numbers.
        """
        x = _places(x)
        inside = (x / self.n > 0) & (x < np.inf)
        z = np.where(inside, x, 1.0) / self.n
        return np.where(inside, log_f_density(z, *self.dof) - np.log(self.n), -np.inf)

    def pdf(self, x: ArrayLike) -> Floats:
        """Density at x, per example; see `logpdf`."""
        return np.exp(self.logpdf(x))


def log_f_density(z: ArrayLike, d1: float, d2: float) -> Floats:
    """Log density of F(d1, d2), without cancellation for degrees of freedom up to 10¹⁵.

    With a = d1/2, b = d2/2, s = az + b the textbook form subtracts numbers of size a·log a. Loader's
    deviance form keeps only their difference:

        a·L(b(z-1)/s) + b·L(-a(z-1)/s) + ½ log(ab/(a+b)) - ½ log 2π - log z + c(a+b) - c(a) - c(b)

    where L(e) = log(1+e) - e and c(x) is Stirling's remainder. The first-order terms of L cancel exactly
    because a·b(z-1)/s = b·a(z-1)/s. (scipy 1.17's `f.logpdf`, in the textbook form, is off by 1 or more from
    d1 = 10¹⁵ on.) Numerators and s are divided by max(z, 1), so that no z > 0 overflows.

    Args:
        z: > 0, any shape.
        d1: numerator degrees of freedom, > 0.
        d2: denominator degrees of freedom, > 0.

    Returns:
        Log density, in z's shape.

    Raises:
        ValueError: if a degree of freedom or a z is not a finite number > 0.

    Source: C. Loader 2000, "Fast and accurate computation of binomial probabilities".
    """
    z = real_array("z", z)
    if not np.all((z > 0) & (z < np.inf)):
        raise ValueError(f"z: needs finite numbers > 0, got {z[~((z > 0) & (z < np.inf))].flat[0]!r}")
    a, b = positive("d1", d1) / 2, positive("d2", d2) / 2
    down = np.maximum(z, 1.0)
    lever, s = z / down - 1 / down, a * (z / down) + b / down  # (z-1)/max(z, 1) and s/max(z, 1)
    deviance = a * _log1p_minus(b * lever / s, z / down * (a + b) / s) + b * _log1p_minus(
        -a * lever / s, (a + b) / down / s
    )
    stirling = _stirling_remainder(a + b) - _stirling_remainder(a) - _stirling_remainder(b)
    return deviance + 0.5 * np.log(b / (1 + b / a)) - 0.5 * np.log(2 * np.pi) - np.log(z) + stirling


def _places(x: ArrayLike) -> Floats:
    """Places on the real line, infinities included.

    Raises:
        ValueError: if one is nan or no number.
    """
    places = real_array("x", x)
    if np.any(np.isnan(places)):
        raise ValueError("x: needs numbers, got nan")
    return places


def _log1p_minus(e: Floats, one_plus: Floats) -> Floats:
    """Log(1+e) - e, by its series where that would cancel; 1+e is passed in, exact also near e = -1."""
    small = np.abs(e) < 0.01
    t = np.where(small, e, 0.0)
    series = -(t**2) * sum((-t) ** k / (k + 2) for k in range(8))
    return np.where(small, series, np.log(one_plus) - e)


def _stirling_remainder(x: float) -> float:
    """Log Γ(x) - [(x-½) log x - x + ½ log 2π], which goes to zero as 1/(12x)."""
    if x < _STIRLING_FROM:
        return float(special.gammaln(x) - ((x - 0.5) * np.log(x) - x + 0.5 * np.log(2 * np.pi)))
    y = 1.0 / (x * x)
    return (1 / 12 - y * (1 / 360 - y * (1 / 1260 - y * (1 / 1680 - y / 1188)))) / x
