"""The largest batch at which a run goes on at no cost, from rows of `experiments.branches`."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from experiments.analysis.cells import Floats, Row
from experiments.analysis.curves import Estimated
from experiments.analysis.resampling import DRAWS, LEVEL, interval
from experiments.critical.examples import one_cell
from experiments.critical.seeds import redrawn
from experiments.monotone import first_reach


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
    draws = np.concatenate([np.zeros((DRAWS, 1)), redrawn(excess[1:], DRAWS, 0)], axis=1)
    curves = np.vstack([mean, draws])
    found = np.exp(first_reach(at, curves, np.full(len(curves), delta)))
    single = excess.shape[1] < 2
    low, high = (0.0, math.inf) if single else interval(found[1:], level)
    notes = ["one seed: no interval"] if single else []
    notes += ["beyond the grid"] if math.isinf(found[0]) else []
    lost = [int(b) for b, x in zip(batches, mean, strict=True) if math.isinf(x)]
    notes += [f"diverged at batch {', '.join(map(str, lost))}"] if lost else []
    return Estimated(float(found[0]), low, high, "; ".join(notes), found[1:] if not single else np.empty(0))


def _excess(rows: Iterable[Row]) -> tuple[Floats, Floats]:
    """([K] batches, [K, S] loss above the branch at the trunk's batch, ∞ where one diverged), rising.

    Raises:
        ValueError: see `branched`.
    """
    rows = [row for row in rows if row["status"] != "failed"]
    points = {(row["branch"]["at_examples"], row["branch"]["examples"]) for row in rows}
    if len(points) != 1:
        raise ValueError(f"branches from one point and of one length are needed; seen {sorted(points)}")
    one_cell([row | {"validation": [{"loss": row["loss"]}], "test_loss": row["loss"]} for row in rows])
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
