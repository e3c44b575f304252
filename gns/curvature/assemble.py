"""From sums and contractions to a `CurvatureEstimate`: the figures, who adds what, and what is to be said."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gns.curvature.conclude import Known, point_values, set_of
from gns.curvature.contractions import Contractions, identity
from gns.curvature.gathering import Sums
from gns.curvature.result import Contribution, CurvatureEstimate
from gns.estimate import format_count
from gns.geometry import module_of
from gns.sums import factor_of

ONE_PART = "All examples for H were taken as one: what H itself owes to them is not in the interval."


def known_of(sums: Sums, eye: Contractions) -> Known:
    """Give what is known without products.

    Args:
        sums: of the gradients.
        eye: their contractions with the identity.
    """
    centred = float(sums.centred_sq().sum())
    return Known(
        centred=centred,
        probe_sq=eye.probes[0].sum(1),
        traces=None if sums.overlap else _traces(sums, centred, eye.groups[0].sum(1)),
        by_probe=sums.by_probe,
        share=sums.share,
        sum_sq_weights=sums.sum_sq_weights,
        n=sums.n,
    )


def _traces(sums: Sums, centred: float, along: np.ndarray) -> np.ndarray:
    """Tₛ = Σ ‖c̃ᵢ − ãᵢḡ‖² over each probe's examples [S]; they add up to that over all.

    Exact where the examples of a probe weigh the same; else Σ ãᵢc̃ᵢ is shared out by weight, and all of T
    where Σ ‖c̃ᵢ‖² is not known probe by probe.

    Args:
        sums: of the gradients.
        centred: Σₛ Tₛ.
        along: [S], ḡₛᵀḡ.
    """
    if sums.by_probe is None:
        return centred * sums.share
    each = np.divide(sums.sq_share, sums.share, out=np.zeros_like(along), where=sums.share > 0)
    found = sums.by_probe - 2 * each * along + sums.sq_share * along.sum()
    return found + sums.share * (centred - found.sum())


def concluded(
    sums: Sums,
    found: Contractions,
    *,
    level: float,
    operator: str,
    seed: int,
    contributions: bool = True,
) -> CurvatureEstimate:
    """Conclude from the contractions.

    Args:
        sums: of the gradients.
        found: with the operator.
        level: nominal coverage of the sets.
        operator: "hessian" or "ggn".
        seed: of the signs.
        contributions: say what factors and modules add, if it is known.

    Returns:
        The estimate, without what costs further products.
    """
    eye = identity(sums)
    known = known_of(sums, eye)
    noise, simple = set_of(found, known, level), set_of(eye, known, level)
    each = _contributions(sums, found, eye, known) if contributions else None
    groups = None if each is None else _joined(each, factor_or_other)
    block = _loud_one(sums)
    notes = list(found.notes)
    if len(found.mass) < 2:
        notes.append(ONE_PART)
    if sums.left_out:
        notes.append(
            f"{len(sums.left_out)} trainable parameter(s) are not in it, e.g. {_first(sums.left_out)}"
        )
    if block == "B":
        notes.append("Factor A has no gradient here (B = 0): all numbers are those of factor B's block of H.")
    return CurvatureEstimate(
        b_noise=noise.ratio,
        low=noise.low,
        high=noise.high,
        level=level,
        status=noise.status,
        trace_h_sigma=noise.x,
        g_h_g=noise.y,
        detection_limit=noise.detection_limit,
        method=found.method,
        operator=operator,
        b_simple=simple.ratio,
        b_simple_low=simple.low,
        b_simple_high=simple.high,
        b_simple_status=simple.status,
        trace_sigma=simple.x,
        grad_sq_norm=simple.y,
        n_examples=sums.n,
        n_hessian=len(found.mass),
        probes=sums.probes,
        groups={} if groups is not None and set(groups) == {"other"} else groups,
        modules=None if each is None else _joined(each, module_of),
        block=block,
        unit=_unit(sums),
        warnings=tuple(notes),
        moments=noise.moments,
        seed=seed,
        derivatives=found.derivatives,
    )


def _contributions(
    sums: Sums, found: Contractions, eye: Contractions, known: Known
) -> dict[str, Contribution] | None:
    """What each parameter adds; None where products are known as a whole only."""
    x, y = point_values(found, known)
    if len(x) != len(sums.names):
        return None
    a, centred = sums.sum_sq_weights, sums.centred_sq()
    q, t = eye.groups[0].sum(0), eye.weighted[0]
    s = centred + 2 * t - a * q
    grad = (q - s) / (1 - a)
    trace = sums.n * (s - a * grad)
    rows = zip(sums.names, x, y, trace, grad, strict=True)
    return {name: Contribution(*(float(v) for v in values)) for name, *values in rows}


def factor_or_other(parameter: str) -> str:
    """LoRA factor of a parameter, or "other"."""
    return factor_of(parameter) or "other"


def _loud_one(sums: Sums) -> str | None:
    """The one factor of several that has a gradient, or None."""
    heard: dict[str, float] = {}
    for name, sq in sums.sq.items():
        heard[factor_or_other(name)] = heard.get(factor_or_other(name), 0.0) + sq
    loud = [factor for factor, sq in heard.items() if sq > 0]
    return loud[0] if len(loud) == 1 < len(heard) else None


def _joined(parts: dict[str, Contribution], key: Callable[[str], str]) -> dict[str, Contribution]:
    out: dict[str, Contribution] = {}
    for name, c in parts.items():
        k, before = key(name), out.get(key(name), Contribution(0.0, 0.0, 0.0, 0.0))
        out[k] = Contribution(
            before.trace_h_sigma + c.trace_h_sigma,
            before.g_h_g + c.g_h_g,
            before.trace_sigma + c.trace_sigma,
            before.grad_sq_norm + c.grad_sq_norm,
        )
    return out


def _first(reasons: dict[str, str]) -> str:
    name, why = next(iter(reasons.items()))
    return f"{name}: {why}"


def _unit(sums: Sums) -> str:
    if sums.n_tokens is None:
        return "examples"
    return f"examples (mean {format_count(sums.n_tokens / sums.n)} tokens)"
