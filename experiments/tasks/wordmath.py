"""`wordmath`: seeded word problems of several steps with worked solutions and an exact-match answer.

Splits are disjoint by construction: a problem belongs to one of them by a hash of its calculation (numbers
and signs, without names or sentences), the same at every setting of the dials. So no calculation that is held
out is ever learned, in no story.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from experiments.configs import RunError
from experiments.tasks.items import Item, Rows, known_split, part_of, whole_dial
from experiments.tasks.stories import MARK, Chain, draw_chain, tell

MOST_STEPS = 8
ANSWER = re.compile(re.escape(MARK) + r"(-?\d+)")


@dataclass(frozen=True)
class WordMath(Rows):
    """Word problems.

    Args:
        merged: as in `Rows`.
        copies: as in `Rows`.
        difficulty: steps of each problem.
        label_noise: share of the training problems whose results are all replaced by those of another problem
            of the same length, with another answer. Numbers and form keep their distribution, so the noise
            shrinks what gradients agree on and not their size. What is noisy at 20 % is so at 50 %, and
            nothing else changes. Held-out problems are always clean.
    """

    difficulty: int = 1
    label_noise: float = 0.0

    name: ClassVar[str] = "wordmath"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_dial(self, "difficulty", 1, MOST_STEPS)
        if not (isinstance(self.label_noise, int | float) and 0 <= self.label_noise <= 1):
            raise RunError(f"dial label_noise is {self.label_noise!r}; a share from 0 to 1 is needed")

    def train(self, n: int, seed: int) -> list[Item]:
        """Give `n` training rows drawn with this seed; no problem is there twice but by `copies`."""
        problems = self._problems("train", f"train {seed}")
        noise = Random(f"wordmath noise {self.difficulty} {seed}")
        examples = []
        for _ in range(self.examples_for(n)):
            prompt, chain = next(problems)
            wrong = _wrong_results(
                chain, noise
            )  # drawn for every problem: the next ones must not depend on it
            noisy = noise.random() < self.label_noise
            examples.append(_item(prompt, chain, wrong if noisy else chain.results()))
        return self.rows(examples, n)

    def held_out(self, split: str, n: int) -> list[Item]:
        """Give the first `n` problems of a split, single, clean and once each."""
        known_split(split)
        problems = self._problems(split, split)
        return [_item(prompt, chain, chain.results()) for prompt, chain in (next(problems) for _ in range(n))]

    def right(self, item: Item, generated: str) -> bool:
        """Whether the first answer after the mark is the item's."""
        found = ANSWER.search(generated)
        return found is not None and found[1] == item.answer

    def _problems(self, part: str, stream: str) -> Iterator[tuple[str, Chain]]:
        """Yield distinct problems of one part for ever: the prompt and its calculation."""
        rng = Random(f"wordmath {self.difficulty} {stream}")
        seen = set()
        while True:
            chain = draw_chain(self.difficulty, rng)
            if part_of(chain.key) != part:
                continue
            prompt = tell(chain, rng)
            if prompt not in seen:
                seen.add(prompt)
                yield prompt, chain


def _wrong_results(chain: Chain, rng: Random) -> list[int]:
    """Results of another calculation of the same length that ends in another number."""
    while True:
        results = draw_chain(len(chain.steps), rng).results()
        if results[-1] != chain.results()[-1]:
            return results


def _item(prompt: str, chain: Chain, results: list[int]) -> Item:
    """The answer of a noisy item is the wrong one that it teaches."""
    return Item(prompt, chain.worked(results), str(results[-1]))
