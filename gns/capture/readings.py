"""Host values of one optimizer step before anything is concluded: of this rank, or of all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from gns.capture.spread import Spread


@dataclass(frozen=True)
class Readings:
    """What was measured in a step; P parameters, loss scale undone.

    Args:
        s: [P], Σᵢ ‖cᵢ‖² of each parameter.
        q: [P], ‖ḡ‖², of the part of ḡ that is on this rank.
        rows: [P], rows whose gradient passed its taps.
        n: examples, in the calls that were run backward; where these were not seen, rows.
        call_seen: whether n, tokens and weights come from the model's own calls.
        totals: tokens, Σw and Σw²; NaN where unknown.
        read: whether a backward pass ended, so that there was a gradient to be read.
        loss_scaled: an unknown loss scale is still in the sums.
        reason: why the step is not usable, or None.
        without_gradient: parameters whose `.grad` is None.
        misfits: parameter → why rows of it are not examples, if those rows count.
        mismatch: parameter of the self-check → ‖Σcᵢ − ḡ‖.
        dtypes: parameter of the self-check → lowest precision on its way; those whose taps never fired are
            missing.
        slack: how many times the tolerance of the self-check is allowed.
        spread: of the examples' ‖cᵢ‖² over all parameters; None where they are not known.
        in_metric: [P, 2], s and q in a metric that weighs entries; None in the Euclidean one.
        unready: parameter → why there is no metric for it, if examples or a gradient reached it.
        local: `.grad` is hidden; q is ‖Σcᵢ‖² of the examples on one rank, see `gns/capture/localstats.py`.
    """

    s: np.ndarray
    q: np.ndarray
    rows: np.ndarray
    n: int
    call_seen: bool = True
    totals: tuple[float, ...] = (math.nan,) * 3
    read: bool = True
    loss_scaled: bool = False
    reason: str | None = None
    without_gradient: frozenset[str] = frozenset()
    misfits: Mapping[str, str] = field(default_factory=dict)
    mismatch: Mapping[str, float] = field(default_factory=dict)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    slack: float = 1.0
    local: bool = False
    spread: Spread | None = None
    in_metric: np.ndarray | None = None
    unready: Mapping[str, str] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        """Whether all sums are finite."""
        return bool(np.isfinite(self.s).all() and np.isfinite(self.q).all())


def empty(size: int, **known: object) -> Readings:
    """Readings of a rank that ran nothing backward: zeros, which change no sum."""
    zeros: Sequence[np.ndarray] = [np.zeros(size) for _ in range(3)]
    return Readings(*zeros, n=0, totals=(0.0, 0.0, 0.0), read=False, **known)  # type: ignore[reportArgumentType]
