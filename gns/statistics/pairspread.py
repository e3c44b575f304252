"""How sure the average over all pairs is, for each noise scale that is asked about: a score set.

Y = |G|² over all pairs of N examples is a U-statistic. If |G|² is g, and v = GᵀΣG/|G|² the noise along G,

    Var Y = 4gv/N + 2 tr(Σ²)/(N(N − 1)),

a part that grows with the signal and one that is there without any. The delete-one-batch jackknife estimates
4ĝᵀΣĝ/N with the measured ĝ = G + noise in the place of G. That is wrong twice. Without signal it is twice the
truth, 4 tr(Σ²)/N²: the set has no upper end where it could have one. And where noise happens to cancel G, so
that Y is small, it is small as well: the set then lies above the truth, in 14 % of probes at nominal 5 % (G
in the noisiest direction, r_eff 2.5). So θ is tested with the variance that holds *if θ is true*, with
g = X/θ:

- tr(Σ²) from the products of different batches' centred gradients;
- v from the jackknife, which is a Rayleigh quotient at ĝ; as far as ĝ is noise, by the share
  w = (X/N)/(Y + X/N), the top eigenvalue of Σ instead: ĝ does not know the direction of G there.

The jackknife's covariance with tr Σ and its skewness (for Hall's correction) are kept, scaled to match.
The price: where G lies in a quiet direction of a steep spectrum, the set is up to twice as wide as need be.
Simulated: experiments/results/coverage/FROZEN.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from gns.estimate import Moments
from gns.statistics.pairs import Batches, jackknife

MIN_BATCHES = 4  # fewer leave no products of centred gradients


@dataclass(frozen=True)
class ScoreMoments(Moments):
    """Moments whose spread of Y is the one under the θ that is tested.

    Args:
        linear: 4v/N: what the variance of Y gains for each unit of |G|².
        null: the variance of Y without any signal.
    """

    linear: float = math.nan
    null: float = math.nan

    def se_y(self) -> float:
        """Standard error of Y without signal: what a detection limit is about."""
        return math.sqrt(self.null)

    def scaled(self, times: float) -> ScoreMoments:
        """Give the moments to be expected of so many times the batches."""
        return replace(super().scaled(times), linear=self.linear / times, null=self.null / times**2)  # type: ignore

    def statistics(self, theta: np.ndarray, kappa: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Student's T and Hall's H of D = κX − θY, with Var Y = linear · κX/θ + null.

        θ·√(Var Y under θ / Var Y of the jackknife) stands for θ wherever D spreads, and for nothing else.
        """
        spread = self.second[2] * self.k / (self.k - 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            wanted = np.maximum(self.linear * self.x * kappa * theta + self.null * theta**2, 0.0)
            stretched = np.where(spread > 0, np.sqrt(wanted / spread), theta)
            y = np.where(stretched > 0, theta * self.y / stretched, 0.0)
        plain = Moments(self.x, y, self.second, self.third, self.k)  # type: ignore[arg-type]
        return plain.statistics(stretched, kappa)


def score(batches: Batches) -> Moments:
    """Give X and Y over all pairs with the spread that `confidence_set` turns into a score set.

    Args:
        batches: at least two; below `MIN_BATCHES` the jackknife's own moments are given.

    Returns:
        The moments.

    Raises:
        ValueError: fewer than two batches.

    Source: Rao 1948, Proc. Camb. Phil. Soc. 44:50, for tests with the variance under the hypothesis;
        Székely & Rizzo 2014, Ann. Stat. 42:2382, for the centring of products.
    """
    plain = jackknife(batches)
    if len(batches) < MIN_BATCHES:
        return plain
    share = batches.mass / batches.mass.sum()
    a = float(share**2 @ batches.sum_sq_weights)  # 1/N for equal weights
    trace_sq, top = spectrum(batches.gram, float(np.mean(batches.sum_sq_weights)))
    linear = noise_along(plain, a, top) * 4 * a
    null = 2 * trace_sq * a * a / (1 - a)
    return ScoreMoments(plain.x, plain.y, plain.second, plain.third, plain.k, linear=linear, null=null)


def spectrum(gram: np.ndarray, weight: float) -> tuple[float, float]:
    """Estimate tr(Σ²) and the largest eigenvalue of Σ from K batch gradients.

    Args:
        gram: [K, K], ḡₖ·ḡₗ; ḡₖ has the covariance `weight` · Σ about a common mean.
        weight: Σaᵢ² of a batch, 1/n.

    Returns:
        (tr(Σ²), λ₁), in (loss / parameter)⁴ and ². The first is unbiased for batches of one size; the second
        reads high where K is small against the rank.
    """
    k = len(gram)
    apart = gram - np.diag(np.diag(gram))
    row, total = apart.sum(1), apart.sum()
    centred = apart - (row[:, None] + row[None, :]) / (k - 2) + total / ((k - 1) * (k - 2))
    np.fill_diagonal(centred, 0.0)
    mean = np.eye(k) - 1 / k
    top = float(np.linalg.eigvalsh(mean @ gram @ mean)[-1]) / (k - 1)
    return float((centred**2).sum()) / (k * (k - 3)) / weight**2, top / weight


def noise_along(moments: Moments, a: float, top: float) -> float:
    """Noise along G, GᵀΣG/|G|²: the jackknife's as far as it knows the direction of G, else at most `top`.

    Args:
        moments: of the jackknife.
        a: one over the number of examples.
        top: largest eigenvalue of Σ.

    Returns:
        v, in (loss / parameter)².
    """
    noise, plugin = moments.x * a, moments.y + moments.x * a  # of ‖ĝ‖², and ‖ĝ‖² itself
    if plugin <= 0:  # only a sketch can make it so
        return top
    seen = moments.second[2] * moments.k / (moments.k - 1) / (4 * a * plugin)
    unknown = min(max(noise / plugin, 0.0), 1.0)
    return max(seen, seen + unknown * (top - seen))
