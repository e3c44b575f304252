"""Stacked adapters: the LoRA factors of S runs side by side on one frozen base.

The batch holds S·B rows, those of slot s from row s·B on. A frozen layer runs once on all of them; the
factors, A [S, r, I] and B [S, O, r], are batched matrix products. Rows are independent of each other, so one
backward pass of the summed losses of the slots gives each slot its own gradient. (`torch.func.vmap` over
stacked adapters would do the same; folding the slots into the batch keeps fused attention and needs no
functional form of the model.)

All numbers of a slot lie in one row of a `Stack`; the layers hold views of it, and so do their gradients.
An optimizer then works on one [S, P] tensor, whatever the number of layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from experiments.configs import RunError

State = Mapping[str, Tensor]
FACTORS = ("lora_A", "lora_B", "lora_magnitude_vector")


class Stack:
    """The trained numbers of S slots, a row each, and their gradients.

    Args:
        states: of each slot, name → tensor; the same names and shapes in all.
        device: where they live.

    Raises:
        RunError: the slots differ in their shapes.
    """

    def __init__(self, states: Sequence[State], device: torch.device | str) -> None:
        shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in states]
        if any(shape != shapes[0] for shape in shapes):
            raise RunError("packed runs need adapters of the same shapes on the same layers; run them solo")
        rows = [torch.cat([t.detach().flatten() for t in state.values()]) for state in states]
        self.values = torch.stack(rows).to(device)  # [S, P]
        self.gradient = torch.zeros_like(self.values)
        self._places: dict[str, tuple[int, tuple[int, ...]]] = {}
        start = 0
        for name, shape in shapes[0].items():
            self._places[name] = start, shape
            start += math.prod(shape)
        self.parameters = {name: nn.Parameter(self._view(self.values, name)) for name in shapes[0]}

    @property
    def slots(self) -> int:
        """S."""
        return len(self.values)

    def backward(self, loss: Tensor, *, first: bool) -> None:
        """Write the gradients of a loss into `gradient`, or add them to what is there.

        Args:
            loss: scalar; the sum over slots of what each slot minimises.
            first: of the step's forward passes.
        """
        found = torch.autograd.grad(loss, list(self.parameters.values()))
        places = [self._view(self.gradient, name) for name in self.parameters]
        (torch._foreach_copy_ if first else torch._foreach_add_)(places, found)

    def rows(self) -> list[Tensor]:
        """Give each slot's numbers, [P], copied."""
        return [row.clone() for row in self.values]

    def hold(self, rows: Sequence[Tensor]) -> None:
        """Take these slots in the place of those held; the layers then have as many.

        Args:
            rows: [P] of each, as `rows` gave them.
        """
        self.values = torch.stack(list(rows))
        self.gradient = torch.zeros_like(self.values)
        for name, parameter in self.parameters.items():
            parameter.data = self._view(self.values, name)

    def state(self, slot: int) -> dict[str, Tensor]:
        """Give one slot's tensors by name, copied."""
        return {name: self._view(self.values, name)[slot].clone() for name in self._places}

    def _view(self, of: Tensor, name: str) -> Tensor:
        start, shape = self._places[name]
        return of[:, start : start + math.prod(shape)].view(len(of), *shape)


