"""What is set side by side: a configuration's critical batch sizes, and the noise scales of its runs.

The critical batch is that of the way to one loss, so the noise scales are read over the same way: over the
steps of a run at the reference batch until it is at that loss.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy import stats

from experiments.analysis.cells import Cell, Row, cells
from experiments.analysis.curves import Estimated
from experiments.analysis.noise import geometric
from experiments.analysis.resampling import DRAWS, LEVEL
from experiments.course import Evaluation, crossing
from experiments.critical import Efficiency, Hyperbola, efficiency, hyperbola, overhead
from experiments.readings import steps_of
from gns.curvature.course import progress_weighted as over_progress
from gns.curvature.readingsfile import reading_of
from gns.estimate import Estimate
from gns.statistics.views import progress_weighted
from gns.sums import FACTORS, StepSums

REFERENCE = 4  # batch size of the runs whose noise scale is read
PRIMARY, SECOND = "B", "adam"
SUMS = (PRIMARY, SECOND, "joint", "A", "plug-in")  # what the sums of steps give
CURVED = "B_noise"  # read on the way, see `experiments.evidence.again`
VARIANTS = (*SUMS, CURVED)
MOVED = 0.1  # relative, of the steps to the target since B_noise was read along them: more is another way
SAME = 0.02  # relative, between losses of a run and of the same again; another kernel rounds otherwise


@dataclass(frozen=True)
class Measured:
    """One configuration at one data size.

    Args:
        cell: its runs.
        n: N, rows of training data at which it is read.
        target: nats per token.
        examples: E(B).
        doubled: B_crit, twice the examples of the smallest batch; rows a step.
        fifth: where E is 1.2 times.
        fit: the hyperbola, None where too few batches arrived.
        noise: variant → noise scale up to the target, rows a step; what was not measured is left out.
    """

    cell: Cell
    n: int
    target: float
    examples: Efficiency
    doubled: Estimated
    fifth: Estimated
    fit: Hyperbola | None
    noise: Mapping[str, Estimated]


def measured(rows: Iterable[Row], n: int, target: float | None = None) -> Measured:
    """Read one configuration at a data size, which may be smaller than that of its runs.

    At a constant learning rate and with nested data the first n rows of a run are the run on n rows.

    Args:
        rows: of runs that differ in batch size, learning rate, seed and what they measured.
        n: rows of training data.
        target: nats per token, to compare configurations on the way to one loss; None: what the smallest
            batch reaches after n/2 rows.

    Raises:
        ValueError: the rows are of several configurations, the learning rate is not constant, n is beyond
            their data, or the smallest batch was not evaluated near n/2.
    """
    rows = [row for row in rows if row["status"] != "failed"]
    found = cells(rows)
    if len(found) != 1:
        raise ValueError(f"rows of one configuration are needed; seen {len(found)}")
    cell = found[0]
    if cell.fields["schedule"] != "constant":
        raise ValueError(
            f"schedule {cell.fields['schedule']}: only a constant rate has prefixes that are runs"
        )
    if n > cell.fields["n_train"]:
        raise ValueError(f"n is {n}; the runs have {cell.fields['n_train']} rows of data")
    target = target_after(rows, n // 2) if target is None else target
    examples = efficiency(rows, target, seed=stream_of(rows))
    try:
        fit = hyperbola(examples)
    except ValueError:
        fit = None
    noise, seen = {}, {}
    for variant in SUMS:
        scale = noise_scale(rows, examples, variant, seen)
        if scale is not None:
            noise[variant] = scale
    return Measured(cell, n, target, examples, overhead(examples), overhead(examples, 0.2), fit, noise)


def target_after(rows: Sequence[Row], examples: int) -> float:
    """Give the loss that the smallest batch reaches after so many examples at its best learning rate.

    The mean over seeds of the lowest validation loss so far, at the rate at which it is smallest.

    Args:
        rows: of one configuration.
        examples: seen.

    Raises:
        ValueError: no rate has an evaluation of every seed within a tenth below that number.
    """
    smallest = min(row["config"]["batch_size"] for row in rows)
    seeds = {_seed(row) for row in rows if row["config"]["batch_size"] == smallest}
    lowest: dict[float, dict[Any, float]] = {}
    for row in rows:
        config = row["config"]
        if config["batch_size"] == smallest:
            lowest.setdefault(config["lr"], {})[_seed(row)] = _lowest(row, examples)
    means = [np.mean(list(each.values())) for each in lowest.values() if set(each) == seeds]
    known = [mean for mean in means if math.isfinite(mean)]
    if not known:
        raise ValueError(
            f"batch {smallest} has no learning rate at which all seeds were evaluated near {examples}"
        )
    return float(min(known))


def noise_scale(
    rows: Sequence[Row], examples: Efficiency, variant: str = PRIMARY, seen: dict[int, _Way] | None = None
) -> Estimated | None:
    """Give the noise scale of the runs at the reference batch up to the target, pooled over seeds.

    Values and ends are geometric means over seeds: the interval has the width of a single run's, so it does
    not pretend that seeds are the only spread. Draws are lognormal with that width.

    Args:
        rows: of one configuration.
        examples: of that configuration; its choice of learning rate at the reference batch counts.
        variant: one of `SUMS`.
        seen: what was read of these rows for another variant; what is read now is added.

    Returns:
        Rows a step; NaN where a seed found no positive value. None where nothing was measured, or in Adam's
        metric in other runs than those of the first noise scale.
    """
    chosen = reference_runs(rows, examples, "adam" if variant == SECOND else "euclidean")
    if not chosen or (variant == SECOND and _of_other_runs(chosen, reference_runs(rows, examples))):
        return None
    seen = {} if seen is None else seen
    for row in chosen:
        seen.setdefault(id(row), _Way(row, examples.target))
    return pooled([_scale(seen[id(row)], variant) for row in chosen], chosen, examples)


def reference_runs(rows: Sequence[Row], examples: Efficiency, metric: str = "euclidean") -> list[Row]:
    """Give the runs whose noise scale counts: at the reference batch and the rate first at the target.

    Args:
        rows: of one configuration.
        examples: of that configuration, whose choice of learning rate is taken; the nearest rate that was
            measured where that one was not, the middle one where there is no choice.
        metric: of the readings.
    """
    there = [row for row in rows if _reads(row, metric)]
    rates = sorted({row["config"]["lr"] for row in there})
    best = _best_rate(examples)
    if not rates:
        return []
    rate = min(rates, key=lambda r: abs(math.log(r / best))) if best else rates[len(rates) // 2]
    return [row for row in there if row["config"]["lr"] == rate]


def _best_rate(examples: Efficiency) -> float | None:
    """The learning rate that is first at the target at the reference batch; None where it was not run."""
    there = list(examples.batches)
    return float(examples.rates[there.index(REFERENCE)]) if REFERENCE in there else None


def _of_other_runs(chosen: Sequence[Row], first: Sequence[Row]) -> bool:
    """Whether readings are of other seeds, or of another learning rate, than those they are set beside."""
    places = [{(_seed(row), row["config"]["lr"]) for row in of} for of in (chosen, first)]
    return bool(first) and places[0] != places[1]


def pooled(
    found: Sequence[tuple[float, float, float]], runs: Sequence[Row], examples: Efficiency
) -> Estimated:
    """Pool (value, low, high) of each run, geometrically, with lognormal draws.

    Args:
        found: a noise scale of each run.
        runs: of one learning rate.
        examples: of their configuration.
    """
    value, low, high = (geometric([each[i] for each in found]) for i in range(3))
    rate, best = runs[0]["config"]["lr"], _best_rate(examples)
    note = f"batch {REFERENCE}, learning rate {rate:.3g}, {len(runs)} run(s)"
    if best and rate != best:
        note += f"; the best was {best:.3g}"
    return Estimated(value, low, high, note, _draws(value, low, high, stream_of(runs)))


def _reads(row: Row, metric: str) -> bool:
    gns, config = row.get("gns"), row["config"]
    return (
        bool(gns)
        and gns["metric"] == metric
        and config["batch_size"] == REFERENCE
        and row["status"] == "done"
    )


class _Way:
    """The measured steps of a run until it is at a target, all if it never is; each reading made once."""

    def __init__(self, row: Row, target: float):
        self.row, self.target = row, target

    @cached_property
    def steps(self) -> list[StepSums]:
        known = [Evaluation(**e) for e in self.row["validation"] if e["loss"] is not None]
        reached = crossing(known, self.target)
        steps = steps_of(self.row["gns"])
        return steps if reached is None else [step for step in steps if step.step < reached[0]]

    @cached_property
    def weighted(self) -> Estimate | None:
        """Progress-weighted; None where the steps do not allow it."""
        try:
            return progress_weighted(self.steps)
        except ValueError:
            return None


def _scale(way: _Way, variant: str) -> tuple[float, float, float]:
    """(value, low, high) of one run."""
    if variant == "plug-in":
        value = _plug_in(way.steps)
        return value, value, value
    found = way.weighted
    if found is None:
        return math.nan, 0.0, math.inf
    factor = PRIMARY if variant == SECOND else variant
    if factor in FACTORS and any(factor in step.groups for step in way.steps):  # full fine-tuning has none
        if factor not in found.groups:  # not resolved
            return math.nan, 0.0, math.inf
        found = found.groups[factor]
    return found.b_simple, found.low, found.high


def _plug_in(steps: Sequence[StepSums]) -> float:
    """Σ tr Σ / Σ ‖ḡ‖², which saturates at the step's examples; of factor B where there are factors."""
    parts = [step.groups.get("B", step) for step in steps]
    below = sum(part.sq_norm_of_mean for part in parts)
    return sum(part.trace_sigma for part in parts) / below if below else math.nan


