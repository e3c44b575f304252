"""`metamath-gsm8k`: learn MetaMathQA, be tested on GSM8K (the first pair of arXiv:2602.09492).

MetaMathQA rephrases the training problems of GSM8K and MATH several times each. Validation holds out a
fiftieth of those original problems with all their rephrasings; the test set is GSM8K's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import ClassVar

from experiments.configs import RunError
from experiments.tasks.hub import for_validation, prompt, records
from experiments.tasks.items import Item, Rows, known_split, take, whole_dial

MARK = re.compile(r"the answer is:?|####", re.IGNORECASE)
NUMBER = re.compile(r"[-+]?(?:\d[\d,]*)?(?:\.\d+|\d)(?:\s*/\s*\d+)?")
ONLY_NUMBER = re.compile(rf"\\?(?:{NUMBER.pattern})\\?%?|-?\\d?frac\{{\d+\}}\{{\d+\}}")
FRACTION = re.compile(r"\\d?frac\{(\d+)\}\{(\d+)\}")
FUNCTION = re.compile(r"\\(?:sqrt|pi)\b")
CALCULATOR = re.compile(r"<<[^>]*>>")  # GSM8K's marks for a calculator, which MetaMathQA has not
SAID = "The answer is: "


@dataclass(frozen=True)
class MetaMath(Rows):
    """Mathematics problems.

    Args:
        merged: as in `Rows`.
        copies: as in `Rows`.
        data: MetaMathQA: columns query, response, type; original_question where it is there.
        test_data: GSM8K: columns question, answer.
        first: use only the first so many records of `data`, as the paper does; None: all.
        longest: leave out records of `data` with more characters than this; None: none.
    """

    data: str = "meta-math/MetaMathQA"
    test_data: str = "openai/gsm8k"
    first: int | None = None
    longest: int | None = None

    name: ClassVar[str] = "metamath-gsm8k"

    def __post_init__(self) -> None:
        super().__post_init__()
        for dial in ("first", "longest"):
            if getattr(self, dial) is not None:
                whole_dial(self, dial, 1)

    def train(self, n: int, seed: int) -> list[Item]:
        """Give `n` rows of MetaMathQA in an order of this seed."""
        items = self._items(validation=False)
        Random(f"metamath {seed}").shuffle(items)
        return self.rows(take(items, self.examples_for(n), f"the training part of {self.data}"), n)

    def held_out(self, split: str, n: int) -> list[Item]:
        """Give the first `n` items of a split: MetaMathQA's own for validation, GSM8K's test set."""
        known_split(split)
        if split == "validation":
            return take(self._items(validation=True), n, f"the validation part of {self.data}")
        found = records(self.test_data, "test", ("question", "answer"), "main")
        return take([_gsm8k(record) for record in found], n, f"{self.test_data} (test)")

    def right(self, item: Item, generated: str) -> bool:
        """Whether the generated answer is the same number, or for want of a number the same text."""
        return item.answer is not None and same(extracted(generated), item.answer)

    def _items(self, *, validation: bool) -> list[Item]:
        """Give all items of one part, in the data's order."""
        found = records(self.data, "train", ("query", "response", "type"))
        n = len(found) if self.first is None else min(self.first, len(found))
        columns = found[:n]
        groups = columns.get("original_question", columns["query"])
        return [
            Item(prompt(query), f" {response.strip()}", extracted(response))
            for query, response, group in zip(columns["query"], columns["response"], groups, strict=True)
            if for_validation(group) == validation
            and (self.longest is None or len(query) + len(response) <= self.longest)
        ]


def _gsm8k(record: Mapping[str, str]) -> Item:
    """An item of GSM8K in the words that MetaMathQA teaches: no calculator marks, the answer said at the end.

    Raises:
        RunError: the answer has no mark.
    """
    worked, mark, answer = record["answer"].rpartition("####")
    if not mark:
        raise RunError(f"GSM8K: no '#### ' before the answer in {record['answer'][-60:]!r}")
    answer = answer.strip()
    solution = f"{CALCULATOR.sub('', worked).strip()}\n#### {answer}\n{SAID}{answer}"
    return Item(prompt(record["question"]), f" {solution}", answer)


def extracted(text: str) -> str:
    """Give the answer in a text: what follows the last "The answer is:" or "####" on its line.

    Without either mark it is the last number; without a number, nothing.
    """
    marks = list(MARK.finditer(text))
    if marks:
        said = text[marks[-1].end() :].strip()
        return said.splitlines()[0].strip().rstrip(".").strip() if said else ""
    numbers = NUMBER.findall(text)
    return numbers[-1] if numbers else ""


def same(given: str, answer: str) -> bool:
    """Whether a given answer is the right one.

    As a number (commas, $, % and units left aside) where the right one is nothing but a number, else as text
    without blanks and dollar signs.
    """
    plain_given, plain = (re.sub(r"[\s$]", "", text) for text in (given, answer))
    if not plain or plain_given == plain:
        return bool(plain)
    value = number(answer)
    return bool(ONLY_NUMBER.fullmatch(plain)) and value is not None and number(given) == value


def number(text: str) -> Fraction | None:
    r"""Read the first number of an answer: "$1,234.50", "20%", "3/4", "\frac{3}{4}", "-7 degrees".

    None if there is none, or if it is a part of something else (a root, a multiple of π).
    """
    text = FRACTION.sub(r"\1/\2", text)
    found = NUMBER.search(text)
    if found is None or FUNCTION.search(text):
        return None
    above, _, below = found[0].replace(",", "").replace(" ", "").partition("/")
    if below and int(below) == 0:
        return None
    return Fraction(above) / int(below or 1)
