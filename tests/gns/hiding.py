"""An engine that hides `.grad` as ZeRO does: hooks move it away, and the optimizer owns a flat copy."""

from __future__ import annotations

import torch
from torch import distributed, nn


class Hiding:
    """Gradients are averaged over ranks in flat buffers; `.grad` is None after backward."""

    def __init__(self, model: nn.Module, lr: float):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.master = nn.Parameter(torch.cat([p.detach().flatten() for p in self.parameters]))
        self.optimizer = torch.optim.SGD([self.master], lr=lr)
        self.buffers = [torch.zeros_like(p) for p in self.parameters]
        for p, buffer in zip(self.parameters, self.buffers, strict=True):
            p.register_post_accumulate_grad_hook(lambda p, buffer=buffer: self._take(p, buffer))

    @staticmethod
    def _take(p: torch.Tensor, buffer: torch.Tensor) -> None:
        buffer.add_(p.grad)
        p.grad = None

    def step(self) -> None:
        self.master.grad = torch.cat([b.flatten() for b in self.buffers])
        if distributed.is_initialized():
            distributed.all_reduce(self.master.grad)
            self.master.grad.div_(distributed.get_world_size())
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            parts = self.master.split([p.numel() for p in self.parameters])
            for p, buffer, part in zip(self.parameters, self.buffers, parts, strict=True):
                p.copy_(part.view_as(p))
                buffer.zero_()
