"""The program of packed runs: steps and evaluations of all slots, each forward pass for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from experiments.configs import RunConfig, RunError
from experiments.course import Course
from experiments.evaluation import eval_batch, token_mean
from experiments.order import batches_of
from experiments.outcome import askable, compared, room, tested
from experiments.packed.layers import LearnedRows, Stack, State, pack, state_of, token_losses
from experiments.packed.optim import StackedOptimizer
from experiments.prepared import Data, Prepared, prepare
from experiments.schedules import lr_at
from experiments.tasks.accuracy import AT_ONCE, answers
from gns.finetune import dropout_of, n_labels
from gns.finetuning.data import NO_LOSS, Row


@dataclass
class Slot:
    """One run of the program.

    Args:
        config: of the run.
        data: of the run.
    """

    config: RunConfig
    data: Data

    def __post_init__(self) -> None:
        self.course = Course(self.config)
        self.numbers: Iterator[list[int]] = batches_of(self.config)


class Folded(NamedTuple):
    """Rows of all slots in one batch.

    Args:
        ids: [S·B, T], padded on the right.
        wanted: [tokens], the places in [S·B·T] whose next token has a label.
        labels: [tokens], that label.
        row: [tokens], the row, 0 … S·B − 1, that each of them is in.
    """

    ids: Tensor
    wanted: Tensor
    labels: Tensor
    row: Tensor


class Program:
    """S runs that share one frozen base.

    Args:
        slots: at least one.
        device: of the base and the adapters.

    Raises:
        RunError: the base cannot be loaded or adapted, or the slots cannot share it.
    """

    def __init__(self, slots: Sequence[Slot], device: torch.device) -> None:
        self.slots, self.live = list(slots), list(slots)
        self._prepared, states = _prepared(slots, device)
        self._model = self._prepared.model
        self._head = LearnedRows(self._model)
        self._stack: Stack = pack(self._model, states, device)
        self._optimizer = StackedOptimizer(self._stack, [slot.config for slot in slots])
        self._trained: dict[int, Tensor] = {}  # what slots that are over have learned

    def train(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Make the steps of all slots, each until its own course is over."""
        self._evaluate()
        while self.live:
            made = self.step()
            self._part([slot.course.diverged for slot in self.live])
            self._evaluate()
            if progress is not None:
                progress(made, self.slots[0].config.n_steps)

    def results(self) -> list[dict[str, Any]]:
        """Give what each slot's row says of its course and, unless it diverged, of the test split."""
        done = [slot for slot in self.slots if not slot.course.diverged]
        found = {id(slot): slot.course.row() for slot in self.slots}
        if done:
            self._stack.hold([self._trained[id(slot)] for slot in done])
            losses = self._item_losses([slot.data.test for slot in done])
            for slot, own, right in zip(done, losses, self._right(done), strict=True):
                found[id(slot)] |= tested(slot.data, own, right)
        return [found[id(slot)] for slot in self.slots]

    def step(self) -> int:
        """Make one step of the live slots and let their courses know; gives how many that were."""
        batches = [[slot.data.train[i] for i in next(slot.numbers)] for slot in self.live]
        tokens = [sum(map(n_labels, rows)) for rows in batches]
        losses = self._backward(batches, tokens)
        self._optimizer.step([lr_at(slot.config, slot.course.steps) for slot in self.live])
        for slot, loss, rows, n in zip(self.live, losses, batches, tokens, strict=True):
            slot.course.stepped(loss, len(rows), n)
        return max(slot.course.steps for slot in self.live)

    def _backward(self, batches: Sequence[Sequence[Row]], tokens: Sequence[int]) -> list[float]:
        """Write the gradient of each slot's mean over the tokens of its step, and give those means."""
        most = max(map(len, batches))
        size = self._prepared.config.micro_batch or most
        total = torch.zeros(len(batches), dtype=torch.float64, device=self._prepared.device)
        for start in range(0, most, size):
            part = [rows[start : start + size] for rows in batches]
            folded = self._folded(part)
            slot = folded.row // (len(folded.ids) // len(batches))
            losses = self._token_losses(folded)
            weights = torch.tensor([1 / n for n in tokens], dtype=losses.dtype, device=losses.device)
            weighted = losses * weights[slot]
            self._stack.backward(weighted.sum(), first=start == 0)
            total.index_add_(0, slot, weighted.detach().double())
        return total.tolist()

    def _token_losses(self, folded: Folded) -> Tensor:
        """[tokens], nats."""
        with self._prepared.autocast():
            logits = self._head.logits(self._model, folded.ids, folded.wanted)
        return token_losses(logits, folded.labels)

    def _folded(self, groups: Sequence[Sequence[Row]]) -> Folded:
        """Lay the slots' rows one after the other; empty ones fill up a slot that has fewer."""
        most = max(map(len, groups))
        empty = Row([self._prepared.collator.pad_id], [NO_LOSS])
        batch = self._prepared.collator(
            [row for rows in groups for row in [*rows, *[empty] * (most - len(rows))]]
        )
        labels = batch["labels"].roll(-1, dims=1)
        labels[:, -1] = NO_LOSS
        wanted = (labels.flatten() != NO_LOSS).nonzero().squeeze(1)
        parts = batch["input_ids"], wanted, labels.flatten()[wanted], wanted // labels.shape[1]
        return Folded(*(part.to(self._prepared.device, non_blocking=True) for part in parts))

    def _evaluate(self) -> None:
        """Evaluate the live slots' validation splits where that is due, and let those that are over go."""
        if not self.live or not self.live[0].course.due:
            return  # it is due for all of them or for none
        splits = [slot.data.validation for slot in self.live]
        for slot, rows, losses in zip(self.live, splits, self._item_losses(splits), strict=True):
            slot.course.evaluated(token_mean(losses, rows))
        self._part([slot.course.over for slot in self.live])

    @torch.no_grad()
    def _item_losses(self, splits: Sequence[Sequence[Row]]) -> list[list[float]]:
        """Mean loss of each item of the slots held over its own tokens: [S][items], nats per token."""
        size = max(1, eval_batch(self._prepared.config) // len(splits))
        orders = [sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids)) for rows in splits]
        found = [[math.nan] * len(rows) for rows in splits]
        self._model.eval()
        for start in range(0, len(splits[0]), size):
            chosen = [order[start : start + size] for order in orders]
            folded = self._folded([[rows[i] for i in own] for rows, own in zip(splits, chosen, strict=True)])
            losses = self._token_losses(folded).double()
            sums = torch.zeros(2, len(folded.ids), dtype=torch.float64, device=losses.device)
            sums[0].index_add_(0, folded.row, losses)
            sums[1].index_add_(0, folded.row, torch.ones_like(losses))
            means = (sums[0] / sums[1]).view(len(splits), -1).tolist()
            for own, numbers, values in zip(found, chosen, means, strict=True):
                for i, value in zip(numbers, values, strict=True):
                    own[i] = value
        self._model.train()
        return found

    def _part(self, over: Sequence[bool]) -> None:
        """Let some of the live slots go, with what they learned."""
        if not any(over):
            return
        rows = self._stack.rows()
        self._trained |= {
            id(slot): row for slot, row, gone in zip(self.live, rows, over, strict=True) if gone
        }
        kept = [i for i, gone in enumerate(over) if not gone]
        self.live = [self.live[i] for i in kept]
        if kept:
            self._stack.hold([rows[i] for i in kept])
            self._optimizer.keep(kept)

    def _right(self, slots: Sequence[Slot]) -> list[list[int]]:
        """1 or 0 for each item and slot: right or not. All slots answer the same items at once."""
        asked = askable(slots[0].data)
        if not asked:
            return [[] for _ in slots]
        config, n = self._prepared.config, len(slots)
        with self._prepared.autocast():
            texts = answers(
                _Interleaved(self._model, n),
                self._prepared.tokenizer,
                [item for item in asked for _ in slots],
                max_new_tokens=room(asked, self._prepared.tokenizer, config.max_length),
                batch_size=n * AT_ONCE,
                together=n,
            )
        return [compared(slot.data, asked, texts[i::n]) for i, slot in enumerate(slots)]


