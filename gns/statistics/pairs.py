"""All pairs of examples of many batches at one parameter point: |G|², tr Σ, and how sure they are.

Batch k has the gradient ḡₖ = Σᵢ cᵢ over its nₖ examples, of weights aᵢ in its loss (Σaᵢ = 1 in the batch).
Joined into one batch, with a share pₖ of the whole weight, its examples contribute pₖcᵢ of weight pₖaᵢ. With
Gₖₗ = ḡₖ·ḡₗ, sₖ = Σ ‖cᵢ‖² and A = Σ pₖ² Σaᵢ², N = Σ nₖ,

    Y = |G|² = (Σ_{k≠l} pₖpₗ Gₖₗ + Σ pₖ² (Gₖₖ − sₖ)) / (1 − A)     all pairs of two examples, i ≠ j
    X = tr Σ = N (Σ pₖ² sₖ − A Y)

which is what `gns.sums.unbiased` makes of the one joined batch; with equal weights
Y = Σ_{i≠j} gᵢ·gⱼ / N(N − 1). How sure they are is in `gns.statistics.pairspread`, which builds on the
delete-one-batch jackknife here; the sign-flip test asks only whether there is any |G|².
Slow twin: tests/reference/all_pairs.py
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from gns.statistics.moments import Moments

EXACT_FLIPS = 13  # batches: 2¹² distinct patterns; with more, patterns are drawn
DRAWS = 9_999  # patterns drawn
ROUNDING = 1e-5  # of pairs inside batches against pairs across: what float32 norms leave of equal ones


@dataclass(frozen=True)
class Batches:
    """What is kept of K batches at one parameter point.

    Args:
        gram: [K, K], ḡₖ·ḡₗ in (loss / parameter)²; off the diagonal it may be sketched.
        n: [K], examples.
        sum_sq_norms: [K], sₖ = Σ ‖cᵢ‖² of the batch's own contributions, in (loss / parameter)².
        sum_sq_weights: [K], Σaᵢ².
        mass: [K], weight of the batch in the whole, unnormalised: its examples, or its tokens.
        cross: Σ_{k≠l} mₖmₗ Gₖₗ, m the mass, where it is known better than `gram` says; else None.
        sketch_share: share of the spread of a product of two batches' gradients that the sketch adds.
    """

    gram: np.ndarray
    n: np.ndarray
    sum_sq_norms: np.ndarray
    sum_sq_weights: np.ndarray
    mass: np.ndarray
    cross: float | None = None
    sketch_share: float = 0.0

    def __post_init__(self) -> None:
        k = len(self.n)
        if self.gram.shape != (k, k):
            raise ValueError(f"gram has shape {self.gram.shape}; [{k}, {k}] is needed, for {k} batches")
        for name in ("sum_sq_norms", "sum_sq_weights", "mass"):
            if len(getattr(self, name)) != k:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries; {k} are needed")
        if not (self.mass > 0).all():
            raise ValueError(f"mass is {self.mass.min():g} of a batch; more than 0 is needed")

    def __len__(self) -> int:
        return len(self.n)

    def scaled(self, times: float) -> Batches:
        """Give the same with all squared norms and products so many times larger."""
        cross = None if self.cross is None else self.cross * times
        return replace(self, gram=self.gram * times, sum_sq_norms=self.sum_sq_norms * times, cross=cross)

    @property
    def weighted(self) -> np.ndarray:
        """[K, K], mₖmₗ Gₖₗ with a zero diagonal; its sum is `cross` where that is known."""
        found = self.gram * np.outer(self.mass, self.mass)
        np.fill_diagonal(found, 0.0)
        if self.cross is not None and len(self) > 1:
            off = (self.cross - found.sum()) / (len(self) * (len(self) - 1))
            found = found + off * (1 - np.eye(len(self)))
        return found

    @property
    def within(self) -> np.ndarray:
        """[K], Gₖₖ − sₖ: sum over the pairs of two examples of the batch."""
        return np.diag(self.gram) - self.sum_sq_norms


@dataclass(frozen=True)
class _Sums:
    """Sums over batches that X and Y are made of; scalars, or [K] with one batch left out of each."""

    cross: np.ndarray
    within: np.ndarray
    norms: np.ndarray
    weights: np.ndarray
    mass: np.ndarray
    n: np.ndarray

    def xy(self) -> tuple[np.ndarray, np.ndarray]:
        """Give (tr Σ, |G|²)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            p2 = 1 / self.mass**2
            a = self.weights * p2
            y = (self.cross + self.within) * p2 / (1 - a)
            return self.n * (self.norms * p2 - a * y), y


