"""Calling a model with a batch, whatever form batches have, and taking the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[Any, Any], Tensor]


class ProbeError(ValueError):
    """A probe cannot be made as asked; the message says what to do."""


def loss_of(model: nn.Module, batch: Any, loss: Loss | None) -> Tensor:
    """Give the loss of a batch.

    Args:
        model: to call.
        batch: a mapping, a tensor, a tuple or list of tensors, or (args, kwargs).
        loss: (model, batch) → scalar; None: the model's own.

    Returns:
        A scalar with a graph.

    Raises:
        ProbeError: there is no loss, or it is no differentiable scalar.
    """
    value = value_of(model, batch, loss)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        seen = f"a {type(value).__name__}"
        if isinstance(value, Tensor):
            graph = "" if value.requires_grad else " without a graph"
            seen = f"a tensor of shape {tuple(value.shape)}{graph}"
        raise ProbeError(f"the loss is {seen}; a differentiable scalar is needed")
    return value.reshape(())


def value_of(model: nn.Module, batch: Any, loss: Loss | None) -> Any:
    """Give the loss of a batch as it comes, which may be without a graph.

    Raises:
        ProbeError: there is none.
    """
    return loss(model, batch) if loss is not None else _own_loss(call(model, batch))


def call(model: nn.Module, batch: Any) -> Any:
    """Call the model with a batch.

    Raises:
        ProbeError: nobody knows how.
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, Tensor):
        return model(batch)
    if (
        isinstance(batch, tuple)
        and len(batch) == 2
        and isinstance(batch[0], tuple | list)
        and isinstance(batch[1], Mapping)
    ):
        return model(*batch[0], **batch[1])
    if isinstance(batch, tuple | list):
        return model(*batch)
    raise ProbeError(
        f"a batch is a {type(batch).__name__}; a mapping, a tensor, a tuple of tensors or (args, kwargs) is "
        "needed"
    )


def _own_loss(out: Any) -> Any:
    """Take the loss that a model gives itself.

    Raises:
        ProbeError: it gives none.
    """
    found = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
    if found is None:
        raise ProbeError(
            f"the model's output, a {type(out).__name__}, has no `loss`; put `labels` into the batches, or "
            "pass loss=, a function of (model, batch)"
        )
    return found


def moved(value: Any, device: torch.device) -> Any:
    """Give a batch with its tensors on a device; itself where they are there already."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        there = {key: moved(item, device) for key, item in value.items()}
        return value if all(there[key] is item for key, item in value.items()) else there
    if isinstance(value, tuple | list):
        items = [moved(item, device) for item in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        if isinstance(value, tuple):
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        return items
    return value
