"""Records → token ids, labels and batches for supervised fine-tuning.

The loss is on every token of a `text`, on the response of a `prompt` + `response`, on the assistant's turns
of a chat. An example longer than `max_length` loses its end, and is counted; only plain text is cut into
several instead, so that none of it is lost. The end-of-sequence token closes each example and is
learned, except in a chat, whose end belongs to the template.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import torch
from torch import Tensor

from gns.finetuning.sources import KNOWN, DataError, Record, first_line, read

NO_LOSS = -100  # label of a token that the loss leaves out (torch's and transformers' default)
GENERATION = re.compile(r"\{%-?\s*generation\b")  # the mark of a template that knows its assistant's tokens


class Row(NamedTuple):
    """One example: token ids, and for each token its label or `NO_LOSS`."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Examples:
    """Encoded examples, and what encoding did to them.

    Args:
        rows: the examples.
        n_truncated: examples that lost their end at `max_length`.
        n_dropped: examples left out because no token was left to learn (empty, or all prompt).
        notes: anything else the user should know, one line each.
    """

    rows: Sequence[Row]
    n_truncated: int = 0
    n_dropped: int = 0
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Row:
        return self.rows[i]

    def remarks(self) -> list[str]:
        """Say, a line each, what was truncated or left out, and the notes; empty if all is well."""
        lines = list(self.notes)
        if self.n_truncated:
            lines.append(f"{self.n_truncated} of {len(self)} examples truncated at the maximum length")
        if self.n_dropped:
            lines.append(f"{self.n_dropped} examples left out: no token to learn in them")
        return lines

    def split(self, n_held_out: int, seed: int) -> tuple[list[Row], list[Row]]:
        """Draw `n_held_out` examples at random; give (the rest, the drawn), both in their first order."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        held_out = set(order[:n_held_out].tolist())
        rest = [row for i, row in enumerate(self.rows) if i not in held_out]
        return rest, [self.rows[i] for i in sorted(held_out)]


def pad_id(tokenizer: Any) -> int:
    """Give a token to pad with. Any will do: neither attention nor loss sees it."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in ids if i is not None)


class Collator:
    """Rows → one batch, padded on the right to its longest row.

    Args:
        pad_id: token to pad with; neither attention nor loss sees it.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Build `input_ids`, `attention_mask` and `labels`, each [B, T] of int64."""
        width = max(len(row.input_ids) for row in rows)

        def padded(lists: Iterable[list[int]], fill: int) -> Tensor:
            return torch.tensor([values + [fill] * (width - len(values)) for values in lists])

        return {
            "input_ids": padded((row.input_ids for row in rows), self.pad_id),
            "attention_mask": padded(([1] * len(row.input_ids) for row in rows), 0),
            "labels": padded((row.labels for row in rows), NO_LOSS),
        }


def load_examples(source: str | Path, tokenizer: Any, *, max_length: int, split: str = "train") -> Examples:
    """Read and encode a local file or folder, or a hub data set; `DataError` where that cannot be done.

    Args:
        source: a .jsonl, .txt, .md or .py file, a folder of them, or the name of a hub data set.
        tokenizer: of the model that will learn.
        max_length: most tokens in an example.
        split: of a hub data set.

    Returns:
        The examples, at least one.
    """
    return encode(read(source, split), tokenizer, max_length=max_length, source=str(source))


def encode_texts(texts: Iterable[str], tokenizer: Any, *, max_length: int, source: str) -> Examples:
    """Encode texts at hand, an example each, as `load_examples` encodes `text` records."""
    records = (Record(f"{source}, text {i}", ("text",), {"text": text}) for i, text in enumerate(texts, 1))
    return encode(records, tokenizer, max_length=max_length, source=source)


def encode(records: Iterable[Record], tokenizer: Any, *, max_length: int, source: str) -> Examples:
    """Turn records into rows of at most `max_length` tokens.

    Args:
        records: of one shape.
        tokenizer: of the model that will learn.
        max_length: most tokens in a row.
        source: name of the data, for messages.

    Returns:
        The rows, at least one.

    Raises:
        DataError: there is no record, or none with a token to learn.
    """
    rows: list[Row] = []
    n_seen = n_truncated = n_dropped = n_whole_chats = 0
    for record in records:
        n_seen += 1
        row, whole_chat = _encode(record, tokenizer)
        n_whole_chats += whole_chat
        pieces = [piece for piece in _pieces(row, max_length, record.cut) if _learns(piece)]
        rows += pieces
        n_dropped += not pieces
        n_truncated += len(row.labels) > max_length and len(pieces) > 0 and not record.cut
    if not rows:
        why = "all are empty, or all prompt within the maximum length of"
        nothing = f"no token to learn in any of {n_seen} examples ({why} {max_length} tokens)"
        raise DataError(f"{source}: {nothing if n_seen else 'empty; at least one example is needed'}")
    note = f"{n_whole_chats} chats are learned whole: the template does not show where the assistant speaks"
    return Examples(rows, n_truncated, n_dropped, (note,) if n_whole_chats else ())


