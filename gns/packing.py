"""A monitor's history as plain data, for checkpoints that are read back with no class of ours."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from gns.estimate import Estimate
from gns.statistics.moments import Moments
from gns.sums import Layout, StepSums

_SCALARS = [f.name for f in fields(StepSums) if f.name not in ("rows", "layout")]


def pack(next_step: int, history: Sequence[StepSums]) -> dict[str, Any]:
    """Turn a history into plain JSON data; the rows exactly, as base64 of their bytes."""
    layouts: dict[tuple[str, ...], int] = {}
    steps = []
    for step in history:
        packed = {name: getattr(step, name) for name in _SCALARS}
        packed["top_sq_norms"] = list(step.top_sq_norms)
        if step.rows is not None and step.layout is not None:
            text = base64.b64encode(np.ascontiguousarray(step.rows).tobytes()).decode()
            packed |= {"rows": text, "dtype": step.rows.dtype.name}
            packed["layout"] = layouts.setdefault(step.layout.names, len(layouts))
        steps.append(packed)
    return {"next_step": next_step, "layouts": [list(names) for names in layouts], "steps": steps}


def unpack(packed: Mapping[str, Any]) -> list[StepSums]:
    """Give the history that was packed; a field that the writer did not know yet takes its default."""
    layouts = [Layout(tuple(names)) for names in packed["layouts"]]
    steps = []
    for step in packed["steps"]:
        values = {name: step[name] for name in _SCALARS if name in step}
        values["top_sq_norms"] = tuple(step.get("top_sq_norms", ()))
        if "rows" in step:
            flat = np.frombuffer(base64.b64decode(step["rows"]), dtype=step["dtype"])
            values |= {"rows": flat.reshape(-1, 2).copy(), "layout": layouts[step["layout"]]}
        steps.append(StepSums(**values))
    return steps


def pack_estimate(found: Estimate) -> dict[str, Any]:
    """Turn an estimate into plain JSON data, without its history."""
    data = {f.name: _plain(getattr(found, f.name)) for f in fields(found) if f.name != "history"}
    data["groups"] = {name: pack_estimate(group) for name, group in found.groups.items()}
    moments = found.moments
    known = None if moments is None else {f.name: _plain(getattr(moments, f.name)) for f in fields(moments)}
    return {**data, "moments": known}


def unpack_estimate(packed: Mapping[str, Any]) -> Estimate:
    """Give the estimate that was packed; fields that this version does not know are left out."""
    data, moments = _known(Estimate, packed), packed["moments"]
    data["moments"] = None if moments is None else Moments(**_known(Moments, moments))
    data["groups"] = {name: unpack_estimate(group) for name, group in packed["groups"].items()}
    return Estimate(**data)


def _plain(x: Any) -> Any:
    return list(x) if isinstance(x, tuple) else x


def _known(kind: type[Any], packed: Mapping[str, Any]) -> dict[str, Any]:
    """Read the fields of a dataclass, and leave out those that it does not have."""
    return {f.name: _read(packed[f.name]) for f in fields(kind) if f.name in packed}


def _read(x: Any) -> Any:
    return tuple(x) if isinstance(x, list) else x
