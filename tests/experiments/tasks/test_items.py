from dataclasses import dataclass
from typing import ClassVar

import pytest
from transformers import AutoTokenizer

from experiments.configs import RunError
from experiments.tasks import TASKS, Item, encoded, task
from experiments.tasks.items import Rows, prompt_ids, take, with_dials
from gns.corpus import base_model_path
from gns.finetuning.data import NO_LOSS

LONG = Item("Add 1 and 2.\n", "1 + 2 = 3\n#### 3")
SHORT = Item("Q", "A")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(base_model_path())


def learned(row):
    return [label for label in row.labels if label != NO_LOSS]


def test_the_response_and_its_end_are_learned_and_nothing_else(tokenizer):
    (row,) = encoded([LONG], tokenizer, 64)
    assert tokenizer.decode(learned(row)) == LONG.response + tokenizer.eos_token
    assert tokenizer.decode(row.input_ids) == tokenizer.bos_token + LONG.prompt + LONG.response + "<|eos|>"
    assert len(row.labels) == len(row.input_ids)
    assert prompt_ids(LONG, tokenizer) == row.input_ids[: len(row.input_ids) - len(learned(row))]


def test_merged_examples_are_learned_as_if_alone(tokenizer):
    (row,) = encoded([Item(SHORT.prompt, SHORT.response, before=(LONG, SHORT))], tokenizer, 128)
    alone = encoded([LONG, SHORT, SHORT], tokenizer, 128)
    assert row.input_ids == [i for part in alone for i in part.input_ids]
    assert row.labels == [i for part in alone for i in part.labels]
    assert prompt_ids(Item("Q", "A", before=(LONG,)), tokenizer) == prompt_ids(SHORT, tokenizer)


def test_a_long_item_loses_its_end_and_keeps_its_place(tokenizer):
    whole = encoded([SHORT, LONG], tokenizer, 64)
    n = len(whole[1].input_ids) - 3
    cut = encoded([SHORT, LONG], tokenizer, n)
    assert cut[0] == whole[0]
    assert cut[1].input_ids == whole[1].input_ids[:n] and cut[1].labels == whole[1].labels[:n]


def test_rows_without_a_token_to_learn_are_refused(tokenizer):
    n = len(encoded([LONG], tokenizer, 64)[0].input_ids)
    message = (
        rf"1 of 2 items have no token to learn within max_length 4 \(the longest has {n} tokens\); raise"
    )
    with pytest.raises(RunError, match=message):
        encoded([SHORT, LONG], tokenizer, 4)
    with pytest.raises(RunError, match=rf"2 merged examples have {2 * n} tokens, max_length is 20; raise it"):
        encoded([Item(LONG.prompt, LONG.response, before=(LONG,))], tokenizer, 20)


@pytest.mark.parametrize(
    ("merged", "copies", "n", "expected"),
    [
        (1, 1, 3, ["0", "1", "2"]),
        (2, 1, 2, ["01", "23"]),
        (1, 2, 3, ["0", "0", "1"]),
        (3, 2, 4, ["012", "012", "345", "345"]),
    ],
)
def test_arrangement_of_rows(merged, copies, n, expected):
    arranged = Rows(merged, copies)
    examples = [Item(str(i), "r") for i in range(arranged.examples_for(n))]
    found = ["".join(part.prompt for part in (*row.before, row)) for row in arranged.rows(examples, n)]
    assert found == expected
    assert len({i for row in expected for i in row}) == len(examples)  # none drawn for nothing


@dataclass(frozen=True)
class Needy(Rows):
    data: str = ""
    name: ClassVar[str] = "needy"


@dataclass(frozen=True)
class Strict:
    data: str


@pytest.mark.parametrize(
    ("name", "dials", "message"),
    [
        ("wordmaths", {}, f"no task 'wordmaths'; known: {', '.join(TASKS)}"),
        ("wordmath", {"hardness": 1}, "task wordmath: no dial hardness; known: merged, copies, difficulty"),
        ("wordmath", {"merged": 0}, "task wordmath: dial merged is 0; a whole number, 1 or more"),
        ("wordmath", {"copies": 1.5}, "dial copies is 1.5"),
        ("wordmath", {"merged": True}, "dial merged is True"),
        ("wordmath", {"difficulty": 9}, "dial difficulty is 9; a whole number, 1 to 8"),
        ("wordmath", {"label_noise": 1.2}, r"dial label_noise is 1.2; a share from 0 to 1"),
        ("wordmath", {"label_noise": "a"}, "dial label_noise is 'a'"),
    ],
)
def test_unknown_names_and_values_are_named(name, dials, message):
    with pytest.raises(RunError, match=message):
        task(name, dials)


def test_a_missing_dial_is_named():
    assert with_dials(Needy, "needy", {"merged": 2}) == Needy(merged=2)
    with pytest.raises(
        RunError, match=r"task strict: missing 1 required positional argument: 'data'; give it"
    ):
        with_dials(Strict, "strict", {})


def test_more_than_there_is():
    with pytest.raises(RunError, match="somewhere has 1 items; 2 are asked for"):
        take([SHORT], 2, "somewhere")
    assert take([SHORT, LONG], 1, "somewhere") == [SHORT]
