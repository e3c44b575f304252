"""AdamW and SGD on the stacked numbers of S runs, each slot with its own settings.

The arithmetic is that of `torch.optim`, in the same order; a slot's settings are a column [S, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from experiments.configs import RunConfig
from experiments.packed.layers import Stack

EPS = 1e-8  # of AdamW, torch's default
IN_CACHE = 2**18  # numbers that a CPU updates at once: their moments stay in its cache


class StackedOptimizer:
    """Makes the optimizer steps of all slots.

    Args:
        stack: the slots' numbers, changed in place.
        configs: of each slot, all with the same `optimizer`.
    """

    def __init__(self, stack: Stack, configs: Sequence[RunConfig]) -> None:
        self._stack, self._configs, self._steps = stack, list(configs), 0
        self._update = _UPDATES[configs[0].optimizer]
        n_moments = 2 if configs[0].optimizer == "adamw" else 0
        self._moments = [torch.zeros_like(stack.values) for _ in range(n_moments)]

    def step(self, rates: Sequence[float]) -> None:
        """Clip each slot's gradient and make one step.

        Args:
            rates: learning rate of each slot.
        """
        self._steps += 1
        self._clip()
        columns = [
            self._column(column)
            for column in zip(
                *(_settings(c, lr, self._steps) for c, lr in zip(self._configs, rates, strict=True)),
                strict=True,
            )
        ]
        for rows in self._parts():
            tensors = (t[rows] for t in (self._stack.values, self._stack.gradient, *self._moments))
            self._update(*tensors, *(column[rows] for column in columns))

    def keep(self, slots: Sequence[int]) -> None:
        """Forget all slots but these; to be called when the stack holds these only."""
        self._configs = [self._configs[slot] for slot in slots]
        self._moments = [moment[list(slots)] for moment in self._moments]

    def _clip(self) -> None:
        """Scale gradients longer than their slot's limit, as `torch.nn.utils.clip_grad_norm_` does."""
        limits = [math.inf if c.clip is None else c.clip for c in self._configs]
        if all(map(math.isinf, limits)):
            return
        norms = torch.linalg.vector_norm(self._stack.gradient, dim=1, keepdim=True)
        factors = (self._column(limits) / (norms + 1e-6)).clamp(max=1.0)
        self._stack.gradient.mul_(factors)

    def _column(self, values: Sequence[float]) -> Tensor:
        return self._stack.values.new_tensor(values).unsqueeze(1)

    def _parts(self) -> list[slice]:
        """Rows to update at once: all on an accelerator, on a CPU what stays in the cache."""
        slots, size = self._stack.values.shape
        if self._stack.values.device.type != "cpu":
            return [slice(None)]
        rows = max(1, IN_CACHE // size)
        return [slice(start, start + rows) for start in range(0, slots, rows)]


def _settings(config: RunConfig, lr: float, step: int) -> tuple[float, ...]:
    """Numbers of a slot that its update needs at a step, counted from 1, computed in double precision."""
    if config.optimizer == "sgd":
        return lr, config.weight_decay
    beta1, beta2 = config.betas
    corrected = lr / (1 - beta1**step)
    return 1 - lr * config.weight_decay, 1 - beta1, beta2, 1 - beta2, math.sqrt(1 - beta2**step), corrected


@torch.no_grad()
def _adamw(
    values: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    decay: Tensor,
    new_first: Tensor,
    beta2: Tensor,
    new_second: Tensor,
    root: Tensor,
    rate: Tensor,
) -> None:
    """One step of AdamW with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101)."""
    values.mul_(decay)
    first.lerp_(gradient, new_first)
    second.mul_(beta2).addcmul_(gradient * new_second, gradient)
    values.addcdiv_(first * -rate, second.sqrt().div_(root).add_(EPS))


@torch.no_grad()
def _sgd(values: Tensor, gradient: Tensor, rate: Tensor, decay: Tensor) -> None:
    """One step without momentum: w ← w − lr · (g + λ w)."""
    values.addcmul_(gradient + decay * values, rate, value=-1)


_UPDATES: dict[str, Callable[..., None]] = {"adamw": _adamw, "sgd": _sgd}