def _sums(batches: Batches) -> tuple[_Sums, _Sums]:
    """Give the sums over all batches, and those with each batch left out."""
    weighted, m2 = batches.weighted, batches.mass**2
    terms = (
        m2 * batches.within,
        m2 * batches.sum_sq_norms,
        m2 * batches.sum_sq_weights,
        batches.mass,
        batches.n.astype(np.float64),
    )
    cross = weighted.sum()
    whole = _Sums(cross, *(np.asarray(t.sum()) for t in terms))
    return whole, _Sums(cross - 2 * weighted.sum(1), *(t.sum() - t for t in terms))


def pooled(batches: Batches) -> tuple[float, float]:
    """Unbiased tr Σ and |G|² from all pairs of examples; NaN where there is no pair.

    Returns:
        (tr Σ, |G|²), in (loss / parameter)²; |G|² may be negative.

    Source: McCandlish et al. 2018, arXiv:1812.06162, appendix A.1, of all batches as one.
    """
    x, y = _sums(batches)[0].xy()
    return float(x), float(y)


def has_spread(batches: Batches) -> bool:
    """Whether a pair of examples is left without any one of the batches."""
    return len(batches) > 1 and bool(np.isfinite(_sums(batches)[1].xy()).all())


def jackknife(batches: Batches) -> Moments:
    """Give X and Y with the spread of the delete-one-batch jackknife, as the confidence set takes them.

    Batch k has the pseudo-value x̃ₖ = X/pₖ − (1/pₖ − 1) X₍₋ₖ₎ and the weight pₖ, its share of the whole.

    Returns:
        The moments.

    Raises:
        ValueError: without some batch, no pair of examples is left.

    Source: Busing et al. 1999, Stat. Comput. 9:3, for batches of unequal size.
    """
    if not has_spread(batches):
        raise ValueError(
            f"{len(batches)} batch(es) of {batches.n.tolist()} examples; at least 2 are needed, and a pair "
            "of examples that is left without any one of them: add batches"
        )
    whole, left = _sums(batches)
    p = batches.mass / batches.mass.sum()
    pseudo = [w / p - (1 / p - 1) * v for w, v in zip(whole.xy(), left.xy(), strict=True)]
    moments = Moments.of(pseudo[0], pseudo[1], p, p)
    x, y = whole.xy()
    return replace(moments, x=float(x), y=float(y))


@dataclass(frozen=True)
class SignFlip:
    """Is there any gradient at all?

    Args:
        p_value: one-sided, of |G|² = 0.
        exact: all sign patterns were looked at, not a sample of them.
        patterns: how many.
    """

    p_value: float
    exact: bool
    patterns: int

    def upper_end(self, high: float, level: float) -> float:
        """Give a set's upper end, or `inf` where this test does not see a gradient.

        An upper end says that |G|² > 0, which is to be said by chance in (1 − level)/2 of all probes at most.
        The score set knows the spread of Y without a gradient, but not its skewness: simulated without one
        (Gaussian j⁻², 16 examples a batch), 4.5 % of its 95 % sets at 50 batches and 3.8 % of its 98.75 %
        sets at 20 have an upper end, where 2.5 % and 0.6 % should. The flips hold their size there.

        Args:
            high: upper end of the set.
            level: nominal coverage of the set.

        Returns:
            `high`, if p ≤ (1 − level)/2, or p is the least that so many patterns can give.
        """
        least = 1 / (self.patterns + (not self.exact))
        return high if self.p_value <= max((1 - level) / 2, least) * (1 + 1e-9) else math.inf


