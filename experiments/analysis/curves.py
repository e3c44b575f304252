"""The batch curve of a cell: loss over batch size at the best learning rate; its optimum and its end.

The learning rate is chosen on validation data, the loss is that of the test split at the chosen rate, in the
data and in each bootstrap replicate: so the intervals hold the uncertainty of the choice as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from experiments.analysis.cells import Cell, Floats, by_data, ruled_out
from experiments.analysis.resampling import DRAWS, LEVEL, interval, means, replicates

Place = tuple[float, float, float]  # log₂ B: a place, what it is at the least, and at the most


@dataclass(frozen=True)
class Estimated:
    """A number with its interval.

    Args:
        value: of the data; NaN where there is none.
        low: lower end.
        high: upper end; may be infinite.
        note: what a reader must know, as "at the largest batch"; "" for nothing.
        draws: [R], bootstrap replicates, for what is computed from this; may be empty.
        least: [R], what each replicate is at the least, where the grid does not tell it; empty: `draws`.
        most: [R], what it is at the most.
        at_least: the value is a lower bound: what was tried ends before the number.
    """

    value: float
    low: float
    high: float
    note: str = ""
    draws: Floats = field(default_factory=lambda: np.empty(0), compare=False, repr=False)
    least: Floats = field(default_factory=lambda: np.empty(0), compare=False, repr=False)
    most: Floats = field(default_factory=lambda: np.empty(0), compare=False, repr=False)
    at_least: bool = False

    def bounds(self) -> tuple[Floats, Floats]:
        """Give [R] what each replicate is at the least, and at the most."""
        return (self.least if len(self.least) else self.draws), (self.most if len(self.most) else self.draws)


@dataclass(frozen=True)
class Curve:
    """Loss over batch size.

    Args:
        cell: it is of.
        batches: [J], those with at least one learning rate that every seed survived.
        validation: [J], nats per token at the chosen rates.
        loss: [J], of the test split.
        rates: [J], the chosen learning rates, refined by a parabola in log₂ where both neighbours were tried.
        rate_edges: [J]; "" where the best rate has a worse one, or a diverged one, on both sides; else "low",
            "high" or "single": the grid ends there and should be extended.
        validation_draws: [R, J].
        draws: [R, J], of `loss`.
        rate_draws: [R, J], of `rates`.
        edge_draws: [R, J], whether a replicate's rate is at an edge, as of `rate_edges`.
        diverged: batches at which no learning rate that was tried was survived by every seed: their loss is
            worse than any, and none of the arrays above has a place for them.
    """

    cell: Cell
    batches: Floats
    validation: Floats
    loss: Floats
    rates: Floats
    rate_edges: tuple[str, ...]
    validation_draws: Floats
    draws: Floats
    rate_draws: Floats
    edge_draws: NDArray[np.bool_]
    diverged: Floats = field(default_factory=lambda: np.empty(0))

    def place(self, batch: float) -> tuple[int, int]:
        """Give the places in the cell of a batch and of its learning rate, the best on validation loss."""
        j = self.cell.batches.index(int(batch))
        losses = self.cell.validation[j].mean(axis=-1)
        return j, int(np.where(np.isfinite(losses), losses, math.inf).argmin())

    def between(self, batches: Floats) -> tuple[NDArray[np.intp], NDArray[np.intp], Floats]:
        """Give the places of the neighbours of batch sizes, and how far in log₂ B they lie towards the upper.

        Args:
            batches: [R]; what lies beyond the grid counts as its edge.
        """
        x = np.log2(self.batches)
        at = np.interp(np.log2(np.clip(batches, self.batches[0], self.batches[-1])), x, np.arange(len(x)))
        low = np.minimum(at.astype(int), max(0, len(x) - 2))
        return low, np.minimum(low + 1, len(x) - 1), at - low

    def ends(self, level: float = LEVEL) -> tuple[Floats, Floats]:
        """Give the interval of each loss, [J] and [J]; without what a seed does to all batches alike.

        None reaches below 0, where no cross-entropy lies: residuals are added, not multiplied.
        """
        pairs = [interval(np.maximum(column, 0), level) for column in self.draws.T]
        return np.array([low for low, _ in pairs]), np.array([high for _, high in pairs])


def curve(cell: Cell, draws: int = DRAWS, seed: int = 0) -> Curve:
    """Tune each batch size of a cell.

    Raises:
        ValueError: no run of the cell has a loss.
    """
    cell = by_data(cell)
    validation = means(cell.validation)
    best = _best(validation)
    kept = np.flatnonzero(~np.isnan(best))
    if not len(kept):
        raise ValueError(
            f"cell {dict(cell.fields)}: every run diverged or is missing; lower its learning rates"
        )
    new_validation, new_test = replicates(cell, best, draws, seed)
    new_best = np.array([_best(each) for each in new_validation])
    log_rates = np.log2(cell.rates)
    gone = np.zeros(validation.shape, dtype=bool)  # rates that the grid has, though not as results
    for j in kept:
        gone[j] = ruled_out(cell.validation[j], int(best[j]))
    tried = ~np.isnan(validation) | gone

    def at(losses: Floats, places: Floats) -> Floats:
        picked = np.take_along_axis(losses, places[..., None].astype(int), axis=-1)[..., 0]
        return picked

    fill, new_fill = np.nan_to_num(best), np.nan_to_num(new_best)
    rates = _refined(validation, log_rates, fill)
    rate_draws = np.array([_refined(v, log_rates, b) for v, b in zip(new_validation, new_fill, strict=True)])
    return Curve(
        cell,
        np.array(cell.batches, dtype=float)[kept],
        at(validation, fill)[kept],
        at(means(cell.test), fill)[kept],
        rates[kept],
        tuple(_edge(tried[j], int(best[j])) for j in kept),
        at(new_validation, new_fill)[:, kept],
        at(new_test, new_fill)[:, kept],
        rate_draws[:, kept],
        _edges(tried, new_best)[:, kept],
        np.array([b for j, b in enumerate(cell.batches) if _diverged(cell.validation[j])], dtype=float),
    )


def optimum(found: Curve) -> Estimated:
    """Locate the batch size of the smallest loss, by a parabola in log₂ B through the three lowest points.

    Returns:
        Examples a step. Its note says if it lies on the edge of the grid, in the data or in the interval:
        then the end beyond which nothing was tried is 0 or infinite; a grid that begins at batch 1 has no
        end below, as no batch is smaller, and one above if nothing else was tried. Beside a batch at which
        all diverged there is no parabola: the value is the best batch itself, the interval spans its
        neighbours.
    """
    return _located(found, _lowest)


def largest_within(found: Curve, delta: float = 0.01) -> Estimated:
    """Give B_max(δ), the largest batch whose tuned loss is within δ of the best.

    Between two batch sizes the loss is a line in log₂ B. A curve that stays within δ to its end gives
    infinity with a note: the largest batch that was tried is then a lower bound. Where every run of the next
    larger batch diverged, the value is the last batch that did not, and the interval reaches to that one.

    Args:
        found: the curve.
        delta: δ, nats per token.

    Returns:
        Examples a step.
    """
    return _located(found, lambda x, losses: _last(x, losses, delta))


def _located(found: Curve, locate: Callable[[Floats, Floats], Place]) -> Estimated:
    """Find a place in log₂ B, in the data and in each replicate; one draw of seeds has no interval."""
    batches = np.concatenate([found.batches, found.diverged])
    order = np.argsort(batches)
    x = np.log2(batches[order])

    def losses(own: Floats) -> Floats:
        return np.concatenate([own, np.full(len(found.diverged), math.inf)])[order]

    value, least, most = locate(x, losses(found.loss))
    draws = np.array([locate(x, losses(each)) for each in found.draws])  # [R, 3]
    low, high = min(least, interval(draws[:, 1])[0]), max(most, interval(draws[:, 2])[1])
    notes = []
    for name, sign in (("smallest", -1), ("largest", 1)):
        if value == sign * math.inf:
            notes.append(f"at the {name} batch")
        elif (low if sign < 0 else high) == sign * math.inf:
            notes.append(f"the interval reaches the {name} batch")
    if beside := [b for b in found.diverged if np.log2(b) in (low, high)]:
        notes.append(f"every run diverged at batch {', '.join(f'{b:.0f}' for b in beside)}")
    value, low, high = (2.0**place for place in (value, low, high))
    if len(found.cell.seeds) < 2:
        notes.append("one draw: no interval")
        return Estimated(value, 0.0, math.inf, ", ".join(notes))
    return Estimated(value, low, high, ", ".join(notes), *np.exp2(draws.T))


def _lowest(x: Floats, losses: Floats) -> Place:
    """Place of the minimum; ± infinity where it is an edge of the grid, and not batch 1."""
    j = int(np.argmin(losses))
    if j == 0:
        if x[0] > 0:
            return -math.inf, -math.inf, float(x[0])
        if len(x) == 1:
            return 0.0, 0.0, math.inf
        return 0.0, 0.0, 0.0 if math.isfinite(losses[1]) else float(x[1])
    if j == len(x) - 1:
        return math.inf, float(x[-1]), math.inf
    if not np.isfinite(losses[j - 1 : j + 2]).all():
        return float(x[j]), float(x[j - 1]), float(x[j + 1])
    return (_vertex(x[j - 1 : j + 2], losses[j - 1 : j + 2]),) * 3


def _last(x: Floats, losses: Floats, delta: float) -> Place:
    """Place where the curve leaves, for good, what is within delta of its minimum; infinity if nowhere."""
    bound = losses.min() + delta
    j = int(np.flatnonzero(losses <= bound)[-1])
    if j == len(x) - 1:
        return math.inf, float(x[j]), math.inf
    if math.isinf(losses[j + 1]):
        return float(x[j]), float(x[j]), float(x[j + 1])
    share = (bound - losses[j]) / (losses[j + 1] - losses[j])
    return (float(x[j] + share * (x[j + 1] - x[j])),) * 3


def _best(validation: Floats) -> Floats:
    """[J], place of the smallest loss among [J, L]; NaN where none is finite."""
    finite = np.where(np.isfinite(validation), validation, math.inf)
    return np.where(np.isfinite(finite).any(axis=-1), finite.argmin(axis=-1), math.nan)


def _diverged(validation: Floats) -> bool:
    """Whether at each learning rate of [L, S] that was tried some seed diverged."""
    tried = ~np.isnan(validation).all(axis=-1)
    return bool(tried.any() and np.isinf(validation[tried]).any(axis=-1).all())


def _edge(tried: NDArray[np.bool_], place: int) -> str:
    """Say on which side of the best rate the grid ends; a diverged neighbour is a worse one."""
    there = np.flatnonzero(tried)
    low, high = place == there[0], place == there[-1]
    return "single" if low and high else "low" if low else "high" if high else ""


def _edges(tried: NDArray[np.bool_], places: Floats) -> NDArray[np.bool_]:
    """[R, J], whether there is nothing tried beyond the best rates of replicates on one of their sides."""
    first, last = tried.argmax(axis=-1), tried.shape[-1] - 1 - tried[:, ::-1].argmax(axis=-1)
    return (places == first) | (places == last)


def _refined(validation: Floats, log_rates: Floats, places: Floats) -> Floats:
    """[J], learning rates at the vertices of parabolas through the best rates and their tried neighbours."""
    rates = []
    for losses, place in zip(validation, places.astype(int), strict=True):
        tried = list(np.flatnonzero(np.isfinite(losses)))
        at = tried.index(place) if place in tried else -1
        inner = 0 < at < len(tried) - 1
        near = tried[at - 1 : at + 2] if inner else [place]
        rates.append(2.0 ** (_vertex(log_rates[near], losses[near]) if inner else log_rates[place]))
    return np.array(rates)


def _vertex(x: Floats, y: Floats) -> float:
    """Lowest point of the parabola through three points, the middle one the lowest; flat: the middle."""
    left, right = (y[0] - y[1]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    if left + right <= 0:
        return float(x[1])
    middle = (x[0] + x[1]) / 2, (x[1] + x[2]) / 2  # where the slopes are -left and right
    return float(middle[0] + (middle[1] - middle[0]) * left / (left + right))
