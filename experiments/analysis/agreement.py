"""Does one number predict another? Rank correlation, calibration, and what a wrong choice of batch costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from experiments.analysis.cells import Floats
from experiments.analysis.curves import Curve, Estimated
from experiments.analysis.resampling import DRAWS, LEVEL, interval


def spearman(
    x: Sequence[Estimated],
    y: Sequence[Estimated],
    draws: int = DRAWS,
    seed: int = 0,
    level: float = LEVEL,
    groups: Sequence[str] | None = None,
) -> Estimated:
    """Rank correlation over configurations, with an interval for other configurations and other seeds.

    A replicate draws configurations with replacement and, where there are draws of a number, one of them. The
    interval is that of Fisher's z with the bootstrap's standard deviation: percentiles of rank correlations
    are too narrow for a dozen points. Infinite values rank highest.

    Args:
        x: [K], one number a configuration.
        y: [K], the other.
        draws: replicates.
        seed: of the draws.
        level: of the interval.
        groups: [K], the configuration of each pair, where one has several; None: each pair is its own.

    Raises:
        ValueError: fewer than four configurations.
    """
    members = _members(groups, len(x))
    if len(x) != len(y) or len(members) < 4:
        raise ValueError(
            f"a rank correlation needs pairs of four configurations; seen {len(x)} and {len(y)} numbers of "
            f"{len(members)}"
        )
    random = np.random.default_rng(seed)
    (value,) = _rank_correlations(*([np.array([each.value for each in part])] for part in (x, y))).tolist()
    drawn: tuple[list[Floats], list[Floats]] = ([], [])
    for _ in range(draws):
        chosen = _resampled(members, random)
        for part, replicates in zip((x, y), drawn, strict=True):
            replicates.append(_drawn(part, chosen, random))
    found = _rank_correlations(*drawn)
    inner = np.arctanh(np.clip(found[~np.isnan(found)], -0.999, 0.999))
    # a bootstrap of few points must not undercut Bonett and Wright 2000, Psychometrika 65:23
    least = math.sqrt((1 + value**2 / 2) / max(1, len(members) - 3))
    width = stats.norm.ppf((1 + level) / 2) * max(float(inner.std()), least)
    middle = math.atanh(max(-0.999, min(0.999, value)))
    return Estimated(value, math.tanh(middle - width), math.tanh(middle + width), "", found)


def calibration(
    predicted: Sequence[Estimated],
    measured: Sequence[Estimated],
    draws: int = DRAWS,
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> tuple[Estimated, Estimated]:
    """Fit measured = c · predicted, and say how far off the calibrated prediction is.

    Args:
        predicted: [K], positive; a pair with an infinite number is left out.
        measured: [K].
        draws: replicates, over configurations and seeds.
        seed: of the draws.
        groups: [K], the configuration of each pair, where one has several: they are left out and drawn
            together. None: each pair is its own.

    Returns:
        c, the geometric mean of the ratios; and the share of configurations within a factor of two of
        c · predicted, c fitted to the others: in a replicate without any copy of the one that is predicted.
        Notes say how many pairs were left out.

    Raises:
        ValueError: finite pairs of fewer than three configurations.
    """
    finite = [i for i, p in enumerate(predicted) if _positive(p) and _positive(measured[i])]
    pairs = [(predicted[i], measured[i]) for i in finite]
    members = _members(None if groups is None else [groups[i] for i in finite], len(finite))
    if len(members) < 3:
        raise ValueError(
            f"a calibration needs finite pairs of three configurations; seen {len(pairs)} of "
            f"{len(predicted)}, of {len(members)}"
        )
    note = (
        f"{len(predicted) - len(pairs)} pairs without a finite number" if len(pairs) < len(predicted) else ""
    )
    of = np.empty(len(pairs), dtype=int)  # the configuration of each pair
    for k, each in enumerate(members):
        of[each] = k
    random = np.random.default_rng(seed)
    logs = np.log([m.value / p.value for p, m in pairs])
    constants, shares = np.empty(draws), np.empty(draws)
    for r in range(draws):
        chosen = _resampled(members, random)
        top, bottom = ([pair[i] for pair in pairs] for i in (1, 0))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.log(_drawn(top, chosen, random) / _drawn(bottom, chosen, random))
        known = np.isfinite(ratios)
        constants[r] = math.exp(ratios[known].mean()) if known.any() else math.nan
        shares[r] = _within_two(ratios[known], of[chosen[known]])
    return (
        Estimated(math.exp(logs.mean()), *interval(constants), note, constants),
        Estimated(_within_two(logs, of), *interval(shares), note, shares),
    )


def regret(
    found: Sequence[Curve], chosen: Sequence[float], draws: int = DRAWS, seed: int = 0
) -> tuple[Estimated, list[float]]:
    """Price a rule: test loss at the batch that it chooses, minus that at the batch best on validation data.

    Both are tuned in learning rate. A choice between two batch sizes is read off a line in log₂ B, one beyond
    the grid at its edge. The reference was not chosen on test data, so a regret below 0 is a legal result.

    Args:
        found: [K], a curve for each configuration.
        chosen: [K], batch sizes that the rule gives.
        draws: replicates, over configurations and seeds.
        seed: of the draws.

    Returns:
        The mean over configurations, nats per token, with its interval; and the regret of each. Replicates
        choose the best batch anew on losses that are noisier by a draw, and so lean high where the regret is
        small: the interval is theirs, stretched to hold the number.

    Raises:
        ValueError: there is not one choice for each configuration, or one is NaN.
    """
    if len(found) != len(chosen) or not found:
        raise ValueError(f"a rule needs a choice for each configuration; seen {len(chosen)} for {len(found)}")
    if any(math.isnan(batch) for batch in chosen):
        raise ValueError(
            "a rule's choice is NaN; leave that configuration out, or say what the rule then does"
        )
    random = np.random.default_rng(seed)
    own = [_cost(c, b, c.loss, c.validation) for c, b in zip(found, chosen, strict=True)]
    means = np.empty(draws)
    for r in range(draws):
        picked = random.integers(len(found), size=len(found))
        means[r] = np.mean([_drawn_cost(found[k], chosen[k], random) for k in picked])
    value, (low, high) = float(np.mean(own)), interval(means)
    return Estimated(value, min(low, value), max(high, value), "", means), own


def _drawn_cost(found: Curve, batch: float, random: np.random.Generator) -> float:
    """Regret of one configuration in one replicate of its seeds."""
    r = int(random.integers(len(found.draws)))
    return _cost(found, batch, found.draws[r], found.validation_draws[r])


def _cost(found: Curve, batch: float, loss: Floats, validation: Floats) -> float:
    """Loss at a batch minus the loss at the batch that is best on validation data."""
    inside = min(max(batch, found.batches[0]), found.batches[-1])  # 0 and ∞ are legal answers of a rule
    at = float(np.interp(math.log2(inside), np.log2(found.batches), loss))
    return at - float(loss[int(validation.argmin())])


def _members(groups: Sequence[str] | None, n: int) -> list[NDArray[np.intp]]:
    """Give the places of each configuration's pairs."""
    names = np.arange(n) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    return [np.flatnonzero(names == k) for k in range(int(names.max(initial=-1)) + 1)]