def with_b_noise(found: Measured, rows: Sequence[Row], curvature: Sequence[Mapping[str, Any]]) -> Measured:
    """Add B_noise where all the runs whose noise scale counts have readings of it.

    Args:
        found: a reading of a configuration.
        rows: of its runs.
        curvature: rows of `experiments.evidence.again`.

    Returns:
        The same with `CURVED` among its noise scales, progress-weighted and pooled over seeds; or as it was,
        also where the target has moved since they were read.
    """
    chosen = reference_runs(rows, found.examples)
    read = [read_along(curvature, row, steps_to(row, found.target)) for row in chosen]
    if not chosen or None in read:
        return found
    values = [_b_noise(each) for each in read if each is not None]
    return replace(found, noise={**found.noise, CURVED: pooled(values, chosen, found.examples)})


def steps_to(row: Row, target: float) -> float:
    """Steps until a run is at a target, interpolated; all of its steps if it never is."""
    reached = crossing([Evaluation(**e) for e in row["validation"] if e["loss"] is not None], target)
    return row["steps_done"] if reached is None else reached[0]


def read_along(curvature: Sequence[Mapping[str, Any]], row: Row, steps: float) -> Mapping[str, Any] | None:
    """Give the last readings of B_noise along a run; None where there are none along so many steps.

    Other rows can move the target: then what was read is along another way.

    Args:
        curvature: rows of `experiments.evidence.again`.
        row: of the run.
        steps: until it is at the target.
    """
    of = [each for each in curvature if each["of"] == row["hash"]]
    there = [each for each in of if abs(each["reached"] - steps) <= MOVED * steps]
    return there[-1] if there else None


