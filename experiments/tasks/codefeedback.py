"""`codefeedback-humaneval`: learn CodeFeedback, be tested on HumanEval (the second pair of arXiv:2602.09492).

Generated programs run only where the dial `execute` allows it, within the limits of `sandbox.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from experiments.configs import RunError
from experiments.tasks.hub import HubRows, for_validation, prompt, records, taught
from experiments.tasks.items import Item, whole_dial
from experiments.tasks.sandbox import passes

ASK = "Complete this Python function.\n```python\n{code}\n```"
BLOCK = re.compile(r"```[ \t]*\w*[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)
MAIN = re.compile(r'^if __name__ == [\'"]__main__[\'"]:', re.MULTILINE)


@dataclass(frozen=True)
class CodeFeedback(HubRows):
    """Programming tasks.

    Args:
        merged: as in `Rows`.
        copies: as in `Rows`.
        data: CodeFeedback-Filtered-Instruction: columns query, answer, lang, resource.
        test_data: HumanEval: columns task_id, prompt, entry_point, canonical_solution, test.
        lang: use only records of this language, e.g. "python"; None: all.
        first: as in `HubRows`.
        longest: as in `HubRows`.
        execute: run generated programs to score them. They are a model's, and no sandbox is perfect.
        seconds: that a program may take.
    """

    data: str = "m-a-p/CodeFeedback-Filtered-Instruction"
    test_data: str = "openai/openai_humaneval"
    lang: str | None = None
    execute: bool = False
    seconds: int = 5

    name: ClassVar[str] = "codefeedback-humaneval"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_dial(self, "seconds", 1)
        if not isinstance(self.execute, bool):
            raise RunError(f"dial execute is {self.execute!r}; true or false is needed")

    def right(self, item: Item, generated: str) -> bool:
        """Whether the generated function passes the item's tests; runs it.

        Raises:
            RunError: programs may not run, by the dial `execute`.
        """
        if not self.execute:
            raise RunError("scoring HumanEval runs generated programs; allow it by the dial execute = true")
        return item.answer is not None and passes(program(item.answer, generated), seconds=self.seconds)

    def _items(self, *, validation: bool) -> list[Item]:
        columns = self._columns("query", "answer", "lang", "resource")
        return [
            Item(prompt(query), f" {answer.strip()}")
            for query, answer, lang in zip(columns["query"], columns["answer"], columns["lang"], strict=True)
            if taught(query, answer)
            and self.lang in (None, lang)
            and for_validation(query) == validation
            and self._short(query, answer)
        ]

    def _pairs(self) -> tuple[Sequence[str], Sequence[str]]:
        columns = self._columns("query", "answer", "lang", "resource")
        return columns["query"], columns["answer"]

    def _tested(self) -> list[Item]:  # they have an answer if programs may run
        needed = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
        return [self._humaneval(record) for record in records(self.test_data, "test", needed)]

    def _humaneval(self, record: Mapping[str, str]) -> Item:
        """An item in the form that CodeFeedback teaches: the whole function in a fenced block."""
        known = {key: record[key] for key in ("prompt", "entry_point", "test")}
        code = f"{record['prompt'].rstrip()}\n{record['canonical_solution'].rstrip()}"
        return Item(
            prompt(ASK.format(code=record["prompt"].strip())),
            f" ```python\n{code.strip()}\n```",
            json.dumps(known) if self.execute else None,
        )


def program(answer: str, generated: str) -> str:
    """Put a generated function and the tests of its item together; the program fails unless they pass."""
    known = json.loads(answer)
    name, asked = known["entry_point"], known["prompt"]
    code = _code(generated, name)
    if _defines(code, name):  # a whole function; imports and helpers that the prompt gave go before it
        code = f"{asked[: _start(asked, name)]}\n{code}"
    else:  # a body that goes on where the prompt stops
        code = f"{asked}{code}"
    return f"{code}\n\n{known['test']}\n\ncheck({name})\n"


def _code(generated: str, name: str) -> str:
    """Take the fenced block that defines the function, else the first one, else all; without a main part."""
    blocks = BLOCK.findall(generated)
    code = next((block for block in blocks if _defines(block, name)), blocks[0] if blocks else generated)
    return MAIN.split(code)[0]


def _defines(code: str, name: str) -> bool:
    return re.search(rf"^def {re.escape(name)}\b", code, re.MULTILINE) is not None


def _start(asked: str, name: str) -> int:
    """Where the asked function begins in its prompt; its end if it is not there."""
    found = re.search(rf"^def {re.escape(name)}\b", asked, re.MULTILINE)
    return found.start() if found else len(asked)
