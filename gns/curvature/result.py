"""`CurvatureEstimate`: B_noise with its confidence set, and what stands beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gns.estimate import format_count
from gns.statistics.moments import Moments
from gns.statistics.sets import inside


@dataclass(frozen=True)
class Contribution:
    """What some parameters add to the sums over all of them; cross terms go half to each side.

    Args:
        trace_h_sigma: to tr(HΣ).
        g_h_g: to GᵀHG.
        trace_sigma: to tr Σ, in (loss / parameter)².
        grad_sq_norm: to |G|², in (loss / parameter)².
    """

    trace_h_sigma: float
    g_h_g: float
    trace_sigma: float
    grad_sq_norm: float


@dataclass(frozen=True)
class Block:
    """The noise scale of some parameters taken as the only trainable ones: their block of H alone."""

    b_noise: float
    low: float
    high: float
    status: str
    trace_h_sigma: float
    g_h_g: float


@dataclass(frozen=True)
class Cost:
    """What a reading cost.

    Args:
        seconds: in all.
        gradient_seconds: of the tapped passes over the batches for g.
        batches: how many of those there were.
        products: vectors multiplied with H, each over all the examples for H.
        step_seconds: of one optimizer step of the training around it, without readings: the median of those
            before; None outside of a training.
    """

    seconds: float
    gradient_seconds: float
    batches: int
    products: int
    step_seconds: float | None = None

    @property
    def steps(self) -> float:
        """The reading in steps of the training around it; NaN where there is none."""
        return self.seconds / self.step_seconds if self.step_seconds else math.nan

    @property
    def tapped_passes(self) -> float:
        """The reading in passes over one batch for g, forward and backward with taps: dearer than a step."""
        return (
            self.seconds / (self.gradient_seconds / self.batches) if self.gradient_seconds > 0 else math.nan
        )


@dataclass(frozen=True)
class CurvatureEstimate:
    """B_noise = tr(HΣ) / GᵀHG at one parameter point.

    tr(HΣ) and GᵀHG are in loss³ / parameter⁴ (H in loss / parameter², Σ in loss² / parameter²).

    Args:
        b_noise: tr(HΣ) / GᵀHG in examples; NaN where GᵀHG ≤ 0.
        low: lower end of the confidence set.
        high: upper end; `inf` where the data set no upper bound.
        level: nominal coverage.
        status: "measured", "lower bound" (GᵀHG not distinguishable from 0), "not detectable" (no positive
            ratio fits), "collecting" (too few probes for the set to be trusted), "indefinite" (tr(HΣ) or GᵀHG
            is significantly below 0: at this point the second-order law has no critical batch size).
        trace_h_sigma: tr(HΣ).
        g_h_g: GᵀHG, without bias; may be negative.
        detection_limit: largest B_noise that these batches could tell from infinity; NaN where tr(HΣ) < 0.
        method: how products were made: "exact", "difference" or "forward".
        operator: "hessian" or "ggn".
        b_simple: tr Σ / |G|² of the same examples, by the same formulas.
        b_simple_low: lower end of its set.
        b_simple_high: upper end of its set.
        b_simple_status: as for B_noise.
        trace_sigma: tr Σ, in (loss / parameter)².
        grad_sq_norm: |G|², in (loss / parameter)².
        n_examples: examples for g, N.
        n_hessian: parts of the examples for H.
        probes: random sign vectors.
        groups: LoRA factor → its contribution to the sums; empty without factors, None where contributions
            were not asked for (`b_noise(contributions=True)` gives them) or are not known (method "forward").
        modules: module → its contribution; None as there.
        blocks: LoRA factor → the noise scale of its block of H alone, where asked for.
        block: the factor that these numbers are of, where no other has a gradient (B, at B = 0), else None.
        trace_h: tr H by one random vector, where asked for.
        largest_eigenvalue: λ_max of H, a lower bound by Lanczos iteration, where asked for.
        cost: of the reading.
        unit: what one example is.
        warnings: sentences on what to know of it.
        moments: tr(HΣ) and GᵀHG with their spread, from which readings are joined.
        seed: of the signs.
        derivatives: how exact products with H were made: "tangents", along a tape of the model's operations
            (without contributions, in float32 or wider), or "double backward"; None: none were.
    """

    b_noise: float
    low: float
    high: float
    level: float
    status: str
    trace_h_sigma: float
    g_h_g: float
    detection_limit: float
    method: str
    operator: str
    b_simple: float
    b_simple_low: float
    b_simple_high: float
    b_simple_status: str
    trace_sigma: float
    grad_sq_norm: float
    n_examples: int
    n_hessian: int
    probes: int
    groups: dict[str, Contribution] | None = None
    modules: dict[str, Contribution] | None = field(default=None, repr=False)
    blocks: dict[str, Block] = field(default_factory=dict)
    block: str | None = None
    trace_h: float | None = None
    largest_eigenvalue: float | None = None
    cost: Cost | None = None
    unit: str = "examples"
    warnings: tuple[str, ...] = ()
    moments: Moments | None = field(default=None, repr=False)
    seed: int = 0
    derivatives: str | None = None

    @property
    def ratio(self) -> float:
        """B_noise / B_simple; NaN where either is."""
        return self.b_noise / self.b_simple if self.b_simple > 0 else math.nan

    @property
    def max_learning_rate(self) -> float | None:
        """2 / λ_max: above it gradient descent on these examples' loss diverges along that direction."""
        found = self.largest_eigenvalue
        return None if found is None else 2 / found if found > 0 else math.inf

    def __str__(self) -> str:
        name = "B_noise" if self.operator == "hessian" else "B_noise (Gauss-Newton)"
        name += f" of factor {self.block}" if self.block else ""
        percent, of = (
            f"{100 * self.level:g} %",
            f"{self.n_examples} examples, {self.probes} probes, {self.method}",
        )
        simple = f"B_simple of the same: {format_count(self.b_simple)}"
        if self.status == "indefinite":
            sign = "GᵀHG" if self.g_h_g < 0 else "tr(HΣ)"
            return f"{name}: {sign} is below 0 ({of}); {simple}; indefinite"
        if self.status in ("lower bound", "not detectable"):
            bound = f"{name} ≥ {format_count(self.low)} examples ({percent})"
            limit = of  # where tr(HΣ) comes out below 0 there is no limit to name
            if not math.isnan(self.detection_limit):
                limit = f"detection limit {format_count(self.detection_limit)}, {of}"
            return f"{bound}; GᵀHG not distinguishable from 0 ({limit}); {simple}; {self.status}"
        point = inside(self.b_noise, self.low, self.high)
        value = "not resolved" if math.isnan(point) else f"= {format_count(point)} examples"
        bounds = f"{format_count(self.low)} … {format_count(self.high)}"
        return f"{name} {value} ({percent}: {bounds}), {of}; {simple}; {self.status}"


@dataclass(frozen=True)
class CurvatureReading:
    """One reading during a training.

    Args:
        step: number of the optimizer step before which the weights were these.
        learning_rate: of the optimizer at that step, or None.
        estimate: what was read.
    """

    step: int
    learning_rate: float | None
    estimate: CurvatureEstimate
