"""The record of one optimizer step: the two sums a noise scale is made of, and how parts of them add.

Contribution cᵢ is what example i adds to the gradient the optimizer sees, gᵢ = n cᵢ. Then

    mean_sq_norm     m = (1/n) Σ ‖gᵢ‖² = n Σ ‖cᵢ‖²      adds over micro-batches and ranks (before the n)
    sq_norm_of_mean  q = ‖ḡ‖²          = ‖Σ cᵢ‖²        does not add: read once, from the accumulated gradient

Units: m and q are (loss / parameter)², the noise scales are counted in examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

FACTORS = ("A", "B")
_FEWER: dict[str, Any] = {"mean_fourth": None, "top_sq_norms": ()}  # of a step with fewer parameters


def factor_of(parameter: str) -> str | None:
    """Tell which LoRA factor a parameter belongs to: "A", "B", or None for any other parameter."""
    parts = parameter.split(".")
    for factor in FACTORS:
        if f"lora_{factor}" in parts or f"lora_embedding_{factor}" in parts:
            return factor
    return None


@dataclass(frozen=True)
class Layout:
    """Which parameter stands in which row of a step's array. One layout serves many steps.

    Args:
        names: one parameter name a row, in the order of the rows.
    """

    names: tuple[str, ...]

    @cached_property
    def groups(self) -> dict[str, np.ndarray]:
        """Group name → row numbers: the LoRA factors "A" and "B", and "other" where there is a mix."""
        factors = [factor_of(name) or "other" for name in self.names]
        rows = {g: np.array([i for i, f in enumerate(factors) if f == g]) for g in (*FACTORS, "other")}
        return {g: r for g, r in rows.items() if len(r) and (g != "other" or len(r) < len(factors))}


class Unbiased(NamedTuple):
    """Unbiased estimates from one step: |G|² (may be negative) and tr Σ."""

    grad_sq_norm: float
    trace_sigma: float


def unbiased(n: int, mean_sq_norm: float, sq_norm_of_mean: float, sum_sq_weights: float) -> Unbiased:
    """Unbiased |G|² and tr Σ from the two sums of one step.

    |G|² = (q − m/n) / (1 − Σaᵢ²),   tr Σ = n (q − |G|²);   for equal weights aᵢ = 1/n these are
    (n q − m)/(n − 1) and n (m − q)/(n − 1).

    Args:
        n: examples in the step.
        mean_sq_norm: m, in (loss / parameter)².
        sq_norm_of_mean: q, in (loss / parameter)².
        sum_sq_weights: Σaᵢ² of the examples' weights in the loss, Σaᵢ = 1.

    Returns:
        Both estimates; NaN where they do not exist (one example, or all the weight on one).

    Source: McCandlish et al. 2018, arXiv:1812.06162, appendix A.1, for equal weights.
    """
    if n < 2 or not sum_sq_weights < 1:
        return Unbiased(math.nan, math.nan)
    if sum_sq_weights == 1 / n:  # the same numbers, without the loss of digits in q − |G|²
        m, q = mean_sq_norm, sq_norm_of_mean
        return Unbiased((n * q - m) / (n - 1), n * (m - q) / (n - 1))
    grad_sq_norm = (sq_norm_of_mean - mean_sq_norm / n) / (1 - sum_sq_weights)
    return Unbiased(grad_sq_norm, n * (sq_norm_of_mean - grad_sq_norm))


@dataclass(frozen=True)
class StepSums:
    """Sums of one optimizer step over all its micro-batches and ranks.

    Args:
        step: number of the optimizer step, from 0.
        n_examples: n, examples whose loss reached the gradient.
        mean_sq_norm: m = (1/n) Σ ‖gᵢ‖², in (loss / parameter)².
        sq_norm_of_mean: q = ‖ḡ‖², in (loss / parameter)².
        sum_sq_weights: Σaᵢ² of the examples' weights in the loss; default 1/n, equal weights.
        n_tokens: tokens with a label in the step, or None where they cannot be known.
        learning_rate: of the optimizer at this step (the largest over its parameter groups), or None.
        finite: whether both sums are finite.
        reason: why the step is not usable for an estimate, else None.
        loss_scaled: the sums still carry an unknown loss scale; ratios hold, tr Σ and |G|² do not.
        call_seen: n and the weights come from the model's own call; else from the rows its layers saw, with
            equal weights.
        local: the engine hides `.grad`, and each rank's own batch stands for a step: both sums are of that
            smaller batch, averaged over ranks.
        mean_fourth: (1/n) Σ ‖gᵢ‖⁴ over the examples, all measured parameters together, in
            (loss / parameter)⁴; None where the examples' own norms are not known, or not of these parameters.
        top_sq_norms: the largest ⌈n/10⌉ of ‖gᵢ‖², descending, in (loss / parameter)²; empty where unknown.
        metric: in which m and q are taken, see `gns.geometry.METRICS`.
        rows: [P, 2], (m, q) of each parameter, float32 or float64; None for sums built by hand.
        layout: names of those rows.
    """

    step: int
    n_examples: int
    mean_sq_norm: float
    sq_norm_of_mean: float
    sum_sq_weights: float | None = None
    n_tokens: int | None = None
    learning_rate: float | None = None
    finite: bool = True
    reason: str | None = None
    loss_scaled: bool = False
    call_seen: bool = True
    local: bool = False
    mean_fourth: float | None = None
    top_sq_norms: tuple[float, ...] = ()
    metric: str = "euclidean"
    rows: np.ndarray | None = field(default=None, repr=False, compare=False)
    layout: Layout | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.n_examples < 0:
            raise ValueError(f"n_examples is {self.n_examples}; a count of examples is needed, 0 or more")
        if self.sum_sq_weights is None:
            object.__setattr__(self, "sum_sq_weights", 1 / self.n_examples if self.n_examples else math.nan)
        if not (math.isfinite(self.mean_sq_norm) and math.isfinite(self.sq_norm_of_mean)):
            object.__setattr__(self, "finite", False)
        if self.reason is None:
            object.__setattr__(self, "reason", self._why_unusable())

    def _why_unusable(self) -> str | None:
        if not self.finite:
            return "a gradient of this step is not finite (overflow, NaN or Inf)"
        if self.n_examples < 2:
            return f"{self.n_examples} example(s) in the step: at least 2 are needed to see a spread"
        if not self.sum_sq_weights < 1:  # type: ignore[operator]
            return "one example has all the weight in the loss: at least 2 with a label are needed"
        return None

    @property
    def usable(self) -> bool:
        """Whether an estimate may use this step."""
        return self.reason is None

    @property
    def _unbiased(self) -> Unbiased:
        assert self.sum_sq_weights is not None
        return unbiased(self.n_examples, self.mean_sq_norm, self.sq_norm_of_mean, self.sum_sq_weights)

    @property
    def grad_sq_norm(self) -> float:
        """Unbiased estimate of |G|² from this step alone, in (loss / parameter)²; may be negative."""
        return self._unbiased.grad_sq_norm

    @property
    def trace_sigma(self) -> float:
        """Unbiased estimate of tr Σ from this step alone, in (loss / parameter)²."""
        return self._unbiased.trace_sigma

    @property
    def b_simple(self) -> float:
        """Noise scale of this step alone, in examples: mostly noise. NaN where the |G|² estimate is ≤ 0."""
        return self.trace_sigma / self.grad_sq_norm if self.grad_sq_norm > 0 else math.nan

    @property
    def b_simple_plugin(self) -> float:
        """Plug-in tr Σ / ‖ḡ‖², in examples: saturates at n; Lemma 4.1 where n is the whole data set."""
        return self.trace_sigma / self.sq_norm_of_mean if self.sq_norm_of_mean > 0 else math.nan

    @property
    def groups(self) -> Mapping[str, StepSums]:
        """Factor name ("A", "B", and "other" in a mix) → the same figures for that group's parameters."""
        if self.rows is None or self.layout is None:
            return {}
        return {name: self._of_rows(rows) for name, rows in self.layout.groups.items()}

    def parameters(self) -> Iterator[tuple[str, StepSums]]:
        """Yield (parameter name, the same figures for that parameter alone)."""
        if self.rows is not None and self.layout is not None:
            for i, name in enumerate(self.layout.names):
                yield name, self._of_rows(np.array([i]))

    def _of_rows(self, rows: np.ndarray) -> StepSums:
        assert self.rows is not None
        m, q = self.rows[rows].sum(axis=0, dtype=np.float64)
        sums = {"mean_sq_norm": float(m), "sq_norm_of_mean": float(q)}
        return replace(self, **_FEWER, **sums, rows=None, layout=None)

    def without(self, names: Iterable[str], layout: Layout | None = None) -> StepSums:
        """Give the same step with some parameters left out of both sums.

        Norms of single examples over the other parameters are not known: those fields become unknown.

        Args:
            names: parameters to leave out; those not in the record change nothing.
            layout: the layout that results, if the caller has it, so that many steps share one.

        Returns:
            A new record; this one is unchanged.
        """
        if self.rows is None or self.layout is None:
            return self
        gone = set(names)
        keep = np.array([name not in gone for name in self.layout.names])
        if keep.all():
            return self
        if not keep.any():
            reason = self.reason or "every measured parameter of this step was left out since"
            return replace(self, **_FEWER, reason=reason)
        left = layout or Layout(tuple(n for n in self.layout.names if n not in gone))
        return from_rows(self.rows[keep], left, like=self, **_FEWER)


