"""The preregistered predictions, each judged by the interval of its number: held, failed or undecided."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from experiments.analysis.curves import Curve, Estimated
from experiments.analysis.fits import exponent, slope
from experiments.analysis.resampling import LEVEL, interval
from experiments.critical import open_above
from experiments.evidence.configurations import RANK
from experiments.evidence.measured import CURVED, PRIMARY, Measured
from experiments.evidence.tuned import above_best, growth_within, octaves_between, pick
from experiments.monotone import first_reach

MISSING = Estimated(math.nan, -math.inf, math.inf)
OCTAVE = 1.0  # a difference of best batches that would matter: the factor of two that all is judged by
FIXED_TARGET = (1_024, 1_448, 2_048)  # N by √2, from twice what the smallest batch needs on
WHOLE = (512, 1_024, 2_048)  # N of whole runs
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
        zero: None; or instead of the range, whether 0 is said to lie inside or outside the interval.
    """

    name: str
    says: str
    number: Estimated
    low: float = -math.inf
    high: float = math.inf
    zero: bool | None = None

    @property
    def open(self) -> bool:
        """Whether nothing was predicted."""
        return self.zero is None and math.isinf(self.low) and math.isinf(self.high)

    @property
    def verdict(self) -> str:
        """Say "held", "failed", "undecided" or "not measured"; "shown" where nothing was predicted."""
        if self.open:
            return "not measured" if math.isnan(self.number.value) else "shown"
        if self.zero is None:
            return verdict(self.number, self.low, self.high)
        return zero_verdict(self.number, self.zero)


def verdict(number: Estimated, low: float, high: float) -> str:
    """Say "held" if the whole interval lies in the range, "failed" if it lies outside, else "undecided"."""
    if math.isnan(number.value) and not (number.low > high or number.high < low):
        return "not measured" if not number.note else "undecided"
    if low <= number.low and number.high <= high:
        return "held"
    return "failed" if number.low > high or number.high < low else "undecided"


def zero_verdict(number: Estimated, inside: bool) -> str:
    """Say whether 0 lies inside, or outside; an interval wider than an octave to a side decides not."""
    if math.isnan(number.value) and not number.note:
        return "not measured"
    if number.low > 0 or number.high < 0:
        return "failed" if inside else "held"
    if number.low < -OCTAVE or number.high > OCTAVE:
        return "undecided"
    return "held" if inside else "failed"


def ratio(top: Estimated, bottom: Estimated) -> Estimated:
    """Divide two numbers measured on different runs.

    Its interval comes from the draws of both, with what censored runs leave open in them; from the ends,
    which is too wide, where one has no draws or an open end, or is itself a lower bound.
    """
    notes = "; ".join(
        f"{what}: {each.note}" for what, each in (("over", top), ("under", bottom)) if each.note
    )
    value = _divided(top.value, bottom.value)
    if not all(_closed(each) for each in (top, bottom)):
        return Estimated(value, _divided(top.low, bottom.high), _divided(top.high, bottom.low), notes)
    n = min(len(top.draws), len(bottom.draws))
    (low, high), (under, over) = ([each[:n] for each in part.bounds()] for part in (top, bottom))
    ends = interval(low / over)[0], interval(high / under)[1]
    return Estimated(value, *ends, notes, top.draws[:n] / bottom.draws[:n], low / over, high / under)


def _closed(number: Estimated) -> bool:
    """Whether the draws of a number say all about it."""
    return bool(len(number.draws) and 0 < number.low and number.high < math.inf and not number.at_least)


def _divided(top: float, bottom: float) -> float:
    if math.isinf(top) and math.isinf(bottom):
        return math.nan
    if bottom == 0:
        return math.inf if top else math.nan
    return top / bottom


def rank_slope(frozen: Sequence[Mapping[str, Any]], base: str) -> Estimated:
    """P1: slope of log B_simple of factor B at initialisation over log rank, a point an adapter.

    All adapters see one data set: the interval is about adapters.
    """
    size = max((row["n"] for row in frozen if row["base"] == base), default=0)
    used = [
        row
        for row in frozen
        if (row["base"], row["adapter"], row["data_seed"], row["n"]) == (base, "lora", 0, size)
    ]
    try:
        return slope(*_logs(used, "rank"))
    except ValueError:
        return MISSING


