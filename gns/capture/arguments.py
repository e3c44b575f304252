"""What the arguments of a call show: the tensor whose first dimension is the batch, rows and positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from gns.capture.placement import Shape

_BATCH_FIRST = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Walk the tensors of nested call arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from tensors_in(item)


def batch_of(args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Find the tensor whose first dimension is the batch."""
    named = (kwargs.get(name) for name in _BATCH_FIRST)
    first = next((t for t in named if isinstance(t, Tensor)), None)
    return next((t for t in tensors_in((args, dict(kwargs))) if t.ndim > 0), None) if first is None else first


def call_shape(args: tuple, kwargs: Mapping[str, Any]) -> Shape | None:
    """Read rows and positions off a call's arguments, or None where it holds no tensor with a dimension."""
    batch = batch_of(args, kwargs)
    if batch is None:
        return None
    positions = batch.ndim == (3 if batch.is_floating_point() else 2)
    return Shape(int(batch.shape[0]), int(batch.shape[1]) if positions else None)