class _Adapted(torch.autograd.Function):
    """y = x Wᵀ + s · (x Aᵀ) Bᵀ by slots, W frozen: the low-rank part is added in place, forward and backward.

    Left to autograd, each of the two sums would be a pass over a tensor of its own.

    With h = x Aᵀ and dh = s · dy B: dx = dy W + dh A, dA = dhᵀ x, dB = s · dyᵀ h.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """[S, N, I], [O, I], [S, r, I], [S, O, r] → [S, N, O]."""
        inner = torch.bmm(x, a.mT)
        ctx.save_for_backward(x, weight, a, b, inner)
        ctx.scaling = scaling
        return torch.matmul(x, weight.T).baddbmm_(inner, b.mT, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """[S, N, O] → gradients of x, A and B."""
        x, weight, a, b, inner = ctx.saved_tensors
        d_inner = torch.bmm(dy, b).mul_(ctx.scaling)
        d_a = torch.bmm(d_inner.mT, x)
        d_b = torch.bmm(inner.mT, dy).mul_(ctx.scaling).mT
        d_x = torch.matmul(dy, weight).baddbmm_(d_inner, a) if ctx.needs_input_grad[0] else None
        return d_x, None, d_a, d_b, None


class PackedLinear(nn.Module):
    """A frozen linear layer with an adapter for each slot.

    y = W x + s · B_slot A_slot x, for row s·B + b of slot s.

    Args:
        base: the frozen layer.
        a: [S, r, I].
        b: [S, O, r].
        scaling: s.
    """

    def __init__(self, base: nn.Linear, a: nn.Parameter, b: nn.Parameter, scaling: float) -> None:
        super().__init__()
        self.base_layer, self.lora_A, self.lora_B, self.scaling = base, a, b, scaling

    def forward(self, x: Tensor) -> Tensor:
        """[S·B, ..., I] → [S·B, ..., O], in the dtype of the base or, under autocast, in that of autocast."""
        kind = x.device.type
        dtype = (
            torch.get_autocast_dtype(kind)
            if torch.is_autocast_enabled(kind)
            else self.base_layer.weight.dtype
        )
        with torch.autocast(kind, enabled=False):
            rows = x.reshape(len(self.lora_A), -1, x.shape[-1]).to(dtype)  # [S, rows of a slot, I]
            return self._adapted(rows, dtype).view(*x.shape[:-1], -1)

    def _adapted(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[S, N, I] → [S, N, O]."""
        out = self._without_bias(x, dtype)
        return out if self.base_layer.bias is None else out + self.base_layer.bias.to(dtype)

    def _without_bias(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        weight = self.base_layer.weight.to(dtype)
        return _Adapted.apply(x, weight, self.lora_A.to(dtype), self.lora_B.to(dtype), self.scaling)


class PackedDora(PackedLinear):
    """The same with a magnitude for each output: m / |W + s B A|, by rows, times the adapted output.

    The norm counts as a constant in backward (Liu et al. 2024, arXiv:2402.09353, §4.3), as in `peft`. It
    comes from |w|² + 2s·b(Aw) + s²·b(AAᵀ)bᵀ, so that no slot's whole weight is ever built.

    Args:
        base: the frozen layer.
        a: [S, r, I].
        b: [S, O, r].
        scaling: s.
        magnitude: [S, O].
    """

    def __init__(
        self, base: nn.Linear, a: nn.Parameter, b: nn.Parameter, scaling: float, magnitude: nn.Parameter
    ) -> None:
        super().__init__(base, a, b, scaling)
        self.lora_magnitude_vector = magnitude

    def _without_bias(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        factor = self.lora_magnitude_vector / self._norms()
        return super()._without_bias(x, dtype) * factor.unsqueeze(1).to(dtype)

    @torch.no_grad()
    def _norms(self) -> Tensor:
        """[S, O]: the length of each row of W + s B A."""
        weight = self.base_layer.weight.to(self.lora_A.dtype)
        crossed = (self.lora_B * torch.matmul(weight, self.lora_A.mT)).sum(-1)
        own = (torch.bmm(self.lora_B, torch.bmm(self.lora_A, self.lora_A.mT)) * self.lora_B).sum(-1)
        return (weight.square().sum(1) + 2 * self.scaling * crossed + self.scaling**2 * own).sqrt()


def adapters_of(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Yield the adapted layers of a `peft` model by name.

    Raises:
        RunError: a layer that cannot be stacked, or something else is trained as well.
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        base = module.get_base_layer()
        if not isinstance(base, nn.Linear) or len(module.lora_A) != 1:
            raise RunError(
                f"`{name}` ({type(base).__name__}) cannot be packed: one adapter on a linear layer is"
            )
        seen |= {id(p) for n, p in module.named_parameters() if n.startswith(FACTORS)}
        yield name, module
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in seen:
            raise RunError(f"`{name}` is trained and no factor of an adapter; run this adapter solo")


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Give the trained tensors of a `peft` model, layer and factor → tensor, copied.

    Raises:
        RunError: see `adapters_of`.
    """
    return {
        f"{name}.{factor}": tensor.detach().clone()
        for name, module in adapters_of(model)
        for factor, tensor in _factors(module).items()
    }


def pack(model: nn.Module, states: Sequence[State], device: torch.device | str) -> Stack:
    """Put stacked adapters in the place of a `peft` model's own, in place.

    Args:
        model: base with adapters of the kind and shapes that the states have.
        states: what each slot starts from, as `state_of` gives it.
        device: where the model lives.

    Returns:
        The slots' numbers, which the layers now use.

    Raises:
        RunError: a layer cannot be stacked, or the states do not fit.
    """
    stack = Stack(states, device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, module in list(adapters_of(model)):
        (adapter,) = module.lora_A
        parts = {key: stack.parameters[f"{name}.{key}"] for key in _factors(module)}
        a, b, *rest = parts.values()
        kind = PackedDora if rest else PackedLinear
        packed = kind(module.get_base_layer(), a, b, float(module.scaling[adapter]), *rest)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, packed)
    return stack


def _factors(module: LoraLayer) -> dict[str, Tensor]:
    """A, B and, of DoRA, the magnitude of an adapted layer."""
    (adapter,) = module.lora_A
    parts: dict[str, Any] = {"lora_A": module.lora_A[adapter], "lora_B": module.lora_B[adapter]}
    if adapter in module.lora_magnitude_vector:
        parts["lora_magnitude_vector"] = module.lora_magnitude_vector[adapter]
    return {key: part.weight for key, part in parts.items()}


class LearnedRows:
    """Lets the head of a causal model see only the positions that have a label.

    A hook on the head takes the rows asked for from its input [R, T, H], as [1, rows, H]: the head and its
    loss are a large share of a small model's work, and prompts and padding need neither.

    Args:
        model: with `get_output_embeddings`.
    """

    def __init__(self, model: Any) -> None:
        self.wanted: Tensor | None = None
        self._handle = model.get_output_embeddings().register_forward_pre_hook(self._take)

    def _take(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        if self.wanted is None:
            return None
        (hidden,) = inputs
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, self.wanted).unsqueeze(0),)

    def logits(self, model: nn.Module, ids: Tensor, wanted: Tensor) -> Tensor:
        """[rows, V] of the model at some positions.

        Args:
            model: the one whose head is watched.
            ids: [R, T], padded on the right: attention is causal, so that padding is not seen.
            wanted: [rows], places in the flattened [R·T].
        """
        self.wanted = wanted
        try:
            return model(input_ids=ids, use_cache=False).logits[0]
        finally:
            self.wanted = None

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """[rows]: the loss of each position, in nats; in float32 at the least."""
    wide = logits if logits.dtype is torch.float64 else logits.float()
    return F.cross_entropy(wide, labels, reduction="none")
