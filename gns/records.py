"""What is written and read back of a run: the steps (`gns/stepsfile.py`) and `summary.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from gns._version import __version__
from gns.coverage import Coverage
from gns.curvature.readingsfile import read_readings
from gns.estimate import Estimate, estimate
from gns.probing.file import PROBE, read_probe
from gns.stepsfile import (
    STEPS,
    VERSION,
    RecordsError,
    StepsWriter,
    cut_after,
    number,
    parsed,
    read_steps,
    write_atomically,
    write_steps,
)

__all__ = [
    "STEPS",
    "SUMMARY",
    "RecordsError",
    "StepsWriter",
    "Summary",
    "cut_after",
    "load",
    "read_steps",
    "read_summary",
    "write_atomically",
    "write_steps",
    "write_summary",
]

SUMMARY = "summary.json"
LEFT_OUT = ("history", "groups", "moments", "curvature")  # of an estimate, in the summary: they are elsewhere


def _plain(x: Any) -> Any:
    """Turn anything a caller puts into settings into JSON; what JSON has no word for becomes its str()."""
    if isinstance(x, Mapping):
        return {str(key): _plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple | set | frozenset):
        return [_plain(value) for value in x]
    x = number(x)
    return x if x is None or isinstance(x, bool | int | float | str) else str(x)


@dataclass(frozen=True)
class Summary:
    """What `summary.json` adds to the steps.

    Args:
        level: nominal coverage of the confidence set.
        coverage: which parameters are in the sums, or None where unknown.
        settings: of the run, as plain data.
        batch_size: examples a step that the run used, or None where unknown.
        estimate: the estimate as it was written, as plain data.
    """

    level: float = 0.95
    coverage: Coverage | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    batch_size: int | None = None
    estimate: dict[str, Any] = field(default_factory=dict)


def _estimate_data(result: Estimate) -> dict[str, Any]:
    data = {f.name: getattr(result, f.name) for f in fields(result) if f.name not in LEFT_OUT}
    data["groups"] = {name: _estimate_data(group) for name, group in result.groups.items()}
    return {"in_words": str(result), **_plain(data)}


def write_summary(
    folder: str | Path,
    result: Estimate,
    *,
    coverage: Coverage | None = None,
    settings: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
) -> Path:
    """Write `summary.json` atomically.

    Args:
        folder: of the run; it is made.
        result: the estimate over the run's steps.
        coverage: which parameters are in the sums.
        settings: anything worth knowing of the run: learning rate, schedule, model, versions, seed …
        batch_size: examples a step.

    Returns:
        Path of the file.
    """
    data = {
        "format": "gns-summary",
        "version": VERSION,
        "gns": __version__,
        "batch_size": number(batch_size),
    }
    data |= {"estimate": _estimate_data(result), "settings": _plain(settings or {}), "coverage": None}
    if coverage is not None:
        parts = {name: _plain(getattr(coverage, name)) for name in ("measured", "unmeasured", "reasons")}
        data["coverage"] = {"share": coverage.share, **parts, "verified": sorted(coverage.verified)}
        data["coverage"]["stopped"] = coverage.stopped
    path = Path(folder) / SUMMARY
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, [json.dumps(data, indent=1, allow_nan=False).encode() + b"\n"])
    return path


def read_summary(folder: str | Path) -> Summary:
    """Read `summary.json`; a folder without one gives an empty `Summary`.

    Raises:
        RecordsError: the file is truncated, malformed or foreign.
    """
    path = Path(folder) / SUMMARY
    if not path.exists():
        return Summary()
    data = parsed(path.read_bytes())
    try:
        seen = (data["format"], data["version"])
        level, covered = float(data["estimate"]["level"]), data["coverage"]
        coverage = None
        if covered:
            verified = frozenset(covered["verified"])
            coverage = Coverage(
                covered["measured"],
                covered["unmeasured"],
                covered["reasons"],
                verified,
                covered.get("stopped"),
            )
        summary = Summary(level, coverage, data["settings"], data["batch_size"], data["estimate"])
    except (KeyError, TypeError, ValueError):
        seen = None
    if seen != ("gns-summary", VERSION):
        raise RecordsError(
            f"{path}: truncated, malformed or foreign; a gns-summary of version {VERSION} is needed. Delete "
            f"it and it will be written anew from {STEPS}, without coverage and settings."
        )
    return summary


def load(folder: str | Path) -> Estimate:
    """Give back what `monitor.report(folder)` wrote, computed anew from its steps; a `gns probe` as it was.

    Args:
        folder: of the run; or a file of steps, as `GNSMonitor(sink=…)` writes one, which has no coverage.

    Returns:
        The estimate with `history`, `curvature`, `coverage` and groups.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no steps.
        RecordsError: a file there is truncated, malformed or foreign; its `.steps` are the good records.
    """
    folder = Path(folder)
    if (folder / PROBE).is_file():
        return read_probe(folder)
    if folder.is_file():
        steps = read_steps(folder)
        return replace(estimate(steps), history=tuple(steps))
    if not (folder / STEPS).is_file():
        seen = f"holds no {STEPS}" if folder.is_dir() else "is not there"
        raise FileNotFoundError(
            f"{folder} {seen}; a folder that `gns measure` or monitor.report(folder) wrote is needed, or a "
            "file that GNSMonitor(sink=file) wrote"
        )
    steps = read_steps(folder / STEPS)
    try:
        summary = read_summary(folder)
    except RecordsError as error:
        raise RecordsError(str(error), steps) from error
    share = summary.coverage.share if summary.coverage else None
    readings = read_readings(folder)
    found = estimate(steps, level=summary.level)
    return replace(found, history=tuple(steps), coverage=share, curvature=readings)
