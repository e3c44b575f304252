"""Batch curves of whole runs, tuned at each batch size: the best batch, and the largest harmless one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from experiments.analysis.cells import Floats, Row, cells
from experiments.analysis.curves import Curve, Estimated, curve, largest_within, optimum
from experiments.analysis.fits import exponent
from experiments.analysis.resampling import interval
from experiments.evidence.configurations import REFERENCE, unlike

LEAST_BATCHES = 4  # sizes of a curve
RELATIVE = 0.05  # of a curve's own best loss, in P3
_REFERENCE = REFERENCE | {"n_train": 1_024, "schedule": "cosine"}


def tuned(rows: Iterable[Row]) -> list[Curve]:
    """Give the curve of every configuration that was tried at four batch sizes, and survived one.

    Runs of a fixed number of steps are none: there a larger batch sees more data.
    """
    found = []
    for cell in cells(rows):
        whole = (cell.fields["protocol"], cell.fields["epochs"]) == ("epochs", 1)
        if whole and len(cell.batches) >= LEAST_BATCHES and np.isfinite(cell.validation).any():
            found.append(curve(cell))
    return found


def pick(found: Iterable[Curve], **differs: Any) -> Curve:
    """Give the curve of the reference with some fields changed; a dial is written `dials_NAME`.

    Raises:
        KeyError: there is none, or the runs of several differ in fields that are not named here.
    """
    wanted = _REFERENCE | {name.replace("dials_", "dials."): value for name, value in differs.items()}
    chosen = [each for each in found if not unlike(each.cell.fields, wanted)]
    if len(chosen) != 1:
        raise KeyError(f"{len(chosen)} curves of {differs or 'the reference'}")
    return chosen[0]


def above_best(found: Curve) -> Estimated:
    """P4: test loss at the smallest batch less that at the one best on validation data, nats per token.

    Raises:
        KeyError: every run of the smallest batch diverged.
    """
    if len(found.diverged) and found.diverged.min() < found.batches.min():
        raise KeyError(f"batch {found.diverged.min():.0f} diverged")

    def excess(loss: Floats, validation: Floats) -> float:
        return float(loss[0] - loss[int(validation.argmin())])

    draws = np.array([excess(*each) for each in zip(found.draws, found.validation_draws, strict=True)])
    return Estimated(excess(found.loss, found.validation), *interval(draws), "", draws)


def growth_within(by_size: Mapping[int, Curve], relative: bool = False) -> Estimated:
    """P3: exponent of B_max in N, over whole runs on N rows.

    Args:
        by_size: N → curve.
        relative: within 5 % of the curve's own best loss, not within 0.01 nat of it.
    """
    largest = [
        largest_within(each, RELATIVE * float(each.loss.min())) if relative else largest_within(each)
        for each in by_size.values()
    ]
    found = exponent(list(by_size), largest)
    notes = [f"N = {n:,}: {each.note}" for n, each in zip(by_size, largest, strict=True) if each.note]
    return replace(found, note="; ".join([*notes, *([found.note] if found.note else [])]))


def octaves_between(one: Curve, other: Curve) -> Estimated:
    """P9: how many octaves the best batch of one lies above that of the other.

    Where a minimum is at an edge of the grid it may lie anywhere beyond, and so may the difference. Batch 1
    is no edge, as no batch is smaller; but two curves that both fall all the way there may differ in
    anything: if most draws of both do, the difference is open.
    """
    top, bottom = optimum(one), optimum(other)
    notes = [f"{what}: {each.note}" for what, each in (("one", top), ("other", bottom)) if each.note]
    value, low, high = (
        _octaves(*pair)
        for pair in ((top.value, bottom.value), (top.low, bottom.high), (top.high, bottom.low))
    )
    if not notes:  # nothing open: the draws of both say more than the ends
        n = min(len(top.draws), len(bottom.draws))
        draws = np.log2(top.draws[:n]) - np.log2(bottom.draws[:n])
        if ((top.draws[:n] == 1) & (bottom.draws[:n] == 1)).mean() > 0.5:
            return Estimated(value, -math.inf, math.inf, "both at batch 1, and none is smaller")
        return Estimated(value, *interval(draws), "", draws)
    low = -math.inf if math.isnan(low) else low
    high = math.inf if math.isnan(high) else high
    return Estimated(value, low, high, "; ".join(notes))


def _octaves(top: float, bottom: float) -> float:
    """log₂ of a ratio of batch sizes, 0 and infinite ones included; NaN where both are beyond one edge."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.log2(top) - np.log2(bottom))
