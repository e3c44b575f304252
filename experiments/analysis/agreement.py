"""Does one number predict another? Rank correlation, calibration, and what a wrong choice of batch costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from experiments.analysis.cells import Floats
from experiments.analysis.curves import Curve, Estimated
from experiments.analysis.resampling import DRAWS, LEVEL, interval

NARROW = 0.1  # of half an interval: the least that a side counts, for a value may lie at its end
FAR = 4.0  # of a log ratio: a miss, however much further; infinite ones would take all others along


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


@dataclass(frozen=True)
class Calibrated:
    """A prediction calibrated by one constant, beside what was measured.

    Args:
        constant: c in measured = c · predicted, the geometric mean of the ratios.
        share: of the pairs within a factor of two of c · predicted, c fitted to the other configurations.
        off: factor by which c · predicted is off, c fitted to the others: the geometric mean.
        ceiling: the share that a prediction without error would show at these uncertainties of both numbers,
            of the pairs in which both are known; NaN for those of fewer than three configurations.
        exact: pairs whose measured number is not a bound; c is fitted to these.
        bounds: pairs whose measured number is a lower bound.
    """

    constant: Estimated
    share: Estimated
    off: Estimated
    ceiling: float
    exact: int
    bounds: int


def calibration(
    predicted: Sequence[Estimated],
    measured: Sequence[Estimated],
    draws: int = DRAWS,
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> Calibrated:
    """Fit measured = c · predicted, and say how far off the calibrated prediction is.

    A replicate draws configurations with replacement, and no noise on top of that which their numbers hold:
    added a second time it would let a perfect prediction miss. c is fitted without any copy of the
    configuration that is predicted. The interval of the share holds that of Clopper and Pearson (1934), as
    all hits of a few resample to all hits. A lower bound counts as a miss for the lower end, and for the
    upper end as a hit if it is not beyond a factor of two already.

    Args:
        predicted: [K], positive; a pair with an infinite number is left out.
        measured: [K].
        draws: replicates.
        seed: of the draws.
        groups: [K], the configuration of each pair, where one has several: they are left out and drawn
            together. None: each pair is its own.

    Raises:
        ValueError: exact pairs of fewer than three configurations.
    """
    finite = [i for i, p in enumerate(predicted) if _positive(p) and _positive(measured[i])]
    exact = np.array([not measured[i].at_least for i in finite], dtype=bool)
    members = _members(None if groups is None else [groups[i] for i in finite], len(finite))
    of = np.empty(len(finite), dtype=int)  # the configuration of each pair
    for k, each in enumerate(members):
        of[each] = k
    if len(np.unique(of[exact])) < 3:
        raise ValueError(
            f"a calibration needs exact, finite pairs of three configurations; seen {exact.sum()} of "
            f"{len(predicted)}, of {len(np.unique(of[exact]))}"
        )
    logs = np.log([measured[i].value / predicted[i].value for i in finite])
    random = np.random.default_rng(seed)
    constants, shares, offs = np.empty(draws), np.empty((3, draws)), np.empty(draws)
    for r in range(draws):
        chosen = _resampled(members, random)
        sure = exact[chosen]
        constants[r] = math.exp(logs[chosen][sure].mean()) if sure.any() else math.nan
        *shares[:, r], offs[r] = _scores(_left_out(logs[chosen], of[chosen], sure), sure)
    value, least, most, off = _scores(_left_out(logs, of, exact), exact)
    n, bounds = int(exact.sum()), int((~exact).sum())
    low, high = _clopper_pearson(least, most, len(members))
    low, high = min(low, interval(shares[1])[0]), max(high, interval(shares[2])[1])
    note = f"{bounds} pairs are lower bounds" if bounds else ""
    return Calibrated(
        Estimated(math.exp(logs[exact].mean()), *interval(constants), note, constants),
        Estimated(value, low, high, note, *shares),
        Estimated(math.exp(off), *interval(np.exp(offs)), note, np.exp(offs)),
        _ceiling([(predicted[finite[i]], measured[finite[i]], of[i]) for i in np.flatnonzero(exact)], draws),
        n,
        bounds,
    )


def heterogeneity(found: Sequence[Estimated]) -> tuple[float, int]:
    """Ask whether numbers differ by more than their intervals: Cochran's Q of their logarithms.

    An interval may reach further to one side: what counts is the side on which the common value lies, the one
    that makes Q least.

    Args:
        found: positive numbers; each side of an interval is taken as that of a lognormal. Bounds and open
            intervals are left out.

    Returns:
        The p-value, NaN for fewer than two, and how many numbers it is of.
    """
    closed = [e for e in found if _positive(e) and 0 < e.low < e.high < math.inf and not e.at_least]
    if len(closed) < 2:
        return math.nan, len(closed)
    width = stats.norm.ppf((1 + LEVEL) / 2)
    low, logs, high = np.log([(e.low, e.value, e.high) for e in closed]).T
    least = NARROW * (high - low) / 2
    below, above = np.maximum(logs - low, least) / width, np.maximum(high - logs, least) / width

    def q(common: float) -> float:
        return float((((logs - common) / np.where(common < logs, below, above)) ** 2).sum())

    ends = float(logs.min()), float(logs.max())
    found_q = q(ends[0]) if ends[0] == ends[1] else optimize.minimize_scalar(q, bounds=ends).fun
    return float(stats.chi2.sf(found_q, len(closed) - 1)), len(closed)


def _left_out(logs: Floats, of: NDArray[np.intp], exact: NDArray[np.bool_]) -> Floats:
    """Log ratios less the mean of the exact ones of other configurations; NaN where there are none."""
    others = (of[:, None] != of) & exact
    with np.errstate(invalid="ignore"):
        return logs - others @ logs / others.sum(axis=1)


def _scores(off: Floats, exact: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """Share of the exact ones within a factor of two; that of all at the least, and at the most; distance.

    Args:
        off: log ratios less what calibrates them.
        exact: the others are lower bounds, whose numbers are larger by nobody knows what.
    """
    if not exact.any() or np.isnan(off).any():
        return (math.nan,) * 4
    near = np.abs(off) <= math.log(2)
    may = np.where(exact, near, off <= math.log(2))
    return (
        float(near[exact].mean()),
        float((near & exact).mean()),
        float(may.mean()),
        float(np.abs(off[exact]).mean()),
    )


def _clopper_pearson(least: float, most: float, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Interval of a share of n configurations that may be least to most.

    Several pairs of a configuration are no independent throws: they make a hit of it in part.
    """
    tail = (1 - level) / 2
    low = float(stats.beta.ppf(tail, least * n, n - least * n + 1)) if least else 0.0
    return low, float(stats.beta.ppf(1 - tail, most * n + 1, n - most * n)) if most < 1 else 1.0


