"""`curvature.jsonl`: the readings of B_noise of a run, one a line, written as they come and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from gns.curvature.result import Block, Contribution, Cost, CurvatureEstimate, CurvatureReading
from gns.statistics.moments import Moments
from gns.stepsfile import RecordsError, number, write_atomically

CURVATURE = "curvature.jsonl"
WORDS = ("NaN", "Infinity", "-Infinity")
FORMAT, VERSION = "gns-curvature", 1
_PARTS = {"groups": Contribution, "modules": Contribution, "blocks": Block}
_NAMES = {f.name for f in fields(CurvatureEstimate)}


def record_of(reading: CurvatureReading) -> dict[str, Any]:
    """Give a reading as JSON can hold it."""
    return _named(
        {
            "format": FORMAT,
            "version": VERSION,
            "step": reading.step,
            "learning_rate": reading.learning_rate,
            "estimate": asdict(reading.estimate),
        }
    )


def _line(reading: CurvatureReading) -> bytes:
    return json.dumps(record_of(reading), separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _named(x: Any) -> Any:
    """Write what JSON has no number for as a word."""
    if isinstance(x, dict):
        return {key: _named(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_named(value) for value in x]
    return number(x)


def _numbers(x: Any) -> Any:
    """Read it back."""
    if isinstance(x, dict):
        return {key: _numbers(value) for key, value in x.items()}
    if isinstance(x, list):
        return [_numbers(value) for value in x]
    return float(x) if isinstance(x, str) and x in WORDS else x


def _tupled(x: Any) -> Any:
    return tuple(x) if isinstance(x, list) else x


def reading_of(record: Mapping[str, Any]) -> CurvatureReading:
    """Give back what `record_of` wrote.

    Raises:
        ValueError: another format; `KeyError`, `TypeError` or `AttributeError` where something is missing.
    """
    if (record["format"], record["version"]) != (FORMAT, VERSION):
        raise ValueError("another format")
    data = {k: _numbers(v) for k, v in record["estimate"].items() if k in _NAMES}
    for name, kind in _PARTS.items():
        if data[name] is not None:  # contributions that were not asked for
            data[name] = {key: kind(**part) for key, part in data[name].items()}
    data["cost"] = None if data["cost"] is None else Cost(**data["cost"])
    data["warnings"] = tuple(data["warnings"])
    if data.get("moments") is not None:  # readings of earlier versions have none
        data["moments"] = Moments(**{key: _tupled(value) for key, value in data["moments"].items()})
    rate = _numbers(record["learning_rate"])
    return CurvatureReading(int(record["step"]), rate, CurvatureEstimate(**data))


def append_reading(folder: Path, reading: CurvatureReading) -> None:
    """Append a reading to the run in `folder`; it is made."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / CURVATURE).open("ab") as file:
        file.write(_line(reading))


def write_readings(folder: Path, readings: Sequence[CurvatureReading]) -> None:
    """Write all readings of a run; the folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CURVATURE, map(_line, readings))


def read_readings(folder: Path) -> tuple[CurvatureReading, ...]:
    """Read the readings of the run in `folder`; none without a file. A last line cut short is left out.

    Raises:
        RecordsError: a line is malformed or foreign.
    """
    path = folder / CURVATURE
    if not path.exists():
        return ()
    lines, found = path.read_bytes().splitlines(keepends=True), []
    for at, line in enumerate(lines, 1):
        try:
            found.append(reading_of(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if at == len(lines) and not line.endswith(b"\n"):
                break
            raise RecordsError(
                f"{path}, line {at}: malformed or foreign; a {FORMAT} record of version {VERSION} is "
                "needed. Delete the line, or the file: B_noise alone is in it"
            ) from error
    return tuple(found)


def cut_readings(folder: Path, step: int) -> None:
    """Leave out the readings after a step, which a resumed run makes again."""
    if (folder / CURVATURE).exists():
        write_readings(folder, [r for r in read_readings(folder) if r.step <= step])
