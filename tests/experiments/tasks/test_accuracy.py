import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from experiments.tasks import Item
from experiments.tasks.accuracy import _greedy, answers
from experiments.tasks.items import prompt_ids
from gns.corpus import base_model_path

PROMPTS = ["def ", "import os\nimport ", "class Reader:\n    def __init__(self, source):\n        self.", "x"]
ITEMS = [Item(prompt, "-", None) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(base_model_path())


@pytest.fixture(scope="module")
def model():
    # float64: a tie between two tokens that rounding could break differently is then out of question
    return AutoModelForCausalLM.from_pretrained(base_model_path(), dtype=torch.float64)


def one_by_one(model, tokenizer, item, most):
    """Slow twin: no padding, no cache, the whole text again for every token."""
    ids, new = prompt_ids(item, tokenizer), []
    for _ in range(most):
        with torch.no_grad():
            new.append(
                int(model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax())
            )
        if new[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize(("batch_size", "first"), [(1, 32), (3, 32), (8, 32), (3, 2), (8, 5)])
def test_a_batch_answers_as_one_by_one(batch_size, first, model, tokenizer, monkeypatch):
    """Also where answers are gathered anew, after 2, 4 and 8 tokens or 5 and 10."""
    monkeypatch.setattr("experiments.tasks.accuracy.FIRST", first)
    found = answers(model, tokenizer, ITEMS, max_new_tokens=12, batch_size=batch_size)
    assert found == [one_by_one(model, tokenizer, item, 12) for item in ITEMS]
    assert len(set(found)) > 1


def test_an_unmasked_padding_would_be_noticed(model, tokenizer):
    """The control: with padding that attention sees, some answer differs."""
    real = model.forward

    def unmasked(*, attention_mask, **given):
        return real(attention_mask=torch.ones_like(attention_mask), **given)

    expected = answers(model, tokenizer, ITEMS, max_new_tokens=12, batch_size=8)
    model.forward = unmasked
    try:
        assert answers(model, tokenizer, ITEMS, max_new_tokens=12, batch_size=8) != expected
    finally:
        model.forward = real


def test_an_answer_ends_at_its_end_token_and_the_loop_with_the_last(tokenizer):
    model = Scripted(tokenizer.eos_token_id, ends=[2, 4])
    items = [Item("a", "-"), Item("a b c d e f g", "-")]
    found = answers(model, tokenizer, items, max_new_tokens=50, batch_size=2)
    assert [len(tokenizer(text)["input_ids"]) - 1 for text in found] == [2, 4]
    assert model.calls == 5  # the longest answer and its end token, not 50


@pytest.mark.parametrize(("together", "last"), [(1, 1), (2, 2)])
def test_what_comes_to_no_end_goes_on_alone(tokenizer, monkeypatch, together, last):
    """Six answers; the fourth takes 12 tokens: the others are not made again, or its companion alone."""
    monkeypatch.setattr("experiments.tasks.accuracy.FIRST", 4)
    model = Ending(tokenizer, {"d": 12})
    items = [Item(letter, "-") for letter in "abcdef"]
    if together == 2:  # two of one prompt side by side, as the slots of a program ask
        items = [Item(letter, "-") for letter in "aabbccddeeff"]
    found = answers(model, tokenizer, items, max_new_tokens=50, batch_size=2 * together, together=together)
    assert [len(tokenizer(text)["input_ids"]) - 1 for text in found] == [
        12 if item.prompt == "d" else 2 for item in items
    ]
    first = [2 * together] * (3 + 4 + 3)  # calls for three batches; in the second one answer has no end yet
    assert model.rows[: len(first)] == first
    assert model.rows[len(first) :] == [last] * (4 + 5)  # 4 tokens more, then 5 with the end token


def test_an_answer_that_has_ended_does_not_keep_its_companion_waiting(tokenizer):
    """One row is done before the stage begins, and would not end again."""
    model, ids = Scripted(tokenizer.eos_token_id, ends=[99, 2]), torch.ones(2, 3, dtype=torch.long)
    new = _greedy(model, ids, torch.ones_like(ids), tokenizer.eos_token_id, 50, torch.tensor([True, False]))
    assert new.shape == (2, 3) and model.calls == 3


def test_a_stage_knows_which_of_its_answers_have_ended(tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr("experiments.tasks.accuracy.FIRST", 4)
    monkeypatch.setattr(
        "experiments.tasks.accuracy._greedy",
        lambda *given: seen.append(given[-1].tolist()) or _greedy(*given),
    )
    items = [Item("a", "-"), Item("d", "-")]
    answers(Ending(tokenizer, {"d": 5}), tokenizer, items, max_new_tokens=9, batch_size=2, together=2)
    assert seen == [[False, False], [True, False]]


def test_logits_are_asked_for_at_the_last_position_alone(model, tokenizer):
    seen = []
    hook = model.register_forward_hook(lambda module, given, out: seen.append(out.logits.shape[1]))
    answers(model, tokenizer, ITEMS, max_new_tokens=5, batch_size=8)
    hook.remove()
    assert seen == [1] * 5


def test_a_module_that_takes_no_such_word_is_asked_without_it(model, tokenizer):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, attention_mask, position_ids, past_key_values, use_cache):
            return self.inner(
                input_ids, attention_mask, position_ids, past_key_values=past_key_values, use_cache=use_cache
            )

    asked = {"max_new_tokens": 5, "batch_size": 8}
    assert answers(Plain(), tokenizer, ITEMS, **asked) == answers(model, tokenizer, ITEMS, **asked)


def test_a_batch_that_would_part_what_goes_together_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="batch_size is 3; it must be a multiple of together, 2"):
        answers(model, tokenizer, ITEMS, max_new_tokens=5, batch_size=3, together=2)


def test_a_limit_ends_what_does_not_end(tokenizer):
    model = Scripted(tokenizer.eos_token_id, ends=[99])
    assert answers(model, tokenizer, [Item("a", "-")], max_new_tokens=3, batch_size=1) == ["!!!"]
    assert answers(model, tokenizer, [], max_new_tokens=3, batch_size=1) == []


def test_settings_of_the_model_and_its_mode_are_left_alone(model, tokenizer):
    plain = answers(model, tokenizer, ITEMS, max_new_tokens=12, batch_size=4)
    before = model.generation_config
    model.generation_config = GenerationConfig(repetition_penalty=1.5, do_sample=True, temperature=5.0)
    model.train()
    try:
        assert answers(model, tokenizer, ITEMS, max_new_tokens=12, batch_size=4) == plain
        assert model.training
    finally:
        model.generation_config = before
        model.eval()


class Scripted(torch.nn.Module):
    """Says "!" until the step at which each row ends."""

    def __init__(self, end, ends):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.end, self.ends, self.calls = end, ends, 0

    def forward(self, input_ids, **given):
        logits = torch.zeros(*input_ids.shape, 2_048)
        logits[..., 3] = 1  # the first token after the three marks is "!"
        for row, end in enumerate(self.ends):
            if self.calls >= end:
                logits[row, -1, self.end] = 2
        self.calls += 1
        return type("Out", (), {"logits": logits, "past_key_values": None})()


class Ending(torch.nn.Module):
    """Says "!" as often as a prompt's first letter asks, whatever was said of it before; 2 times else."""

    def __init__(self, tokenizer, lengths):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer, self.lengths, self.rows = tokenizer, lengths, []

    def forward(self, input_ids, past_key_values, **given):
        said = input_ids if past_key_values is None else torch.cat([past_key_values, input_ids], 1)
        logits = torch.zeros(*input_ids.shape, 2_048)
        logits[..., 3] = 1
        for row, ids in enumerate(said.tolist()):
            text = self.tokenizer.decode([i for i in ids if i != 3], skip_special_tokens=True)
            wanted = next((n for letter, n in self.lengths.items() if letter in text), 2)
            if ids.count(3) >= wanted:
                logits[row, -1, self.tokenizer.eos_token_id] = 2
        self.rows.append(len(input_ids))
        return type("Out", (), {"logits": logits, "past_key_values": said})()
