"""Reads of `.grad`, without a device synchronisation: squared norms, emptiness, what changed since."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from gns.capture.gather import sum_dtype


def sq_norms(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Squared norm of each tensor, in float32 or wider; 0 where there is none.

    Args:
        tensors: gradients, of any device and dtype.
        like: tensors of the same devices and dtypes, for the zeros; may be empty where none is missing.

    Returns:
        One scalar a tensor, float64 for float64, else float32.
    """
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    found: list[Tensor | None] = [None] * len(tensors)
    for i, t in enumerate(tensors):
        if t is None:
            found[i] = torch.zeros((), dtype=sum_dtype(like[i].dtype), device=like[i].device)
        else:
            alike[t.device, t.dtype].append(i)
    for (device, dtype), rows in alike.items():
        there = [tensors[i].detach() for i in rows]  # type: ignore[union-attr]
        for i, squared in zip(rows, _sq_norms_alike(there, device, sum_dtype(dtype)), strict=True):
            found[i] = squared
    return [t for t in found if t is not None]


def _sq_norms_alike(tensors: list[Tensor], device: torch.device, dtype: torch.dtype) -> Sequence[Tensor]:
    if device.type == "cpu":  # its norm kernel adds in sequence: 10⁻⁴ off at 3 million float32 entries
        return [t.to(dtype).square().sum() for t in tensors]
    norms = torch._foreach_norm(tensors, 2, dtype=dtype)  # type: ignore[reportPrivateImportUsage]
    return torch._foreach_mul(norms, norms)  # type: ignore[reportPrivateImportUsage]


class Stamp:
    """What the gradients were when last read, so that a later look can tell what the loop did to them.

    Args:
        gradients: one a parameter, or None.
    """

    def __init__(self, gradients: Sequence[Tensor | None]):
        self._seen = [None if g is None else (weakref.ref(g), g._version) for g in gradients]

    def any(self) -> bool:
        """Whether there was a gradient."""
        return any(seen is not None for seen in self._seen)

    def untouched(self, gradients: Sequence[Tensor | None]) -> bool:
        """Whether all gradients are the same tensors with the same values."""
        return all(
            g is None if seen is None else (g is not None and seen[0]() is g and seen[1] == g._version)
            for seen, g in zip(self._seen, gradients, strict=True)
        )

    def replaced(self, gradients: Sequence[Tensor | None]) -> bool:
        """Whether every gradient that was there is gone or is another tensor now."""
        there = [(s, g) for s, g in zip(self._seen, gradients, strict=True) if s is not None]
        return bool(there) and all(g is None or seen[0]() is not g for seen, g in there)


def all_empty(gradients: Sequence[Tensor | None]) -> bool:
    """Whether every gradient is None or zero; waits for the device if one is there."""
    there = [g for g in gradients if g is not None]
    if all(g.device.type == "cpu" for g in there):
        return not any(bool(g.any()) for g in there)  # as a rule the first one settles it
    return not bool(largest_entries(there).any())


def largest_entries(tensors: Sequence[Tensor]) -> Tensor:
    """Largest absolute entry of each tensor, [len], on the first one's device."""
    norms = torch._foreach_norm([t.detach() for t in tensors], float("inf"))  # type: ignore[reportPrivateImportUsage]
    return torch.stack([n.to(norms[0].device) for n in norms]).float()
