"""Why data size moves the best batch although the noise scale does not depend on it: the one-epoch law.

One epoch fixes examples, E = N. For a fixed target loss the trade-off law then gives the largest batch that
still gets there, B_max(N) = (N - E_min)/S_min = B_crit (N/E_min - 1). Here the same question is put to the
noisy quadratic, under three meanings of "still as good" and two schedules, and B_crit is measured by two
definitions beside the run-averages of the noise scale.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from theory.domain import Floats, choice, positive, real_array, sorted_sizes, vector
from theory.quadratic import NoisyQuadratic
from theory.tradeoff import TradeOff, fit_tradeoff

CRITERIA = ("absolute", "relative", "target")


def loss_table(model: NoisyQuadratic, sizes: ArrayLike, batches: ArrayLike, schedule: str) -> Floats:
    """Best loss after one epoch, for every data-set size and batch size.

    Args:
        model: the quadratic.
        sizes: [k], data-set sizes N, increasing.
        batches: [m], batch sizes, increasing; a batch larger than N is left as nan.
        schedule: "constant" or "cosine".

    Returns:
        [k, m], expected excess losses.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    n, b = sorted_sizes("sizes", sizes), sorted_sizes("batches", batches)
    rows = [[model.best_loss(e, c, schedule) if c <= e else np.nan for c in b] for e in n]
    return np.array(rows)


def largest_batch(losses: ArrayLike, batches: ArrayLike, bound: float) -> float:
    """Largest batch whose loss is within a bound, interpolated in log batch and log loss.

    Args:
        losses: [m], loss at each batch; nan entries are ignored.
        batches: [m], increasing.
        bound: largest allowed loss, > 0.

    Returns:
        The batch; nan if none is good enough or if all are (the answer is outside the table).

    Raises:
        ValueError: if the lengths differ, a loss is not positive, or the bound is outside its domain.
    """
    b, values = sorted_sizes("batches", batches), real_array("losses", losses)
    if values.shape != b.shape or np.any(values <= 0):
        raise ValueError(f"losses: needs {b.size} numbers > 0 or nan, one per batch, got {values.tolist()}")
    known = np.isfinite(values)
    b, values = b[known], values[known]
    good = np.flatnonzero(values <= positive("bound", bound))
    if good.size == 0 or good[-1] == values.size - 1:
        return float("nan")
    i = int(good[-1])
    share = (np.log(bound) - np.log(values[i])) / (np.log(values[i + 1]) - np.log(values[i]))
    return float(np.exp(np.log(b[i]) + share * (np.log(b[i + 1]) - np.log(b[i]))))


def one_epoch_batches(table: ArrayLike, batches: ArrayLike, criterion: str, bound: float) -> Floats:
    """B_max(N) under one meaning of "still as good".

    Args:
        table: [k, m] from `loss_table`.
        batches: [m], increasing.
        criterion: "target" (loss <= bound), "absolute" (loss <= best at this N + bound), "relative"
            (loss <= best at this N · (1 + bound)).
        bound: the tolerance, > 0.

    Returns:
        [k], with nan where the table has no answer.

    Raises:
        ValueError: if the table is not [k, m] or has an empty row, or an argument is outside its domain.
    """
    criterion, bound = choice("criterion", criterion, CRITERIA), positive("bound", bound)
    b, rows = sorted_sizes("batches", batches), real_array("table", table)
    if rows.ndim != 2 or rows.shape[1] != b.size or np.any(np.all(np.isnan(rows), axis=1)):
        domain = f"rows of {b.size} losses, none all nan"
        raise ValueError(f"table: needs {domain}, got shape {rows.shape}")
    best = np.nanmin(rows, axis=1)
    limits = {
        "target": np.full(rows.shape[0], bound),
        "absolute": best + bound,
        "relative": best * (1 + bound),
    }
    pairs = zip(rows, limits[criterion], strict=True)
    return np.array([largest_batch(row, b, float(limit)) for row, limit in pairs])


