"""`stdlib`: functions and classes of the standard library's held-out packages, learned whole.

No base model saw these packages. A file belongs to one split by a hash of its name, so no file is in two; a
piece that is there several times stays where it is found first. The text is the running interpreter's.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from experiments.tasks.items import PARTS, Item, Rows, known_split, part_of, take
from gns import corpus


@dataclass(frozen=True)
class Stdlib(Rows):
    """Real Python code, without prompts and without right answers."""

    name: ClassVar[str] = "stdlib"

    def train(self, n: int, seed: int) -> list[Item]:
        """Give `n` rows of the training files in an order of this seed."""
        pieces = _shuffled("train", seed)
        return self.rows(take(pieces, self.examples_for(n), "the training part of stdlib"), n)

    def held_out(self, split: str, n: int) -> list[Item]:
        """Give the first `n` pieces of a split, in one fixed shuffled order."""
        known_split(split)
        return take(_shuffled(split, 0), n, f"the {split} part of stdlib")

    def right(self, item: Item, generated: str) -> bool:
        """Code to be learned whole has no right answer."""
        return False


def _shuffled(part: str, seed: int) -> list[Item]:
    items = [Item("", piece) for piece in pieces()[part]]
    Random(f"stdlib {part} {seed}").shuffle(items)
    return items


@functools.cache
def pieces() -> dict[str, list[str]]:
    """All pieces of the held-out packages by split, in the order of their files."""
    found: dict[str, list[str]] = {part: [] for part in PARTS}
    seen = set()
    for document in corpus.documents("held_out"):
        for piece in corpus.cut(document):
            if len(piece) >= corpus.SHORTEST_EXAMPLE and piece not in seen:
                seen.add(piece)
                found[part_of(document.name)].append(piece)
    return found