def _resampled(members: Sequence[NDArray[np.intp]], random: np.random.Generator) -> NDArray[np.intp]:
    """Draw configurations with replacement, and give the places of all their pairs."""
    return np.concatenate([members[k] for k in random.integers(len(members), size=len(members))])


def _drawn(part: Sequence[Estimated], chosen: Floats, random: np.random.Generator) -> Floats:
    """Give one replicate of each chosen number; the number itself where it has no draws."""
    return np.array(
        [
            part[k].draws[random.integers(len(part[k].draws))] if len(part[k].draws) else part[k].value
            for k in chosen
        ]
    )


def _rank_correlations(x: Sequence[Floats], y: Sequence[Floats]) -> Floats:
    """Spearman's of each pair of lists, NaN where one of the two does not vary or holds a NaN.

    Lists of one length are ranked in one call: a call a list takes longer than all else in a bootstrap.
    """
    lengths, found = np.array([len(values) for values in x]), np.full(len(x), np.nan)
    for length in np.unique(lengths):
        these = np.flatnonzero(lengths == length)
        a, b = (stats.rankdata([part[i] for i in these], axis=1) for part in (x, y))
        a, b = (ranks - (length + 1) / 2 for ranks in (a, b))  # in halves, so exact
        with np.errstate(invalid="ignore"):  # 0/0
            found[these] = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return found


def _within_two(logs: Floats, configurations: NDArray[np.intp]) -> float:
    """Share of log ratios within log 2 of the mean of those of other configurations; NaN if there is none."""
    others = configurations[:, None] != configurations
    n = others.sum(axis=1)
    if not n.all():
        return math.nan
    return float((np.abs(logs - others @ logs / n) <= math.log(2)).mean())


def _positive(number: Estimated) -> bool:
    """Whether a number can be on a logarithmic axis."""
    return math.isfinite(number.value) and number.value > 0
