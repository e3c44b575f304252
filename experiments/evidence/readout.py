"""From all rows to all that is shown: readings, judged predictors, judged predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from experiments.analysis.agreement import heterogeneity
from experiments.analysis.cells import Row
from experiments.analysis.curves import Curve, Estimated, largest_within
from experiments.analysis.noise import measured as whole_run
from experiments.evidence.branched import branched_batches
from experiments.evidence.configurations import CONFIGURATIONS, SIZE, SIZES, named, per_row, shows_examples
from experiments.evidence.judged import Judged, gain, judge
from experiments.evidence.measured import PRIMARY, VARIANTS, Measured, measured, with_b_noise
from experiments.evidence.practice import DELTA, Price, prices
from experiments.evidence.predictions import Prediction, predictions
from experiments.evidence.tuned import tuned

BY_SIZE, BY_DEFAULT = "c · N", "a constant"


class Harmless(NamedTuple):
    """What predicts the largest batch within `DELTA` of the best, of whole runs under one schedule.

    Args:
        scale: B_simple of factor B.
        fixed: one batch size for all.
        gain: the factor by which B_simple is off where one batch size for all is off by one.
    """

    scale: Judged
    fixed: Judged
    gain: Estimated


@dataclass(frozen=True)
class Readout:
    """What the page and the figures are made of.

    Args:
        found: configuration → N → reading, N in examples.
        broken: configuration → why it cannot be read.
        judged: noise scale or rival → beside B_crit, a configuration once, at N = `SIZE`.
        over_sizes: the same over all N.
        predicted: the judged predictions.
        priced: schedule → what rules that choose a batch size cost, and the curves that say so.
        frozen: rows of frozen probes.
        rows: of all runs.
        runs: rows that were used or could have been.
        diverged: of these.
        missing: configurations without rows.
        commits: that the rows name.
        branched: configuration → largest batch that branches went on at for free.
        gains: rival → the factor by which B_simple is off where the rival is off by one, at N = `SIZE`.
        harmless: schedule → B_simple and its rival beside the largest batch within `DELTA` of the best, of
            whole runs.
    """

    found: Mapping[str, Mapping[int, Measured]]
    broken: Mapping[str, str]
    judged: Mapping[str, Judged]
    over_sizes: Mapping[str, Judged]
    predicted: Sequence[Prediction]
    priced: Mapping[str, tuple[Sequence[Price], Sequence[Curve]]]
    frozen: Sequence[Mapping[str, Any]]
    rows: Sequence[Row]
    runs: int
    diverged: int
    missing: Sequence[str]
    commits: Sequence[str]
    branched: Mapping[str, Estimated]
    gains: Mapping[str, Estimated]
    harmless: Mapping[str, Harmless]

    @property
    def compared(self) -> dict[str, Measured]:
        """Readings at the size at which configurations are compared."""
        return {name: by_size[SIZE] for name, by_size in self.found.items() if SIZE in by_size}

    @property
    def critical_apart(self) -> tuple[float, int]:
        """Whether critical batch sizes differ by more than their intervals: p, and of how many."""
        return heterogeneity([each.doubled for each in self.compared.values()])

    @property
    def noise_apart(self) -> tuple[float, int]:
        """The same of B_simple."""
        there = [each.noise for each in self.compared.values() if PRIMARY in each.noise]
        return heterogeneity([noise[PRIMARY] for noise in there])


def read_out(
    rows: Sequence[Row],
    frozen: Sequence[Mapping[str, Any]],
    curvature: Sequence[Mapping[str, Any]] = (),
    branches: Sequence[Mapping[str, Any]] = (),
) -> Readout:
    """Read everything that the rows allow; what they do not allow is named.

    Args:
        rows: of runs.
        frozen: of `experiments.evidence.frozen`.
        curvature: of `experiments.evidence.again`, readings of B_noise.
        branches: of `experiments.evidence.branched`.
    """
    parts = named(rows)
    found: dict[str, dict[int, Measured]] = {}
    broken: dict[str, str] = {}
    for name, part in parts.items():
        for size in SIZES:
            try:
                reading = measured(part, size // per_row(part))
            except ValueError as error:
                broken.setdefault(name, str(error))
            else:
                found.setdefault(name, {})[size] = reading
        if SIZE in found.get(name, {}):
            found[name][SIZE] = with_b_noise(found[name][SIZE], part, curvature)
    same_loss = None
    if SIZE in found.get("reference", {}) and SIZE in found.get("merged", {}):
        rows_of = parts["merged"]
        try:
            same_loss = measured(rows_of, SIZE // per_row(rows_of), found["reference"][SIZE].target)
        except ValueError as error:
            broken["merged, on the way to the reference's loss"] = str(error)
    curves = tuned(rows)
    priced = _priced(curves)
    return Readout(
        found,
        broken,
        _judged(found, (SIZE,)),
        _judged(found, SIZES),
        predictions(found, frozen, SIZE, same_loss, curves),
        priced,
        frozen,
        rows,
        len(rows),
        sum(row["status"] == "diverged" for row in rows),
        [name for name in CONFIGURATIONS if name not in found],
        sorted({row["commit"] or "unknown" for row in rows}),
        branched_batches(branches),
        _gains(found),
        {schedule: judged_harmless(of) for schedule, (_, of) in priced.items()},
    )


def _priced(curves: Sequence[Curve]) -> dict[str, tuple[list[Price], list[Curve]]]:
    """Price the rules on each schedule's configurations.

    Warm-up and β₂ are recipes of one, and left out; so are a trained start, which was announced as a figure,
    and at a constant learning rate all runs but those that configurations are read from.
    """
    made = {}
    for schedule in ("cosine", "constant"):
        of = [
            each
            for each in curves
            if each.cell.fields["schedule"] == schedule
            and not each.cell.fields["warmup"]
            and each.cell.fields["beta2_batch"] is None
            and each.cell.fields["adapter"] != "foundation"
            and (schedule != "constant" or shows_examples(each.cell.fields))
        ]
        if len(of) > 1:
            made[schedule] = prices(of), of
    return made


def _pairs(
    found: Mapping[str, Mapping[int, Measured]], sizes: Sequence[int]
) -> list[tuple[str, int, Measured]]:
    """Give (configuration, N, reading) of all readings."""
    return [(name, n, by[n]) for name, by in found.items() for n in sizes if n in by]


def _judged(found: Mapping[str, Mapping[int, Measured]], sizes: Sequence[int]) -> dict[str, Judged]:
    """Set every predictor beside B_crit, over configurations and sizes.

    A noise scale that was read at one of several sizes alone is left out.
    """
    each = _pairs(found, sizes)
    made = {}
    for variant in VARIANTS:
        there = [(name, n, one) for name, n, one in each if variant in one.noise]
        if len({n for _, n, _ in there}) == len({n for _, n, _ in each}) and there:
            made[variant] = judge(
                variant,
                [one.noise[variant] for *_, one in there],
                [one.doubled for *_, one in there],
                [name for name, *_ in there],
            )
    there = [(name, n, one) for name, n, one in each if PRIMARY in one.noise]
    for rival in (BY_SIZE, BY_DEFAULT):
        made[rival] = judge(
            rival,
            [_rival(rival, n) for _, n, _ in there],
            [one.doubled for *_, one in there],
            [name for name, *_ in there],
        )
    return made


def _rival(name: str, n: int) -> Estimated:
    """What a rival goes by: the amount of data, or nothing."""
    size = float(n) if name == BY_SIZE else 1.0
    return Estimated(size, size, size)


def _gains(found: Mapping[str, Mapping[int, Measured]]) -> dict[str, Estimated]:
    """Compare B_simple with its rivals: at one size with one batch for all, over sizes with c · N."""
    made = {}
    for rival, sizes in ((BY_DEFAULT, (SIZE,)), (BY_SIZE, SIZES)):
        there = [(name, n, one) for name, n, one in _pairs(found, sizes) if PRIMARY in one.noise]
        made[rival] = gain(
            [one.noise[PRIMARY] for *_, one in there],
            [_rival(rival, n) for _, n, _ in there],
            [one.doubled for *_, one in there],
            [name for name, *_ in there],
        )
    return made


def judged_harmless(curves: Sequence[Curve]) -> Harmless:
    """Set the noise scale of whole runs, and one batch for all, beside the largest harmless batch."""
    pairs = [(noise, each) for each in curves if (noise := whole_run(each.cell)) is not None]
    noise, largest = [each for each, _ in pairs], [largest_within(each, DELTA) for _, each in pairs]
    one = [_rival(BY_DEFAULT, SIZE)] * len(pairs)
    return Harmless(
        judge(PRIMARY, noise, largest), judge(BY_DEFAULT, one, largest), gain(noise, one, largest)
    )
