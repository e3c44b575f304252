"""E(B), the examples that a run needs to one target loss, over batch size, each at its best learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

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
from experiments.analysis.resampling import DRAWS
from experiments.configs import RunConfig
from experiments.course import Evaluation, crossing
from experiments.critical.seeds import residuals

EVALUATIONS = 64  # of a run to a target: E is interpolated between them


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
    cell = one_cell(rows)
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


def one_cell(rows: Sequence[Row]) -> Cell:
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
    pool = residuals(usable)
    random = np.random.default_rng(seed)
    drawn = random.choice(pool, size=(draws, n_batches, n_rates, n_seeds)).mean(axis=3)
    new = logs.mean(axis=2) + drawn  # [R, J, L]
    return _of_choice(new, _choice(new, np.broadcast_to(short, new.shape)))
