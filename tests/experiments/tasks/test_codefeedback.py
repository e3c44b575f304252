import json

import pytest

from experiments.configs import RunError
from experiments.tasks import codefeedback, task


@pytest.fixture
def coding(data):
    def make(**dials):
        files = {"data": str(data / "codefeedback.jsonl"), "test_data": str(data / "humaneval.jsonl")}
        return task("codefeedback-humaneval", files | dials)

    return make


@pytest.fixture
def records(data):
    return [json.loads(line) for line in (data / "codefeedback.jsonl").read_text().splitlines()]


def test_records_become_items(coding, records):
    items = coding().train(5, 0)
    validation = coding().held_out("validation", 2)
    found = {
        item.prompt.partition("### Instruction:\n")[2].partition("\n\n### Response:")[0]: item
        for item in items
    }
    assert len(found) == 5 and not {item.prompt for item in items} & {item.prompt for item in validation}
    by_query = {record["query"]: record for record in records}
    for query, item in found.items():
        assert item.response == " " + by_query[query]["answer"] and item.answer is None
    assert coding().train(2, 0) == items[:2] and coding().train(5, 1) != items


@pytest.mark.parametrize(
    ("dials", "n"), [({"lang": "python"}, 3), ({"lang": "sql"}, 1), ({"first": 3}, 2), ({"longest": 1}, 0)]
)
def test_dials_that_leave_records_out(dials, n, coding):
    with pytest.raises(RunError, match=f"has {n} items; 9 are asked for"):
        coding(**dials).train(9, 0)


def test_nothing_runs_unless_allowed(coding, monkeypatch):
    monkeypatch.setattr(codefeedback, "passes", lambda *a, **k: pytest.fail("it ran"))
    (item, _) = coding().held_out("test", 2)
    assert item.answer is None
    with pytest.raises(RunError, match="allow it by the dial execute = true"):
        coding().right(item, item.response)
    with pytest.raises(RunError, match="dial execute is 'yes'; true or false"):
        coding(execute="yes")


@pytest.mark.parametrize("i", [0, 1])
def test_the_canonical_solution_passes_and_a_wrong_one_fails(i, coding):
    humaneval = coding(execute=True)
    item = humaneval.held_out("test", 2)[i]
    assert "```python\n" in item.prompt and item.prompt.endswith("### Response:")
    assert humaneval.right(item, item.response)
    assert not humaneval.right(item, item.response.replace("return ", "return 1 + "))
    assert not humaneval.right(item, "")


WHOLE = "def total(numbers: List[int]) -> int:\n    return sum(numbers)"


@pytest.mark.parametrize(
    ("generated", "right"),
    [
        (f"Here:\n\n```python\n{WHOLE}\n```\nIt adds.", True),
        (f"```\n{WHOLE}", True),
        (WHOLE, True),
        ("    return sum(numbers)\n", True),
        (f"```bash\npip install x\n```\n```python\n{WHOLE}\n```", True),
        (f"```python\nimport math\n\n{WHOLE}\n\nif __name__ == '__main__':\n    input()\n```", True),
        ("```python\ndef totals(numbers):\n    return sum(numbers)\n```", False),
        ("It cannot be done.", False),
        ("import os\nos._exit(0)", False),
        (f"```python\n{WHOLE}\nraise SystemExit\n```", False),
    ],
)
def test_forms_of_an_answer(generated, right, coding):
    humaneval = coding(execute=True)
    assert humaneval.right(humaneval.held_out("test", 1)[0], generated) is right
