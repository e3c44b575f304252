"""A chain of calculations, the story that poses it, and its worked solution.

    Question: Nadia has 14 pears. Nadia gathers 7 more. Farid takes 5 of them. How many pears has Nadia now?
    14 + 7 = 21
    21 - 5 = 16
    #### 16

All numbers are whole, from 1 to `LARGEST`. Names, things and sentences are apart from those that the base
models learned (`experiments.bases.primer`; a test compares them): the arithmetic is shared, no story is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

LARGEST = 99  # of every number in a chain
LARGEST_CHANGE = 40  # added or taken away at once
FACTORS = (2, 3, 4, 5)
SIGNS = "+-+-+-*/"  # drawn uniformly from what fits; sums come three times as often as products

NAMES = (
    "Nadia", "Farid", "Greta", "Hassan", "Ingrid", "Jamal", "Keiko", "Luis", "Mbali", "Nils", "Olga", "Pedro",
    "Rosa", "Sanjay", "Thandi", "Umut", "Vera", "Wanjiru", "Yusuf", "Zoe",
)  # fmt: skip
THINGS = (
    "pears", "stamps", "marbles", "shells", "lemons", "badges", "candles", "ribbons", "walnuts", "postcards",
    "buttons", "tulips", "muffins", "feathers", "magnets", "carrots", "lanterns", "crayons", "cushions",
    "figs",
)  # fmt: skip
START = (
    "{name} has {n} {things}.",
    "In the morning {name} owns {n} {things}.",
    "There are {n} {things} on the table of {name}.",
)
SENTENCES = {
    "+": (
        "{name} gathers {n} more.",
        "Then {other} brings {n} new ones.",
        "Later {n} {things} come by mail.",
    ),
    "-": (
        "{other} takes {n} of them.",
        "Then {name} hands out {n}.",
        "On the way {n} {things} get lost.",
    ),
    "*": (
        "A week later there are {n} times as many.",
        "{name} trades them for {n} times as many.",
    ),
    "/": (
        "{name} splits them among {n} children and keeps the share of one.",
        "Only one out of every {n} is kept.",
    ),
}
ASK = (
    "How many {things} has {name} now?",
    "How many {things} are there in the end?",
    "What number of {things} remains?",
)
HEADER = "Question: "
MARK = "#### "  # before the answer, as in GSM8K


@dataclass(frozen=True)
class Chain:
    """A first number and the steps that change it, each a sign and a number."""

    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def key(self) -> str:
        """The calculation alone, without story or results; problems with equal keys are the same problem."""
        return " ".join([str(self.start), *(f"{sign} {n}" for sign, n in self.steps)])

    def results(self) -> list[int]:
        """The number after each step."""
        value, found = self.start, []
        for sign, n in self.steps:
            value = _apply(value, sign, n)
            found.append(value)
        return found

    def worked(self, results: Sequence[int]) -> str:
        """Write out the calculation with these results, one line a step, and the answer."""
        lines, value = [], self.start
        for (sign, n), result in zip(self.steps, results, strict=True):
            lines.append(f"{value} {sign} {n} = {result}")
            value = result
        return "\n".join([*lines, f"{MARK}{value}"])


def draw_chain(steps: int, rng: Random) -> Chain:
    """Draw a calculation whose numbers all lie from 1 to `LARGEST`."""
    start = value = rng.randint(2, LARGEST)
    drawn = []
    for _ in range(steps):
        sign, numbers = "", range(0)
        while not numbers:
            sign = rng.choice(SIGNS)
            numbers = _fitting(value, sign)
        drawn.append((sign, rng.choice(numbers)))
        value = _apply(value, *drawn[-1])
    return Chain(start, tuple(drawn))


def tell(chain: Chain, rng: Random) -> str:
    """Write a problem that poses the calculation; names, things and sentences are drawn."""
    name, other = rng.sample(NAMES, 2)
    words = {"name": name, "other": other, "things": rng.choice(THINGS)}
    told = [rng.choice(START).format(n=chain.start, **words)]
    told += [rng.choice(SENTENCES[sign]).format(n=n, **words) for sign, n in chain.steps]
    return f"{HEADER}{' '.join([*told, rng.choice(ASK).format(**words)])}\n"


def _fitting(value: int, sign: str) -> Sequence[int]:
    """Numbers that the sign may take from here."""
    if sign == "+":
        return range(2, min(LARGEST_CHANGE, LARGEST - value) + 1)
    if sign == "-":
        return range(2, min(LARGEST_CHANGE, value - 1) + 1)
    if sign == "*":
        return [n for n in FACTORS if value * n <= LARGEST]
    return [n for n in FACTORS if value % n == 0]


def _apply(value: int, sign: str, n: int) -> int:
    return {"+": value + n, "-": value - n, "*": value * n, "/": value // n}[sign]
