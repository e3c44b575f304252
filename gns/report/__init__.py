"""The report of a run: `report.html`, its figures, `steps.jsonl` and `summary.json`. Text and files only."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gns.advising.throughput import FILE, Throughput, ThroughputError
from gns.advising.throughput import read as read_speeds
from gns.coverage import Coverage
from gns.curvature.readingsfile import read_readings
from gns.probing.file import PROBE, read_probe
from gns.probing.result import FrozenEstimate
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
from gns.report import page
from gns.report.comparison import COMPARISON, write_comparison
from gns.report.drawing import DRAWINGS, drawn
from gns.report.environment import environment
from gns.report.findings import Findings, findings
from gns.sums import StepSums

__all__ = ["COMPARISON", "PAGE", "compare", "redraw", "write_report"]

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

    Speeds enter the advice where the folder holds a `throughput.json` of `gns throughput`.

    Args:
        folder: it is made if it is not there.
        steps: records of the run, usable or not.
        coverage: which parameters are in the sums.
        settings: anything worth knowing of the run; "dataset_size" (examples) and "learning_rate", if given,
            enter the advice, and so does what `gns.advising.capacity.recorded` finds of the adapters.
            "versions" and "commit" are filled in from this process where they are missing.
        batch_size: examples an optimizer step; default the median of the steps.
        level: nominal coverage of the confidence set.

    Returns:
        Path of `report.html`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    held = write_steps(folder / STEPS, steps)
    told = {**environment(), **(settings or {})}
    return _write(folder, held, Summary(level, coverage, told, batch_size))


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
    steps, notes = _read(Path(folder))
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return _write(Path(folder), steps, read_summary(folder), notes)


def compare(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write one self-contained page that sets runs side by side; the runs' own folders are left as they are.

    Args:
        folders: of two or more runs.
        out: path of the page; default `comparison.html` beside the first run's folder.

    Returns:
        The path.

    Raises:
        ValueError: there are fewer than two runs, or the same one twice.
        FileNotFoundError: a folder holds no `steps.jsonl`.
        RecordsError: it is foreign or holds no good record, or `summary.json` is damaged.
    """
    runs: dict[str, Findings] = {}
    for folder in folders:
        steps, notes = _read(Path(folder))
        known, name = read_summary(folder), Path(folder).resolve().name
        runs[str(folder)] = findings(name, steps, known, notes, frozen=_frozen(Path(folder)))
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise ValueError("a run is named twice; different ones are needed to compare")
    if out is None and folders:
        out = Path(folders[0]).resolve().parent / COMPARISON
    return write_comparison(runs, out or COMPARISON)


def _read(folder: Path) -> tuple[list[StepSums], list[str]]:
    """Read the good records of a run, and what is to be said of the others.

    Raises:
        FileNotFoundError: there is no `steps.jsonl`.
        RecordsError: it is foreign or holds no good record.
    """
    if not (folder / STEPS).is_file():
        raise FileNotFoundError(f"{folder} holds no {STEPS}; the folder of a measured run is needed")
    try:
        return read_steps(folder / STEPS), []
    except RecordsError as error:
        if not error.steps:
            raise
        return error.steps, [str(error)]


def _frozen(folder: Path) -> FrozenEstimate | None:
    """Read the result of a probe; None in the folder of a training."""
    return read_probe(folder) if (folder / PROBE).is_file() else None


def _timed(folder: Path) -> tuple[Throughput | None, list[str]]:
    """Read the speeds that lie in a folder, and what is to be said of a file that cannot be used."""
    try:
        return (read_speeds(folder / FILE), []) if (folder / FILE).is_file() else (None, [])
    except ThroughputError as error:
        return None, [str(error)]


def _write(folder: Path, steps: list[StepSums], known: Summary, notes: Sequence[str] = ()) -> Path:
    """Write figures, summary and page; the page last, so that one that is there is whole."""
    timed, bad = _timed(folder)
    notes = [*notes, *bad]
    found = findings(folder.resolve().name, steps, known, notes, frozen=_frozen(folder), timed=timed)
    found = replace(found, curvature=read_readings(folder))
    images = drawn(found)
    for drawing in DRAWINGS:
        (folder / f"{drawing.name}.png").unlink(missing_ok=True)  # none from an earlier report may stay
    for image in images:
        write_atomically(folder / f"{image.drawing.name}.png", [image.light])
    write_summary(
        folder,
        found.result,
        coverage=found.coverage,
        settings=found.settings,
        batch_size=found.batch_size,
    )
    write_atomically(folder / PAGE, [page.html(found, images).encode(errors="replace")])
    return folder / PAGE
