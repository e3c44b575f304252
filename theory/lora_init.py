"""LoRA at initialisation: W = W₀ + s·B·A with B = 0, so only factor B has a gradient.

For one example with output gradient δ [d_out] and input x [d_in], ∂/∂B = s·δ(Ax)ᵀ and ∂/∂A = s·Bᵀδxᵀ = 0. So
the noise scale of factor B is that of the full weights seen through A: through AAᵀ [r, r] and nothing else.

All statements hold at initialisation with a *random* A. Later in training they are a hypothesis, and for
PiSSA or MiLoRA, whose subspaces are not random, they are not claimed.
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

from theory.domain import Floats, choice, count, finite, matrix, non_negative, positive, probability
from theory.domain import seed as check_seed
from theory.spectra import plugin_mean, repeated_reciprocal_moment

_KURTOSIS = {"gaussian": 3.0, "kaiming_uniform": 1.8}
INITIALISATIONS = ("gaussian", "kaiming_uniform", "orthonormal")
_ROUNDING = 1e-9
_LABEL_DEVIATIONS = 10.0


def lora_null_factor(r: int, d_out: int) -> float:
    """r·d_out/(r·d_out - 2): the lemma's factor with all entries of factor B counted.

    Labels ±1 independent over outputs, orthonormal A. Exact for d_out = 1 (it is the lemma), asymptotic in N
    otherwise: δ(Ax)ᵀ has rank one, and only its mean over many examples looks Gaussian in r·d_out
    dimensions. `b_factor_null_mean` is exact at finite N. There r <= 2 has an infinite mean for every d_out:
    with probability 2^((1-N)(d_out-1)) the outputs' labels agree up to sign and only r directions are left.

    Args:
        r: LoRA rank, >= 1.
        d_out: outputs of the layer, >= 1.

    Returns:
        The factor on N; `inf` for r·d_out <= 2.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    entries = count("r", r) * count("d_out", d_out)
    return float("inf") if entries <= 2 else entries / (entries - 2)


def b_factor_null_mean_given(r: int, label_gram: ArrayLike, n: int) -> float:
    """E[tr(S)/|ḡ_B|²] given the labels, exact at finite N, orthonormal A, standard normal inputs.

    Given Y [N, d_out] with ±1 entries, N²|ḡ_B|² = |YᵀX|² = Σⱼ κⱼ χ²_r with κ the eigenvalues of YᵀY. The
    ratio |X|²/|YᵀX|² is independent of |X|, so E[ratio] = E[1/|YᵀX|²]·(rN - 2), and
    E[tr(S)/|ḡ_B|²] = (d_out N² (rN-2) E[1/Q] - N)/(N-1),  Q = Σ κⱼ χ²_r.

    Args:
        r: LoRA rank, >= 1.
        label_gram: [d_out, d_out], YᵀY.
        n: number of examples N, >= 2.

    Returns:
        The conditional mean, in examples; `inf` when Q has two degrees of freedom or fewer.

    Raises:
        ValueError: if the matrix is not square, symmetric and positive semidefinite with N on its diagonal.
    """
    r, n = count("r", r), count("n", n, 2)
    gram = matrix("label_gram", label_gram, square=True)
    if gram.ndim != 2 or not np.allclose(gram, gram.T, rtol=_ROUNDING):
        raise ValueError(f"label_gram: needs one symmetric matrix, got {gram.tolist()}")
    if not np.allclose(np.diag(gram), n, rtol=_ROUNDING):
        raise ValueError(f"label_gram: needs n = {n} on the diagonal, got {np.diag(gram).tolist()}")
    kappa = np.linalg.eigvalsh(gram)
    if kappa.min() < -_ROUNDING * kappa.max():
        raise ValueError(f"label_gram: needs eigenvalues >= 0, got {float(kappa.min())!r}")
    kappa = np.where(kappa < _ROUNDING * kappa.max(), 0.0, kappa)
    inverse = repeated_reciprocal_moment(kappa, r)
    return inverse if np.isinf(inverse) else _null_mean(inverse, r, gram.shape[0], n)


def _null_mean(inverse: float, r: int, d_out: int, n: int) -> float:
    """From E[1/Q] to E[tr(S)/|ḡ_B|²]: (d_out N² (rN-2) E[1/Q] - N)/(N-1)."""
    return (d_out * n * (r * n - 2) * inverse - 1) * (n / (n - 1))


