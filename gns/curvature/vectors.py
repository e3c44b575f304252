"""Inner products of vectors that are kept parameter by parameter, summed in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

TOGETHER = 2**18  # entries that are converted to float64 at once, unless one parameter has more


def dots(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> np.ndarray:
    """Inner product of each parameter's part of two vectors, summed in float64, [P]."""
    return along({name: x[None] for name, x in a.items()}, b)[0]


def along(
    stacked: Mapping[str, Tensor | Sequence[Tensor]], vector: Mapping[str, Tensor], *, whole: bool = False
) -> np.ndarray:
    """The same of S vectors, kept as parameter → [S, *shape], with one, [S, P]; the whole alone: [S, 1]."""
    found = []
    for names in _neighbours(vector, list(stacked)):
        sizes = [vector[name].numel() for name in names]
        sizes = [sum(sizes)] if whole else sizes
        v = _flat([vector[name] for name in names]).split(sizes)
        for s in range(len(stacked[names[0]])):  # one at a time: in float64 all S would not fit
            u = _flat([stacked[name][s] for name in names]).split(sizes)
            found.append(torch.stack([torch.dot(a, b) for a, b in zip(u, v, strict=True)]))
    if not found:
        return np.zeros((0, 0))
    rows = len(next(iter(stacked.values())))
    host = [f.to(found[0].device) for f in found]
    wide = [torch.stack(host[i : i + rows]) for i in range(0, len(host), rows)]
    parts = torch.cat(wide, 1)
    return (parts.sum(1, keepdim=True) if whole else parts).cpu().numpy()  # one transfer


def _neighbours(vector: Mapping[str, Tensor], names: Sequence[str]) -> list[list[str]]:
    """Group parameters to be converted together: many small ones would cost a call each."""
    groups: list[list[str]] = []
    size = 0
    for name in names:
        v = vector[name]
        if not groups or size + v.numel() > TOGETHER or v.device != vector[groups[-1][0]].device:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += v.numel()
    return groups


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors one behind the other, in float64."""
    flat = [t.detach().reshape(-1) for t in tensors]
    return (torch.cat(flat) if len(flat) > 1 else flat[0]).double()


def inner(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Inner product of two vectors over all their parameters, summed in float64."""
    found = []
    for names in _neighbours(b, list(a)):
        v = _flat([b[name] for name in names])
        found.append(torch.dot(v if a is b else _flat([a[name] for name in names]), v))
    return float(torch.stack([f.to(found[0].device) for f in found]).sum()) if found else 0.0


def norm(vector: Mapping[str, Tensor]) -> float:
    """Euclidean norm of a vector over all its parameters."""
    return inner(vector, vector) ** 0.5
