"""All that a report of a run shows, worked out from its records by the functions that own the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from gns.advice import Advice, advise
from gns.advising.recorded import inputs
from gns.advising.throughput import Throughput, length_remark
from gns.coverage import Coverage
from gns.curvature.result import CurvatureReading
from gns.estimate import Estimate, estimate
from gns.geometry import by_layer, by_module
from gns.probing.result import FrozenEstimate
from gns.records import Summary
from gns.statistics.drift import Drift, drift
from gns.statistics.views import progress_weighted
from gns.sums import StepSums


@dataclass(frozen=True)
class Findings:
    """What is known of a run.

    Args:
        name: of the run.
        steps: all records of the run, usable or not.
        result: the estimate over them.
        batch_size: in use, examples a step; None where nothing tells.
        advice: what follows, or None where nothing was measured.
        change: how the noise scale moved along the run, or None where that cannot be told.
        coverage: which parameters are in the sums.
        settings: of the run.
        notes: what the reader must know of the records, e.g. that they were damaged.
        curvature: readings of B_noise.
    """

    name: str
    steps: Sequence[StepSums]
    result: Estimate
    batch_size: int | None
    advice: Advice | None
    change: Drift | None
    coverage: Coverage | None
    settings: Mapping[str, Any]
    notes: Sequence[str] = ()
    curvature: Sequence[CurvatureReading] = ()

    @property
    def frozen(self) -> bool:
        """Whether this is a probe at frozen weights, not a training."""
        return isinstance(self.result, FrozenEstimate)

    @cached_property
    def progress(self) -> Estimate | None:
        """Progress-weighted mean over the run, to set beside a critical batch; None where not resolved."""
        if self.frozen:
            return None
        try:
            return progress_weighted(self.steps, batch_size=self.batch_size, level=self.result.level)
        except ValueError:  # |G|² is not resolved well enough for weights at this batch
            return None

    @cached_property
    def modules(self) -> Mapping[str, Estimate]:
        """Path of a module → estimate, in the model's order."""
        return by_module(self.steps, level=self.result.level)

    @cached_property
    def layers(self) -> Mapping[str, Estimate]:
        """Path of a block → estimate, in the model's order."""
        return by_layer(self.steps, level=self.result.level)


def findings(
    name: str,
    steps: Sequence[StepSums],
    known: Summary,
    notes: Sequence[str] = (),
    *,
    frozen: FrozenEstimate | None = None,
    timed: Throughput | None = None,
) -> Findings:
    """Work out everything that the report of a run shows.

    Args:
        name: of the run.
        steps: all its records.
        known: level, coverage, settings and batch size.
        notes: what the reader must know of the records.
        frozen: the result of a probe, whose batches the steps then are; it has nothing to move.
        timed: speed at each batch size on the user's machine, or None.
    """
    share = known.coverage.share if known.coverage else None
    result = replace(frozen or estimate(steps, level=known.level), coverage=share)
    told = inputs(steps, known.settings, known.batch_size, known.coverage)
    change = None if frozen else drift(steps, level=known.level)
    return Findings(
        name=name,
        steps=steps,
        result=result,
        batch_size=told["batch_size"],
        advice=_timed_advice(result, steps, told, change, timed),
        change=change,
        coverage=known.coverage,
        settings=known.settings,
        notes=notes,
    )


def _timed_advice(
    result: Estimate,
    steps: Sequence[StepSums],
    told: Mapping[str, Any],
    change: Drift | None,
    timed: Throughput | None,
) -> Advice | None:
    """Advise with what the records tell, how the noise scale moved and the machine's speed."""
    if not told["batch_size"]:
        return None
    advice = advise(result, **told, change=change, throughput=timed.speeds if timed else None)
    remark = length_remark(timed, steps) if timed else None
    return replace(advice, warnings=(*advice.warnings, remark)) if remark else advice
