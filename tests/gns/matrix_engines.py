"""Train a model of the matrix in one of its engines, and the slow twin of its first step."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.gns.matrix_cells import ENGINES, PRECISIONS, Cell, Precision
from tests.gns.matrix_models import batch, build, quiet
from tests.reference.per_example import contributions, trainable

STEPS = 3
SCALE = 2.0**8

OPTIMIZERS: dict[str, Callable[[list[Tensor]], Any]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.05, max_iter=2),
    "in backward": lambda p: None,
}


def make(cell: Cell) -> nn.Module:
    """Build the model of a cell; compiled ones have one block, for the compiler's sake."""
    engine = ENGINES[cell.engine]
    layers = 1 if engine.compiled else 2
    model = build(
        cell.family, cell.adapter, PRECISIONS[cell.precision].dtype, layers=layers, dropout=engine.dropout
    )
    if engine.reentrant is not None:
        base = getattr(model, "get_base_model", lambda: model)()
        with quiet():
            base.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": engine.reentrant}
            )
        base.enable_input_require_grads()
    return model


def precision_context(precision: Precision) -> contextlib.AbstractContextManager:
    """Autocast, or nothing."""
    return torch.autocast("cpu", precision.autocast) if precision.autocast else contextlib.nullcontext()


def scaler_of(cell: Cell) -> torch.amp.GradScaler | None:
    """Make the gradient scaler of a cell, if it has one."""
    return torch.amp.GradScaler("cpu", init_scale=SCALE) if PRECISIONS[cell.precision].scaler else None


def _compiled(model: nn.Module, how: str) -> nn.Module:
    if not how:
        return model
    torch._dynamo.reset()
    if how == "whole":
        return torch.compile(model, backend="aot_eager")  # type: ignore[return-value]
    base = getattr(model, "get_base_model", lambda: model)()
    for layer in getattr(base, "transformer", getattr(base, "model", None)).get_submodule(
        "h" if hasattr(base, "transformer") else "layers"
    ):
        layer.compile(backend="aot_eager")
    return model


class Trained(NamedTuple):
    """What training left: weights at its end, and before its last step."""

    weights: list[Tensor]
    before_last: list[Tensor]


def train(model: nn.Module, cell: Cell, scaler: torch.amp.GradScaler | None) -> Trained:
    """Train for a few steps."""
    engine, precision = ENGINES[cell.engine], PRECISIONS[cell.precision]
    parameters = list(trainable(model).values())
    optimizer = OPTIMIZERS[engine.optimizer](parameters)
    call = _compiled(model, engine.compiled)
    handles = [] if optimizer is not None else _step_in_backward(parameters)
    torch.manual_seed(1)

    def take(step: int) -> None:
        data = batch(seed=step)
        for part in zip(*(v.split(engine.splits) for v in data.values()), strict=True):
            with precision_context(precision):
                loss = call(**dict(zip(data, part, strict=True))).loss / len(engine.splits)
            (loss if scaler is None else scaler.scale(loss)).backward()

    before_last: list[Tensor] = []
    for step in range(STEPS):
        before_last = [p.detach().clone() for p in parameters]
        if engine.optimizer == "LBFGS":
            optimizer.step(functools.partial(_closure, optimizer, take, step))
            continue
        take(step)
        if optimizer is not None:
            _step(optimizer, parameters, engine.clip, scaler)
    for handle in handles:
        handle.remove()
    return Trained([p.detach().clone() for p in parameters], before_last)


def _closure(optimizer: Any, take: Callable[[int], None], step: int) -> float:
    optimizer.zero_grad()
    take(step)
    return 1.0 / (1 + step)  # LBFGS without a line search only looks at how much it changed


def _step(
    optimizer: Any, parameters: list[Tensor], clip: float | None, scaler: torch.amp.GradScaler | None
) -> None:
    if clip is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, clip)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()


