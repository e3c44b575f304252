"""Simulated steps whose true noise scale is known: one noise, every B.

Example i of a step has the gradient gᵢ = G + eᵢ. What a monitor records of n of them depends on the noise by
three numbers alone, a = ‖ē‖², p = u·ē (u = G/|G|) and s = (1/n) Σ‖eᵢ‖²:

    q = ‖ḡ‖²          = |G|² + 2|G|p + a            m = (1/n) Σ ‖gᵢ‖² = |G|² + 2|G|p + s

so a noise drawn once serves every |G|. Spectra are scaled to tr Σ = 1: |G|² = 1/B, and B is in examples.

d = 64 dimensions: what the spread of the sums depends on is r_eff = (tr Σ)²/tr(Σ²), and flat, 1/j and j⁻²
give 64, 13.8 and 2.45 there, from "nearly normal sums" to "one direction is most of the noise". More
dimensions would make flat and 1/j easier and leave j⁻² as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from theory.spectra import power_law_spectrum

DIMENSIONS = 64
CHUNK = 1 << 20  # random numbers alive at once: 4 MiB, so that a pass over them stays in the cache
Draw = Callable[[np.random.Generator, tuple[int, int, int]], np.ndarray]


def _unit(spectrum: np.ndarray) -> np.ndarray:
    return spectrum / spectrum.sum()


SPECTRA: dict[str, np.ndarray] = {
    "flat": _unit(np.ones(DIMENSIONS)),
    "1/j": _unit(power_law_spectrum(DIMENSIONS, 1.0)),
    "1/j^2": _unit(power_law_spectrum(DIMENSIONS, 2.0)),
}

# The answer depends on where G points: uᵀΣu is the noise along it. "even": G has the same entry in every
# eigendirection, uᵀΣu = tr Σ/d, what a random direction has on average. "top": G lies in the noisiest
# direction, the largest: 1/d of tr Σ on the flat spectrum but 21 % on 1/j and 61 % on j⁻².
DIRECTIONS: dict[str, np.ndarray] = {
    "even": np.full(DIMENSIONS, DIMENSIONS**-0.5),
    "top": np.eye(DIMENSIONS)[0],
}


def gaussian(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Standard normal coordinates, [steps, n, d], float32."""
    return rng.standard_normal(shape, dtype=np.float32)


