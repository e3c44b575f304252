"""`probe.json`: a frozen probe, written and read back. Its batches lie beside it in `steps.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from gns.probing.largest import LargeExample
from gns.probing.result import DropoutNoise, FrozenEstimate
from gns.statistics.moments import Moments
from gns.statistics.pairs import Dependence, SignFlip
from gns.statistics.pairspread import ScoreMoments
from gns.stepsfile import STEPS, RecordsError, number, read_steps, write_atomically, write_steps

PROBE = "probe.json"
_FORMAT = {"format": "gns-probe", "version": 1}
_PARTS = {
    "signal": SignFlip,
    "dependence": Dependence,
    "dropout": DropoutNoise,
    "moments": Moments,
}
_APART = ("history", "groups", *_PARTS, "largest")


def write_probe(folder: str | Path, found: FrozenEstimate) -> Path:
    """Write `steps.jsonl`, one record a batch, and `probe.json`.

    Args:
        folder: it is made.
        found: by `gns.probe`.

    Returns:
        Path of `probe.json`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_steps(folder / STEPS, found.history)
    data = {**_FORMAT, "in_words": str(found), **_plain(found)}
    write_atomically(folder / PROBE, [json.dumps(data, indent=1, allow_nan=False).encode() + b"\n"])
    return folder / PROBE


def _plain(found: FrozenEstimate) -> dict[str, Any]:
    data = {f.name: _value(getattr(found, f.name)) for f in fields(found) if f.name not in _APART}
    for name in _PARTS:
        part = getattr(found, name)
        data[name] = None if part is None else {f.name: _value(getattr(part, f.name)) for f in fields(part)}
    data["largest"] = [{f.name: number(getattr(e, f.name)) for f in fields(e)} for e in found.largest]
    data["groups"] = {name: _plain(group) for name, group in found.groups.items()}  # type: ignore[arg-type]
    return data


def _value(x: Any) -> Any:
    return [number(v) for v in x] if isinstance(x, tuple) else number(x)


def read_probe(folder: str | Path) -> FrozenEstimate:
    """Read back what `write_probe` wrote.

    Raises:
        FileNotFoundError: there is none.
        RecordsError: a file there is truncated, malformed or foreign.
    """
    path = Path(folder) / PROBE
    try:
        data = json.loads(path.read_bytes())
        if {name: data.pop(name) for name in _FORMAT} != _FORMAT:
            raise ValueError("another format")
        history = tuple(read_steps(Path(folder) / STEPS))
        return _estimate(data, history=history)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, RecordsError):
            raise
        version = _FORMAT["version"]
        raise RecordsError(
            f"{path}: truncated, malformed or foreign; a gns-probe of version {version} is needed. "
            "Measure again."
        ) from error


def _estimate(data: Mapping[str, Any], **known: Any) -> FrozenEstimate:
    names = {f.name for f in fields(FrozenEstimate)}
    values = {name: _read(value) for name, value in data.items() if name in names and name not in _APART}
    for name, kind in _PARTS.items():
        part = data[name]
        kind = ScoreMoments if part is not None and "null" in part else kind
        values[name] = None if part is None else kind(**{k: _read(v) for k, v in part.items()})
    values["largest"] = tuple(LargeExample(**{k: _read(v) for k, v in e.items()}) for e in data["largest"])
    values["groups"] = {name: _estimate(group) for name, group in data["groups"].items()}
    return FrozenEstimate(**values, **known)


def _read(x: Any) -> Any:
    if isinstance(x, list):
        return tuple(_read(v) for v in x)
    return float(x) if x in ("NaN", "Infinity", "-Infinity") else x
