"""From contractions to tr(HΣ), GᵀHG, their ratio and its confidence set. Pure functions of arrays.

With all examples joined into one batch, weights ãᵢ (Σãᵢ = 1, A = Σãᵢ²), dᵢ = c̃ᵢ − ãᵢḡ and T = Σ‖dᵢ‖² known,

    r = Σ dᵢᵀHdᵢ ≈ Σₛ [uₛᵀHuₛ + β₋ₛ (Tₛ − ‖uₛ‖²)]   random signs, corrected by the known traces Tₛ, Σ Tₛ = T
    β₋ₛ = Σₜ uₜᵀHuₜ / Σₜ ‖uₜ‖²                     over the other probes, t ≠ s, whose signs are others
    s = Σ c̃ᵢᵀHc̃ᵢ = r + 2 (Σ ãᵢc̃ᵢ)ᵀHḡ − A ḡᵀHḡ
    Y = GᵀHG   = (ḡᵀHḡ − s) / (1 − A)                all pairs of two examples
    X = tr(HΣ) = N (s − A Y)

For H = cI these are c times the |G|² and tr Σ of `gns.sums.unbiased`, exactly. Over the signs r has no
bias: a signed sum's error in the trace, which is known, is taken off with a slope that knows nothing of
its signs. (Where the examples of one probe weigh differently, Tₛ is shared out by weight, and a trace of
bias is left.) The plain ratio T · Σ uₛᵀHuₛ / Σ ‖uₛ‖² is off by about (2/S)(1/r_eff(Σ) − 1/r_eff(HΣ)),
which no number of examples mends, and Y by B_noise/N times as much.

Spread: probe by probe (each has its own examples; first-order influence) and part by part of the examples for
H, added. A slow test wants 89 % of its 95 % sets to cover where B_noise is 10 or more. Simulated by its code
with a flat spectrum, 8 probes and B_noise = 2, they cover in 85 % (16 examples) and 91 % (128) of 1,000.
Source of both: tests/gns/curvature/test_coverage.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gns.curvature.contractions import Contractions
from gns.statistics.moments import Moments, exact_unit
from gns.statistics.sets import detection_limit, honest_set, indefinite, satterthwaite

MIN_PROBES = 6  # fewer replicates are not trusted with their own spread; simulated, sets of 3 to 5 do cover
STATUSES = ("measured", "lower bound", "not detectable", "collecting", "indefinite")


@dataclass(frozen=True)
class Known:
    """What is known of the gradients without any product.

    Args:
        centred: T = Σ ‖c̃ᵢ − ãᵢḡ‖² over the parameters looked at.
        probe_sq: [S], ‖uₛ‖² over them.
        traces: [S], Tₛ, the mean of ‖uₛ‖² over the signs, Σ Tₛ = T; None where probes share examples.
        by_probe: [S], Σ ‖c̃ᵢ‖² of each probe's examples, up to a factor; None where not known.
        share: [S], αₛ, the probes' shares of the weight.
        sum_sq_weights: A.
        n: N.
    """

    centred: float
    probe_sq: np.ndarray
    traces: np.ndarray | None
    by_probe: np.ndarray | None
    share: np.ndarray
    sum_sq_weights: float
    n: int


@dataclass(frozen=True)
class Set:
    """A ratio X / Y with what is to be believed of it."""

    x: float
    y: float
    ratio: float
    low: float
    high: float
    status: str
    detection_limit: float
    moments: Moments


def _xy(r: np.ndarray, q: np.ndarray, t: np.ndarray, known: Known) -> tuple[np.ndarray, np.ndarray]:
    a = known.sum_sq_weights
    s = r + 2 * t - a * q
    y = (q - s) / (1 - a)
    return known.n * (s - a * y), y


def _of_signs(known: Known) -> np.ndarray:
    """[S], what each uₛᵀHuₛ weighs in r."""
    sq, total = known.probe_sq, float(known.probe_sq.sum())
    plain = np.full(len(sq), known.centred / total if total > 0 else 0.0)
    others = total - sq
    if known.traces is None or not (others > 0).all():
        return plain
    slopes = (known.traces - sq) / others  # of probe s, shared by all others
    return 1 + slopes.sum() - slopes


def point_values(found: Contractions, known: Known) -> tuple[np.ndarray, np.ndarray]:
    """X and Y by parameter, [P] each; they add up to those of the whole."""
    mass = found.mass[:, None]
    r = (mass * np.einsum("s,msp->mp", _of_signs(known), found.probes)).sum(0)
    q, t = (mass * found.groups.sum(1)).sum(0), (mass * found.weighted).sum(0)
    return _xy(r, q, t, known) if len(r) == len(q) else _xy(r.sum(), q.sum(), t.sum(), known)


def moments_of(found: Contractions, known: Known) -> Moments:
    """X and Y of the whole with their spread over probes and over parts.

    Args:
        found: summed over parameters or not.
        known: of the same parameters.
    """
    whole = found.total()
    probes, groups, weighted = whole.probes[..., 0], whole.groups[..., 0], whole.weighted[:, 0]
    mass = found.mass
    scale = known.centred / known.probe_sq.sum() if known.probe_sq.sum() > 0 else 0.0
    per_part = _xy(probes @ _of_signs(known), groups.sum(1), weighted, known)
    x, y = (float(mass @ v) for v in per_part)
    of_probes = _influence(mass @ probes, mass @ groups, scale, known)
    of_parts = (mass * (per_part[0] - x), mass * (per_part[1] - y))
    return _joined(x, y, [of_probes, of_parts] if len(mass) > 1 else [of_probes])


def _influence(
    probes: np.ndarray, groups: np.ndarray, scale: float, known: Known
) -> tuple[np.ndarray, np.ndarray]:
    """What each probe's examples add to X and to Y beyond their share, [S] each."""
    a = known.sum_sq_weights
    total_sq = known.probe_sq.sum()
    slope = probes.sum() / total_sq if total_sq > 0 else 0.0
    trace = known.probe_sq * scale if known.by_probe is None else known.by_probe
    trace = trace * (known.centred / trace.sum()) if trace.sum() > 0 else trace
    dr = scale * (probes - slope * known.probe_sq) + slope * (trace - known.share * known.centred)
    dq = 2 * (groups - known.share * groups.sum())
    return known.n * dr / (1 - a), dq - dr / (1 - a)