def _noise_of(number: Estimated, draws: int, random: np.random.Generator) -> Floats | None:
    """[R], replicates of what uncertainty does to a number's logarithm; None where it is not known."""
    if len(number.draws):
        with np.errstate(divide="ignore"):
            found = np.log(random.choice(number.draws, draws) / number.value)
        return np.clip(np.nan_to_num(found), -FAR, FAR)
    return np.zeros(draws) if number.low == number.high else None


def _ceiling(pairs: Sequence[tuple[Estimated, Estimated, int]], draws: int, seed: int = 0) -> float:
    """Mean share within a factor of two where nothing but noise moves the log ratios; NaN if it is unknown.

    Args:
        pairs: predicted, measured, and the number of their configuration.
        draws: replicates.
        seed: of these.
    """
    random, known, of = np.random.default_rng(seed), [], []
    for predicted, measured, name in pairs:
        below, above = (_noise_of(each, draws, random) for each in (predicted, measured))
        if below is not None and above is not None:
            known.append(above - below)
            of.append(name)
    if len(set(of)) < 3:
        return math.nan
    every = np.ones(len(of), dtype=bool)
    off = [_left_out(noise, np.array(of), every) for noise in np.array(known).T]
    return float((np.abs(off) <= math.log(2)).mean())


def regret(
    found: Sequence[Curve],
    chosen: Sequence[float],
    draws: int = DRAWS,
    seed: int = 0,
    others: Sequence[Floats] | None = None,
) -> tuple[Estimated, list[float]]:
    """Price a rule: test loss at the batch that it chooses, minus that at the batch best on validation data.

    Both are tuned in learning rate. A choice between two batch sizes is read off a line in log₂ B, one beyond
    the grid at its edge. The reference was not chosen on test data, so a regret below 0 is a legal result.

    Args:
        found: [K], a curve for each configuration.
        chosen: [K], batch sizes that the rule gives.
        draws: replicates, over configurations and seeds.
        seed: of the draws.
        others: [K] of [R], replicates of what the rule chooses; None: it has no uncertainty.

    Returns:
        The mean over configurations, nats per token, with its interval; and the regret of each. Replicates
        choose the batch that is compared with anew, on losses noisier by a draw: by how much all of them
        lean high for that is taken out of the interval.

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
    own = [
        float(_costs(c, np.array([b]), c.loss[None], c.validation[None])[0])
        for c, b in zip(found, chosen, strict=True)
    ]
    costs, leans = np.empty((len(found), draws)), np.empty(len(found))
    for k, each in enumerate(found):
        at = random.integers(len(each.draws), size=draws)
        drawn = each.draws[at], each.validation_draws[at]
        fixed = np.full(draws, float(chosen[k]))
        costs[k] = _costs(each, fixed if others is None else random.choice(others[k], draws), *drawn)
        leans[k] = _costs(each, fixed, *drawn).mean() - own[k]
    picked = random.integers(len(found), size=(draws, len(found)))
    means = costs[picked, random.integers(draws, size=picked.shape)].mean(axis=1)
    value, (low, high) = float(np.mean(own)), interval(means - leans.mean())
    return Estimated(value, min(low, value), max(high, value), "", means), own


def _costs(found: Curve, batches: Floats, losses: Floats, validation: Floats) -> Floats:
    """[R], loss at a batch minus the loss at the batch that is best on validation data.

    Args:
        found: the curve.
        batches: [R]; 0 and ∞ are legal answers of a rule, and priced at the edges of the grid.
        losses: [R, J], of the test split.
        validation: [R, J].
    """
    low, high, share = found.between(batches)
    rows = np.arange(len(losses))
    between = losses[rows, low] + share * (losses[rows, high] - losses[rows, low])
    return between - losses[rows, validation.argmin(axis=1)]


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


def _positive(number: Estimated) -> bool:
    """Whether a number can be on a logarithmic axis."""
    return math.isfinite(number.value) and number.value > 0
