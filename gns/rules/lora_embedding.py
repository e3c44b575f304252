"""LoRA on an embedding as `peft` builds it: y = W[ids] + s · Bᵀ-image of A[:, ids], A [r, V], B [D, r].

`peft` keeps both factors in dictionaries of the layer and uses them without calling a module, so that the
layer as a whole is tapped and its parameters have names with a dot: "lora_embedding_A.default".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gns.rules.base import Rule, parameter_of, register, unknown, wide
from gns.rules.embedding import rows_of, table_blocks, table_sq_norms, table_total

_A, _B = "lora_embedding_A", "lora_embedding_B"


def _read(layer: nn.Module, ids: Tensor, dy: Tensor, parameter: str) -> tuple[str, Tensor, Tensor]:
    """Name the factor, and give ids [B, T] with what its own table's blocks are made of.

    For A: s · dy B, [B, T, r], the gradient at A[:, ids]. For B: s · dy, [B, T, D].
    """
    factor, _, adapter = parameter.partition(".")
    if factor not in (_A, _B) or not adapter:
        raise unknown(parameter, "LoraEmbedding", (f"{_A}.*", f"{_B}.*"))
    scale = float(layer.scaling[adapter])  # type: ignore[reportIndexIssue]
    embed_scale = getattr(layer, "_get_embed_scale", lambda: None)()
    scale *= 1.0 if embed_scale is None else float(embed_scale)
    padding = layer.get_base_layer().padding_idx if factor == _A else None  # type: ignore[reportCallIssue]
    if factor == _A:
        b = parameter_of(layer, f"{_B}.{adapter}").detach()
        dy = wide(dy) @ b.to(wide(dy).dtype)
    return factor, *rows_of(ids, scale * wide(dy), padding)


def _looked_up(layer: nn.Module, ids: Tensor, dy: Tensor, parameter: str) -> Tensor:
    """A[:, ids] as [B, T, r]."""
    a = parameter_of(layer, parameter.replace(_B, _A)).detach()
    return a.to(dy.dtype).T[ids]


def lora_embedding_blocks(layer: nn.Module, ids: Tensor, dy: Tensor, parameter: str) -> Tensor:
    """Gradient that each example adds to a factor.

    A: C_b[:, v] = s Σ_{t: id_bt = v} Bᵀ dy_bt        B: C_b = s Σ_t dy_bt A[:, id_bt]ᵀ

    Args:
        layer: the `peft` layer, for its scaling and its other factor.
        ids: [B, ...], integers.
        dy: [B, ..., D], gradient of the loss at its output.
        parameter: "lora_embedding_A.<adapter>" or "lora_embedding_B.<adapter>".

    Returns:
        [B, r, V] or [B, D, r], float32 or float64, in loss / parameter.

    Raises:
        ValueError: the layer has no such parameter.

    Slow twin: tests/reference/per_example.py
    """
    factor, ids, dy = _read(layer, ids, dy, parameter)
    if factor == _A:
        return table_blocks(ids, dy, parameter_of(layer, parameter).shape[1]).mT
    return torch.bmm(dy.mT, _looked_up(layer, ids, dy, parameter))


def lora_embedding_total(layer: nn.Module, ids: Tensor, dy: Tensor, parameter: str) -> Tensor:
    """Sum of `lora_embedding_blocks` over the examples."""
    factor, ids, dy = _read(layer, ids, dy, parameter)
    if factor == _A:
        return table_total(ids, dy, parameter_of(layer, parameter).shape[1]).T
    return dy.flatten(0, 1).T @ _looked_up(layer, ids, dy, parameter).flatten(0, 1)


def lora_embedding_sq_norms(
    layer: nn.Module, ids: Tensor, dy: Tensor, parameter: str, limit: int
) -> Tensor | None:
    """‖C_b‖² of factor A, [B], from the distinct ids of each example; None for factor B, which is small."""
    factor, ids, dy = _read(layer, ids, dy, parameter)
    return table_sq_norms(ids, dy, limit) if factor == _A else None


LORA_EMBEDDING = Rule(
    "LoraEmbedding",
    (f"{_A}.*", f"{_B}.*"),
    lora_embedding_blocks,
    needs_input=(f"{_A}.*", f"{_B}.*"),
    total=lora_embedding_total,
    sq_norms=lora_embedding_sq_norms,
    ids=True,
)


def _recognise(module: nn.Module) -> Rule | None:
    """Recognise `peft`'s layer without importing it; variants (DoRA) compute something else."""
    base = getattr(module, "base_layer", None)
    there = all(isinstance(module._modules.get(name), nn.ParameterDict) for name in (_A, _B))
    if not there or not isinstance(base, nn.Embedding) or getattr(module, "lora_variant", None):
        return None
    return None if base.sparse or base.scale_grad_by_freq else LORA_EMBEDDING


register(LORA_EMBEDDING, _recognise)
