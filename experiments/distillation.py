"""What a student learns from a larger teacher: the distance of their distributions, beside the text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from experiments.configs import RunError
from gns.finetuning.data import NO_LOSS, Collator, Row, pad_id


class Losses(NamedTuple):
    """Both halves of the loss, in nats per token."""

    divergence: Any
    text: Any


def losses(student: Tensor, teacher: Tensor, labels: Tensor) -> Losses:
    """Sums over the learned tokens.

    KL(p ‖ q) = Σ_v p_v (log p_v − log q_v) with p the teacher's and q the student's distribution.

    Args:
        student: [B, T, V], logits.
        teacher: [B, T, V], logits.
        labels: [B, T]; token t is predicted at t − 1.

    Returns:
        Σ KL and −Σ log q of the labels, float32.
    """
    learned = labels[:, 1:] != NO_LOSS
    q = functional.log_softmax(student[:, :-1].float(), dim=-1)[learned]
    p = functional.log_softmax(teacher[:, :-1].float(), dim=-1)[learned]
    divergence = functional.kl_div(q, p, log_target=True, reduction="sum")
    return Losses(divergence, functional.nll_loss(q, labels[:, 1:][learned], reduction="sum"))


def same_tokenizer(base: Any, teacher: Any, names: Sequence[str]) -> None:
    """Refuse a teacher whose distributions are over other tokens.

    Raises:
        RunError: a token has another number in the other vocabulary, or none.
    """
    mine, theirs = base.get_vocab(), teacher.get_vocab()
    odd = sorted(token for token in {*mine, *theirs} if mine.get(token) != theirs.get(token))
    if odd:
        raise RunError(
            f"teacher {names[1]} has another tokenizer than base {names[0]}: {len(odd)} of {len(mine)} "
            f"tokens differ, as {odd[0]!r}. A teacher of the same family is needed"
        )


class Pair:
    """A student and its teacher on one device.

    Args:
        student: model in training.
        teacher: model with the same tokenizer; it is frozen.
        tokenizer: of both.
        device: they are moved to.
        autocast: compute matrix products in bfloat16.
    """

    def __init__(
        self, student: Any, teacher: Any, tokenizer: Any, device: torch.device, *, autocast: bool = False
    ) -> None:
        self.student, self.device = student.to(device), device
        self.teacher = teacher.requires_grad_(False).eval().to(device)
        self.width = len(tokenizer)  # models of one family pad their vocabularies to different lengths
        self.collator = Collator(pad_id(tokenizer))
        self._autocast = autocast

    def sums(self, rows: Sequence[Row]) -> tuple[Losses, int]:
        """Give both losses summed over some texts, and their learned tokens."""
        batch = {name: value.to(self.device) for name, value in self.collator(rows).items()}
        labels = batch.pop("labels")
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._autocast):
            with torch.no_grad():
                theirs = self.teacher(**batch, use_cache=False).logits[..., : self.width]
            mine = self.student(**batch, use_cache=False).logits[..., : self.width]
        return losses(mine, theirs, labels), int((labels[:, 1:] != NO_LOSS).sum())

    @torch.no_grad()
    def measured(self, rows: Sequence[Row], batch_size: int) -> dict[str, float]:
        """Mean of both losses over the tokens of some texts, without dropout; leaves training mode on."""
        self.student.eval()
        parts = [self.sums(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
        self.student.train()
        tokens = sum(n for _, n in parts)
        return {
            name: math.fsum(float(getattr(part, name)) for part, _ in parts) / tokens
            for name in Losses._fields
        }
