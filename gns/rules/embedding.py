"""The embedding y = s · W[ids], with s = 1 but for families that scale it (Gemma)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from gns.rules.base import Rule, joined, register, unknown, wide
from gns.rules.probing import close, own_parameters, run

FLOAT = 4  # bytes


def rows_of(ids: Tensor, dy: Tensor, padding: int | None) -> tuple[Tensor, Tensor]:
    """View ids as [B, T] and gradients as [B, T, D] in float32 or wider, those of the padding id as zeros."""
    ids, dy = ids.reshape(len(ids), -1), wide(dy.reshape(len(dy), -1, dy.shape[-1]))
    return ids, dy if padding is None else dy * ids.ne(padding).unsqueeze(-1)


def distinct_rows(ids: Tensor, dy: Tensor) -> Tensor:
    """Add up the gradients of equal ids, example by example, with no table of the vocabulary's size.

    Args:
        ids: [B, T].
        dy: [B, T, D].

    Returns:
        [B, T, D]: in each example, one row a distinct id, in the order of the ids; the rest is zero.
    """
    order = ids.argsort(1)
    sorted_ids = ids.gather(1, order)
    first = torch.ones_like(sorted_ids)
    first[:, 1:] = sorted_ids[:, 1:] != sorted_ids[:, :-1]
    slot = (first.cumsum(1) - 1).unsqueeze(-1).expand(dy.shape)
    there = dy.gather(1, order.unsqueeze(-1).expand(dy.shape))
    return torch.zeros_like(dy).scatter_add_(1, slot, there)


def table_blocks(ids: Tensor, dy: Tensor, rows: int) -> Tensor:
    """Per-example gradient of a table of `rows` rows, [B, rows, D], from ids [B, T] and dy [B, T, D]."""
    place = ids.unsqueeze(-1).expand(dy.shape)
    return dy.new_zeros(len(dy), rows, dy.shape[-1]).scatter_add_(1, place, dy)


def table_total(ids: Tensor, dy: Tensor, rows: int) -> Tensor:
    """Sum of `table_blocks` over the examples, [rows, D]."""
    return dy.new_zeros(rows, dy.shape[-1]).index_add_(0, ids.flatten(), dy.flatten(0, 1))


def table_sq_norms(ids: Tensor, dy: Tensor, limit: int) -> Tensor:
    """‖C_b‖² of a table from its distinct rows, [B], in chunks of at most `limit` bytes."""
    size = max(1, limit // (3 * FLOAT * dy.shape[1:].numel()))
    chunks = zip(ids.split(size), dy.split(size), strict=True)
    return joined([distinct_rows(i, d).square().sum((1, 2)) for i, d in chunks])


def _weight_only(parameter: str) -> None:
    if parameter != "weight":
        raise unknown(parameter, "Embedding", ("weight",))


def embedding_blocks(layer: nn.Module, ids: Tensor, dy: Tensor, parameter: str) -> Tensor:
    """Gradient that each example adds to an embedding's table.

    C_b[v] = Σ_{t: id_bt = v} dy_bt, and none for the padding id

    Args:
        layer: the embedding, for its size and padding id.
        ids: [B, ...], integers.
        dy: [B, ..., D], gradient of the loss at its output.
        parameter: "weight".

    Returns:
        [B, V, D], float32 or float64, in loss / parameter.

    Raises:
        ValueError: the layer has no such parameter.

    Slow twin: tests/reference/per_example.py
    """
    _weight_only(parameter)
    return table_blocks(*rows_of(ids, dy, _padding(layer)), _size(layer))


def embedding_total(layer: nn.Module, ids: Tensor, dy: Tensor, parameter: str) -> Tensor:
    """Sum of `embedding_blocks` over the examples."""
    _weight_only(parameter)
    return table_total(*rows_of(ids, dy, _padding(layer)), _size(layer))


def embedding_sq_norms(layer: nn.Module, ids: Tensor, dy: Tensor, parameter: str, limit: int) -> Tensor:
    """‖C_b‖², [B], from the distinct ids of each example: B·T·D floats instead of B·V·D."""
    _weight_only(parameter)
    return table_sq_norms(*rows_of(ids, dy, _padding(layer)), limit)


def _padding(layer: nn.Module) -> int | None:
    return layer.padding_idx  # type: ignore[reportReturnType]


def _size(layer: nn.Module) -> int:
    return layer.num_embeddings  # type: ignore[reportReturnType]


EMBEDDING = Rule(
    "Embedding",
    ("weight",),
    embedding_blocks,
    needs_input=("weight",),
    total=embedding_total,
    sq_norms=embedding_sq_norms,
    ids=True,
)


def _recognise(module: nn.Module) -> Rule | None:
    """Recognise `nn.Embedding`, and subclasses that multiply it by a constant.

    One whose gradients are sparse tensors, or are divided by how often an id occurs in the batch, is none.
    """
    if not isinstance(module, nn.Embedding) or module.sparse or module.scale_grad_by_freq:
        return None
    if type(module).forward is nn.Embedding.forward:
        return EMBEDDING
    scale = _scale(module)
    return None if scale is None else replace(EMBEDDING, scale=scale)


def _scale(module: nn.Embedding) -> float | None:
    """Find the constant that a subclass multiplies the rows by, or None."""
    small = own_parameters(module, sizes={"weight": (min(module.num_embeddings, 8), module.embedding_dim)})
    if small is None or set(small) != {"weight"}:
        return None
    ids = torch.arange(len(small["weight"])).expand(2, -1)
    plain = small["weight"][ids]
    if module.padding_idx is not None and module.padding_idx >= len(small["weight"]):
        return None
    found = run(module, small, ids)
    if found is None or found.shape != plain.shape:
        return None
    strange = (torch.tensor([[-1]]), torch.tensor([[module.num_embeddings]]))
    if any(run(module, small, ids) is not None for ids in strange):
        return None  # it does something of its own with ids
    scale = float((found * plain).sum() / plain.square().sum())
    return scale if close(found, scale * plain) else None


register(EMBEDDING, _recognise)
