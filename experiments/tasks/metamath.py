"""`metamath-gsm8k`: learn MetaMathQA, be tested on GSM8K (the first pair of arXiv:2602.09492).

MetaMathQA rephrases the training problems of GSM8K and MATH several times each. Validation holds out a
fiftieth of those original problems with all their rephrasings; the test set is GSM8K's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from experiments.configs import RunError
from experiments.tasks.hub import HubRows, for_validation, prompt, records, taught
from experiments.tasks.items import Item

MARK = re.compile(r"the answer is:?|####", re.IGNORECASE)
NUMBER = re.compile(r"[-+]?(?:\d[\d,]*)?(?:\.\d+|\d)(?:\s*/\s*\d+)?")
ONLY_NUMBER = re.compile(rf"\\?(?:{NUMBER.pattern})\\?%?|-?\\d?frac\{{\d+\}}\{{\d+\}}")
FRACTION = re.compile(r"\\d?frac\{(\d+)\}\{(\d+)\}")
FUNCTION = re.compile(r"\\(?:sqrt|pi)\b")
CALCULATOR = re.compile(r"<<[^>]*>>")  # GSM8K's marks for a calculator, which MetaMathQA has not
SAID = "The answer is: "


@dataclass(frozen=True)
class MetaMath(HubRows):
    """Mathematics problems.

    Args:
        merged: as in `Rows`.
        copies: as in `Rows`.
        data: MetaMathQA: columns query, response, type; original_question where it is there.
        test_data: GSM8K: columns question, answer.
        first: as in `HubRows`; the paper uses the first 100,000.
        longest: as in `HubRows`.
    """

    data: str = "meta-math/MetaMathQA"
    test_data: str = "openai/gsm8k"

    name: ClassVar[str] = "metamath-gsm8k"

    def right(self, item: Item, generated: str) -> bool:
        """Whether the generated answer is the same number, or for want of a number the same text."""
        return item.answer is not None and same(extracted(generated), item.answer)

    def _items(self, *, validation: bool) -> list[Item]:
        columns = self._columns("query", "response", "type")
        groups = columns.get("original_question", columns["query"])
        return [
            Item(prompt(query), f" {response.strip()}", extracted(response))
            for query, response, group in zip(columns["query"], columns["response"], groups, strict=True)
            if taught(query, response)
            and for_validation(group or query) == validation
            and self._short(query, response)
        ]

    def _pairs(self) -> tuple[Sequence[str], Sequence[str]]:
        columns = self._columns("query", "response", "type")
        return columns["query"], columns["response"]

    def _tested(self) -> list[Item]:
        return [_gsm8k(r) for r in records(self.test_data, "test", ("question", "answer"), "main")]


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