def b_factor_null_mean(r: int, d_out: int, n: int) -> float:
    """E[tr(S)/|ḡ_B|²] over labels too, for one or two outputs, by enumeration of the labels.

    For two outputs YᵀY = N[[1, c], [c, 1]] with c the mean of N fair signs, and given c

        E[1/Q] = ∫₀^∞ ((1+2tN)² - (2tNc)²)^(-r/2) dt = ₂F₁(½, 1; (r+1)/2; c²) / (2N(r-1)),

    so the N+1 values of c are summed with binomial weights (those within ten standard deviations, the rest
    has probability below 1e-22). Over N it tends to r·d_out/(r·d_out-2) as N grows: from above for a handful
    of examples (labels may agree), then from slightly below.

    Args:
        r: LoRA rank, >= 1.
        d_out: 1 or 2.
        n: number of examples N, >= 2.

    Returns:
        The mean, in examples; `inf` if it is infinite for some labels (r <= 2: all labels may agree).

    Raises:
        ValueError: if d_out is not 1 or 2 (use `theory.montecarlo` there), or r or n is outside its domain.
    """
    r, n = count("r", r), count("n", n, 2)
    if count("d_out", d_out) > 2:
        raise ValueError(f"d_out: needs 1 or 2 for enumeration, got {d_out}")
    if r <= 2:
        return float("inf")
    if d_out == 1:
        return b_factor_null_mean_given(r, [[float(n)]], n)
    reach = min(n, _LABEL_DEVIATIONS * np.sqrt(n) / 2)
    agreeing = np.arange(max(0, np.ceil(n / 2 - reach)), min(n, np.floor(n / 2 + reach)) + 1)
    inverse = special.hyp2f1(0.5, 1.0, (r + 1) / 2, (2 * agreeing / n - 1) ** 2) / (2 * n * (r - 1))
    return _null_mean(float(stats.binom.pmf(agreeing, n, 0.5) @ inverse), r, 2, n)


def gaussian_a_mean(r: int, d_in: int, n: int) -> float:
    """E[tr(AAᵀ)/|Aḡ|²] = N(r·d_in - 2)/((r-2)(d_in-2)) for Gaussian A: closed form, one output.

    Turn A so that ḡ is its first axis: |Aḡ|² = |ḡ|²χ²_r and tr(AAᵀ) = χ²_r + χ²_{r(d_in-1)} with the same
    first χ², so the mean is E[1/|ḡ|²]·(1 + r(d_in-1)/(r-2)). Tends to rN/(r-2) for d_in ≫ r.

    Args:
        r: LoRA rank, >= 1.
        d_in: inputs of the layer, >= r.
        n: number of examples N, >= 2.

    Returns:
        The mean, in examples; `inf` for r <= 2 or d_in <= 2.

    Raises:
        ValueError: if d_in < r.
    """
    r, d, n = count("r", r), count("d_in", d_in), count("n", n, 2)
    if d < r:
        raise ValueError(f"d_in: needs at least r = {r}, got {d_in}")
    return float("inf") if r <= 2 else n * (r * d - 2) / ((r - 2) * (d - 2))


def init_factor_a(kind: str, r: int, d_in: int, seed: int | np.random.Generator) -> Floats:
    """One random factor A, scaled so that E[AAᵀ] = I (the scale leaves every noise scale alone).

    Args:
        kind: "orthonormal", "gaussian", or "kaiming_uniform" (peft's default, up to scale).
        r: LoRA rank, >= 1.
        d_in: inputs, >= r.
        seed: seed or generator.

    Returns:
        [r, d_in].

    Raises:
        ValueError: if d_in < r or an argument is outside its domain.
    """
    kind, r, d = choice("kind", kind, INITIALISATIONS), count("r", r), count("d_in", d_in)
    if d < r:
        raise ValueError(f"d_in: needs at least r = {r}, got {d_in}")
    rng = np.random.default_rng(check_seed("seed", seed))
    if kind == "kaiming_uniform":
        return rng.uniform(-1, 1, (r, d)) * np.sqrt(3 / d)
    a = rng.standard_normal((r, d)) / np.sqrt(d)
    return a if kind == "gaussian" else np.linalg.qr(a.T)[0].T


def a_factor_mean(a: ArrayLike, n: int) -> float:
    """E[tr(AAᵀ)/|Aḡ|²] given A, one output, no signal: the spectrum integral over eigenvalues of AAᵀ.

    Args:
        a: [r, d_in], factor A.
        n: number of examples N, >= 2.

    Returns:
        The mean over data sets, in examples.

    Raises:
        ValueError: if A is not a finite matrix other than zero, or n is outside its domain.
    """
    factor, n = matrix("a", a), count("n", n, 2)
    if not np.any(factor):
        raise ValueError("a: needs a matrix other than zero, got all zero")
    singular = np.linalg.svd(factor / np.abs(factor).max(), compute_uv=False)
    return plugin_mean(np.where(singular < 1e-14 * singular.max(), 0.0, singular) ** 2, n)