def size_slope(frozen: Sequence[Mapping[str, Any]], base: str) -> Estimated:
    """P2: slope of log B_simple at frozen initialisation over log N.

    Sizes of one data set are nested, so that its slope is one number; the interval is over data sets.
    """
    found = [np.polyfit(*_logs(part, "n"), 1)[0] for part in _by_data(frozen, base).values() if len(part) > 1]
    return _mean(found)


def plug_in_excess(frozen: Sequence[Mapping[str, Any]], base: str) -> Estimated:
    """P2: mean of B_plugin (1/B + 1/N), a number a data set, with B from the last set at its largest.

    The interval is over the other sets, and as much wider as the set of that B is.
    """
    sets = _by_data(frozen, base)
    if len(sets) < 3:
        return MISSING
    reference = max(sets.pop(max(sets)), key=lambda row: row["n"])
    b, high = reference["b_simple"], reference["high"] or math.inf  # null: no upper end
    products = [[row["plug_in"] * (1 / b + 1 / row["n"]) for row in part] for part in sets.values()]
    found = _mean([float(np.mean(each)) for each in products])
    own = found.value * math.log(high / reference["low"]) / 2
    half = math.hypot(found.high - found.value, own)
    return Estimated(found.value, found.value - half, found.value + half)


def _by_data(frozen: Sequence[Mapping[str, Any]], base: str) -> dict[int, list[Mapping[str, Any]]]:
    """Give the probes of the first adapter at the reference's rank, by data set."""
    found: dict[int, list[Mapping[str, Any]]] = {}
    for row in frozen:
        if (row["base"], row["adapter"], row["rank"], row["seed"]) == (base, "lora", RANK, 0):
            found.setdefault(row["data_seed"], []).append(row)
    return found


def _logs(used: Sequence[Mapping[str, Any]], over: str) -> tuple[np.ndarray, np.ndarray]:
    """(log of a field, log B_simple) of the probes that found a positive one."""
    known = [row for row in used if (row["b_simple"] or math.nan) > 0]
    return np.log([row[over] for row in known]), np.log([row["b_simple"] for row in known])


def _mean(values: Sequence[float], level: float = LEVEL) -> Estimated:
    """Mean of independent numbers with Student's interval."""
    if len(values) < 2:
        return MISSING
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    middle = float(np.mean(values))
    return Estimated(middle, middle - half, middle + half)


def harmless(found: Measured, sizes: Sequence[int]) -> list[Estimated]:
    """Give for each N the largest batch that reaches the target within N rows: B_max of a fixed target."""
    efficiency = found.examples
    at = np.log(efficiency.batches)
    known = np.vstack([efficiency.log_examples, efficiency.draws])
    least = np.where(efficiency.censored, np.inf, known)
    seen = np.maximum(known, efficiency.log_examples)  # of what was censored, at the least
    most = np.where(efficiency.censored, np.maximum.accumulate(seen, axis=1), known)  # E does not fall
    made = []
    for n in sizes:
        low, high = (np.exp(first_reach(at, logs, np.full(len(logs), math.log(n)))) for logs in (least, most))
        high = open_above(low, high, efficiency) if efficiency.censored.any() else low
        ends = min(low[0], interval(low[1:])[0]), max(high[0], interval(high[1:])[1])
        bound = np.minimum(low, efficiency.batches[-1])  # beyond the grid: at least the last batch tried
        open_ = bool(high[0] > low[0])
        made.append(Estimated(float(low[0]), *map(float, ends), "", low[1:], bound[1:], high[1:], open_))
    return made


