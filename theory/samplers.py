"""What is drawn: the lemma's own data sets, and every extension, as functions (generator, size) → draws.

Two kinds: samplers that build the data set itself (x, y, U, per-example gradients, then the estimate), and
samplers of the sufficient statistics, for many draws. `theory.montecarlo` runs them.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from theory.domain import Floats, choice, count, finite_array, like, non_negative, positive, spectrum
from theory.lora_init import INITIALISATIONS, init_factor_a

Sampler = Callable[[np.random.Generator, int], Floats]

DIVISORS = ("N", "N-1")


def step_estimates(gradients: Floats) -> tuple[Floats, Floats]:
    """Unbiased trΣ and |G|² of each set of per-example gradients, by the toolkit's two sums.

    m = mean |g|², q = |mean g|²;  trΣ = n(m - q)/(n-1),  |G|² = (nq - m)/(n-1).

    Args:
        gradients: [M, n, d].

    Returns:
        trΣ [M] and |G|² [M].

    Raises:
        ValueError: if the array is not [M, n, d] with n >= 2, or a value is not finite.
    """
    gradients = finite_array("gradients", gradients)
    if gradients.ndim != 3 or gradients.shape[1] < 2:
        raise ValueError(f"gradients: needs [M, n, d] with n >= 2, got shape {gradients.shape}")
    n = gradients.shape[1]
    m = np.einsum("mnd,mnd->m", gradients, gradients) / n
    mean = gradients.mean(1)
    q = np.einsum("md,md->m", mean, mean)
    return n * (m - q) / (n - 1), (n * q - m) / (n - 1)


def lemma_data(r: int, n: int, d: int | None = None, divisor: str = "N-1") -> Sampler:
    """The lemma's data set itself: x, y, U → gradients -y·Ux at w = 0 → tr(S)/|ḡ|².

    Args:
        r: rank, >= 1.
        n: examples N, >= 2.
        d: ambient dimension >= r: one random orthonormal U [d, r] a chunk; None leaves U out (isometry).
        divisor: "N-1" for the unbiased S, "N" for the biased one (the control without Bessel's factor).

    Returns:
        A sampler of tr(S)/|ḡ|², r·N numbers a draw.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    r, n = count("r", r), count("n", n, 2)
    scale = 1.0 if choice("divisor", divisor, DIVISORS) == "N-1" else (n - 1) / n
    ambient = None if d is None else count("d", d, r)

    def sample(rng: np.random.Generator, size: int) -> Floats:
        x = rng.standard_normal((size, n, r))
        y = rng.choice([-1.0, 1.0], size=(size, n, 1))
        if ambient is not None:
            x = x @ np.linalg.qr(rng.standard_normal((ambient, r)))[0].T
        residual = 0.0 - y  # wᵀx̃ - y at w = 0
        gradients = residual * x
        mean = gradients.mean(1, keepdims=True)
        scatter = np.einsum("mnd,mnd->m", gradients - mean, gradients - mean)
        return scale * scatter / (n - 1) / np.einsum("mnd,mnd->m", mean, mean)

    return sample


def lemma_law(r: float, n: int) -> Sampler:
    """The same ratio from its two χ² variables: 10⁷ draws take a second or two.

    Args:
        r: rank, > 0.
        n: examples N, >= 2.

    Returns:
        A sampler of tr(S)/|ḡ|², two numbers a draw.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    r, n = positive("r", r), count("n", n, 2)

    def sample(rng: np.random.Generator, size: int) -> Floats:
        trace = rng.chisquare(r * (n - 1), size) / (n - 1)
        return trace / (rng.chisquare(r, size) / n)

    return sample


def population_norm_control(r: int, n: int) -> Sampler:
    """A broken control: tr(S) over the *expected* |ḡ|² = r/N, whose mean is N and not rN/(r-2).

    Args:
        r: rank, >= 1.
        n: examples N, >= 2.

    Returns:
        A sampler of tr(S)/(r/N).

    Raises:
        ValueError: if an argument is outside its domain.
    """
    r, n = count("r", r), count("n", n, 2)

    def sample(rng: np.random.Generator, size: int) -> Floats:
        return rng.chisquare(r * (n - 1), size) / (n - 1) / (r / n)

    return sample


def spectrum_plugin(eigenvalues: ArrayLike, n: int, mean: ArrayLike | None = None) -> Sampler:
    """tr(S)/|ḡ|² of N Gaussian gradients of any spectrum and mean, through ḡ and S's own law.

    Args:
        eigenvalues: [d], spectrum of Σ.
        n: examples N, >= 2.
        mean: [d], true gradient; zero if left out.

    Returns:
        A sampler, 2d numbers a draw.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    lam, n = spectrum("eigenvalues", eigenvalues), count("n", n, 2)
    mu = np.zeros_like(lam) if mean is None else like("mean", mean, "eigenvalues", lam)

    def sample(rng: np.random.Generator, size: int) -> Floats:
        full = mu + rng.standard_normal((size, lam.size)) * np.sqrt(lam / n)
        trace = rng.chisquare(n - 1, (size, lam.size)) @ lam / (n - 1)
        return trace / np.einsum("md,md->m", full, full)

    return sample


def noncentral_reciprocal(r: float, noncentrality: float) -> Sampler:
    """1/χ'²_r(λ).

    Args:
        r: degrees of freedom, > 0.
        noncentrality: λ >= 0.

    Returns:
        A sampler, one number a draw.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    r, lam = positive("r", r), non_negative("noncentrality", noncentrality)
    return lambda rng, size: (
        1.0 / (rng.noncentral_chisquare(r, lam, size) if lam > 0 else rng.chisquare(r, size))
    )


def gaussian_step(eigenvalues: ArrayLike, mean: ArrayLike, batch: int) -> Sampler:
    """Columns (trΣ, |G|²) of independent steps of b Gaussian gradients each, from sufficient statistics.

    Args:
        eigenvalues: [d], spectrum of Σ.
        mean: [d], true gradient in the eigenbasis.
        batch: examples per step b, >= 2.

    Returns:
        A sampler of [size, 2], 2d numbers a draw.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    lam, b = spectrum("eigenvalues", eigenvalues), count("batch", batch, 2)
    mu = like("mean", mean, "eigenvalues", lam)

    def sample(rng: np.random.Generator, size: int) -> Floats:
        full = mu + rng.standard_normal((size, lam.size)) * np.sqrt(lam / b)
        trace = rng.chisquare(b - 1, (size, lam.size)) @ lam / (b - 1)
        return np.stack([trace, np.einsum("md,md->m", full, full) - trace / b], axis=1)

    return sample


def regression_step(r: int, snr: float, batch: int) -> Sampler:
    """Columns (trΣ, |G|²) of steps of y = w·x + noise at w₀ = 0, |w| = 1: the case with signal, from data.

    Args:
        r: rank, >= 1.
        snr: |w|²/s², > 0.
        batch: examples per step, >= 2.

    Returns:
        A sampler of [size, 2], batch·(r+1) numbers a draw.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    r, b, deviation = count("r", r), count("batch", batch, 2), 1 / np.sqrt(positive("snr", snr))

    def sample(rng: np.random.Generator, size: int) -> Floats:
        x = rng.standard_normal((size, b, r))
        y = x[..., 0] + deviation * rng.standard_normal((size, b))
        return np.stack(step_estimates((0.0 - y)[..., None] * x), axis=1)

    return sample


def lora_null(kind: str, r: int, d_in: int, d_out: int, n: int, scale: float = 1.0) -> Sampler:
    """tr(S)/|ḡ_B|² of a LoRA layer's factor B at initialisation on pure noise, through real matrices.

    x [d_in] standard normal, δ = -y with y [d_out] of independent signs, per-example gradients s·δ(Ax)ᵀ;
    a fresh A for every draw.

    Args:
        kind: initialisation of A, see `theory.lora_init.init_factor_a`.
        r: LoRA rank.
        d_in: inputs, >= r.
        d_out: outputs.
        n: examples N, >= 2.
        scale: LoRA's s = α/r; cancels.

    Returns:
        A sampler, n·(d_in + d_out) + r·d_in numbers a draw.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    kind, r, d_in = choice("kind", kind, INITIALISATIONS), count("r", r), count("d_in", d_in, count("r", r))
    n, d_out, s = count("n", n, 2), count("d_out", d_out), positive("scale", scale)

    def one(rng: np.random.Generator) -> float:
        a = init_factor_a(kind, r, d_in, rng)
        x = rng.standard_normal((n, d_in))
        delta = -rng.choice([-1.0, 1.0], size=(n, d_out))
        gradients = s * np.einsum("no,nr->nor", delta, x @ a.T).reshape(n, -1)
        mean = gradients.mean(0)
        return float(((gradients - mean) ** 2).sum() / (n - 1) / (mean @ mean))

    return lambda rng, size: np.array([one(rng) for _ in range(size)])


def captured_share(r: int, d: int) -> Sampler:
    """|Aw|²/|w|² for a random r-dimensional subspace of R^d, by drawing the subspace.

    By rotation invariance w may be drawn instead of A: the share of a Gaussian vector's first r coordinates.

    Args:
        r: dimension of the subspace, 1 <= r <= d.
        d: dimension of the space.

    Returns:
        A sampler, d numbers a draw.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    r, d = count("r", r), count("d", d, r)

    def sample(rng: np.random.Generator, size: int) -> Floats:
        w = rng.standard_normal((size, d)) ** 2
        return w[:, :r].sum(1) / w.sum(1)

    return sample


def sgd_second_moment(
    curvature: ArrayLike, noise: ArrayLike, start: ArrayLike, rate: float, batch: float, steps: int
) -> Sampler:
    """wⱼ² after S steps of SGD on the noisy quadratic, by running SGD: checks `theory.quadratic`.

    Args:
        curvature: [d], h.
        noise: [d], c.
        start: [d], E[w₀²]; the start itself is its square root.
        rate: learning rate.
        batch: B > 0.
        steps: S >= 1.

    Returns:
        A sampler of [size, d], S·d numbers a draw.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    h = spectrum("curvature", curvature)
    c, m0 = like("noise", noise, "curvature", h), like("start", start, "curvature", h)
    for name, value in (("noise", c), ("start", m0)):
        if np.any(value < 0):
            raise ValueError(f"{name}: needs numbers >= 0, got {float(value.min())!r}")
    eps, b, s = positive("rate", rate), positive("batch", batch), count("steps", steps)

    def sample(rng: np.random.Generator, size: int) -> Floats:
        w = np.tile(np.sqrt(m0), (size, 1))
        for _ in range(s):
            w = w - eps * (h * w + rng.standard_normal(w.shape) * np.sqrt(c / b))
        return w**2

    return sample
