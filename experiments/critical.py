"""Measured critical batch size, from rows of runs to a target loss and from branched runs.

Three definitions, which differ (FACTS §4 of the project, and the sources named):

    overhead(found, 1.0)   twice the examples of the smallest batch (McCandlish et al. 2018, arXiv:1812.06162)
    overhead(found, 0.2)   20 % more (Zhang et al. 2025, arXiv:2410.21676)
    branched(rows)         no loss above +0.01 nat after a branch at a larger batch with a rescaled learning
                           rate (Merrill et al. 2025, arXiv:2505.23971); `experiments.branches` makes the rows

E(B), the examples to the target at the best learning rate, is read by a monotone interpolation: isotonic
regression of log E, then PCHIP in log B. The hyperbola E = E_min (1 + B/B_crit) is a diagnostic beside it.

A run that never reached the target is censored: its E is at least the examples it saw. One that diverged
would never have reached it: E = ∞ at that learning rate. An interval spans all that this leaves open.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from experiments.analysis.cells import (
    Cell,
    Floats,
    Row,
    averaged,
    by_data,
    cells,
    independent,
    ruled_out,
    varied,
)
from experiments.analysis.curves import Estimated
from experiments.analysis.resampling import DRAWS, LEVEL, interval
from experiments.configs import RunConfig
from experiments.course import Evaluation, crossing
from experiments.monotone import first_reach, start

OCTAVES = np.arange(-8.0, 24.0, 0.05)  # log₂ of the critical batch sizes that the hyperbola is tried with
EVALUATIONS = 64  # of a run to a target: E is interpolated between them
SMALL = 0.1  # of B_crit: what the smallest batch must not exceed to stand for a vanishing one


@dataclass(frozen=True)
class Efficiency:
    """Examples to a target loss over batch size, each batch at its best learning rate.

    Args:
        target: nats per token.
        batches: [J], rising.
        log_examples: [J], mean over seeds of ln E; where `censored` a lower bound, ∞ where a seed diverged at
            every learning rate.
        censored: [J]; at no learning rate did all seeds reach the target.
        rates: [J], the chosen learning rates.
        edges: batches whose best learning rate is the last of its grid, which should be extended.
        draws: [R, J], bootstrap replicates of `log_examples`; [0, J] with a single seed.
    """

    target: float
    batches: Floats
    log_examples: Floats
    censored: np.ndarray
    rates: Floats
    edges: tuple[int, ...]
    draws: Floats


@dataclass(frozen=True)
class Hyperbola:
    """E = E_min (1 + B/B_crit), that is (S/S_min − 1)(E/E_min − 1) = 1, fitted to the batches that arrived.

    Args:
        b_crit: examples.
        e_min: examples at a vanishing batch.
        s_min: steps at an infinite one, E_min/B_crit.
        misfit: root mean square of ln (measured/fitted), over the degrees of freedom that are left.
    """

    b_crit: Estimated
    e_min: float
    s_min: float
    misfit: float


def target_runs(
    config: RunConfig,
    target: float,
    batches: Sequence[int],
    rates: Sequence[float],
    seeds: Sequence[int],
) -> list[RunConfig]:
    """Make the runs that `efficiency` needs: to a target, at a constant learning rate, evaluated often.

    Args:
        config: what they have in common; a run passes at most `epochs` times over its data.
        target: loss on the validation split, nats per token.
        batches: examples a step.
        rates: learning rates, each tried at each batch.
        seeds: each of adapter and data.
    """
    common = replace(
        config, protocol="target", target_loss=target, steps=None, schedule="constant", evals=EVALUATIONS
    )
    return [
        replace(common, batch_size=batch, lr=rate, seed=seed, data_seed=seed)
        for batch in batches
        for rate in rates
        for seed in seeds
    ]


def efficiency(
    rows: Iterable[Row], target: float | None = None, draws: int = DRAWS, seed: int = 0
) -> Efficiency:
    """Read E(B) off rows of one configuration that differ in batch size, learning rate and seed.

    The learning rate of a batch is the one with the fewest censored seeds and then the fewest examples,
    chosen again in each replicate; where none arrives, the one of the lowest loss at the end. Replicates
    redraw what is left of ln E when a seed's shift of all batches is taken out, pooled over batches and
    scaled for the degrees of freedom: two seeds cannot be resampled. Seeds that share data among others
    that do not are one draw, their mean; so are seeds without an adapter, which are one run.

    Args:
        rows: of runs; failed ones are left out.
        target: nats per token; None: the `target_loss` of the runs.
        draws: R, replicates.
        seed: of the replicates.

    Raises:
        ValueError: the rows are of several configurations or none, differ in how often they were evaluated,
            name no target, or lack seeds everywhere.
    """
    rows = [row for row in rows if row["status"] != "failed"]
    cell = _one_cell(rows)
    if len(often := sorted({row["config"]["evals"] for row in rows})) > 1:
        raise ValueError(
            f"evals is {' in some rows and '.join(map(str, often))} in others; E is read between "
            "evaluations, so rows of one number are needed"
        )
    target = cell.fields.get("target_loss") if target is None else target
    if target is None:
        raise ValueError("the runs have no target_loss; name a target")
    logs, censored = _examples(rows, cell, target)
    groups = independent(cell)
    logs, censored, cell = averaged(logs, groups), averaged(censored, groups) > 0, by_data(cell)
    kept = [j for j in range(len(cell.batches)) if not np.isnan(logs[j]).any(axis=1).all()]
    if not kept:
        raise ValueError("no batch size has a learning rate with all seeds; run what is missing")
    logs, censored = logs[kept], censored[kept]
    batches = np.array(cell.batches, dtype=float)[kept]
    short = np.where(np.isnan(logs).any(axis=2), np.inf, censored.sum(axis=2))  # [J, L]
    chosen = _of_equals(_choice(logs.mean(axis=2), short), logs.mean(axis=2), short, cell.validation[kept])
    at = np.arange(len(kept)), chosen
    told = np.where((short[at] > 0)[:, None, None], cell.validation[kept], logs)  # what the rate is chosen by
    return Efficiency(
        target,
        batches,
        _of_choice(logs.mean(axis=2), chosen),
        short[at] > 0,
        np.array(cell.rates)[chosen],
        tuple(int(b) for b, own, i in zip(batches, told, chosen, strict=True) if _at_edge(own, int(i))),
        _replicates(logs, short, chosen, draws, seed),
    )


def overhead(found: Efficiency, share: float = 1.0, level: float = LEVEL) -> Estimated:
    """Say at which batch a run needs `share` more examples than at the smallest batch.

    Args:
        found: E(B).
        share: 1 for twice the examples, 0.2 for 20 % more.
        level: of the interval.

    Returns:
        Examples a step. Infinite: not within the grid ("beyond the grid"). Where a censored batch leaves the
        place open, the interval spans what is left, and the value is what it is at least.
    """
    rise, at = math.log1p(share), np.log(found.batches)

    def batches(logs: Floats) -> Floats:
        """[1 + R]: where each reading of ln E has risen that much."""
        return np.exp(first_reach(at, logs, start(logs) + rise))

    known = np.vstack([found.log_examples, found.draws])  # [1 + R, J]
    lows = highs = batches(np.where(found.censored, np.inf, known))
    if found.censored.any():  # at least what was seen, and E does not fall
        highs = batches(np.where(found.censored, np.maximum.accumulate(known, axis=1), known))
        highs = open_above(lows, highs, found)
    return _estimated(found, lows, highs, level, share)


def open_above(lows: Floats, highs: Floats, found: Efficiency) -> Floats:
    """Give what places may be at the most: where they lie within the batches that arrived, what they are.

    What was censored bends the interpolant there as well, and says nothing of it.

    Args:
        lows: [...], places read as if what was censored never arrived.
        highs: [...], as if it arrived with the examples that it saw.
        found: E(B), of which something is censored.
    """
    last = found.batches[max(int(found.censored.argmax()) - 1, 0)]  # places are exp(log B): a rounding less
    return np.where(lows >= last * (1 - 1e-9), np.maximum(lows, highs), lows)


def hyperbola(found: Efficiency, level: float = LEVEL) -> Hyperbola:
    """Fit the trade-off law in ln E, by least squares; censored batches are left out and named.

    Raises:
        ValueError: fewer than three batches arrived.
    """
    arrived = ~found.censored & np.isfinite(found.log_examples)
    if arrived.sum() < 3:
        raise ValueError(f"a hyperbola needs three batch sizes that reach the target; {arrived.sum()} do")
    shapes = np.log1p(found.batches[arrived] / np.exp2(OCTAVES)[:, None])  # [G, J]
    place, level_, misfit = _fitted(shapes, found.log_examples[arrived])
    drawn = np.array([_fitted(shapes, draw[arrived])[0] for draw in found.draws], dtype=int)
    sizes = np.exp2(np.concatenate([[-np.inf], OCTAVES[1:-1], [np.inf]]))  # a fit at the end has no end
    low, high = interval(sizes[drawn], level) if len(drawn) else (0.0, math.inf)
    notes = [f"without batch {int(b)}, censored" for b in found.batches[~arrived]]
    notes += ["E does not bend within the grid"] if place in (0, len(OCTAVES) - 1) else []
    e_min, b_crit = math.exp(level_), float(sizes[place])
    left = math.sqrt(misfit / max(1, int(arrived.sum()) - 2))
    return Hyperbola(
        Estimated(b_crit, low, high, "; ".join(notes), sizes[drawn]),
        e_min,
        e_min / b_crit if b_crit else 0.0,
        left,
    )


def branched(rows: Iterable[Row], delta: float = 0.01, level: float = LEVEL) -> Estimated:
    """Say to which batch a run can go on, with the learning rate rescaled, at no more than `delta` of loss.

    The loss above that of the branch at the trunk's own batch is paired by seed, averaged, made monotone and
    interpolated in log B; the interval is a bootstrap over seeds, as of `efficiency`.

    Args:
        rows: of `experiments.branches`, all from one point of one configuration.
        delta: nats per token.
        level: of the interval.

    Returns:
        Examples a step; infinite: "beyond the grid", also the largest branch stays within `delta`.

    Raises:
        ValueError: no branch goes on at the trunk's batch, a seed lacks a branch, or points are mixed.
    """
    batches, excess = _excess(rows)
    at, mean = np.log(batches), excess.mean(axis=1)
    draws = np.concatenate([np.zeros((DRAWS, 1)), _drawn(excess[1:], DRAWS, 0)], axis=1)
    curves = np.vstack([mean, draws])
    found = np.exp(first_reach(at, curves, np.full(len(curves), delta)))
    single = excess.shape[1] < 2
    low, high = (0.0, math.inf) if single else interval(found[1:], level)
    notes = ["one seed: no interval"] if single else []
    notes += ["beyond the grid"] if math.isinf(found[0]) else []
    lost = [int(b) for b, x in zip(batches, mean, strict=True) if math.isinf(x)]
    notes += [f"diverged at batch {', '.join(map(str, lost))}"] if lost else []
    return Estimated(float(found[0]), low, high, "; ".join(notes), found[1:] if not single else np.empty(0))


def _estimated(found: Efficiency, lows: Floats, highs: Floats, level: float, share: float) -> Estimated:
    """Put values and replicates of both readings of what is censored into one estimate."""
    notes, at_least = [], bool(highs[0] > lows[0])
    if len(found.draws):
        low, high = interval(lows[1:], level)[0], interval(highs[1:], level)[1]
    else:
        low, high = 0.0, math.inf
        notes.append("one seed, or one batch with all: no interval")
    if found.censored[0]:
        return Estimated(math.nan, 0.0, math.inf, "the smallest batch did not reach the target")
    if found.censored.any():
        low, high = min(low, float(lows[0])), max(high, float(highs[0]))
        lost = ", ".join(str(int(b)) for b in found.batches[found.censored])
        notes.append(f"{'at least: ' if at_least else ''}censored at batch {lost}")
    value = float(lows[0])
    if math.isinf(value):
        notes.append("beyond the grid")
    elif found.batches[0] > SMALL * value / share:
        notes.append(f"batch {int(found.batches[0])} is not small against it: reads high")
    if found.edges:
        notes.append(f"learning rate at the edge of its grid at batch {', '.join(map(str, found.edges))}")
    return Estimated(value, low, high, "; ".join(notes), lows[1:], lows[1:], highs[1:], at_least)


def _one_cell(rows: Sequence[Row]) -> Cell:
    """Give the cell of rows of one configuration.

    Raises:
        ValueError: they are of several, or there is none.
    """
    found = cells(rows)
    if len(found) != 1:
        differ = f", which differ in {', '.join(varied(found))}" if found else ""
        raise ValueError(f"rows of one configuration are needed; seen {len(found)}{differ}")
    return found[0]


def _examples(rows: Sequence[Row], cell: Cell, target: float) -> tuple[Floats, np.ndarray]:
    """[J, L, S] of ln E, NaN where there is no run and ∞ where it diverged; and whether it is censored."""
    logs = np.full((len(cell.batches), len(cell.rates), len(cell.seeds)), math.nan)
    censored = np.zeros(logs.shape, dtype=bool)
    for row in rows:
        config = row["config"]
        at = (
            cell.batches.index(config["batch_size"]),
            cell.rates.index(config["lr"]),
            cell.seeds.index((config["seed"], config["data_seed"])),
        )
        known = [e for e in row["validation"] if e["loss"] is not None]
        reached = crossing([Evaluation(**e) for e in known], target)
        censored[at] = reached is None
        if reached is not None:
            logs[at] = math.log(max(1.0, reached[1]))
        else:
            logs[at] = math.inf if row["status"] == "diverged" else math.log(row["examples_seen"])
    return logs, censored


def _choice(means: Floats, short: Floats) -> np.ndarray:
    """[..., J], the learning rate of each batch: fewest censored seeds, then fewest examples."""
    key = np.where(np.isfinite(means), np.arctan(means), 2.0)  # in order, below 2; a diverged seed is last
    return np.where(short == short.min(axis=-1, keepdims=True), key, 3.0).argmin(axis=-1)


def _of_choice(means: Floats, chosen: np.ndarray) -> Floats:
    """[..., J], ln E at the chosen learning rates; where a seed diverged there, the least of all rates.

    One that diverged says nothing of the rates below, at which runs are censored.
    """
    own = np.take_along_axis(means, chosen[..., None], axis=-1)[..., 0]
    return np.where(np.isinf(own), np.where(np.isnan(means), np.inf, means).min(axis=-1), own)


def _of_equals(chosen: np.ndarray, means: Floats, short: Floats, losses: Floats) -> np.ndarray:
    """[J], of rates that are equally far from the target the one of the lowest loss at the end.

    Args:
        chosen: [J], one of them.
        means: [J, L] of ln E: the examples of the run where none arrived, and so the same.
        short: [J, L], censored seeds.
        losses: [J, L, S], at the end of the runs.
    """
    at = np.arange(len(chosen)), chosen
    equal = (means == means[at][:, None]) & (short == short[at][:, None])
    ends = np.where(equal, losses.mean(axis=2), math.inf)
    return np.where(np.isfinite(ends).any(axis=1), ends.argmin(axis=1), chosen)


def _at_edge(told: Floats, chosen: int) -> bool:
    """Whether the best learning rate of a batch is the first or last of several that were tried.

    Args:
        told: [L, S], what it was chosen by: ln E, or losses at the end where none arrived.
        chosen: its place.
    """
    tried = np.flatnonzero(~np.isnan(told).any(axis=1) | ruled_out(told, chosen))
    return len(tried) > 1 and chosen in (tried[0], tried[-1])


def _replicates(logs: Floats, short: Floats, chosen: np.ndarray, draws: int, seed: int) -> Floats:
    """[R, J]: ln E at the learning rates that each replicate chooses; [0, J] where seeds show no spread.

    What a seed does to all batches alike is left out, so two batches with all seeds are needed.
    """
    n_batches, n_rates, n_seeds = logs.shape
    if n_seeds < 2:
        return np.empty((0, n_batches))
    own = logs[np.arange(n_batches), chosen]  # [J, S]
    usable = own[np.isfinite(own).all(axis=1) & (short[np.arange(n_batches), chosen] == 0)]
    if len(usable) < 2:
        return np.empty((0, n_batches))
    pool = _residuals(usable)
    random = np.random.default_rng(seed)
    drawn = random.choice(pool, size=(draws, n_batches, n_rates, n_seeds)).mean(axis=3)
    new = logs.mean(axis=2) + drawn  # [R, J, L]
    return _of_choice(new, _choice(new, np.broadcast_to(short, new.shape)))


def _drawn(values: Floats, draws: int, seed: int) -> Floats:
    """[R, J], means over seeds that could have been: rows of [J, S] plus redrawn residuals."""
    pool = _residuals(values[np.isfinite(values).all(axis=1)], shared=False)
    drawn = np.random.default_rng(seed).choice(pool, size=(draws, *values.shape)).mean(axis=2)
    return values.mean(axis=1) + drawn


def _residuals(values: Floats, shared: bool = True) -> Floats:
    """What seeds do to each row of [K, S], pooled: unbiased variance, Student's width.

    Args:
        values: K batches, S seeds.
        shared: leave out what a seed does to all rows alike.
    """
    n, n_seeds = values.shape
    if n_seeds < 2 or n < 1 + shared:
        return np.zeros(1)
    left = values - values.mean(axis=1, keepdims=True)
    if shared:
        left = left - left.mean(axis=0)
    free = (n - shared) * (n_seeds - 1)
    heavier = stats.t.ppf((1 + LEVEL) / 2, free) / stats.norm.ppf((1 + LEVEL) / 2)
    return left.ravel() * math.sqrt(left.size / free) * heavier


def _fitted(shapes: Floats, logs: Floats) -> tuple[int, float, float]:
    """Best row of shapes [G, J], the ln E_min that goes with it, and the sum of squares."""
    levels = (logs - shapes).mean(axis=1)
    squares = ((logs - shapes - levels[:, None]) ** 2).sum(axis=1)
    place = int(np.argmin(squares))
    return place, float(levels[place]), float(squares[place])


def _excess(rows: Iterable[Row]) -> tuple[Floats, Floats]:
    """([K] batches, [K, S] loss above the branch at the trunk's batch, ∞ where one diverged), rising.

    Raises:
        ValueError: see `branched`.
    """
    rows = [row for row in rows if row["status"] != "failed"]
    points = {(row["branch"]["at_examples"], row["branch"]["examples"]) for row in rows}
    if len(points) != 1:
        raise ValueError(f"branches from one point and of one length are needed; seen {sorted(points)}")
    _one_cell([row | {"validation": [{"loss": row["loss"]}], "test_loss": row["loss"]} for row in rows])
    losses = {
        (row["branch"]["batch_size"], row["config"]["seed"], row["config"]["data_seed"]): row for row in rows
    }
    trunk = {row["config"]["batch_size"] for row in rows}
    batches, seeds = sorted({key[0] for key in losses}), sorted({key[1:] for key in losses})
    if trunk != {batches[0]}:
        raise ValueError(f"no branch goes on at the trunk's batch {sorted(trunk)}; seen {batches}")
    if missing := [(b, *s) for b in batches for s in seeds if (b, *s) not in losses]:
        raise ValueError(f"no branch at (batch, seed, data_seed) {missing[0]}; {len(missing)} are missing")
    found = np.array([[_loss(losses[(b, *s)]) for s in seeds] for b in batches])
    if not np.isfinite(found[0]).all():
        raise ValueError("the branch at the trunk's batch diverged; branch from an earlier point")
    return np.array(batches, dtype=float), found - found[0]


def _loss(row: Row) -> float:
    """Loss at the end of a branch; ∞ where it diverged."""
    return math.inf if row["status"] == "diverged" else row["loss"]