def _pieces(row: Row, max_length: int, cut: bool) -> Iterator[Row]:
    """Yield the row's first `max_length` tokens and, if it is to be cut, the following ones too."""
    for start in range(0, len(row.labels) if cut else 1, max_length):
        stop = start + max_length
        yield Row(row.input_ids[start:stop], row.labels[start:stop])


def _learns(row: Row) -> bool:
    """Whether a label is left for the loss; the first token is predicted from nothing, so it never counts."""
    return any(label != NO_LOSS for label in row.labels[1:])


def _encode(record: Record, tokenizer: Any) -> tuple[Row, bool]:
    """Give the whole row of a record, and whether a chat had to be learned whole.

    Raises:
        DataError: the record's shape is none of the known ones.
    """
    fields = record.fields
    if record.shape == ("text",):
        ids = _ids(tokenizer, fields["text"]) if fields["text"].strip() else []
        return _closed(ids, ids, tokenizer), False
    if record.shape == ("prompt", "response"):
        prompt = _ids(tokenizer, fields["prompt"])
        answered = bool(fields["response"].strip())
        response = _ids(tokenizer, fields["response"], add_special_tokens=False) if answered else []
        return _closed(prompt + response, [NO_LOSS] * len(prompt) + response, tokenizer), False
    if record.shape == ("messages",):
        return _encode_chat(record, tokenizer)
    raise DataError(f"{record.where}: unknown shape {record.shape}; known: {KNOWN}")


def _ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """Tokenize, without the end token that some tokenizers add and their remark on the length."""
    ids = list(tokenizer(text, verbose=False, **options)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _closed(ids: list[int], labels: list[int], tokenizer: Any) -> Row:
    """Append the end token, if the tokenizer has one and there is something to learn before it."""
    learned = any(label != NO_LOSS for label in labels)
    end = [tokenizer.eos_token_id] if learned and tokenizer.eos_token_id is not None else []
    return Row(ids + end, labels + end)


def _encode_chat(record: Record, tokenizer: Any) -> tuple[Row, bool]:
    """Encode a chat with the loss on the assistant's turns, and say whether it had to be on all of them.

    By the template's own marks where it has them; else from what each turn adds to the rendered text. Where a
    template rewrites earlier turns neither is possible, and the whole chat is learned.

    Raises:
        DataError: there is no template, or it refuses this chat.
    """
    messages = record.fields["messages"]
    try:
        if tokenizer.is_fast and GENERATION.search(tokenizer.get_chat_template()):
            options = {"return_dict": True, "return_assistant_tokens_mask": True}
            out = tokenizer.apply_chat_template(messages, tokenizer_kwargs={"verbose": False}, **options)
            return _masked(out["input_ids"], out["assistant_masks"]), False
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        spans = _assistant_spans(messages, text, tokenizer) if tokenizer.is_fast else None
    except (ValueError, jinja2.TemplateError) as error:
        raise DataError(f"{record.where}: the chat template fails: {first_line(error)}") from error
    offsets = {} if spans is None else {"return_offsets_mapping": True}
    out = tokenizer(text, add_special_tokens=False, verbose=False, **offsets)  # the template wrote them all
    if spans is None:
        return Row(list(out["input_ids"]), list(out["input_ids"])), True
    inside = [any(first <= start < stop for first, stop in spans) for start, _ in out["offset_mapping"]]
    return _masked(out["input_ids"], inside), False


def _masked(ids: Sequence[int], learned: Sequence[int | bool]) -> Row:
    return Row(list(ids), [i if on else NO_LOSS for i, on in zip(ids, learned, strict=True)])


def _assistant_spans(messages: list[dict], text: str, tokenizer: Any) -> list[tuple[int, int]] | None:
    """Find the characters that each assistant turn adds after its header; None where they cannot be told."""
    spans = []
    for i, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        if i == 0:
            return None
        before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if not (text.startswith(after) and after.startswith(before)):
            return None
        spans.append((len(before), len(after)))
    return spans
