"""The ways to make a training step that are compared: untouched, watched by the monitor, and the peers.

Arms of one setting share the frozen weights; each has adapters, optimizer and hooks of its own, so that steps
of all arms can be interleaved in one process.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor, nn

from experiments.overhead.settings import Setting
from gns import GNSMonitor
from gns.rules import linear

FIRST = 131  # number of the first step: the next regular round of self-checks is far away


class Arm:
    """A training loop that makes one optimizer step a call.

    `warm` steps are made before the clock; `block` pairs are added up before they are divided;
    where `keeps` is false, what is saved for backward does not tell what is alive at once.

    Args:
        setting: of the benchmark.
        model: shared with other arms; its frozen weights stay shared.
    """

    name, warm, block, keeps = "untouched", 3, 1, True
    sq_norms: Any = None  # [B], ‖gᵢ‖² of the last micro-batch, where the arm makes them

    def __init__(self, setting: Setting, model: nn.Module):
        self.setting = setting
        frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
        self.model = copy.deepcopy(model, memo=frozen)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)
        self.watch()

    def watch(self) -> None:
        """Attach what measures; nothing here."""

    def close(self) -> None:
        """Detach it."""

    def precision(self, ids: Tensor) -> contextlib.AbstractContextManager[Any]:
        """Autocast, if the setting has it."""
        if not self.setting.autocast:
            return contextlib.nullcontext()
        return torch.autocast(ids.device.type, torch.bfloat16)

    def loss(self, ids: Tensor) -> Tensor:
        """Forward pass."""
        with self.precision(ids):
            return self.model(input_ids=ids, labels=ids).loss

    def backward(self, ids: Tensor) -> None:
        """Forward and backward pass of one micro-batch, with whatever is measured."""
        (self.loss(ids) / self.setting.accumulate).backward()

    def step(self, ids: Tensor) -> None:
        """One optimizer step: forward, backward, clip, AdamW, as many micro-batches as the setting says."""
        for _ in range(self.setting.accumulate):
            self.backward(ids)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Monitored(Arm):
    """The monitor, measuring every step."""

    name, warm, every, first = "monitor", 9, 1, FIRST  # its first round of self-checks ends within 9 steps
    share = False

    def watch(self) -> None:
        """Attach; on_error="raise", so that no arm is timed that stood down."""
        how = {"every": self.every, "share_weight_gradient": self.share}
        self.monitor = GNSMonitor(self.model, on_error="raise", history=1_000, **how)
        self.monitor.start_at(self.first)
        self.monitor.attach()

    def close(self) -> None:
        """Detach, and require that the steps were measured.

        Raises:
            RuntimeError: a step was not usable.
        """
        reasons = {s.reason for s in self.monitor.history if s.reason}
        self.monitor.detach()
        if reasons or not self.monitor.history:
            raise RuntimeError(f"arm {self.name!r}: {len(self.monitor.history)} steps, unusable: {reasons}")


class Shared(Monitored):
    """The monitor, linear weights' gradients out of the product that their norms are read from."""

    name, share = "monitor, shared weight gradient", True


class Tenth(Monitored):
    """One step in ten."""

    name, every, first, block = "monitor, every=10", 10, 10 * FIRST, 10


class Between(Monitored):
    """Attached, and between two measured steps: the first step was one, the next is far away."""

    name, warm, every, first = "monitor, between measurements", 3, 10**6, 0


class Detached(Monitored):
    """Attached for one step, then detached."""

    name, warm = "monitor, detached", 3

    def step(self, ids: Tensor) -> None:
        """Detach after the first step."""
        super().step(ids)
        self.monitor.detach()


class OneForm(Monitored):
    """The monitor, held to one of the two forms of a linear layer's norms."""

    gram: bool

    def step(self, ids: Tensor) -> None:
        """Make the rule choose that form, whatever is cheaper."""
        chosen = linear.gram_is_cheaper
        linear.gram_is_cheaper = lambda x, dy: self.gram
        try:
            super().step(ids)
        finally:
            linear.gram_is_cheaper = chosen


class Direct(OneForm):
    """Always the product."""

    name, gram = "monitor, product only", False


class Gram(OneForm):
    """Always the Gram form."""

    name, gram = "monitor, Gram form only", True