def student5(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Multivariate t₅ of unit covariance, [steps, n, d], float32: a whole example is loud or quiet.

    Elliptical, since what makes a gradient large (a long, hard or mislabelled example) scales all of it; with
    independent coordinates the squared norm would average the tails away.
    """
    z = rng.standard_normal(shape, dtype=np.float32)
    w = rng.chisquare(5, (*shape[:2], 1)).astype(np.float32)
    z *= np.sqrt(3 / w)  # E[3/χ²₅] = 1
    return z


def lognormal(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Independent centred lognormals (σ = 1) of unit variance, [steps, n, d], float32.

    The other mechanism: each coordinate by itself has a heavy tail (kurtosis 114), and it is skewed, towards
    where G points. On a steep spectrum one coordinate makes the norm, and nothing averages its tail away.
    """
    z = np.exp(rng.standard_normal(shape, dtype=np.float32))
    z -= np.float32(math.exp(0.5))
    z /= np.float32(math.sqrt(math.e * (math.e - 1)))
    return z


LAWS: dict[str, Draw] = {"gaussian": gaussian, "t5": student5, "lognormal": lognormal}


@dataclass(frozen=True)
class Noise:
    """What many simulated runs record of their noise.

    Args:
        sq_mean: [repeats, steps], a = ‖ē‖², in units of tr Σ.
        mean_sq: [repeats, steps], s = (1/n) Σ‖eᵢ‖², in units of tr Σ.
        along: name of a direction → [repeats, steps], p = u·ē, in units of √tr Σ.
        n: examples in a step.
    """

    sq_mean: np.ndarray
    mean_sq: np.ndarray
    along: dict[str, np.ndarray]
    n: int

    def recorded(self, b_simple: float, direction: str) -> tuple[np.ndarray, np.ndarray]:
        """(m, q), [repeats, steps] each: the sums of the steps where the true noise scale is `b_simple`."""
        signal = 1 / b_simple + 2 / math.sqrt(b_simple) * self.along[direction]
        return signal + self.mean_sq, signal + self.sq_mean

    def unbiased(self, b_simple: float, direction: str) -> tuple[np.ndarray, np.ndarray]:
        """(tr Σ, |G|²), [repeats, steps] each: the unbiased estimates of those steps.

        n(m − q)/(n − 1) and (nq − m)/(n − 1), as `gns.sums.unbiased` has them for equal weights.
        """
        m, q = self.recorded(b_simple, direction)
        return self.n * (m - q) / (self.n - 1), (self.n * q - m) / (self.n - 1)


def simulate(law: str, spectrum: str, n: int, repeats: int, steps: int, seed: int) -> Noise:
    """Draw the noise of `repeats` runs of `steps` steps of n examples.

    Gaussian steps take a short cut: ē ~ N(0, Λ/n) and Σ‖eᵢ − ē‖² = Σⱼ λⱼ χ²₍ₙ₋₁₎ are independent, so no
    example is drawn. The other laws draw every example. Coordinates are float32, their rounding of 1e-7 far
    below the smallest spread of a mean here (2e-4 of tr Σ); all after the sum over coordinates is float64.

    Args:
        law: a key of `LAWS`.
        spectrum: a key of `SPECTRA`.
        n: examples in a step, at least 2.
        repeats: runs.
        steps: steps in a run; shorter runs are its beginnings.
        seed: of this noise.

    Returns:
        The noise, which depends on the arguments only.

    Raises:
        KeyError: `law` or `spectrum` is unknown.
        ValueError: n is below 2.

    Slow twin: tests/experiments/coverage/test_noise.py draws examples and adds them up one by one.
    """
    rng, total = np.random.default_rng(np.random.SeedSequence(seed)), repeats * steps
    loadings = np.stack(list(DIRECTIONS.values()), axis=1).astype(np.float32)
    found = np.empty((2 + len(DIRECTIONS), total))
    for start, mean, mean_sq in _chunks(rng, law, spectrum, n, total):
        here = slice(start, start + len(mean))
        found[0, here] = np.einsum("sd,sd->s", mean, mean)
        found[1, here] = mean_sq
        found[2:, here] = (mean @ loadings).T
    a, s, *along = found.reshape(-1, repeats, steps)
    return Noise(a, s, dict(zip(DIRECTIONS, along, strict=True)), n)


def _chunks(
    rng: np.random.Generator, law: str, spectrum: str, n: int, total: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (first step, ē [some, d], (1/n) Σ‖eᵢ‖² [some]) until `total` steps are drawn."""
    if n < 2:
        raise ValueError(f"n is {n} example(s) a step; at least 2 are needed to see a spread")
    draw, scale = LAWS[law], np.sqrt(SPECTRA[spectrum]).astype(np.float32)
    size = max(1, CHUNK // (DIMENSIONS * (2 if law == "gaussian" else n)))
    for start in range(0, total, size):
        some = min(size, total - start)
        if law == "gaussian":
            yield start, *_short_cut(rng, some, n, scale)
        else:
            yield start, *_drawn(draw, rng, some, n, scale)


def _short_cut(
    rng: np.random.Generator, steps: int, n: int, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """ē [steps, d] and (1/n) Σ‖eᵢ‖² [steps] of Gaussian noise, without its examples."""
    shape = (steps, len(scale))
    mean = rng.standard_normal(shape, dtype=np.float32) * (scale * np.float32(n**-0.5))
    scatter = 2 * (rng.standard_gamma((n - 1) / 2, shape, dtype=np.float32) @ scale**2)
    return mean, np.einsum("sd,sd->s", mean, mean) + scatter / n


def _drawn(
    draw: Draw, rng: np.random.Generator, steps: int, n: int, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """ē [steps, d] and (1/n) Σ‖eᵢ‖² [steps], from every example."""
    z = draw(rng, (steps, n, len(scale)))
    return z.sum(1) * (scale / n), np.einsum("snd,snd->sd", z, z) @ (scale**2 / n)


@dataclass(frozen=True)
class Pooled:
    """What many simulated frozen probes keep of their noise: K batches at one point, all products of them.

    Args:
        gram: [repeats, K, K], ēₖ·ēₗ, in units of tr Σ.
        mean_sq: [repeats, K], s = (1/n) Σ‖eᵢ‖².
        along: name of a direction → [repeats, K], p = u·ē.
        n: examples in a batch.
    """

    gram: np.ndarray
    mean_sq: np.ndarray
    along: dict[str, np.ndarray]
    n: int

    @property
    def steps(self) -> Noise:
        """The same batches as K training steps would see them."""
        own = np.einsum("rkk->rk", self.gram)
        return Noise(own, self.mean_sq, self.along, self.n)

    def jackknife(self, b_simple: float, direction: str) -> tuple[np.ndarray, np.ndarray]:
        """(tr Σ, |G|²) over all pairs of examples as pseudo-values of the delete-one-batch jackknife.

        Pooled over batches of one size, with C = Σ_{k≠l} ḡₖ·ḡₗ, W = Σₖ (‖ḡₖ‖² − mₖ/n) and N = nK examples,
        |G|² = (C + W)/(K²(1 − 1/N)) and tr Σ = Σ mₖ/K − |G|²; pseudo-value k is K·all − (K − 1)·(without k).

        Args:
            b_simple: true noise scale, in examples.
            direction: of G.

        Returns:
            [repeats, K] each. Their mean is the jackknife's own estimate; `whole` is the plain one.
        """
        x, y = self.whole(b_simple, direction)
        k = self.mean_sq.shape[1]
        m, row, within = self._terms(b_simple, direction)
        total = row.sum(1, keepdims=True) + within.sum(1, keepdims=True)
        left_y = (total - 2 * row - within) / ((k - 1) ** 2 * (1 - 1 / (self.n * (k - 1))))
        left_x = (m.sum(1, keepdims=True) - m) / (k - 1) - left_y
        return k * x[:, None] - (k - 1) * left_x, k * y[:, None] - (k - 1) * left_y

    def whole(self, b_simple: float, direction: str) -> tuple[np.ndarray, np.ndarray]:
        """(tr Σ, |G|²), [repeats] each, over all pairs of examples."""
        m, row, within = self._terms(b_simple, direction)
        k = self.mean_sq.shape[1]
        y = (row.sum(1) + within.sum(1)) / (k**2 * (1 - 1 / (self.n * k)))
        return m.mean(1) - y, y

    @cached_property
    def spectrum(self) -> tuple[np.ndarray, np.ndarray]:
        """(tr(Σ²), λ₁), [repeats] each, from the products of batches, as `pairspread.spectrum` of `gns`."""
        k, gram = self.mean_sq.shape[1], self.gram
        apart = gram * (1 - np.eye(k))
        row, total = apart.sum(2), apart.sum((1, 2))[:, None, None]
        centred = apart - (row[:, :, None] + row[:, None, :]) / (k - 2) + total / ((k - 1) * (k - 2))
        squares = (centred**2).sum((1, 2)) - np.einsum("rkk->rk", centred**2).sum(1)
        mean = np.eye(k) - 1 / k
        top = np.linalg.eigvalsh(mean @ gram @ mean)[:, -1] / (k - 1)
        return squares / (k * (k - 3)) * self.n**2, top * self.n

    def _terms(self, b_simple: float, direction: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(mₖ, Σ_{l≠k} ḡₖ·ḡₗ, ‖ḡₖ‖² − mₖ/n), [repeats, K] each."""
        m, q = self.steps.recorded(b_simple, direction)
        p, k = self.along[direction], self.mean_sq.shape[1]
        own = np.einsum("rkk->rk", self.gram)
        cross = self.gram.sum(2) - own
        along = (k - 2) * p + p.sum(1, keepdims=True)
        return m, (k - 1) / b_simple + along / math.sqrt(b_simple) + cross, q - m / self.n


def simulate_pooled(law: str, spectrum: str, n: int, repeats: int, batches: int, seed: int) -> Pooled:
    """Draw the noise of `repeats` frozen probes of `batches` batches of n examples; see `simulate`.

    Args:
        law: a key of `LAWS`.
        spectrum: a key of `SPECTRA`.
        n: examples in a batch, at least 2.
        repeats: probes.
        batches: batches in a probe.
        seed: of this noise.

    Returns:
        The noise, which depends on the arguments only.

    Raises:
        KeyError: `law` or `spectrum` is unknown.
        ValueError: n is below 2.
    """
    rng, total = np.random.default_rng(np.random.SeedSequence(seed)), repeats * batches
    means = np.empty((total, DIMENSIONS), dtype=np.float32)
    mean_sq = np.empty(total)
    for start, mean, squares in _chunks(rng, law, spectrum, n, total):
        means[start : start + len(mean)], mean_sq[start : start + len(mean)] = mean, squares
    means = means.reshape(repeats, batches, DIMENSIONS)
    along = {name: (means @ u.astype(np.float32)).astype(float) for name, u in DIRECTIONS.items()}
    gram = means @ means.transpose(0, 2, 1)
    return Pooled(gram.astype(float), mean_sq.reshape(repeats, batches), along, n)
