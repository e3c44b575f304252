"""What the records of a run tell `gns.advice.advise`: batch, data, learning rate, adapters. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gns.advising.capacity import number_in, recorded, trainable

if TYPE_CHECKING:
    from gns.coverage import Coverage
    from gns.sums import StepSums


def inputs(
    steps: Sequence[StepSums],
    settings: Mapping[str, Any],
    batch_size: int | None = None,
    coverage: Coverage | None = None,
) -> dict[str, Any]:
    """Give what the advice asks of a run, by the name of its argument; None where nothing tells.

    Args:
        steps: all records of the run, usable or not.
        settings: of the run; see `gns.report.write_report`.
        batch_size: in use, examples an optimizer step; None: the median of the usable steps.
        coverage: which parameters are in the sums.

    Returns:
        `batch_size`, `dataset_size` (examples; None if it is less than a batch), `learning_rate` (the highest
        of the steps where the settings have none), `capacity`, `cost`.
    """
    sizes = [step.n_examples for step in steps if step.usable]
    batch = batch_size or (round(statistics.median(sizes)) if sizes else None)
    data = settings.get("dataset_size")
    rates = [step.learning_rate for step in steps if step.learning_rate]
    capacity, cost = recorded(settings, trainable(settings, coverage))
    return {
        "batch_size": batch,
        "dataset_size": data if isinstance(data, int) and batch and data >= batch else None,
        "learning_rate": number_in(settings, "learning_rate") or max(rates, default=None),
        "capacity": capacity,
        "cost": cost,
    }