def _step_in_backward(parameters: list[Tensor]) -> list[Any]:
    own = {p: torch.optim.SGD([p], lr=0.05) for p in parameters}

    def use_up(p: Tensor) -> None:
        own[p].step()
        own[p].zero_grad()

    return [p.register_post_accumulate_grad_hook(use_up) for p in parameters]


class Twin(NamedTuple):
    """Per-example gradients Gᵢ of the loss summed over the example's tokens, as inner products.

    Args:
        names: parameters.
        products: [P, n, n], ⟨Gᵢ, Gⱼ⟩ of each.
        tokens: [n], tokens with a label.
    """

    names: tuple[str, ...]
    products: Tensor
    tokens: Tensor

    def sums(self, splits: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """([P, 2] (m, q) of each parameter, [n] weights) where each micro-batch divides by its own tokens."""
        s = self.shares(splits)
        n = len(s)
        m = n * (self.products.diagonal(dim1=1, dim2=2) * s.square()).sum(1)
        q = torch.einsum("i,pij,j->p", s, self.products, s)
        return torch.stack([m, q], 1), self.tokens * s

    def shares(self, splits: tuple[int, ...]) -> Tensor:
        """What each example's summed loss is multiplied by, [n]."""
        per_call = torch.cat([torch.full((len(t),), float(t.sum())) for t in self.tokens.split(splits)])
        return 1 / (len(splits) * per_call.double())

    def norms(self, splits: tuple[int, ...], names: Collection[str]) -> Tensor:
        """‖gᵢ‖² of each example over some parameters, [n]."""
        rows = [self.names.index(name) for name in names]
        own = self.products[rows].diagonal(dim1=1, dim2=2).sum(0)
        return len(own) ** 2 * own * self.shares(splits).square()


def twin_of(cell: Cell) -> Twin:
    """Twin of the first step; cells that differ in the engine alone share one."""
    precision = PRECISIONS[cell.precision]
    layers = 1 if ENGINES[cell.engine].compiled else 2
    return _first_twin(cell.family, cell.adapter, precision.dtype, precision.autocast, layers)


@functools.cache
def _first_twin(
    family: str, adapter: str, dtype: torch.dtype, autocast: torch.dtype | None, layers: int
) -> Twin:
    return make_twin(build(family, adapter, dtype, layers=layers), batch(), autocast)


def last_twin_of(cell: Cell, weights: list[Tensor]) -> Twin:
    """Twin of the last step, at the weights before it."""
    precision = PRECISIONS[cell.precision]
    layers = 1 if ENGINES[cell.engine].compiled else 2
    model = build(cell.family, cell.adapter, precision.dtype, layers=layers)
    with torch.no_grad():
        for p, value in zip(trainable(model).values(), weights, strict=True):
            p.copy_(value)
    return make_twin(model, batch(seed=STEPS - 1), precision.autocast)


def make_twin(model: nn.Module, data: dict[str, Tensor], autocast: torch.dtype | None) -> Twin:
    """One forward and backward pass per example, in the precision of the cell, without any engine."""
    scale = SCALE if autocast is torch.float16 else 1.0

    def loss(i: int) -> Tensor:
        one = {k: v[i : i + 1] for k, v in data.items() if k != "labels"}
        with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
            logits = model(**one).logits[0, :-1]
        logits = logits if logits.dtype is torch.float64 else logits.float()
        return scale * nn.functional.cross_entropy(
            logits, data["labels"][i, 1:], reduction="sum", ignore_index=-100
        )

    named = trainable(model)
    found = contributions(named, [functools.partial(loss, i) for i in range(len(data["labels"]))])
    rows = [torch.stack([c[name].flatten() for c in found]) / scale for name in named]
    tokens = data["labels"][:, 1:].ne(-100).sum(1)
    return Twin(tuple(named), torch.stack([r @ r.mT for r in rows]), tokens)


@contextlib.contextmanager
def compiler_noise():
    """Leave out what the compiler says of its own doings with autograd functions, scripts and `.grad`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        yield
