"""The preregistered predictions, each judged by the interval of its number: held, failed or undecided."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from experiments.analysis.curves import Estimated
from experiments.analysis.fits import exponent, slope
from experiments.analysis.resampling import interval
from experiments.evidence.measured import PRIMARY, Measured
from experiments.monotone import first_reach

Found = Mapping[str, Mapping[int, Measured]]  # configuration → data size → reading


@dataclass(frozen=True)
class Prediction:
    """One prediction and what became of it.

    Args:
        name: "P1" … "P9".
        says: the number in words.
        number: measured; NaN where it was not.
        low: of the range that was predicted.
        high: of that range.
    """

    name: str
    says: str
    number: Estimated
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Say "held", "failed", "undecided" or "not measured"."""
        return verdict(self.number, self.low, self.high)


def verdict(number: Estimated, low: float, high: float) -> str:
    """Say "held" if the whole interval lies in the range, "failed" if it lies outside, else "undecided"."""
    if math.isnan(number.value) and not (number.low > high or number.high < low):
        return "not measured" if not number.note else "undecided"
    if low <= number.low and number.high <= high:
        return "held"
    return "failed" if number.low > high or number.high < low else "undecided"


def ratio(top: Estimated, bottom: Estimated) -> Estimated:
    """Divide two numbers measured on different runs.

    Its interval comes from the draws of both where both have them, else from the ends, which is too wide.
    """
    notes = "; ".join(
        f"{what}: {each.note}" for what, each in (("over", top), ("under", bottom)) if each.note
    )
    value = _divided(top.value, bottom.value)
    if len(top.draws) and len(bottom.draws) and math.isfinite(value):
        n = min(len(top.draws), len(bottom.draws))
        with np.errstate(divide="ignore", invalid="ignore"):
            draws = top.draws[:n] / bottom.draws[:n]
        low, high = interval(draws)
        # what a censored run leaves open is in the ends only
        low = min(low, value) if top.low > 0 or bottom.high < math.inf else 0.0
        if math.isinf(top.high):
            high = math.inf
        return Estimated(value, low, high, notes, draws)
    return Estimated(value, _divided(top.low, bottom.high), _divided(top.high, bottom.low), notes)


def _divided(top: float, bottom: float) -> float:
    if math.isinf(top) and math.isinf(bottom):
        return math.nan
    if bottom == 0:
        return math.inf if top else math.nan
    return top / bottom


MISSING = Estimated(math.nan, -math.inf, math.inf)


def rank_slope(frozen: Sequence[Mapping[str, Any]], base: str) -> Estimated:
    """P1: slope of log B_simple of factor B at initialisation over log rank, a point an adapter."""
    size = max((row["n"] for row in frozen if row["base"] == base), default=0)
    used = [
        row
        for row in frozen
        if (row["base"], row["adapter"], row["data_seed"], row["n"]) == (base, "lora", 0, size)
    ]
    return _log_slope(used, "rank")


def size_slope(frozen: Sequence[Mapping[str, Any]], base: str) -> Estimated:
    """P2: slope of log B_simple at frozen initialisation over log N, a point a data set."""
    return _log_slope(_by_size(frozen, base), "n")


def plug_in_excess(frozen: Sequence[Mapping[str, Any]], base: str) -> Estimated:
    """P2: mean of B_plugin (1/B + 1/N) over data sets, with B from the largest set that is none of them."""
    by_size = _by_size(frozen, base)
    if not by_size:
        return MISSING
    last = max(row["data_seed"] for row in by_size)
    reference = max((r for r in by_size if r["data_seed"] == last), key=lambda row: row["n"])
    others = [row for row in by_size if row["data_seed"] != last]
    values = np.array([row["plug_in"] * (1 / reference["b_simple"] + 1 / row["n"]) for row in others])
    if len(values) < 3:
        return MISSING
    means = {}
    for row, value in zip(others, values, strict=True):
        means.setdefault(row["data_seed"], []).append(value)
    each = np.array([np.mean(part) for part in means.values()])  # sizes of one seed are nested: one point
    half = stats.t.ppf(0.975, len(each) - 1) * each.std(ddof=1) / math.sqrt(len(each))
    return Estimated(float(each.mean()), float(each.mean() - half), float(each.mean() + half))


