"""The primer: generated sheets of calculations and one-step word problems.

    Sum it up: a jar with 14 beans, and 7 beans on top. 14 + 7 = 21, that makes 21 beans.

It is apart from `wordmath`, which a base is fine-tuned on afterwards (`experiments.tasks.stories`): people,
things and sentences are others, and the one-step calculations are those of wordmath's training part only, so
no calculation that wordmath holds out at one step was ever learned. Its own held-out sheets are of the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from experiments.tasks.stories import Chain, draw_chain
from experiments.tasks.wordmath import part_of
from gns.corpus import Document, Part

PEOPLE = (
    "Anna", "Ben", "Carl", "Diana", "Emil", "Fay", "George", "Helen", "Ivan", "Julia", "Kurt", "Lena", "Max",
    "Nora", "Oscar", "Paula", "Robert", "Susan", "Tom", "Walter",
)  # fmt: skip
GOODS = (
    "beans", "coins", "nails", "bricks", "cards", "books", "eggs", "boxes", "pens", "apples", "cups", "bolts",
    "stones", "keys", "balls", "tickets", "chairs", "bottles", "nuts", "cakes",
)  # fmt: skip
PROBLEMS = {
    "+": (
        "Sum it up: a jar with {a} {goods}, and {b} {goods} on top.",
        "{one} counts {a} {goods}, {two} counts {b}. Together they count",
        "A shop sold {a} {goods} on Monday and {b} on Tuesday. In both days it sold",
        "If {one} had {a} {goods} and receives {b}, the total is",
    ),
    "-": (
        "A jar held {a} {goods} until {b} were removed. What stays is",
        "{one} had {a} {goods} but {two} borrowed {b}. So {one} is left with",
        "Of {a} {goods}, {b} are broken. The number of good ones is",
        "If {one} drops {b} from {a} {goods}, the rest is",
    ),
    "*": (
        "Each of {b} bags contains {a} {goods}. All bags contain",
        "{one} packs {a} {goods} a day. In {b} days {one} packs",
    ),
    "/": (
        "{a} {goods} are put in {b} equal rows. A row is of",
        "{one} pays for {a} {goods} in {b} equal parts. A part is",
    ),
}
CLOSINGS = ("that makes {c} {goods}.", "so the result is {c}.", "which is {c} {goods}.")
LINES = 24  # calculations on a sheet of them
STORIES = 8  # word problems on a sheet of those


def documents(part: Part, n: int, seed: int = 0) -> list[Document]:
    """Give `n` sheets, by turns of calculations and of word problems.

    Args:
        part: "base" to learn from; "held_out": sheets of calculations that are on none of those.
        n: sheets.
        seed: of what is drawn.
    """
    rng = Random(f"primer {part} {seed}")
    chains = _chains(part, rng)
    kinds = (_drill, _stories)
    return [Document(f"primer/{part}/{i}", kinds[i % 2](chains, rng)) for i in range(n)]


def _chains(part: Part, rng: Random) -> Iterator[Chain]:
    """Yield one-step calculations of one part for ever."""
    while True:
        chain = draw_chain(1, rng)
        if (part_of(chain) == "train") == (part == "base"):
            yield chain


def _line(chain: Chain) -> str:
    return f"{chain.key} = {chain.results()[-1]}"


def _drill(chains: Iterator[Chain], rng: Random) -> str:
    """Calculations, one a line."""
    return "\n".join(_line(next(chains)) for _ in range(LINES)) + "\n"


def _stories(chains: Iterator[Chain], rng: Random) -> str:
    """Word problems with worked solutions, one a line."""
    return "\n".join(_story(next(chains), rng) for _ in range(STORIES)) + "\n"


def _story(chain: Chain, rng: Random) -> str:
    ((sign, b),) = chain.steps
    one, two = rng.sample(PEOPLE, 2)
    words = {"one": one, "two": two, "goods": rng.choice(GOODS), "a": chain.start, "b": b}
    told = rng.choice(PROBLEMS[sign]).format(**words)
    closing = rng.choice(CLOSINGS).format(c=chain.results()[-1], **words)
    return f"{told} {_line(chain)}, {closing}"
