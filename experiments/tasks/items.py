"""What a task gives: items, their arrangement into training rows, and their token ids.

A row is what the optimizer counts as one example. The dials `merged` and `copies` change what a row holds
and leave the number of rows alone, so that they move the noise scale at a fixed data size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol, TypeVar

from experiments.configs import RunError
from gns.finetuning.data import NO_LOSS, Row, encode
from gns.finetuning.sources import Record

SPLITS = ("validation", "test")
PARTS = (*SPLITS, *["train"] * 6)  # of a generated task, by hash: an eighth, an eighth, the rest
NO_LIMIT = 1 << 30  # tokens


@dataclass(frozen=True)
class Item:
    """One example, or one training row of several.

    Args:
        prompt: not learned.
        response: learned; ends the example.
        answer: what a generated response must give, as `Task.right` compares it; None: no accuracy.
        before: examples that stand before this one in the same row, each learned as if alone (dial `merged`).
    """

    prompt: str
    response: str
    answer: str | None = None
    before: tuple[Item, ...] = ()


class Task(Protocol):
    """A training set of any size, two held-out splits, and what a right answer is."""

    name: ClassVar[str]

    def train(self, n: int, seed: int) -> list[Item]:
        """Give `n` training rows in an order set by the seed; `train(n)[:m]` is `train(m)`.

        Raises:
            RunError: there are not so many.
        """
        ...

    def held_out(self, split: str, n: int) -> list[Item]:
        """Give the first `n` items of "validation" or "test": the same ones whatever the seed and the dials.

        Raises:
            RunError: there are not so many, or no such split.
        """
        ...

    def right(self, item: Item, generated: str) -> bool:
        """Whether a generated response answers the item."""
        ...


@dataclass(frozen=True)
class Rows:
    """The dials of every task: how examples make training rows.

    Args:
        merged: examples joined into one row; N counts rows.
        copies: how often each row is there within the N rows, side by side (the order of a run shuffles).
    """

    merged: int = 1
    copies: int = 1

    def __post_init__(self) -> None:
        whole_dial(self, "merged", 1)
        whole_dial(self, "copies", 1)

    def examples_for(self, n: int) -> int:
        """How many examples `n` rows are made of."""
        return -(-n // self.copies) * self.merged

    def rows(self, examples: Sequence[Item], n: int) -> list[Item]:
        """Arrange the first `examples_for(n)` examples into `n` rows."""
        k = self.merged
        groups = (examples[i * k : (i + 1) * k] for i in range(-(-n // self.copies)))
        distinct = [replace(group[-1], before=tuple(group[:-1])) for group in groups]
        return [distinct[i // self.copies] for i in range(n)]


def whole_dial(task: Any, dial: str, least: int, most: int | None = None) -> None:
    """Check a dial that is a whole number.

    Raises:
        RunError: it is none, or out of range.
    """
    value = getattr(task, dial)
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if not fits or (most is not None and value > most):
        top = "or more" if most is None else f"to {most}"
        raise RunError(f"dial {dial} is {value!r}; a whole number, {least} {top}, is needed")


def known_split(split: str) -> None:
    """Check the name of a held-out split.

    Raises:
        RunError: it is neither "validation" nor "test".
    """
    if split not in SPLITS:
        raise RunError(f"no split {split!r}; known: {', '.join(SPLITS)}")


def part_of(key: str) -> str:
    """Give the part of a task that what has this key belongs to, whatever the seed and the dials."""
    return PARTS[hashlib.sha256(key.encode()).digest()[0] % len(PARTS)]


def take(items: Sequence[Item], n: int, what: str) -> list[Item]:
    """Give the first `n` items.

    Raises:
        RunError: there are fewer.
    """
    if n > len(items):
        raise RunError(f"{what} has {len(items)} items; {n} are asked for. Ask for fewer, or give more data")
    return list(items[:n])


T = TypeVar("T")


def with_dials(kind: type[T], name: str, dials: Mapping[str, Any]) -> T:
    """Make a task of its class and its dials.

    Raises:
        RunError: a dial is unknown, missing or out of range.
    """
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    if unknown := sorted(set(dials) - set(known)):
        raise RunError(f"task {name}: no dial {', '.join(unknown)}; known: {', '.join(known)}")
    try:
        return kind(**dials)
    except TypeError as error:  # a dial without default is missing
        raise RunError(f"task {name}: {str(error).partition(' ')[2]}; give it in the dials") from error
    except RunError as error:
        raise RunError(f"task {name}: {error}") from error


def encoded(items: Iterable[Item], tokenizer: Any, max_length: int) -> list[Row]:
    """Turn items into token ids and labels: prompts masked, the end token of every example learned.

    An item that is too long loses its end, as in common fine-tuning.

    Args:
        items: of a task.
        tokenizer: of the model that will learn.
        max_length: most tokens of a row.

    Returns:
        One row an item, in their order.

    Raises:
        RunError: a row has no token to learn within `max_length`, or several merged examples do not fit.
    """
    rows, longest, unlearned = [], 0, 0
    for item in items:
        row = _row(item, tokenizer)
        cut = Row(row.input_ids[:max_length], row.labels[:max_length])
        if item.before and len(row.input_ids) > max_length:
            raise RunError(
                f"{len(item.before) + 1} merged examples have {len(row.input_ids)} tokens, max_length is "
                f"{max_length}; raise it, or merge fewer"
            )
        if all(label == NO_LOSS for label in cut.labels[1:]):
            unlearned, longest = unlearned + 1, max(longest, len(row.input_ids))
        rows.append(cut)
    if unlearned:
        raise RunError(
            f"{unlearned} of {len(rows)} items have no token to learn within max_length {max_length} (the "
            f"longest has {longest} tokens); raise it, or leave long ones out by the dial `longest`"
        )
    return rows


def prompt_ids(item: Item, tokenizer: Any) -> list[int]:
    """Token ids of the prompt, exactly as `encoded` masks them."""
    row = _row(replace(item, response="-", before=()), tokenizer)
    return [i for i, label in zip(row.input_ids, row.labels, strict=True) if label == NO_LOSS]


def _row(item: Item, tokenizer: Any) -> Row:
    """Encode an item whole, after those that stand before it."""
    ids: list[int] = []
    labels: list[int] = []
    for part in (*item.before, item):
        shape = {"prompt": part.prompt, "response": part.response}
        record = Record("item", ("prompt", "response"), shape)
        row = encode([record], tokenizer, max_length=NO_LIMIT, source="item").rows[0]
        ids += row.input_ids
        labels += row.labels
    return Row(ids, labels)
