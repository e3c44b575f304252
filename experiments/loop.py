"""The plain loop: one process, one run. What other engines are measured against."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from experiments.configs import RunConfig
from experiments.course import Course
from experiments.order import batches_of
from experiments.prepared import Prepared
from experiments.schedules import lr_at
from gns.finetune import n_labels


def optimizer_of(parameters: Iterable[torch.nn.Parameter], config: RunConfig) -> torch.optim.Optimizer:
    """Build the optimizer of a run; SGD without momentum, for which both kinds of weight decay are one."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, weight_decay=config.weight_decay)
    raise ValueError(f"optimizer {config.optimizer!r} has no rule; add one to `optimizer_of`")


class Steps:
    """The steps of a run, one after the other, with one optimizer.

    Args:
        prepared: whose model is trained; put into training mode.
        course: hears of every step.
    """

    def __init__(self, prepared: Prepared, course: Course) -> None:
        self.prepared, self.course = prepared, course
        self.optimizer = optimizer_of(prepared.trainable, prepared.config)
        self.batches = batches_of(prepared.config)
        prepared.model.train()

    def next(self) -> None:
        """Make the next step."""
        numbers, config = next(self.batches), self.prepared.config
        loss = step(self.prepared, self.optimizer, numbers, lr_at(config, self.course.steps))
        tokens = sum(n_labels(self.prepared.data.train[i]) for i in numbers)
        self.course.stepped(loss, len(numbers), tokens)


def train(prepared: Prepared, course: Course) -> None:
    """Make the steps of a run until its course is over.

    Args:
        prepared: whose model is trained, in training mode.
        course: hears of every step, and of every evaluation after the first step.
    """
    steps = Steps(prepared, course)
    while not course.over:
        steps.next()
        if course.due:
            course.evaluated(prepared.validation_loss())


def step(prepared: Prepared, optimizer: torch.optim.Optimizer, numbers: Sequence[int], lr: float) -> float:
    """Make one optimizer step on some training examples; gives their loss before it, nats per token."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = _backward(prepared, numbers, sum(n_labels(prepared.data.train[i]) for i in numbers))
    if prepared.config.clip is not None:
        torch.nn.utils.clip_grad_norm_(prepared.trainable, prepared.config.clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def _backward(prepared: Prepared, numbers: Sequence[int], tokens: int) -> float:
    """Accumulate the gradient of the mean over all tokens of a step, and give that mean.

    Each micro-batch's sum is divided by the tokens of the step, which the model is told: so the gradients add
    up to the whole batch's, and the monitor knows how the examples weigh.
    """
    total = torch.zeros((), device=prepared.device, dtype=torch.float64)
    size = prepared.config.micro_batch or len(numbers)
    told = {"num_items_in_batch": tokens} if size < len(numbers) else {}
    for start in range(0, len(numbers), size):
        with prepared.autocast():
            loss = prepared.model(**prepared.batch(numbers[start : start + size]), **told).loss
        loss.backward()
        total += loss.detach()
    return float(total)
