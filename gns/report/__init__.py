"""The report of a run: `report.html`, its figures, `steps.jsonl` and `summary.json`. Text and files only."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gns.advice import Advice, advise
from gns.coverage import Coverage
from gns.drift import Drift, drift
from gns.estimate import Estimate, estimate
from gns.records import (
    STEPS,
    RecordsError,
    Summary,
    read_steps,
    read_summary,
    write_atomically,
    write_steps,
    write_summary,
)
from gns.report import figures, page
from gns.sums import StepSums

__all__ = ["PAGE", "redraw", "write_report"]

PAGE = "report.html"


def write_report(
    folder: str | Path,
    steps: Iterable[StepSums],
    *,
    coverage: Coverage | None = None,
    settings: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    level: float = 0.95,
) -> Path:
    """Write everything that is known of a run into a folder.

    The report is of all records that `steps.jsonl` then holds: if a sink wrote there too, also those that a
    bounded history has forgotten (see `gns.records.write_steps`).

    Args:
        folder: it is made if it is not there.
        steps: records of the run, usable or not.
        coverage: which parameters are in the sums.
        settings: anything worth knowing of the run; "dataset_size" (examples) and "learning_rate", if given,
            enter the advice.
        batch_size: examples an optimizer step; default the median of the steps.
        level: nominal coverage of the confidence set.

    Returns:
        Path of `report.html`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    held = write_steps(folder / STEPS, steps)
    return _write(folder, held, Summary(level, coverage, dict(settings or {}), batch_size))


def redraw(folder: str | Path) -> Path:
    """Write the report of a folder anew from its `steps.jsonl`, which is left as it is.

    Damaged records are left out, with a warning and a note in the report.

    Args:
        folder: one that `write_report` or a `StepsWriter` wrote.

    Returns:
        Path of `report.html`.

    Raises:
        FileNotFoundError: there is no `steps.jsonl`.
        RecordsError: it is foreign or holds no good record, or `summary.json` is damaged.
    """
    folder, notes = Path(folder), []
    if not (folder / STEPS).is_file():
        raise FileNotFoundError(f"{folder} holds no {STEPS}; the folder of a measured run is needed")
    try:
        steps = read_steps(folder / STEPS)
    except RecordsError as error:
        if not error.steps:
            raise
        steps, notes = error.steps, [str(error)]
        warnings.warn(str(error), stacklevel=2)
    return _write(folder, steps, read_summary(folder), notes)


def _write(folder: Path, steps: list[StepSums], known: Summary, notes: Sequence[str] = ()) -> Path:
    """Write figures, summary and page; the page last, so that one that is there is whole."""
    share = known.coverage.share if known.coverage else None
    result = replace(estimate(steps, level=known.level), coverage=share)
    batch_size = known.batch_size or _usual_batch(steps)
    change = drift(steps, level=known.level)
    advice = _advice(result, steps, known.settings, batch_size, change)
    run = figures.course(steps, known.level)
    drawn = {
        "noise_scale": figures.noise_scale(run, result, batch_size),
        "trade_off": figures.trade_off(advice),
        "signal_and_noise": figures.signal_and_noise(steps, run),
        "factors": figures.factors(result),
    }
    images = {name: figures.png(figure) for name, figure in drawn.items() if figure is not None}
    for name in drawn:
        (folder / f"{name}.png").unlink(missing_ok=True)  # none from an earlier report may stay
    for name, image in images.items():
        write_atomically(folder / f"{name}.png", [image])
    about: dict[str, Any] = {
        "coverage": known.coverage,
        "settings": known.settings,
        "batch_size": batch_size,
    }
    write_summary(folder, result, **about)
    name = folder.resolve().name
    text = page.html(name, steps, result, advice=advice, images=images, change=change, notes=notes, **about)
    write_atomically(folder / PAGE, [text.encode(errors="replace")])
    return folder / PAGE


def _usual_batch(steps: Iterable[StepSums]) -> int | None:
    sizes = [step.n_examples for step in steps if step.usable]
    return round(statistics.median(sizes)) if sizes else None


def _advice(
    result: Estimate,
    steps: Sequence[StepSums],
    settings: Mapping[str, Any],
    batch_size: int | None,
    change: Drift | None,
) -> Advice | None:
    """Advise with what the settings and the steps tell of data size, learning rate and movement."""
    if not batch_size:
        return None
    rates = [step.learning_rate for step in steps if step.learning_rate]
    rate = settings.get("learning_rate", max(rates, default=None))
    data = settings.get("dataset_size")
    return advise(
        result,
        batch_size=batch_size,
        dataset_size=data if isinstance(data, int) and data >= batch_size else None,
        learning_rate=rate if isinstance(rate, int | float) and rate > 0 else None,
        change=change,
    )
