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
from collections.abc import Callable
from dataclasses import dataclass

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
# direction, the other end, 1/d of tr Σ on the flat spectrum but 21 % on 1/j and 61 % on j⁻².
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

    Slow twin: tests/experiments/test_noise.py draws examples and adds them up one by one.
    """
    if n < 2:
        raise ValueError(f"n is {n} example(s) a step; at least 2 are needed to see a spread")
    draw, scale = LAWS[law], np.sqrt(SPECTRA[spectrum]).astype(np.float32)
    loadings = np.stack(list(DIRECTIONS.values()), axis=1).astype(np.float32)
    rng, total = np.random.default_rng(np.random.SeedSequence(seed)), repeats * steps
    size = max(1, CHUNK // (DIMENSIONS * (2 if law == "gaussian" else n)))
    found = np.empty((2 + len(DIRECTIONS), total))
    for start in range(0, total, size):
        some = min(size, total - start)
        pair = _short_cut(rng, some, n, scale) if law == "gaussian" else _drawn(draw, rng, some, n, scale)
        mean, mean_sq = pair
        found[0, start : start + some] = np.einsum("sd,sd->s", mean, mean)
        found[1, start : start + some] = mean_sq
        found[2:, start : start + some] = (mean @ loadings).T
    a, s, *along = found.reshape(-1, repeats, steps)
    return Noise(a, s, dict(zip(DIRECTIONS, along, strict=True)), n)


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
