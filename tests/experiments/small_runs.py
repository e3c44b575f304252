"""Runs that take a tenth of a second: a tiny base in a folder, and a task of short random sentences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from experiments.configs import RunConfig
from experiments.tasks import Item
from tests.gns import tiny

OFFSETS = {"validation": 1_000, "test": 2_000}


@dataclass(frozen=True)
class Sentences:
    """Item i is a function of i alone, so the sets are nested and disjoint; the answer is its first word."""

    name: ClassVar[str] = "sentences"
    answered: bool = True
    prompted: bool = True

    def _item(self, i: int) -> Item:
        prompt, response = tiny.sentences(2, seed=i, longest=9)
        return Item(
            f"{prompt} " if self.prompted else "", response, response.split()[0] if self.answered else None
        )

    def train(self, n: int, seed: int) -> list[Item]:
        return [self._item(100_000 * (seed + 1) + i) for i in range(n)]

    def held_out(self, split: str, n: int) -> list[Item]:
        return [self._item(OFFSETS[split] + i) for i in range(n)]

    def right(self, item: Item, generated: str) -> bool:
        return generated.split()[:1] == [item.answer]


def config(base: str, **changed) -> RunConfig:
    """A run of four steps over 30 sentences; the last step has 6."""
    common = dict(task="sentences", n_train=30, batch_size=8, rank=4, lr=1e-2, n_eval=6, max_length=48)
    return RunConfig(base, **{**common, **changed})


def without_times(row: dict) -> dict:
    """A row without what another run of the same configuration need not repeat."""
    return {name: value for name, value in row.items() if name not in ("seconds", "started")}