def predictions(
    found: Found,
    frozen: Sequence[Mapping[str, Any]],
    n: int,
    merged: Measured | None = None,
    curves: Sequence[Curve] = (),
) -> list[Prediction]:
    """Judge all predictions; those that no rows speak of are there, and not measured.

    Args:
        found: readings by configuration and data size.
        frozen: rows of `experiments.evidence.frozen`.
        n: data size at which configurations are compared.
        merged: the configuration of merged rows, read on the way to the reference's loss.
        curves: of whole runs, tuned.
    """
    made = _at_initialisation(frozen)

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

    add("P3", "exponent of B_max in N, fixed target", lambda: growth(found["reference"][n]), 0.85, 1.15)
    add("P3", "the same, within 0.01 nat of the best", lambda: growth_within(by_size(curves)), 0.4, 0.9)
    add("P3", "the same, within 5 % of its own best", lambda: growth_within(by_size(curves), True), 0.15, 0.6)
    add(
        "P4",
        "β₂ rescaled: test loss at the smallest batch above the best, nats",
        lambda: above_best(pick(curves, beta2_batch=16)),
        -math.inf,
        0.005,
    )
    add("P5", "B_simple, merged over single", lambda: moved("merged", _noise), 0.4, 0.6)
    add("P5", "B_crit, merged over single", lambda: moved("merged", _critical), 0.4, 0.6)
    one = "merged rows on the way to the loss of single ones"  # not preregistered: there, to their own
    add("P5", f"the same B_simple, {one}", lambda: by_merging(_noise), 0.4, 0.6)
    add("P5", f"the same B_crit, {one}", lambda: by_merging(_critical), 0.4, 0.6)
    for noise in ("0.2", "0.5"):
        add(
            "P6",
            f"factor on B_crit over factor on B_simple, label noise {noise}",
            lambda x=noise: ratio(moved(f"noise {x}", _critical), moved(f"noise {x}", _noise)),
            1 / 1.5,
            1.5,
        )
    add("P7", "B_noise / B_crit under SGD", lambda: _curved(found["SGD"][n]), 0.3, 3)
    spread = _spread([by[n] for name, by in found.items() if name != "SGD" and n in by])
    made.append(Prediction("P7", "the same under AdamW, middle (smallest … largest)", spread))
    add("P8", "B_crit, rank 64 over rank 4", lambda: moved("rank 64", _critical, "rank 4"), 1 / 1.5, 1.5)
    return made + _claims(curves)


def _at_initialisation(frozen: Sequence[Mapping[str, Any]]) -> list[Prediction]:
    """P1 and P2, for each base."""
    bases = sorted({row["base"] for row in frozen}, key=len, reverse=True)
    ranks = [
        Prediction("P1", f"slope of log B_simple on log rank, {b}", rank_slope(frozen, b), -0.15, 0.15)
        for b in bases
    ]
    sizes = []
    for b in bases:
        says = f"plug-in × (1/B + 1/N), B of another data set, {b}: algebra but for B"
        sizes += [
            Prediction("P2", f"slope of log B_simple on log N, {b}", size_slope(frozen, b), -0.1, 0.1),
            Prediction("P2", says, plug_in_excess(frozen, b), 0.9, 1.1),
        ]
    return ranks + sizes


def _claims(curves: Sequence[Curve]) -> list[Prediction]:
    """P9: the paper's claims on where the batch curve has its minimum."""
    made = []
    for says, one, other, inside in (
        ("rank 64 less rank 4", {"rank": 64}, {"rank": 4}, True),
        ("math-1m less math-200k", {"base": "math-1m"}, {}, True),
        ("N = 2,048 less N = 512", {"n_train": 2_048}, {"n_train": 512}, False),
    ):
        try:
            number = octaves_between(pick(curves, **one), pick(curves, **other))
        except KeyError:
            number = MISSING
        made.append(Prediction("P9", f"octaves between best batches, {says}", number, zero=inside))
    return made


def by_size(curves: Sequence[Curve]) -> dict[int, Curve]:
    """Give the reference's curves by data size; KeyError where one is missing."""
    return {size: pick(curves, n_train=size) for size in WHOLE}


def growth(found: Measured, sizes: Sequence[int] = FIXED_TARGET) -> Estimated:
    """P3: exponent of B_max in N for a fixed target, from one configuration's E(B)."""
    if not len(found.examples.draws):
        return MISSING
    return exponent(sizes, harmless(found, sizes))


def _curved(found: Measured) -> Estimated:
    """P7: B_noise over the critical batch size of one configuration."""
    return ratio(found.noise[CURVED], found.doubled)


def _spread(found: Sequence[Measured]) -> Estimated:
    """P7 over configurations: the middle ratio, the smallest and the largest."""
    ratios = [_curved(each).value for each in found if CURVED in each.noise]
    known = sorted(value for value in ratios if 0 < value < math.inf)
    if not known:
        return MISSING
    note = f"{len(known)} configuration(s)"
    return Estimated(math.exp(float(np.median(np.log(known)))), known[0], known[-1], note)


def _noise(found: Measured) -> Estimated:
    return found.noise[PRIMARY]


def _critical(found: Measured) -> Estimated:
    return found.doubled
