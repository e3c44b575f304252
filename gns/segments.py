"""Which positions of a call belong to which example, where examples are not rows.

Packing puts several examples into one row. It shows in what the call is given: `cu_seq_lens_q` (flash
attention), `seq_idx` (state-space models), or `position_ids` that start again, by the very rule that
`transformers` makes its attention mask from. Several rows that are one example (a preference pair) show
nowhere: `segments=` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from gns.capture.arguments import call_shape

SegmentsOf = Callable[[tuple, Mapping[str, Any]], Any]


def stacked(rows_per_example: int) -> SegmentsOf:
    """Make a `segments=` for calls on all first rows, then all second rows, ..., of the examples.

    `stacked(2)` is for preference pairs as TRL's `DPOTrainer` stacks them: chosen rows, then rejected rows.

    Args:
        rows_per_example: rows that one example has in a call.

    Raises:
        ValueError: fewer than one.
    """
    if rows_per_example < 1:
        raise ValueError(f"rows_per_example is {rows_per_example}; 1 or more are needed")

    def segments(args: tuple, kwargs: Mapping[str, Any]) -> np.ndarray:
        rows = _rows(args, kwargs)
        if rows % rows_per_example:
            raise ValueError(f"the call has {rows} rows, which are not {rows_per_example} for each example")
        return np.arange(rows) % (rows // rows_per_example)

    return segments


def _rows(args: tuple, kwargs: Mapping[str, Any]) -> int:
    shape = call_shape(args, kwargs)
    if shape is None:
        raise ValueError("the call has no tensor with a batch dimension")
    return shape.rows


def given(
    segments: SegmentsOf | str, args: tuple, kwargs: Mapping[str, Any], rows: int, positions: int | None
) -> np.ndarray:
    """Ask `segments=` for the examples of a call.

    Args:
        segments: (args, kwargs of the call) → ids, or the name of the keyword argument that holds them.
        args: of the call.
        kwargs: of the call.
        rows: R.
        positions: T, or None where the call has no positions.

    Returns:
        [R] or [R, T] integers.

    Raises:
        ValueError: they have another shape, are no integers, or the keyword argument is not there.
    """
    if isinstance(segments, str):
        if segments not in kwargs:
            raise ValueError(
                f"segments={segments!r}, but the call has no such keyword argument: {sorted(kwargs)}"
            )
        found = kwargs[segments]
    else:
        found = segments(args, kwargs)
    ids = found.detach().cpu().numpy() if isinstance(found, Tensor) else np.asarray(found)
    if ids.shape not in ((rows,), (rows, positions)):
        needed = f"[{rows}]" + (f" or [{rows}, {positions}]" if positions is not None else "")
        raise ValueError(
            f"segments has shape {list(ids.shape)}; {needed} is needed, an example's number each"
        )
    if ids.dtype.kind not in "iu":
        raise ValueError(f"segments has dtype {ids.dtype}; integers are needed, below 0 for no example")
    return ids.astype(np.int64)


def packed(kwargs: Mapping[str, Any], rows: int, positions: int | None) -> np.ndarray | None:
    """Find packed examples in the arguments of a call; waits for the device where there may be some.

    Args:
        kwargs: keyword arguments of the call.
        rows: R.
        positions: T, or None where the call has no positions.

    Returns:
        [R, T] ids, or None where every row is one example.
    """
    if positions is None:
        return None
    for find in (_from_lengths, _from_index, _from_positions):
        ids = find(kwargs, rows, positions)
        if ids is not None:
            ids = _without_padding(ids)
            one_each = (
                ids.min() >= 0 and bool((ids == ids[:, :1]).all()) and len(np.unique(ids[:, 0])) == rows
            )
            return None if one_each else ids
    return None


def _without_padding(ids: np.ndarray) -> np.ndarray:
    """Take out examples of one position at the end of a row: padding to a multiple looks like that.

    A causal model has nothing to predict in one position, so a real example is not missed.
    """
    flat, counts = np.unique(ids, return_counts=True)
    single = np.isin(ids, flat[counts == 1])
    trailing = np.flip(np.logical_and.accumulate(np.flip(single | (ids < 0), 1), axis=1), 1)
    return np.where(trailing & (np.arange(ids.shape[1]) > 0), -1, ids)


def separated(model: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether a model's attention keeps packed examples apart, as far as its configuration says.

    Flash attention reads the lengths. In `transformers` the others make their mask from `position_ids`, but
    only without a two-dimensional mask and without a cache, which `use_cache` makes in training too.
    """
    base = getattr(model, "get_base_model", lambda: model)()
    config = getattr(base, "config", None)
    attention = getattr(config, "_attn_implementation", None)
    if not isinstance(attention, str) or "flash" in attention:
        return True
    mask, places = kwargs.get("attention_mask"), kwargs.get("position_ids")
    cache = kwargs.get("use_cache")
    cache = getattr(config, "use_cache", False) if cache is None else cache
    name = "is_activation_checkpointing"  # its name until transformers 5.22 was is_gradient_checkpointing
    name = name if hasattr(type(base), name) else "is_gradient_checkpointing"
    recomputes = base.training and getattr(base, name, False)  # it forbids the cache
    own_mask = isinstance(mask, Tensor) and mask.ndim == 4
    return own_mask or (mask is None and places is not None and (not cache or recomputes))


def _host(value: Any) -> np.ndarray | None:
    return (
        value.detach().cpu().numpy() if isinstance(value, Tensor) and not value.is_floating_point() else None
    )


def _from_lengths(kwargs: Mapping[str, Any], rows: int, positions: int) -> np.ndarray | None:
    """From cumulative lengths [S + 1] over all R·T positions."""
    bounds = _host(kwargs.get("cu_seq_lens_q", kwargs.get("cu_seqlens_q")))
    if bounds is None or bounds.ndim != 1 or len(bounds) < 2 or bounds[-1] > rows * positions:
        return None
    ids = np.full(rows * positions, -1)
    ids[bounds[0] : bounds[-1]] = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    return ids.reshape(rows, positions)


def _from_index(kwargs: Mapping[str, Any], rows: int, positions: int) -> np.ndarray | None:
    """From the number of each position's sequence within its row, [R, T]."""
    index = _host(kwargs.get("seq_idx"))
    if index is None or index.shape != (rows, positions):
        return None
    spread = int(index.max()) + 1
    return np.where(index < 0, -1, index + spread * np.arange(rows)[:, None])


def _from_positions(kwargs: Mapping[str, Any], rows: int, positions: int) -> np.ndarray | None:
    """From position ids [R, T]: an example begins wherever one is not its predecessor plus one.

    With a two-dimensional attention mask they say nothing: padding starts them again too, and the attention
    does not separate what they separate.
    """
    places, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return None
    places = _host(places)
    if places is not None and places.ndim == 3 and len(places) == 4:
        places = places[0]  # of Qwen-VL: the text's own positions, then time, height and width
    if places is None or places.ndim != 2 or places.shape[1] != positions or places.shape[0] not in (1, rows):
        return None
    begins = np.diff(places, axis=1, prepend=places[:, :1] - 1) != 1
    begins[:, 0] = True
    begins = np.broadcast_to(begins, (rows, positions))
    return np.cumsum(begins.reshape(-1)).reshape(rows, positions) - 1