def from_rows(rows: np.ndarray, layout: Layout, *, like: StepSums | None = None, **fields: Any) -> StepSums:
    """Build the record whose joint sums are the sums of `rows`.

    Args:
        rows: [P, 2], (m, q) of each parameter.
        layout: names of the rows.
        like: a record to take the other fields from.
        **fields: fields of `StepSums`; they win over `like`.

    Returns:
        The record, summed in float64.

    Raises:
        ValueError: `rows` and `layout` differ in length.
    """
    if rows.shape != (len(layout.names), 2):
        raise ValueError(f"rows has shape {rows.shape}; [{len(layout.names)}, 2] is needed, a row a name")
    m, q = rows.sum(axis=0, dtype=np.float64)
    joint = {"mean_sq_norm": float(m), "sq_norm_of_mean": float(q), "rows": rows, "layout": layout}
    if like is not None:
        return replace(like, **joint, **fields)
    return StepSums(**joint, **fields)


@dataclass(frozen=True)
class Contributions:
    """What part of a step (a micro-batch, a rank) adds to its sums; `merge` is associative and commutative.

    Args:
        sum_sq_norms: [P], Σᵢ ‖cᵢ‖² of each parameter.
        n_examples: examples in the part.
        weight_sum: Σwᵢ of the examples' unnormalised weights in the loss.
        weight_sq_sum: Σwᵢ².
        n_tokens: tokens with a label, or None where they cannot be known.
    """

    sum_sq_norms: np.ndarray
    n_examples: int
    weight_sum: float
    weight_sq_sum: float
    n_tokens: int | None = None

    def merge(self, other: Contributions) -> Contributions:
        """Add another part of the same step."""
        tokens = None if self.n_tokens is None or other.n_tokens is None else self.n_tokens + other.n_tokens
        return Contributions(
            self.sum_sq_norms + other.sum_sq_norms,
            self.n_examples + other.n_examples,
            self.weight_sum + other.weight_sum,
            self.weight_sq_sum + other.weight_sq_sum,
            tokens,
        )

    def close(self, sq_norms_of_sum: np.ndarray, layout: Layout, **fields: Any) -> StepSums:
        """Join the accumulated gradient's squared norms, and so end the step.

        Args:
            sq_norms_of_sum: [P], ‖Σᵢ cᵢ‖² of each parameter.
            layout: names of the rows.
            **fields: further fields of `StepSums`, at least `step`.

        Returns:
            The record of the step.
        """
        rows = np.stack([self.n_examples * self.sum_sq_norms, sq_norms_of_sum], axis=1)
        weighted = self.weight_sum > 0
        sum_sq_weights = self.weight_sq_sum / self.weight_sum**2 if weighted else None
        fields = {"n_examples": self.n_examples, "n_tokens": self.n_tokens, **fields}
        return from_rows(rows, layout, sum_sq_weights=sum_sq_weights, **fields)