def a_effective_rank(kind: str, r: int, d_in: int) -> float:
    """(E tr AAᵀ)²/E tr (AAᵀ)²: r for orthonormal A, r·d_in/(d_in + r - 2 + κ) for entries of kurtosis κ.

    κ = 3 (Gaussian), 9/5 (uniform). E tr(AAᵀ)² = r·d(κ + d - 1 + r - 1) for unit entries: the diagonal terms
    give d(κ + d - 1) each, the off-diagonal ones d each.

    Args:
        kind: as in `init_factor_a`.
        r: LoRA rank, >= 1.
        d_in: inputs, >= r.

    Returns:
        The effective rank (dimensionless).

    Raises:
        ValueError: if d_in < r or an argument is outside its domain.
    """
    kind, r, d = choice("kind", kind, INITIALISATIONS), count("r", r), count("d_in", d_in)
    if d < r:
        raise ValueError(f"d_in: needs at least r = {r}, got {d_in}")
    return float(r) if kind == "orthonormal" else r * d / (d + r - 2 + _KURTOSIS[kind])


def subspace_snr(captured: float, sq_signal: float, noise_variance: float) -> float:
    """SNR_eff = |Aw|²/(s² + |w|² - |Aw|²): what the subspace misses turns into noise.

    Args:
        captured: |Aw|², in [0, |w|²].
        sq_signal: |w|², > 0.
        noise_variance: s², >= 0.

    Returns:
        The effective signal to noise ratio; `inf` when all is captured and there is no noise.

    Raises:
        ValueError: if more is captured than there is, or an argument is outside its domain.
    """
    total, noise = positive("sq_signal", sq_signal), non_negative("noise_variance", noise_variance)
    captured = finite("captured", captured)
    if not 0 <= captured <= total:
        raise ValueError(f"captured: needs a number in [0, sq_signal = {total}], got {captured!r}")
    rest = noise + (total - captured)
    return float("inf") if rest == 0 else captured / rest


def subspace_b_ratio_of_means(d: int, snr: float) -> float:
    """E[trΣ]/E[|G|²] over random r-dimensional subspaces: d(1 + 1/SNR) + 1, exactly, for every r.

    trΣ = r(|w|²+s²) + |Aw|² and E|Aw|² = (r/d)|w|²: signal and noise are caught in the same proportion, so
    the rank cancels. This is the full model's own B_simple.

    Args:
        d: dimension of the full weight space, >= 1.
        snr: |w|²/s² of the full problem, > 0.

    Returns:
        The noise scale, in examples.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    return count("d", d) * (1 + 1 / positive("snr", snr)) + 1


def subspace_b_mean(r: int, d: int, snr: float) -> float:
    """Mean over subspaces of B itself: r(d-2)/(r-2)·(1 + 1/SNR) + 1.

    |Aw|²/|w|² ~ Beta(r/2, (d-r)/2), whose reciprocal has mean (d-2)/(r-2). Above `subspace_b_ratio_of_means`
    by at most r/(r-2): a little dependence on r, gone for large r.

    Args:
        r: dimension of the subspace, 1 <= r <= d.
        d: dimension of the full space.
        snr: |w|²/s² of the full problem, > 0.

    Returns:
        The mean, in examples; `inf` for r <= 2 and r < d.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    r, d = _subspace(r, d)
    inverse = 1.0 if r == d else (float("inf") if r <= 2 else (d - 2) / (r - 2))
    return r * inverse * (1 + 1 / positive("snr", snr)) + 1


def subspace_b_quantile(p: float, r: int, d: int, snr: float) -> float:
    """Quantile of B over random subspaces, from the Beta law of the captured share; scatter shrinks in r.

    Args:
        p: in (0, 1).
        r: dimension of the subspace, 1 <= r <= d.
        d: dimension of the full space.
        snr: |w|²/s² of the full problem, > 0.

    Returns:
        The quantile, in examples.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    r, d = _subspace(r, d)
    p = probability("p", p)
    share = 1.0 if r == d else float(stats.beta.isf(p, r / 2, (d - r) / 2))
    return r / share * (1 + 1 / positive("snr", snr)) + 1


def _subspace(r: int, d: int) -> tuple[int, int]:
    """Both counts, r at most d.

    Raises:
        ValueError: if r > d.
    """
    r, d = count("r", r), count("d", d)
    if r > d:
        raise ValueError(f"r: needs at most d = {d}, got {r}")
    return r, d
