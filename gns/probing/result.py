"""`FrozenEstimate`: a noise scale at one parameter point, and what it says of itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gns.estimate import Estimate, format_count
from gns.probing.largest import LargeExample
from gns.statistics.moments import exact_unit
from gns.statistics.pairs import Batches, Dependence, SignFlip, dependence, has_spread, pooled, sign_flip
from gns.statistics.pairspread import score
from gns.statistics.sets import MIN_STEPS, detection_limit, honest_set, status_of

SCORE = "all pairs, under the noise scale that is tested"
VIEW = "all pairs of examples at one parameter point"
DEPENDENT = 0.01  # p-value of a difference between pairs inside and across batches that is warned of


@dataclass(frozen=True)
class DropoutNoise:
    """tr Σ split into what comes from the data and what comes from dropout masks.

    Args:
        data: tr Σ of the examples' mask-averaged gradients, in (loss / parameter)².
        dropout: tr Σ of the masks, of one example's gradient about its own average.
        dropout_se: standard error of `dropout`, over batches.
    """

    data: float
    dropout: float
    dropout_se: float


@dataclass(frozen=True)
class FrozenEstimate(Estimate):
    """A noise scale measured at frozen weights. A "step" of `Estimate` is a batch here.

    Its `p_value` is that of the sign-flip test, which needs no estimate of a spread. The set has an upper end
    only where that test, too, sees a gradient at the set's own level, see `SignFlip.upper_end`.

    Args:
        view: what average this is.
        variance: what the spread was taken from.
        signal: the sign-flip test.
        dependence: pairs inside batches against pairs across, or None where they cannot be compared.
        gradients: how the batches' gradients were kept.
        looks: numbers of batches at which the measurement might have stopped, declared beforehand.
        stopped: why it ended before the batches did, or None.
        largest: the examples with the largest gradients, if asked for.
        dropout: data and dropout noise, if asked for.
    """

    view: str = VIEW
    variance: str = SCORE
    signal: SignFlip | None = None
    dependence: Dependence | None = None
    gradients: str = "whole"
    looks: tuple[int, ...] = ()
    stopped: str | None = None
    largest: tuple[LargeExample, ...] = ()
    dropout: DropoutNoise | None = None

    @property
    def target(self) -> str:
        """What the number estimates."""
        return f"{self.view}; population gradient as long as no example was seen twice"

    @property
    def b_simple_data(self) -> float:
        """Noise scale of the data noise alone, in examples; NaN without `split_dropout`, or |G|² ≤ 0."""
        if self.dropout is None or not self.grad_sq_norm > 0:
            return math.nan
        return self.dropout.data / self.grad_sq_norm

    def __str__(self) -> str:
        said = super().__str__().replace(" steps × ", " batches × ")
        if self.n_steps < 2:
            return said.replace("usable step(s)", "usable batch(es)")
        ended = "" if self.stopped is None else f"; {self.stopped}"
        return f"{said}; frozen weights; any gradient at all: p = {self.p_value:.2g}{ended}"


def from_batches(
    batches: Batches,
    *,
    level: float = 0.95,
    looks: int = 1,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
) -> FrozenEstimate:
    """Estimate B_simple from batches at one parameter point.

    Args:
        batches: at least two for anything but "collecting".
        level: nominal coverage of the confidence set, over all looks together.
        looks: declared looks; each gets its share of 1 − level (Bonferroni).
        seed: of the sign-flip test.
        about: further fields of `FrozenEstimate`.

    Returns:
        The estimate, without groups.

    Raises:
        ValueError: `level` is outside (0, 1), or `looks` below 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; a coverage in (0, 1) is needed, e.g. 0.95")
    if looks < 1:
        raise ValueError(f"looks is {looks}; 1 or more are needed")
    fixed: dict[str, Any] = {
        "level": level,
        "n_steps": len(batches),
        "n_examples": int(batches.n.sum()),
        **(about or {}),
    }
    x, y = pooled(batches)
    if not has_spread(batches):
        nan = math.nan
        return FrozenEstimate(
            nan,
            nan,
            math.inf,
            status="collecting",
            trace_sigma=x,
            grad_sq_norm=y,
            detection_limit=nan,
            **fixed,
        )
    unit = exact_unit(x, y)
    moments = score(batches.scaled(unit))
    each = 1 - (1 - level) / looks
    low, high, empty = honest_set(moments, each)
    signal = sign_flip(batches, seed=seed)
    high = signal.upper_end(high, each)
    apart = dependence(batches)
    fixed["warnings"] = (*fixed.get("warnings", ()), *sentences(apart, moments.k))
    return FrozenEstimate(
        x / y if y > 0 else math.nan,
        low,
        high,
        status=status_of(moments, high, empty),
        trace_sigma=x,
        grad_sq_norm=y,
        detection_limit=detection_limit(moments, each),
        p_value=signal.p_value,
        signal=signal,
        dependence=apart,
        moments=moments,
        set_level=each if looks > 1 else None,
        **fixed,
    )


def sentences(found: Dependence | None, k: float = math.inf) -> tuple[str, ...]:
    """Say that the examples of a batch are not independent, if they are not.

    Args:
        found: the comparison.
        k: effective number of batches; from fewer than `MIN_STEPS`, less agreement is not concluded.
    """
    if found is None or found.p_value >= DEPENDENT or (found.difference < 0 and k < MIN_STEPS * (1 - 1e-9)):
        return ()
    if found.difference < 0:
        return (
            f"Examples of one batch agree less than examples of different batches (p = {found.p_value:.2g}): "
            "batches are balanced, or drawn without replacement from little data. Training steps of such "
            "batches read too large a noise scale.",
        )
    reads = ""
    if found.b_simple_across > 0 and found.b_simple_within > 0:
        reads = (
            f": {format_count(found.b_simple_within)} examples where pairs across batches say "
            f"{format_count(found.b_simple_across)}"
        )
    return (
        f"Examples of one batch agree more than examples of different batches (p = {found.p_value:.2g}): "
        "grouped lengths, neighbouring chunks of one text, duplicates, or data in order? Training steps "
        f"of such batches read too small a noise scale{reads}. Shuffle the data, then measure again.",
    )
