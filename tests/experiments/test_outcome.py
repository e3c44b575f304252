"""What a row says: how long an answer may be."""

import pytest
from transformers import AutoTokenizer

from experiments.outcome import room
from experiments.tasks import Item
from gns.corpus import base_model_path


@pytest.mark.parametrize(("most", "expected"), [(256, 4 * 7), (20, 20)])
def test_an_answer_may_take_four_times_the_longest_solution_and_no_more_than_an_example(most, expected):
    tokenizer = AutoTokenizer.from_pretrained(base_model_path())
    items = [Item("a", response, "1") for response in ("!", "! ! ! !", "!")]
    assert len(tokenizer("! ! ! !", add_special_tokens=False)["input_ids"]) == 7
    assert room(items, tokenizer, most) == expected
