import json

import pytest

from experiments.configs import RunError
from experiments.tasks import Item, task
from experiments.tasks.metamath import extracted, number, same

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{}\n\n### Response:"
)


@pytest.fixture
def metamath(data):
    def make(**dials):
        files = {"data": str(data / "metamathqa.json"), "test_data": str(data / "gsm8k.jsonl")}
        return task("metamath-gsm8k", files | dials)

    return make


@pytest.fixture
def rows(data):
    return json.loads((data / "metamathqa.json").read_text())


def test_records_become_items_in_the_papers_prompt(metamath, rows):
    items = metamath().train(10, 0)
    by_prompt = {ALPACA.format(row["query"]): row for row in rows}
    for item in items:
        row = by_prompt[item.prompt]
        assert item.response == " " + row["response"]
        assert item.answer == row["response"].rpartition("The answer is: ")[2]
        assert metamath().right(item, item.response)


def test_originals_are_held_out_with_their_rephrasings(metamath, rows):
    original = {ALPACA.format(row["query"]): row["original_question"] for row in rows}
    train, validation = metamath().train(10, 0), metamath().held_out("validation", 4)
    groups = [{original[item.prompt] for item in part} for part in (train, validation)]
    assert not groups[0] & groups[1]
    assert len(train) + len(validation) == len(rows)
    for part, size in (("training", 10), ("validation", 4)):
        with pytest.raises(RunError, match=f"the {part} part of .*metamathqa.json has {size} items"):
            metamath().train(11, 0) if part == "training" else metamath().held_out(part, 5)


def test_rows_are_nested_and_shuffled_by_seed(metamath):
    items = metamath().train(10, 0)
    assert metamath().train(4, 0) == items[:4]
    others = metamath().train(10, 1)
    assert others != items and set(others) == set(items)
    assert len(metamath(merged=2).train(5, 0)) == 5 and len(metamath(copies=2).train(20, 0)) == 20
    assert metamath(merged=2).held_out("validation", 4) == metamath().held_out("validation", 4)


def test_dials_that_leave_records_out(metamath, rows):
    assert {item.prompt for item in metamath(first=4).train(4, 0)} == {
        ALPACA.format(row["query"]) for row in rows[:4]
    }
    longest = sorted(len(row["query"]) + len(row["response"]) for row in rows)[2]
    short = metamath(longest=longest).train(2, 0)
    assert all(len(i.prompt) - len(ALPACA.format("")) + len(i.response) - 1 <= longest for i in short)
    with pytest.raises(RunError, match="task metamath-gsm8k: dial longest is 0; a whole number"):
        metamath(longest=0)


@pytest.mark.parametrize("lost", [{"query": ""}, {"response": " \n"}, {"response": None}, {"query": None}])
def test_records_without_a_question_or_an_answer_are_left_out_and_counted(tmp_path, data, rows, lost):
    """Four of the 395,000 published records have no question; one such row used to end every run."""
    path = tmp_path / "odd.json"
    path.write_text(json.dumps([rows[0] | lost, *rows, rows[1] | lost]))
    odd, whole = (
        task("metamath-gsm8k", {"data": str(p), "test_data": str(data / "gsm8k.jsonl")})
        for p in (path, data / "metamathqa.json")
    )
    assert odd.train(10, 0) == whole.train(10, 0)
    assert odd.held_out("validation", 4) == whole.held_out("validation", 4)
    with pytest.raises(RunError, match="2 records without a question or an answer left out.* has 10 items"):
        odd.train(11, 0)


def test_gsm8k_in_the_words_that_are_taught(metamath):
    first, *others = metamath().held_out("test", 3)
    asked = "Ten crates hold 120 bottles each. 200 bottles are broken. How many bottles are whole?"
    assert first.prompt == ALPACA.format(asked)
    assert first.response.splitlines() == [
        " The crates hold 10 * 120 = 1200 bottles.",
        "So 1200 - 200 = 1,000 are whole.",
        "#### 1,000",
        "The answer is: 1,000",
    ]
    assert [item.answer for item in others] == ["40", "18"]
    assert metamath().right(first, "So it is 1000.\nThe answer is: 1000")
    assert not metamath().right(first, "The answer is: 1001")


def test_gsm8k_without_its_mark(tmp_path, data):
    path = tmp_path / "gsm8k.jsonl"
    path.write_text(json.dumps({"question": "Why?", "answer": "Because of 4."}) + "\n")
    with pytest.raises(RunError, match="GSM8K: no '#### ' before the answer in 'Because of 4.'"):
        task("metamath-gsm8k", {"test_data": str(path)}).held_out("test", 1)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 2 = 4\n#### 4\nThe answer is: 4", "4"),
        ("The answer is: 4\n\n### Instruction:\nAdd 7", "4"),
        ("The answer is: 3. No: the answer is 5.", "5"),
        ("the answer is $1,234.50.", "$1,234.50"),
        ("#### 18", "18"),
        ("So we have 12 and then 17 left.", "17"),
        ("The answer is:", ""),
        ("I do not know", ""),
    ],
)
def test_extraction(text, answer):
    assert extracted(text) == answer


@pytest.mark.parametrize(
    ("given", "answer", "right"),
    [
        ("1234", "1,234", True),
        ("$1,234.00", "1234", True),
        ("18 dollars", "18", True),
        ("20%", "20", True),
        (r"20\%", "20", True),
        ("0.5", "1/2", True),
        (r"\frac{3}{4}", "0.75", True),
        (r"$\frac{3}{4}$", r"\frac{3}{4}", True),
        ("-7", "7", False),
        ("+7", "7", True),
        (".5", "0.5", True),
        ("72", "7", False),
        ("1/0", "1", False),
        (r"2\sqrt{3}", "2", False),
        ("2", r"2\sqrt{3}", False),
        (r"2 \sqrt{3}", r"2\sqrt{3}", True),
        ("x + 1", "x+1", True),
        ("x", "y", False),
        ("", "", False),
        ("seven", "7", False),
    ],
)
def test_comparison(given, answer, right):
    assert same(given, answer) is right


def test_numbers():
    assert [number(text) for text in ("-1,000.25", "a 7 b", "none", "3 / 4")] == [-1000.25, 7, None, 0.75]


def test_an_item_without_an_answer_is_never_right(metamath):
    assert not metamath().right(Item("p", "r", None), "The answer is: 1")
