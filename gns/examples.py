"""From the arguments of the model's own call to its examples, and how each weighs in the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gns.capture.arguments import batch_of, call_shape
from gns.capture.placement import Segments, Shape
from gns.reasons import ATTENDS_ACROSS, LOSS_OUTSIDE, NO_LABELS
from gns.segments import SegmentsOf, packed, separated
from gns.segments import given as ask

IGNORED = -100  # label of a token that is not in the loss, the convention of torch and transformers
WEIGHTS = ("auto", "tokens", "equal")


@dataclass(frozen=True)
class RowMap:
    """Which rows of a forward pass are examples.

    Args:
        n: examples.
        shape: rows and positions of the call.
        segments: where examples are not rows; None: row b is example b.
        n_tokens: [], tokens with a label (or, without labels, tokens of the input), on their device; or None.
        weight_sum: [], Σwᵢ of unnormalised weights in the loss; None means equal weights.
        weight_sq_sum: [], Σwᵢ²; None means equal weights.
        weights: [n], the wᵢ; None means equal weights.
        notice: what the user should know of this call, or None.
    """

    n: int
    shape: Shape
    segments: Segments | None = None
    n_tokens: Tensor | None = None
    weight_sum: Tensor | None = None
    weight_sq_sum: Tensor | None = None
    notice: str | None = None
    weights: Tensor | None = None


_SHIFT = ("CausalLM", "LMHead", "ConditionalGeneration", "DoubleHeads")
# Joins of any encoder with any decoder: labels are given to them, whatever the decoder's name is.
_JOINED = ("EncoderDecoderModel",)
# Decoders of encoder–decoder families and four others, whose labels are what is predicted at each token.
_NO_SHIFT = (
    "Bart",
    "BigBirdPegasus",
    "Blenderbot",
    "CpmAnt",
    "FlaubertWith",
    "MBart",
    "Marian",
    "Mvp",
    "PLBart",
    "Pegasus",
    "ProphetNet",
    "Speech2Text2",
    "TrOCR",
    "Whisper",
    "XLMWith",
    "XLNet",
)


def _loss_model(model: nn.Module) -> nn.Module:
    """Find the module that takes the labels, in adapters and other wrappers."""
    base = getattr(model, "get_base_model", lambda: model)()
    words = (*_SHIFT, *_JOINED, "ForCTC")
    known = (m for m in base.modules() if any(word in type(m).__name__ for word in words))
    return next(known, base)


def shifts_labels(model: nn.Module) -> bool:
    """Whether the model predicts token t + 1 at t, so that the first label of a row is never used."""
    base, adapter = _loss_model(model), getattr(model, "active_peft_config", None)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return False
    if getattr(adapter, "is_prompt_learning", False) and "PREFIX" not in str(
        getattr(adapter, "peft_type", "")
    ):
        return False  # virtual tokens stand before the first label, and predict it
    name = type(base).__name__
    return any(word in name for word in _SHIFT) and not name.startswith(_NO_SHIFT)


def _labelled(model: nn.Module, kwargs: Mapping[str, Any], shape: Shape) -> Tensor | None:
    """Positions whose output is in the loss, [R, T] float32, or None where the call has no token labels.

    A CTC loss has labels, but no loss a token: its examples weigh alike.
    """
    if "ForCTC" in type(_loss_model(model)).__name__:
        return None
    for name, shifted in (("shift_labels", False), ("labels", shifts_labels(model))):
        labels = kwargs.get(name)
        if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
            if len(labels) != shape.rows:
                continue
            kept = labels.ne(IGNORED).float()
            return nn.functional.pad(kept[:, 1:], (0, 1)) if shifted else kept
    return None


def _input_tokens(kwargs: Mapping[str, Any]) -> Tensor | None:
    mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.ne(0).sum().float()
    return torch.tensor(float(ids.numel())) if isinstance(ids, Tensor) else None


def _segments(
    given: SegmentsOf | str | None, args: tuple, kwargs: Mapping[str, Any], shape: Shape
) -> Segments | None:
    """Find out where examples are not rows: by the caller's word, else by the signs of packing."""
    if given is not None:
        ids = ask(given, args, kwargs, shape.rows, shape.positions)
        if ids.ndim == 1 and len(np.unique(ids)) == len(ids) and ids.min(initial=0) >= 0:
            return None
    else:
        ids = packed(kwargs, shape.rows, shape.positions)
    batch = batch_of(args, kwargs)
    return None if ids is None or batch is None else Segments(ids, batch.device)


def row_map(
    model: nn.Module,
    args: tuple,
    kwargs: Mapping[str, Any],
    weights: str = "auto",
    segments: SegmentsOf | str | None = None,
) -> RowMap | None:
    """Read the examples of one call of the model; waits for the device only where examples may not be rows.

    Token-mean losses weigh example i by its tokens: wᵢ = tᵢ where the loss is divided by the tokens of the
    whole step (`num_items_in_batch`; so does TRL behind `fused_lm_head`), wᵢ = tᵢ/Σt where each call is
    divided by its own.

    Args:
        model: the module that is called.
        args: its positional arguments.
        kwargs: its keyword arguments.
        weights: "tokens", "equal", or "auto": by tokens where the call itself is given token labels.
        segments: (args, kwargs) → which example each row [R] or position [R, T] belongs to, or the name of
            the keyword argument that says so; None: rows, or what packing shows.

    Returns:
        The map, or None where the call holds no tensor with a batch dimension.

    Raises:
        ValueError: weights="tokens", and the call has no token labels; or `segments` does not fit it.
    """
    shape = call_shape(args, kwargs)
    if shape is None:
        return None
    found = _segments(segments, args, kwargs, shape)
    n = shape.rows if found is None else found.n
    labelled = _labelled(model, kwargs, shape)
    whole_step = kwargs.get("num_items_in_batch") is not None or bool(kwargs.get("fused_lm_head"))
    notice = None
    if found is not None and segments is None and not separated(model, kwargs):
        notice = ATTENDS_ACROSS
    elif weights == "auto" and whole_step and labelled is None:
        notice = LOSS_OUTSIDE
    elif weights == "auto" and labelled is None and found is None and _padded_text(model, kwargs):
        notice = NO_LABELS
    if weights == "equal" or labelled is None:
        if weights == "tokens":
            raise ValueError(
                'weights="tokens", but the call has no [B, T] integer `labels`: pass them to the model as '
                'well (its own loss may go unused), or say weights="equal" if every example weighs the same'
            )
        tokens = _input_tokens(kwargs) if labelled is None else labelled.sum()
        return RowMap(n, shape, found, tokens, notice=notice)
    counts = labelled.sum(1) if found is None else _per_example(found, labelled)
    total = counts.sum()
    w = counts if whole_step else counts / total.clamp(min=1)
    return RowMap(n, shape, found, total, w.sum(), w.square().sum(), notice, w)


def _padded_text(model: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether a language model is called with a padding mask and no labels of any kind."""
    mask = kwargs.get("attention_mask")
    if kwargs.get("labels") is not None or not isinstance(mask, Tensor) or mask.ndim != 2:
        return False
    head = getattr(model, "get_output_embeddings", None)
    return callable(head) and head() is not None


def _per_example(segments: Segments, labelled: Tensor) -> Tensor:
    return segments.per_example(labelled if segments.by_position else labelled.sum(1))