def _joined(x: float, y: float, parts: list[tuple[np.ndarray, np.ndarray]]) -> Moments:
    """Moments of independent sources of spread: variances and third cumulants add.

    The degrees of freedom are Satterthwaite's, of X − θY at the θ that was found (of Y where Y ≤ 0).
    """
    theta = x / y if y > 0 else math.inf
    variance, squares = np.zeros(3), 0.0
    third, at = np.zeros(4), 0.0
    for a, b in parts:
        k = len(a)
        v = np.array([a @ a, a @ b, b @ b]) * k / (k - 1)
        d = a - theta * b if math.isfinite(theta) else -b
        of_d = float(d @ d) * k / (k - 1)
        variance, at, squares = variance + v, at + of_d, squares + of_d**2 / (k - 1)
        third = third + [(a**3).sum(), (a * a * b).sum(), (a * b * b).sum(), (b**3).sum()]
    df = satterthwaite(at, squares) or float(len(parts[0][0]) - 1)
    aa, ab, bb = (float(v) for v in variance * df / (df + 1))
    aaa, aab, abb, bbb = (float(v) for v in third)
    return Moments(x, y, (aa, ab, bb), (aaa, aab, abb, bbb), df + 1)


def set_of(found: Contractions, known: Known, level: float) -> Set:
    """Give the ratio with its confidence set, status and detection limit.

    Args:
        found: of the parameters looked at.
        known: of the same.
        level: nominal coverage.
    """
    moments = moments_of(found, known)
    m = moments.times(exact_unit(moments.x, moments.y))
    low, high, empty = honest_set(m, level)
    enough = len(known.share) >= MIN_PROBES
    if not enough:
        status = "collecting"
    elif indefinite(m, level):
        status = "indefinite"
    elif empty:
        status = "not detectable"
    else:
        status = "lower bound" if math.isinf(high) else "measured"
    return Set(
        x=moments.x,
        y=moments.y,
        ratio=moments.x / moments.y if moments.y > 0 else math.nan,
        low=low,
        high=high,
        status=status,
        detection_limit=detection_limit(m, level),
        moments=moments,
    )