def growth_exponent(sizes: ArrayLike, batches: ArrayLike) -> float:
    """Least-squares slope of log B_max against log N.

    Args:
        sizes: [k], N, increasing.
        batches: [k], B_max(N); nan entries are left out.

    Returns:
        The exponent; nan with fewer than three points.

    Raises:
        ValueError: if the lengths differ, sizes do not increase, or a batch is not positive.
    """
    n, b = sorted_sizes("sizes", sizes), real_array("batches", batches)
    if b.shape != n.shape or np.any(b <= 0):
        raise ValueError(f"batches: needs {n.size} numbers > 0 or nan, one per size, got {b.tolist()}")
    known = np.isfinite(b)
    return float(np.polyfit(np.log(n[known]), np.log(b[known]), 1)[0]) if known.sum() >= 3 else float("nan")


@dataclass(frozen=True)
class CriticalBatch:
    """B_crit of one target by its definitions, and where run-averages of the noise scale land.

    Attributes:
        law: hyperbola fitted to S(B).
        twice_examples: batch at which E doubles (McCandlish's definition), read off the curve.
        twenty_percent: batch at which E is 20 % above the smallest batch's (Zhang's definition).
        averages: name → run-average of B_simple or B_noise at `train_batch`, in examples.
        train_batch: batch of the run that was averaged.
    """

    law: TradeOff
    twice_examples: float
    twenty_percent: float
    averages: dict[str, float]
    train_batch: float


def critical_batch(
    model: NoisyQuadratic, target: float, batches: ArrayLike, train_batch: float
) -> CriticalBatch:
    """Measure B_crit by both definitions at a constant rate, and average the noise scale over a run.

    E(B) rises monotonically, so both definitions are read against the smallest batch of the list. The
    averages: ratio of means (what averaging numerator and denominator gives), plain mean, progress-weighted
    mean (weights 1/(1 + B_k/B_train)), and the last value. They differ by more than the definitions do.

    Args:
        model: the quadratic.
        target: loss to reach, > 0.
        batches: [m], increasing, from far below to far above B_crit.
        train_batch: batch of the averaged run, > 0.

    Returns:
        The measurement.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    b = sorted_sizes("batches", batches)
    steps = np.array([model.steps_to(target, float(v)) for v in b])
    examples = steps * b
    state = model.trajectory(target, train_batch)
    averages = {f"{k}, B_simple": v for k, v in run_averages(model.b_simple(state), train_batch).items()}
    averages |= {f"{k}, B_noise": v for k, v in run_averages(model.b_noise(state), train_batch).items()}
    return CriticalBatch(
        fit_tradeoff(b, steps),
        largest_batch(examples, b, 2 * float(examples[0])),
        largest_batch(examples, b, 1.2 * float(examples[0])),
        averages,
        float(train_batch),
    )


def run_averages(per_step: ArrayLike, train_batch: float) -> dict[str, float]:
    """Four averages of a noise scale along a run whose numerator is constant.

    Args:
        per_step: [S], B_k > 0.
        train_batch: batch of the run, > 0.

    Returns:
        name → average. With constant trΣ the ratio of means is the harmonic mean of B_k.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    b = _noise_scales(per_step)
    weights = 1 / (1 + b / positive("train_batch", train_batch))
    return {
        "ratio of means": float(1 / np.mean(1 / b)),
        "progress-weighted": float(np.average(b, weights=weights)),
        "plain mean": float(b.mean()),
        "last": float(b[-1]),
    }


def _noise_scales(per_step: ArrayLike) -> Floats:
    """Per-step noise scales as an array.

    Args:
        per_step: [S], > 0.

    Returns:
        The same values.

    Raises:
        ValueError: if one is not a finite number > 0.
    """
    b = vector("per_step", per_step)
    if np.any(b <= 0):
        raise ValueError(f"per_step: needs numbers > 0, got {float(b.min())!r}")
    return b