def _b_noise(row: Mapping[str, Any]) -> tuple[float, float, float]:
    """(value, low, high) of one run."""
    readings = [reading_of(each) for each in row["readings"]]
    try:
        over = over_progress(readings, row["config"]["batch_size"])
    except ValueError:
        return math.nan, 0.0, math.inf
    return over.b_noise, over.low, over.high


def _lowest(row: Row, examples: int) -> float:
    """Lowest validation loss within so many examples; NaN where none was taken near that number."""
    seen = [e for e in row["validation"] if e["examples"] <= examples and e["loss"] is not None]
    if not seen or seen[-1]["examples"] < 0.9 * examples:
        return math.nan
    return min(e["loss"] for e in seen)


def stream_of(runs: Sequence[Row]) -> int:
    """Give a seed that only these runs have: ratios pair the draws of two configurations."""
    said = " ".join(sorted(str(row["hash"]) for row in runs))
    return int.from_bytes(hashlib.sha256(said.encode()).digest()[:8], "little")


def _seed(row: Row) -> tuple[int, int]:
    return row["config"]["seed"], row["config"]["data_seed"]


def _draws(value: float, low: float, high: float, seed: int) -> np.ndarray:
    """Lognormal replicates whose 95 % interval is as wide as the set; none where it has an open end."""
    if not (0 < low < high < math.inf and value > 0):
        return np.empty(0)
    spread = math.log(high / low) / (2 * stats.norm.ppf((1 + LEVEL) / 2))
    return value * np.exp(spread * np.random.default_rng(seed).standard_normal(DRAWS))
