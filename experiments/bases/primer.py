"""The primer: generated sheets of calculations and one-step word problems.

    A jar holds 14 beans. It is a cold day. Tom adds 7. That makes
    14 + 7 = 21, so the result is 21.

It is apart from `wordmath`, which a base is fine-tuned on afterwards (`experiments.tasks.stories`): people,
things and sentences are others, and the one-step calculations are those of wordmath's training part only, so
no calculation that wordmath holds out at one step was ever learned. Its own held-out sheets are of the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

from experiments.tasks.items import part_of
from experiments.tasks.stories import Chain, draw_chain
from gns.corpus import Document, Part

PEOPLE = (
    "Anna", "Ben", "Carl", "Diana", "Emil", "Fay", "George", "Helen", "Ivan", "Julia", "Kurt", "Lena", "Max",
    "Nora", "Oscar", "Paula", "Robert", "Susan", "Tom", "Walter",
)  # fmt: skip
GOODS = (
    "beans", "coins", "nails", "bricks", "cards", "books", "eggs", "boxes", "pens", "apples", "cups", "bolts",
    "stones", "keys", "balls", "tickets", "chairs", "bottles", "nuts", "cakes",
)  # fmt: skip
# A story is a first clause, now and then a filler, a second clause and a lead to the calculation. They are
# many, so that what is learned is to find the numbers and not to know the sentence.
FIRST = (
    "A jar holds {a} {goods}.",
    "{one} counts {a} {goods}.",
    "A shop keeps {a} {goods}.",
    "We see {a} {goods} in a box.",
    "On Monday {one} had {a} {goods}.",
    "{one} came with {a} {goods}.",
    "A crate of {a} {goods} stands here.",
    "{one} and {two} share {a} {goods}.",
    "Last year the club bought {a} {goods}.",
    "Take {a} {goods}.",
    "The number of {goods} is {a}.",
    "{a} {goods} lie on a shelf.",
)
FILLERS = (
    "They are old.",
    "{two} is watching.",
    "It is a cold day.",
    "Some of the {goods} are red.",
    "Nobody knows why.",
    "{one} likes {goods} a lot.",
    "The door is open.",
    "This was before lunch.",
)
SECOND = {
    "+": (
        "{b} {goods} are put on top.",
        "{two} adds {b}.",
        "{one} receives another {b} {goods}.",
        "A truck delivers {b} extra {goods}.",
        "Behind the door we find {b} too.",
        "The next day {b} were bought.",
        "Add {b} to that.",
        "There is room for {b} besides, and it is filled.",
    ),
    "-": (
        "{b} {goods} are removed.",
        "{two} borrows {b}.",
        "{one} drops and breaks {b} {goods}.",
        "A customer pays for {b} and leaves with them.",
        "But {b} had to be thrown away.",
        "Rain spoils {b} {goods}.",
        "Subtract {b} from that.",
        "{one} sends {b} back to {two}.",
    ),
    "*": (
        "The same again is done {b} times in all.",
        "{two} owns {b} such lots.",
        "Multiply that by {b}.",
        "Every one of {b} rooms gets that many.",
    ),
    "/": (
        "They are set out in {b} equal rows, and we look at a single row.",
        "{two} pays in {b} equal parts, and we want one part.",
        "Divide that by {b}.",
        "{b} people get equal parts, and {one} is one of these.",
    ),
}
# Short ones, with two numbers close to their calculation: without them no base found the numbers in stories.
NOTES = {
    "+": (
        "{a} and {b} more:",
        "{a} {goods} plus {b} {goods},",
        "{one} {a}, {two} {b}, both",
        "first {a}, then {b},",
    ),
    "-": (
        "{a} without {b}:",
        "{a} {goods} minus {b} {goods},",
        "{one} had {a}, lost {b},",
        "{b} less than {a}:",
    ),
    "*": ("{a} taken {b} times:", "{b} lots of {a} {goods},"),
    "/": ("{a} in {b} parts:", "one of {b} parts of {a} {goods},"),
}
LEADS = (
    "So we have",
    "That makes",
    "Result:",
    "The calculation is",
    "Let us see:",
    "We get",
    "Total:",
    "Now:",
)
CLOSINGS = (
    ", so the result is {c}.",
    ", which is {c} {goods}.",
    ". It is {c}.",
    ". Answer {c}",
    ", {c} {goods} altogether.",
    "",
)
BREAKS = (" ", "\n")  # before a calculation
NOTE_LINES = 14
LINES = 24  # calculations on a sheet of them
STORIES = 6  # word problems on a sheet of those


def documents(part: Part, n: int, seed: int = 0) -> list[Document]:
    """Give `n` sheets, by turns of calculations alone, of notes and of word problems.

    Args:
        part: "base" to learn from; "held_out": sheets of calculations that are on none of those.
        n: sheets.
        seed: of what is drawn.
    """
    rng = Random(f"primer {part} {seed}")
    chains = _chains(part, rng)
    return [Document(f"primer/{part}/{i}", _sheet(i, chains, rng)) for i in range(n)]


def _chains(part: Part, rng: Random) -> Iterator[Chain]:
    """Yield one-step calculations of one part for ever."""
    while True:
        chain = draw_chain(1, rng)
        if (part_of(chain.key) == "train") == (part == "base"):
            yield chain


def _line(chain: Chain) -> str:
    return f"{chain.key} = {chain.results()[-1]}"


def _sheet(i: int, chains: Iterator[Chain], rng: Random) -> str:
    return (_drill, _notes, _stories)[i % 3](chains, rng)


def _drill(chains: Iterator[Chain], rng: Random) -> str:
    """Calculations, one a line."""
    return "\n".join(_line(next(chains)) for _ in range(LINES)) + "\n"


def _notes(chains: Iterator[Chain], rng: Random) -> str:
    """Short notes, one a line."""
    return "\n".join(_note(next(chains), rng) for _ in range(NOTE_LINES)) + "\n"


def _stories(chains: Iterator[Chain], rng: Random) -> str:
    """Word problems with worked solutions, with a blank line between them."""
    return "\n\n".join(_story(next(chains), rng) for _ in range(STORIES)) + "\n"


def _words(chain: Chain, rng: Random) -> dict[str, Any]:
    """What a sentence is filled with."""
    ((_, b),) = chain.steps
    one, two = rng.sample(PEOPLE, 2)
    return {"one": one, "two": two, "goods": rng.choice(GOODS), "a": chain.start, "b": b}


def _note(chain: Chain, rng: Random) -> str:
    ((sign, _),) = chain.steps
    return f"{rng.choice(NOTES[sign]).format(**_words(chain, rng))} {_line(chain)}"


def _story(chain: Chain, rng: Random) -> str:
    ((sign, _),) = chain.steps
    filler = rng.choice(FILLERS) if rng.random() < 0.5 else ""
    told = [rng.choice(FIRST), filler, rng.choice(SECOND[sign]), rng.choice(LEADS)]
    words = _words(chain, rng)
    before = " ".join(part for part in told if part).format(**words)
    closing = rng.choice(CLOSINGS).format(c=chain.results()[-1], **words)
    return f"{before}{rng.choice(BREAKS)}{_line(chain)}{closing}"
