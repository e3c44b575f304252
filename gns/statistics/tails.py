"""Heavy tails: how much of Σ‖gᵢ‖² a few examples hold, and whether that is more than light tails explain.

With heavy-tailed gradients tr Σ rests on a few examples; where none of them was drawn, it and B_simple read
low, and the set covers less often than it says. That is shown here, not corrected.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from gns.statistics.moments import Moments
from gns.sums import StepSums

MIN_EXAMPLES = 100  # the top 1 % of fewer is not even one example
SPREAD = 14  # relative variance of an estimate of tr Σ² from one step: 2 and the kurtosis of χ²₁, the worst
EXCESS = 1.5  # times the share of Gaussian gradients, at the narrowest spectrum that the steps allow
# beyond the share of any Gaussian spectrum: a rank of 1 has 8.4 %, at most 14 % in 300 × 200 drawn
CAP = 0.15


class Tails(NamedTuple):
    """What is known of the tails: the share of the top 1 % (None: unknown), and what to say of it."""

    share: float | None
    warnings: tuple[str, ...] = ()


def tail_share(steps: Iterable[StepSums]) -> float | None:
    """Share of Σ‖gᵢ‖² that the largest 1 % of all examples hold.

    A lower bound: a step keeps only its own top tenth, so one that is louder as a whole than the others may
    hold more of the top 1 % than is known. Over steps that do not drift the two are the same but for chance.

    Args:
        steps: records of steps; those without `top_sq_norms`, or not usable, are left out.

    Returns:
        In (0, 1]; None with fewer than `MIN_EXAMPLES` examples, or where all gradients are zero.
    """
    known = [s for s in steps if s.usable and s.top_sq_norms]
    count = sum(s.n_examples for s in known)
    total = math.fsum(s.n_examples * s.mean_sq_norm for s in known)
    if count < MIN_EXAMPLES or total == 0:
        return None
    top = np.sort(np.concatenate([s.top_sq_norms for s in known]))[::-1]
    return float(top[: math.ceil(count / 100)].sum()) / total


def kurtosis(steps: Iterable[StepSums]) -> float | None:
    """Mean ‖gᵢ‖⁴ over the square of mean ‖gᵢ‖², over all examples.

    1 where all norms are equal; 1 + 2/r_eff for Gaussian gradients without a mean, and so at most 3 for any
    Gaussian; times the kurtosis of the scale where the examples' scales differ.

    Args:
        steps: records of steps; those without `mean_fourth`, or not usable, are left out.

    Returns:
        At least 1; None where nothing is known.
    """
    known = [s for s in steps if s.usable and s.mean_fourth is not None]
    n = np.array([s.n_examples for s in known], dtype=np.float64)
    mean = sum(n * [s.mean_sq_norm for s in known]) / n.sum() if known else 0.0
    if mean == 0:
        return None
    ratios = [
        s.mean_fourth / mean / mean for s in known if s.mean_fourth is not None
    ]  # in range at any scale
    return float(n @ ratios / n.sum())


def effective_rank(moments: Moments, pairs: float) -> float:
    """r_eff = (tr Σ)² / tr Σ², from how much |G|² scatters over the steps: Var Y = 2 tr Σ² / pairs.

    That variance is one of products of different examples, so heavy tails do not enter it. Where there is
    signal, it is larger and the result lower.

    Args:
        moments: of the steps.
        pairs: of examples, Σ nₖ(nₖ − 1), or what that amounts to under weights.

    Returns:
        At least 0; `inf` where |G|² does not scatter.
    """
    tr_sigma_sq = moments.se_y() ** 2 * pairs / 2
    return moments.x**2 / tr_sigma_sq if tr_sigma_sq > 0 else math.inf


def light_share(rank: float) -> float:
    """Share of the top 1 % for Gaussian gradients of this r_eff: their ‖g‖² is about Gamma(r_eff / 2).

    Args:
        rank: r_eff, above 0.

    Returns:
        In (0.01, 1): 0.084 for r_eff 1, 0.015 for 64.
    """
    if math.isinf(rank):
        return 0.01
    shape = rank / 2
    return float(special.gammaincc(shape + 1, special.gammainccinv(shape, 0.01)))


def of(steps: Sequence[StepSums], moments: Moments, pairs: float) -> Tails:
    """Say what is known of the tails of these steps, with a warning where they are heavy.

    Heavy: the share passes `EXCESS` times what Gaussian gradients have at the lower end of r_eff (three
    standard errors of tr Σ², with `SPREAD`), or `CAP`, whichever is less. Simulated with 20 steps of 16 and
    50 of 4 (flat, 1/j, j⁻², two directions and one; B_simple 5 … 1,000): Gaussian gradients fire in 0–0.3 %
    of runs where r_eff is 14 or more, up to 3 % below that, where 20 steps say little of r_eff; Student t₅
    scales fire in 89–100 % (r_eff 14 and more) and 45–71 % (less), lognormal ones (σ = 1) in 99–100 %. With n
    above B the scatter of |G|² is signal, and only `CAP` speaks.

    Args:
        steps: usable.
        moments: of those steps.
        pairs: of examples, see `effective_rank`.
    """
    share = tail_share(steps)
    if share is None or not moments.x > 0:
        return Tails(share)
    rank = max(effective_rank(moments, pairs), 1.0)
    narrow = rank / (1 + 3 * math.sqrt(SPREAD / moments.k))
    if share <= min(EXCESS * light_share(narrow), CAP):
        return Tails(share)
    ratio = kurtosis(steps)
    more = "" if ratio is None else f", and ‖g‖⁴ is {ratio:.2g} times (‖g‖²)² on average"
    text = (
        f"Heavy tails: 1 % of the examples hold at least {100 * share:.0f} % of the squared gradient norms "
        f"(light tails: {100 * light_share(rank):.1f} %){more}. The interval then covers less often than it "
        "says."
    )
    return Tails(share, (text,))