class _Interleaved(nn.Module):
    """Takes rows item by item, the slots of an item side by side, where the model wants them slot by slot.

    Args:
        model: with stacked adapters.
        slots: S.
    """

    def __init__(self, model: nn.Module, slots: int) -> None:
        super().__init__()
        self.model, self.slots = model, slots

    def forward(self, **given: Any) -> Any:
        """Call the model with [items·S, ...] tensors; the logits come in that order, the cache in its own."""
        turned = {
            name: self._turn(value, -1, self.slots) if isinstance(value, Tensor) else value
            for name, value in given.items()
        }
        out = self.model(**turned)
        out.logits = self._turn(out.logits, self.slots, -1)
        return out

    def _turn(self, rows: Tensor, first: int, second: int) -> Tensor:
        return rows.unflatten(0, (first, second)).transpose(0, 1).flatten(0, 1)


def _prepared(slots: Sequence[Slot], device: torch.device) -> tuple[Prepared, list[State]]:
    """Load the base once for each seed: the model of the first slot, and the adapters of all.

    Raises:
        RunError: the base has dropout, or its frozen part depends on the seed.
    """
    first = prepare(slots[0].config, device)
    if dropout_of(first.model):
        raise RunError(
            f'the base {first.config.base} has dropout; it cannot be packed, run it with engine "loop"'
        )
    states = {first.config.seed: state_of(first.model)}
    for slot in slots:
        if slot.config.seed not in states:
            other = prepare(slot.config, device).model
            _refuse_other(first.model, other, slot.config)
            states[slot.config.seed] = state_of(other)
    return first, [states[slot.config.seed] for slot in slots]


def _refuse_other(model: nn.Module, other: nn.Module, config: RunConfig) -> None:
    """Refuse adapters whose making changed the base in another way: those by random projections do.

    Raises:
        RunError: a frozen weight differs.
    """
    weights = dict(other.named_parameters())
    for name, weight in model.named_parameters():
        if not weight.requires_grad and not torch.equal(weight, weights[name]):
            raise RunError(
                f"adapter {config.adapter!r} leaves another `{name}` with seed {config.seed}; "
                "pack runs of one seed only"
            )
