"""The noise scale in the norms of sign-like optimizers, from batches at one parameter point.

signSGD steps by −η sign(ḡ): steepest descent in the ℓ∞ norm, whose dual, ℓ₁, measures gradient and noise.
What ‖G‖² and tr Σ are to SGD, ‖G‖₁² and ‖σ‖₁² are here, σⱼ the standard deviation of coordinate j over
examples:

    B_sign = (Σⱼ σⱼ)² / ‖G‖₁²        in examples; E‖ḡ − G‖₁ ≤ Σⱼ σⱼ / √n for a batch of n

‖G‖₁ cannot be had without bias: |ḡⱼ| of noise alone is not zero, so the plug-in reads high. With signs s
fixed from other batches, E[s·ḡ] = s·G ≤ ‖G‖₁, without bias given s. So the first half of the batches gives s,
the second half s·ḡₖ, and

    (Σⱼ σⱼ)² / (s·G)² ≥ B_sign

is what is estimated, with a confidence set given s: (s·G)² as a mean over pairs of batches, σⱼ as √n times
the spread of ḡⱼ over batches, both with the delete-one-batch jackknife. The bound is tight where most of ‖G‖₁
lies in coordinates whose sign is known. Σσ from K batches reads low by about 1/(4K) of itself.

Source: Bernstein et al. 2018, arXiv:1802.04434, for ‖σ‖₁ and ‖G‖₁ in signSGD's rates. Naganuma et al. 2026,
arXiv:2602.03001, propose noise scales in dual norms for signSGD and Muon; only their abstract was read, and
the formulas here were not checked against theirs. Open: whether B_sign predicts a critical batch size of Adam
or Lion under LoRA; ties to the loss need ℓ∞ smoothness, and the noise of sign(ḡ) is not additive.
Slow twin: tests/reference/signs.py
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from gns.estimate import format_count
from gns.probing.result import FrozenEstimate
from gns.statistics.moments import Moments, exact_unit
from gns.statistics.pairs import Batches, sign_flip
from gns.statistics.sets import detection_limit, honest_set, status_of

COLUMNS = 2**18  # coordinates worked off at a time
LEAST = 6  # batches
JACKKNIFE = "delete-one-batch jackknife"
VIEW = "ℓ₁ noise over ℓ₁ gradient at one parameter point, (Σσ)² / (s·G)²"
SAID = (
    'metric="sign" is an upper bound: the signs are those of the first {first} batches, and where they are '
    "wrong s·G is less than ‖G‖₁. With the noisy ‖ḡ‖₁ in its place it would be {floor} examples."
)


@dataclass(frozen=True)
class SignScale:
    """B_sign with a confidence set given the signs.

    Args:
        b_simple: (Σσ)² / (s·G)², in examples: an upper bound of B_sign; NaN where (s·G)² averages to ≤ 0.
        low: lower end of its set.
        high: upper end.
        floor: (Σσ)² / ‖ḡ‖₁², ḡ over the second half: reads low, for noise adds to ‖ḡ‖₁.
        noise: (Σσ)², in (loss / parameter)² · parameters².
        signal: (s·G)², in the same unit; may be negative.
        detection_limit: largest B that these batches could tell from infinity.
        status: as of `Estimate`.
        moments: noise and signal with the jackknife's spread.
        along: [K], s·ḡₖ of the second half.
    """

    b_simple: float
    low: float
    high: float
    floor: float
    noise: float
    signal: float
    detection_limit: float
    status: str
    moments: Moments
    along: np.ndarray


def sign_scale(parts: Iterable[Tensor], n: np.ndarray, *, level: float) -> SignScale:
    """Estimate B_sign from batch gradients.

    Args:
        parts: one [K, numbers] a parameter, the K batches' gradients in the order of the data.
        n: [K], examples of each batch; all equal.
        level: nominal coverage of the set.

    Returns:
        The scale, from the second half of the batches with the signs of the first.

    Raises:
        ValueError: fewer than six batches, or batches of unequal size.
    """
    k = len(n)
    if k < LEAST or len(set(n.tolist())) > 1:
        sizes = sorted(set(n.tolist()))
        raise ValueError(
            f'{k} batches of {sizes} examples; metric="sign" needs {LEAST} or more, all of one size: half of '
            "them give the signs, half the number"
        )
    first = k // 2
    along, l1 = np.zeros(k - first), 0.0
    sigma, left = 0.0, np.zeros(k - first)
    for part in parts:
        for start in range(0, part.shape[1], COLUMNS):
            g = part[:, start : start + COLUMNS].double().numpy()
            signs, rest = np.sign(g[:first].sum(0)), g[first:]
            along += rest @ signs
            l1 += float(np.abs(rest.mean(0)).sum())
            whole, each = _deviations(rest)
            sigma, left = sigma + whole, left + each
    return _scale(along, sigma * math.sqrt(n[0]), left * math.sqrt(n[0]), l1, level)


def _deviations(g: np.ndarray) -> tuple[float, np.ndarray]:
    """Σⱼ of the standard deviation over rows [K, d], and [K] the same without each row.

    Without row k, the sum of squared deviations is S − (gₖ − ḡ)² K/(K − 1).
    """
    k = len(g)
    off = (g - g.mean(0)) ** 2
    total = off.sum(0)
    without = np.maximum(total - off * (k / (k - 1)), 0.0)  # rounding, where all but one row agree
    return float(np.sqrt(total / (k - 1)).sum()), np.sqrt(without / (k - 2)).sum(1)


def _scale(along: np.ndarray, sigma: float, left: np.ndarray, l1: float, level: float) -> SignScale:
    """Put (Σσ)² and (s·G)² with their jackknife through the set.

    Args:
        along: [K], s·ḡₖ.
        sigma: Σσ.
        left: [K], Σσ without each batch.
        l1: ‖ḡ‖₁.
        level: nominal coverage.
    """
    k, total, squares = len(along), along.sum(), float(along @ along)
    signal = (total**2 - squares) / (k * (k - 1))
    rest = ((total - along) ** 2 - (squares - along**2)) / ((k - 1) * (k - 2))
    x = k * sigma**2 - (k - 1) * left**2
    y = k * signal - (k - 1) * rest
    unit = exact_unit(sigma**2, signal)
    ones = np.ones(k)
    moments = replace(Moments.of(x * unit, y * unit, ones, ones), x=sigma**2 * unit, y=signal * unit)
    low, high, empty = honest_set(moments, level)
    return SignScale(
        b_simple=sigma**2 / signal if signal > 0 else math.nan,
        low=low,
        high=high,
        floor=sigma**2 / l1**2 if l1 > 0 else math.inf,
        noise=sigma**2,
        signal=signal,
        detection_limit=detection_limit(moments, level),
        status=status_of(moments, high, empty),
        moments=moments,
        along=along,
    )


def from_signs(
    parts: Iterable[Tensor], n: np.ndarray, *, level: float, looks: int, seed: int, about: Mapping[str, Any]
) -> FrozenEstimate:
    """Give B_sign as an estimate: tr Σ stands for (Σσ)², |G|² for (s·G)².

    Args:
        parts: one [K, numbers] a parameter.
        n: [K], examples of each batch.
        level: nominal coverage, over all looks together.
        looks: declared looks.
        seed: of the sign-flip test, here of (s·G)² = 0.
        about: further fields of the estimate.
    """
    fixed = {"level": level, "n_steps": len(n), "n_examples": int(n.sum()), "metric": "sign", "view": VIEW}
    fixed |= about
    if len(n) < LEAST:
        nan = math.nan
        sums = {"trace_sigma": nan, "grad_sq_norm": nan, "detection_limit": nan}
        return FrozenEstimate(nan, nan, math.inf, status="collecting", **sums, **fixed)
    found = sign_scale(parts, n, level=1 - (1 - level) / looks)
    k = len(found.along)
    products = np.outer(found.along, found.along)
    batches = Batches(products, n[-k:], np.diag(products), 1 / n[-k:], np.ones(k))
    signal = sign_flip(batches, seed=seed)
    said = SAID.format(first=len(n) - k, floor=format_count(found.floor))
    fixed["warnings"] = (*fixed.get("warnings", ()), said)
    return FrozenEstimate(
        found.b_simple,
        found.low,
        found.high,
        status=found.status,
        trace_sigma=found.noise,
        grad_sq_norm=found.signal,
        detection_limit=found.detection_limit,
        p_value=signal.p_value,
        signal=signal,
        moments=found.moments,
        variance=JACKKNIFE,
        **fixed,
    )