class PerExample(Arm):
    """One backward pass an example."""

    name, keeps = "one backward pass an example", False

    def backward(self, ids: Tensor) -> None:
        """Square the norm of each example's own gradient, and add the gradients up."""
        norms, total = [], [torch.zeros_like(p) for p in self.trained]
        for row in ids.split(1):
            found = torch.autograd.grad(self.loss(row), self.trained)
            norms.append(_sq_norm(found))
            torch._foreach_add_(total, list(found), alpha=1 / (len(ids) * self.setting.accumulate))
        self.sq_norms = torch.stack(norms)
        _accumulate(self.trained, total)


class Vmap(Arm):
    """`torch.func`: `vmap(grad)` over the examples of the batch."""

    name, keeps = "torch.func vmap(grad)", False

    def watch(self) -> None:
        """Build the function once."""
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]

        def loss(trained: dict[str, Tensor], row: Tensor) -> Tensor:
            ids = row.unsqueeze(0)
            return torch.func.functional_call(
                self.model, trained, kwargs={"input_ids": ids, "labels": ids}
            ).loss

        self.names = names
        self.gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")

    def backward(self, ids: Tensor) -> None:
        """Make all examples' gradients at once."""
        with self.precision(ids):
            each = self.gradients(dict(zip(self.names, self.trained, strict=True)), ids)
        self.sq_norms = sum(g.float().square().flatten(1).sum(1) for g in each.values())
        scale = self.setting.accumulate
        _accumulate(self.trained, [each[name].mean(0) / scale for name in self.names])


class Opacus(Arm):
    """Opacus: per-sample gradients in hooks (`GradSampleModule`)."""

    name = "opacus, per-sample gradients"

    def watch(self) -> None:
        """Wrap the model."""
        from opacus.grad_sample import GradSampleModule

        self.inner, self.model = self.model, GradSampleModule(self.model, loss_reduction="mean", strict=False)

    def backward(self, ids: Tensor) -> None:
        """Square what the hooks left in `grad_sample`."""
        super().backward(ids)
        self.sq_norms = sum(p.grad_sample.float().square().flatten(1).sum(1) for p in self.trained)
        for p in self.trained:
            p.grad_sample = None


class Ghost(Opacus):
    """Opacus: ghost norms, without forming gradients."""

    name = "opacus, ghost norms"

    def watch(self) -> None:
        """Wrap the model; the norms only, without clipping's second backward pass."""
        from opacus.grad_sample import GradSampleModuleFastGradientClipping

        self.inner = self.model
        self.model = GradSampleModuleFastGradientClipping(
            self.model, loss_reduction="mean", strict=False, use_ghost_clipping=True, max_grad_norm=1.0
        )

    def backward(self, ids: Tensor) -> None:
        """Read the norms that the hooks left."""
        Arm.backward(self, ids)
        self.sq_norms = self.model.get_norm_sample().square()


class Backpack(Arm):
    """BackPACK: `BatchL2Grad` on the trained linear layers."""

    name = "backpack, BatchL2Grad"

    def watch(self) -> None:
        """Extend the layers.

        Raises:
            NotImplementedError: a trained parameter is of a layer that is not linear.
        """
        import backpack

        others = {
            type(module).__name__
            for module in self.model.modules()
            if not isinstance(module, nn.Linear) and any(p.requires_grad for p in module.parameters(False))
        }
        if others:
            raise NotImplementedError(f"BatchL2Grad has no rule for {' and '.join(sorted(others))}")
        for module in self.model.modules():
            if isinstance(module, nn.Linear) and module.weight.requires_grad:
                backpack.extend(module)

    def backward(self, ids: Tensor) -> None:
        """Run backward inside BackPACK's context."""
        import backpack
        from backpack.extensions import BatchL2Grad

        with backpack.backpack(BatchL2Grad()):
            super().backward(ids)
        self.sq_norms = sum(p.batch_l2 for p in self.trained) * (len(ids) * self.setting.accumulate) ** 2


OURS: tuple[type[Arm], ...] = (Monitored, Shared, Tenth, Between, Detached)
PEERS: tuple[type[Arm], ...] = (Vmap, Opacus, Ghost, Backpack, PerExample)


def _sq_norm(gradients: Any) -> Tensor:
    return torch.stack([g.float().square().sum() for g in gradients]).sum()


def _accumulate(parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g.to(p.dtype) if p.grad is None else p.grad + g
