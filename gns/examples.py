"""From the arguments of the model's own call to its examples, and how each weighs in the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100  # label of a token that is not in the loss, the convention of torch and transformers
WEIGHTS = ("auto", "tokens", "equal")
_BATCH_FIRST = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values")


@dataclass(frozen=True)
class RowMap:
    """Which rows of a forward pass are examples: here, row b is example b.

    Args:
        n: examples, the size of the batch dimension.
        n_tokens: [], tokens with a label (or, without labels, tokens of the input), on their device; or None.
        weight_sum: [], Σwᵢ of unnormalised weights in the loss; None means equal weights.
        weight_sq_sum: [], Σwᵢ²; None means equal weights.
    """

    n: int
    n_tokens: Tensor | None = None
    weight_sum: Tensor | None = None
    weight_sq_sum: Tensor | None = None


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


def _batch_size(args: tuple, kwargs: Mapping[str, Any]) -> int | None:
    named = (kwargs.get(name) for name in _BATCH_FIRST)
    first = next((t for t in named if isinstance(t, Tensor)), None)
    if first is None:
        first = next((t for t in tensors_in((args, dict(kwargs))) if t.ndim > 0), None)
    return None if first is None else int(first.shape[0])


def _shifts_labels(model: nn.Module) -> bool:
    """Whether the model predicts token t + 1 at t, so that the first label of a row is never used."""
    base = getattr(model, "get_base_model", lambda: model)()
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return False
    return any(word in type(base).__name__ for word in ("CausalLM", "LMHead", "ConditionalGeneration"))


def _label_counts(model: nn.Module, kwargs: Mapping[str, Any], n: int) -> Tensor | None:
    """Tokens with a label in each row, [n] float32, or None where rows do not carry token labels."""
    for name, shifted in (("shift_labels", False), ("labels", _shifts_labels(model))):
        labels = kwargs.get(name)
        if (
            isinstance(labels, Tensor)
            and labels.ndim == 2
            and len(labels) == n
            and not labels.is_floating_point()
        ):
            return (labels[:, 1:] if shifted else labels).ne(IGNORED).sum(1).float()
    return None


def _input_tokens(kwargs: Mapping[str, Any]) -> Tensor | None:
    mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.ne(0).sum().float()
    return torch.tensor(float(ids.numel())) if isinstance(ids, Tensor) else None


def row_map(model: nn.Module, args: tuple, kwargs: Mapping[str, Any], weights: str = "auto") -> RowMap | None:
    """Read the examples of one call of the model, without a device synchronisation.

    Token-mean losses weigh example i by its tokens: wᵢ = tᵢ where the loss is divided by the tokens of the
    whole step (`num_items_in_batch`), wᵢ = tᵢ/Σt where each call is divided by its own.

    Args:
        model: the module that is called.
        args: its positional arguments.
        kwargs: its keyword arguments.
        weights: "tokens", "equal", or "auto": by tokens where the call itself is given token labels.

    Returns:
        The map, or None where the call holds no tensor with a batch dimension.

    Raises:
        ValueError: weights="tokens", and the call carries no token labels.
    """
    n = _batch_size(args, kwargs)
    if n is None:
        return None
    counts = None if weights == "equal" else _label_counts(model, kwargs, n)
    if counts is None:
        if weights == "tokens":
            raise ValueError(
                'weights="tokens", but the call has no [B, T] integer `labels`; pass weights="equal"'
            )
        labelled = _label_counts(model, kwargs, n) if weights == "equal" else None
        return RowMap(n, _input_tokens(kwargs) if labelled is None else labelled.sum())
    total = counts.sum()
    w = counts if kwargs.get("num_items_in_batch") is not None else counts / total.clamp(min=1)
    return RowMap(n, total, w.sum(), w.square().sum())
