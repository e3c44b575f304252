"""Held-out loss, an item at a time: what two runs are compared by, pair by pair.

The batches depend on the items and on their number alone, so that runs of every batch size are evaluated
with the same arithmetic. Nothing of the training is touched: neither mode, nor gradients, nor random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from experiments.configs import RunConfig
from gns.finetune import n_labels
from gns.finetuning.data import NO_LOSS, Row

TOKENS = 8_192  # of an evaluation's batch, padding included: half a gigabyte of logits at 16,000 entries


def eval_batch(config: RunConfig) -> int:
    """Items of an evaluation's batch: what `TOKENS` allow, whatever the batch size of the training."""
    return max(1, TOKENS // config.max_length)


def item_losses(
    model: Any,
    rows: Sequence[Row],
    collator: Callable[[Sequence[Row]], dict[str, Tensor]],
    batch_size: int,
) -> list[float]:
    """Mean loss of each item over its own learned tokens.

    Args:
        model: causal language model; its mode is restored, also after an error.
        rows: the items, each with a learned token.
        collator: rows → `input_ids`, `attention_mask` and `labels`, each [B, T].
        batch_size: items of a forward pass; those of like length are put together.

    Returns:
        [items], nats per token, in the order of `rows`; NaN where the model gives NaN.

    Raises:
        ValueError: an item has no learned token.
    """
    if bare := [i for i, row in enumerate(rows) if not n_labels(row)]:
        raise ValueError(f"item {bare[0]} has no learned token; {len(bare)} of {len(rows)} have none")
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    found = [math.nan] * len(rows)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(rows), batch_size):
                chosen = by_length[start : start + batch_size]
                batch = collator([rows[i] for i in chosen])
                for i, loss in zip(chosen, _batch_losses(model, batch), strict=True):
                    found[i] = loss
    finally:
        for module, training in modes.items():
            module.training = training
    return found


def _batch_losses(model: Any, batch: dict[str, Tensor]) -> list[float]:
    """Mean loss of each row, summed in float64: [B]."""
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items()}
    labels = inputs.pop("labels")[:, 1:]
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    losses = functional.cross_entropy(logits.mT, labels, ignore_index=NO_LOSS, reduction="none")
    learned = labels != NO_LOSS
    return (losses.double().sum(dim=1) / learned.sum(dim=1)).tolist()


def token_mean(losses: Sequence[float], rows: Sequence[Row]) -> float:
    """Mean over all learned tokens: item means weighted by their tokens, in nats per token."""
    counts = [n_labels(row) for row in rows]
    return math.fsum(x * n for x, n in zip(losses, counts, strict=True)) / sum(counts)