def _by_size(frozen: Sequence[Mapping[str, Any]], base: str) -> list[Mapping[str, Any]]:
    rank = {row["rank"] for row in frozen if row["base"] == base and row["data_seed"] > 0}
    return [
        row
        for row in frozen
        if row["base"] == base and row["adapter"] == "lora" and row["seed"] == 0 and {row["rank"]} == rank
    ]


def _log_slope(used: Sequence[Mapping[str, Any]], over: str) -> Estimated:
    used = [row for row in used if (row["b_simple"] or math.nan) > 0]
    try:
        return slope(np.log([row[over] for row in used]), np.log([row["b_simple"] for row in used]))
    except ValueError:
        return MISSING


def harmless(found: Measured, sizes: Sequence[int]) -> list[Estimated]:
    """Give for each N the largest batch that reaches the target within N rows: B_max of a fixed target."""
    efficiency = found.examples
    at = np.log(efficiency.batches)
    logs = np.vstack([efficiency.log_examples, efficiency.draws])
    logs = np.where(efficiency.censored, np.inf, logs)
    reached = [np.exp(first_reach(at, logs, np.full(len(logs), math.log(n)))) for n in sizes]
    return [Estimated(float(b[0]), *interval(b[1:]), "", b[1:]) for b in reached]


def predictions(
    found: Found, frozen: Sequence[Mapping[str, Any]], n: int, merged: Measured | None = None
) -> list[Prediction]:
    """Judge all predictions; those that no rows speak of are there, and not measured.

    Args:
        found: readings by configuration and data size.
        frozen: rows of `experiments.evidence.frozen`.
        n: data size at which configurations are compared.
        merged: the configuration of merged rows, read on the way to the reference's loss.
    """
    made: list[Prediction] = []

    def add(name: str, says: str, number: Callable[[], Estimated], low: float, high: float) -> None:
        try:
            value = number()
        except KeyError:  # a configuration or a noise scale that was not measured
            value = MISSING
        made.append(Prediction(name, says, value, low, high))

    def moved(name: str, what: Callable[[Measured], Estimated], over: str = "reference") -> Estimated:
        return ratio(what(found[name][n]), what(found[over][n]))

    def by_merging(what: Callable[[Measured], Estimated]) -> Estimated:
        return MISSING if merged is None else ratio(what(merged), what(found["reference"][n]))

    bases = sorted({row["base"] for row in frozen}, key=len, reverse=True)
    for base in bases:
        add(
            "P1",
            f"slope of log B_simple on log rank, {base}",
            lambda b=base: rank_slope(frozen, b),
            -0.15,
            0.15,
        )
    for base in bases:
        add("P2", f"slope of log B_simple on log N, {base}", lambda b=base: size_slope(frozen, b), -0.1, 0.1)
        add("P2", f"plug-in × (1/B + 1/N), {base}", lambda b=base: plug_in_excess(frozen, b), 0.9, 1.1)
    add("P3", "exponent of B_max in N, fixed target", lambda: growth(found["reference"][n]), 0.85, 1.15)
    add("P5", "B_simple, merged over single", lambda: by_merging(_noise), 0.4, 0.6)
    add("P5", "B_crit, merged over single", lambda: by_merging(_critical), 0.4, 0.6)
    for noise in ("0.2", "0.5"):
        add(
            "P6",
            f"factor on B_crit over factor on B_simple, label noise {noise}",
            lambda x=noise: ratio(moved(f"noise {x}", _critical), moved(f"noise {x}", _noise)),
            1 / 1.5,
            1.5,
        )
    add("P8", "B_crit, rank 64 over rank 4", lambda: moved("rank 64", _critical, "rank 4"), 1 / 1.5, 1.5)
    return made


def growth(found: Measured, sizes: Sequence[int] = (1_024, 1_448, 2_048)) -> Estimated:
    """P3: exponent of B_max in N for a fixed target, from one configuration's E(B)."""
    if not len(found.examples.draws):
        return MISSING
    return exponent(sizes, harmless(found, sizes))


def _noise(found: Measured) -> Estimated:
    return found.noise[PRIMARY]


def _critical(found: Measured) -> Estimated:
    return found.doubled