def sign_flip(batches: Batches, *, seed: int = 0, draws: int = DRAWS) -> SignFlip:
    """Test |G|² = 0: without a gradient, each batch's ḡₖ is as likely as −ḡₖ.

    The statistic Σ_{k≠l} εₖεₗ mₖmₗ Gₖₗ is compared for ε = 1 and for random signs. Exact in size where the
    batch gradients are symmetric about G, which the central limit theorem makes them; a sketched Gram matrix
    keeps that, since a sketch of −ḡ is minus that of ḡ. No spectrum, no scale and no variance enters.

    Args:
        batches: at least two, or the p-value is 1.
        seed: of the patterns that are drawn.
        draws: patterns drawn where there are too many to look at all.

    Returns:
        The p-value; no smaller than one over the number of patterns.

    Raises:
        ValueError: `draws` is below 1.

    Source: Fisher 1935, The Design of Experiments, §21; Hemerik & Goeman 2018, TEST 27:811, for drawing.
    """
    if draws < 1:
        raise ValueError(f"draws is {draws}; 1 or more patterns are needed")
    w, k = batches.weighted, len(batches)
    if k < 2:
        return SignFlip(1.0, True, 1)
    seen = w.sum()
    exact = k <= EXACT_FLIPS
    if exact:
        signs = np.array([(1.0, *rest) for rest in itertools.product((1.0, -1.0), repeat=k - 1)])
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], (draws, k))
    flipped = ((signs @ w) * signs).sum(1)
    slack = 1e-12 * np.abs(w).sum()  # the same pattern, summed in another order
    above = int((flipped >= seen - slack).sum())
    if exact:
        return SignFlip(above / len(signs), True, len(signs))
    return SignFlip((above + 1) / (draws + 1), False, draws)


@dataclass(frozen=True)
class Dependence:
    """Do two examples of one batch agree more, or less, than two of different batches?

    Args:
        within: mean product of two examples' gradients in one batch, (loss / parameter)².
        across: the same of two batches.
        difference: within − across: what dependence inside a batch adds to the |G|² of a training step.
        se: standard error of the difference.
        p_value: two-sided, of no difference.
        trace_sigma: tr Σ, for the scale.
    """

    within: float
    across: float
    difference: float
    se: float
    p_value: float
    trace_sigma: float

    @property
    def b_simple_across(self) -> float:
        """Noise scale from pairs of different batches alone, in examples; NaN where their mean is ≤ 0."""
        return self.trace_sigma / self.across if self.across > 0 else math.nan

    @property
    def b_simple_within(self) -> float:
        """What training steps made of such batches would read, in examples; NaN where that is none."""
        return self.trace_sigma / self.within if self.within > 0 else math.nan


def dependence(batches: Batches) -> Dependence | None:
    """Compare pairs inside batches with pairs across, by the jackknife over batches.

    The p-value is the larger of Student's and of Hall's, whose skewness correction the squares need. Below 20
    batches that is too little on a steep spectrum: with 8 batches of 16, p < 1 % in 4 % of probes
    (simulated), practically all of them with a difference below zero.

    Returns:
        The comparison; None with fewer than three batches, or without a batch of two examples.
    """
    k, m2 = len(batches), batches.mass**2
    pairs = m2 * (1 - batches.sum_sq_weights)
    paired = pairs > 1e-12 * m2
    if k < 3 or paired.sum() < 3:
        return None
    inside = np.where(paired, m2 * batches.within, 0.0)
    pairs = np.where(paired, pairs, 0.0)
    weighted = batches.weighted
    total, apart = weighted.sum(), batches.mass.sum() ** 2 - m2.sum()
    within, across = inside.sum() / pairs.sum(), total / apart
    left_apart = (batches.mass.sum() - batches.mass) ** 2 - (m2.sum() - m2)
    left_within = (inside.sum() - inside) / (pairs.sum() - pairs)
    left_across = (total - 2 * weighted.sum(1)) / left_apart
    p = batches.mass / batches.mass.sum()
    difference = within - across
    pseudo = difference / p - (1 / p - 1) * (left_within - left_across)
    moments = replace(Moments.of(np.zeros(k), pseudo, p, p), y=float(difference))
    t, h = (float(v) for v in moments.statistics(np.array(1.0), np.array(0.0)))
    rounding = abs(difference) <= ROUNDING * max(abs(within), abs(across))
    p_value = 2 * max(float(stats.t.sf(abs(v), moments.df)) for v in (t, h)) if t * h > 0 else 1.0
    p_value = 1.0 if rounding else p_value
    x = pooled(batches)[0]
    return Dependence(float(within), float(across), float(difference), moments.se_y(), p_value, x)
