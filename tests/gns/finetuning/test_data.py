import json

import pytest
import torch

from gns.finetuning.data import NO_LOSS, Collator, DataError, Row, encode_texts, load_examples
from tests.gns import tiny

WITH_MARKS = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
REWRITING = (
    "{% for m in messages %}{{ loop.length }}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
)
CHAT = [
    {"role": "system", "content": "the scale"},
    {"role": "user", "content": "is it large"},
    {"role": "assistant", "content": "it is small"},
    {"role": "user", "content": "as a batch"},
    {"role": "assistant", "content": "we see noise"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def load(path, tokenizer, max_length=200):
    return load_examples(path, tokenizer, max_length=max_length)


def learned(row, tokenizer):
    return tokenizer.decode([label for label in row.labels if label != NO_LOSS])


# shapes


def test_text_is_learned_whole_and_closed(tmp_path, tokenizer):
    path = tiny.save_jsonl(tmp_path / "a.jsonl", [{"text": "the noise"}, {"text": "a step"}])
    examples = load(path, tokenizer)
    assert [tokenizer.decode(row.input_ids) for row in examples.rows] == ["the noise<eos>", "a step<eos>"]
    assert all(row.labels == row.input_ids for row in examples.rows)
    assert examples.remarks() == []


def test_only_the_response_is_learned(tmp_path, tokenizer):
    path = tiny.save_jsonl(tmp_path / "a.jsonl", [{"prompt": "the loss ", "response": "falls"}])
    (row,) = load(path, tokenizer).rows
    assert tokenizer.decode(row.input_ids) == "the loss falls<eos>"
    assert learned(row, tokenizer) == "falls<eos>"
    n_prompt = len(tokenizer("the loss ")["input_ids"])
    assert row.labels[:n_prompt] == [NO_LOSS] * n_prompt


@pytest.mark.parametrize("newline", ["", "\n"], ids=["marks", "prefixes"])
def test_only_the_assistant_is_learned(tmp_path, newline):
    tokenizer = tiny.tokenizer(tiny.CHATML if newline else WITH_MARKS)
    path = tiny.save_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    examples = load(path, tokenizer)
    (row,) = examples.rows
    assert learned(row, tokenizer) == f"it is small<|end|>{newline}we see noise<|end|>{newline}"
    assert tokenizer.decode(row.input_ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert examples.notes == ()


def test_a_template_that_rewrites_turns_is_learned_whole_and_says_so(tmp_path):
    tokenizer = tiny.tokenizer(REWRITING)
    path = tiny.save_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    examples = load(path, tokenizer)
    assert examples.rows[0].labels == examples.rows[0].input_ids
    assert "1 chats are learned whole" in examples.remarks()[0]


def test_an_end_token_that_the_tokenizer_adds_is_not_doubled(tmp_path, tokenizer):
    class Closing:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text, **options):
            return {"input_ids": tokenizer(text)["input_ids"] + [self.eos_token_id]}

    path = tiny.save_jsonl(tmp_path / "a.jsonl", [{"prompt": "a ", "response": "step"}])
    assert tokenizer.decode(load(path, Closing()).rows[0].input_ids) == "a step<eos>"


# length


def test_truncation_is_counted_and_reported(tmp_path, tokenizer):
    path = tiny.save_jsonl(tmp_path / "a.jsonl", [{"text": "noise " * 30}, {"text": "a step"}])
    examples = load(path, tokenizer, max_length=10)
    assert [len(row.input_ids) for row in examples.rows][0] == 10
    assert examples.n_truncated == 1
    assert examples.remarks() == ["1 of 2 examples truncated at the maximum length"]


def test_an_example_that_is_all_prompt_after_truncation_is_left_out(tmp_path, tokenizer):
    records = [{"prompt": "noise " * 30, "response": "x"}, {"prompt": "a ", "response": "step"}]
    examples = load(tiny.save_jsonl(tmp_path / "a.jsonl", records), tokenizer, max_length=10)
    assert (len(examples), examples.n_truncated, examples.n_dropped) == (1, 0, 1)
    assert examples.remarks() == ["1 examples left out: no token to learn in them"]


def test_plain_text_is_cut_without_loss(tmp_path, tokenizer):
    text = "# A heading\n\n" + "noise scale " * 40 + "\n\n\n    " + "a batch " * 40 + "\n"
    (tmp_path / "a.md").write_text(text)
    examples = load(tmp_path / "a.md", tokenizer, max_length=16)
    assert max(len(row.input_ids) for row in examples.rows) == 16
    assert examples.n_truncated == 0
    joined = "".join(tokenizer.decode(row.input_ids) for row in examples.rows)
    assert joined.split("<eos>")[:2] == ["# A heading\n\n" + "noise scale " * 40, "    " + "a batch " * 40]


def test_a_folder_is_read_in_order(tmp_path, tokenizer):
    tiny.save_jsonl(tmp_path / "b.jsonl", [{"text": "second one"}])
    tiny.save_jsonl(tmp_path / "a.jsonl", [{"text": "first one"}])
    rows = load(tmp_path, tokenizer).rows
    assert [tokenizer.decode(row.input_ids) for row in rows] == ["first one<eos>", "second one<eos>"]


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({"prompt": "the loss ", "completion": "falls"}, "the loss "),
        ({"question": "the loss ", "answer": "falls"}, "the loss "),
        ({"query": "the loss ", "response": "falls"}, "the loss "),
        ({"instruction": "the loss ", "output": "falls"}, "the loss "),
        ({"instruction": "the loss", "input": "of a step", "output": "falls"}, "the loss\n\nof a step"),
        ({"instruction": "the loss ", "input": "", "output": "falls"}, "the loss "),
    ],
    ids=lambda value: " + ".join(value) if isinstance(value, dict) else "",
)
def test_prompt_and_response_by_other_names(tmp_path, tokenizer, fields, prompt):
    (row,) = load(tiny.save_jsonl(tmp_path / "a.jsonl", [fields]), tokenizer).rows
    same = tiny.save_jsonl(tmp_path / "b.jsonl", [{"prompt": prompt, "response": "falls"}])
    assert load(same, tokenizer).rows == [row]


# bad input


def chat(*turns):
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})


def test_a_whole_character_in_two_escapes_is_welcome(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud83d\\ude00 b"}\n')
    assert "😀" in tokenizer.decode(load(tmp_path / "a.jsonl", tokenizer).rows[0].input_ids)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a b c"}\n{"text": oops}\n', r"line 2: not JSON \(Expecting value at column 10\)"),
        ('{"text": "\\ud800 abc"}\n', r"line 1: `text` holds half a character \(\\ud800\); write"),
        ('{"prompt": "a", "response": "b\\udc01"}\n', r"line 1: `response` holds half a char.*\\udc01"),
        (chat(("user", "a"), ("assistant", "\ud800")), "line 1: `messages` holds half a character"),
        (
            '{"messages": [{"role": "assistant", "content": "a", "more": [{"\\ud800": 1}]}]}',
            "line 1: `messages` holds half a character",
        ),
        ("[" * 100_000, r"line 1: malformed JSON \(nested too deeply\)"),
        ('{"text": ' + "9" * 6000 + "}", r"line 1: malformed JSON \(a number of more than 4300 digits\)"),
        ('{"text": "a"}\n\n[1]\n', "line 3: a JSON list; an object with `text`, or `prompt` \\+ `response`"),
        ('{"txt": "a"}\n', "line 1: unknown fields `txt`; known: `text`, or `prompt` \\+ `response`, or"),
        ("{}\n", r"line 1: unknown fields \(none\)"),
        ('{"a": "b"}\n', r"\(also prompt \+ completion, .*instruction \+ output\); rename them"),
        ('{"prompt": "a", "completion": "b", "id": 1}\n', "unknown field `id` beside `prompt`, `response`"),
        ('{"prompt": [], "completion": []}\n', "unknown fields `prompt`, `completion`"),
        ('{"text": "a", "colour": 1}\n', "line 1: unknown field `colour` beside `text`; remove it"),
        ('{"prompt": "a"}\n', "line 1: unknown fields `prompt`"),
        ('{"text": "a", "prompt": "b", "response": "c"}\n', "line 1: ambiguous, has `text` and `prompt`"),
        (
            '{"text": "a b"}\n{"prompt": "a", "response": "b"}\n',
            "line 2: has `prompt`, `response`, but .*line 1",
        ),
        ('{"text": 3}\n', "line 1: `text` is a int; a string is needed"),
        ('{"messages": "a"}\n', "line 1: `messages` is not a list of turns"),
        ('{"messages": [{"role": "user"}]}\n', "line 1: turn 1 of `messages` lacks `role` and `content`"),
        (chat(("user", "a")), "line 1: `messages` has no turn of role `assistant`"),
        ("", "empty; at least one example is needed"),
        ("\n\n", "empty; at least one example is needed"),
        ('{"text": " "}\n{"text": ""}\n', "no token to learn in any of 2 examples"),
        ('{"prompt": "a", "response": ""}\n', "no token to learn in any of 1 examples"),
    ],
)
def test_malformed_jsonl(tmp_path, tokenizer, content, message):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as error:
        load(path, tokenizer)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path, tokenizer):
    with pytest.raises(DataError, match="no such file or folder"):
        load(tmp_path / "none.jsonl", tokenizer)
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(DataError, match=r"has suffix \.csv; known: \.jsonl, \.txt, \.md, \.py"):
        load(tmp_path / "a.csv", tokenizer)
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(DataError, match="not UTF-8 at byte 2"):
        load(tmp_path / "a.txt", tokenizer)
    (tmp_path / "a.csv").unlink()
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(DataError, match="a folder of both"):
        load(tmp_path, tokenizer)


def test_a_chat_without_template(tmp_path):
    path = tiny.save_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    with pytest.raises(DataError, match="line 1: the chat template fails: .*chat_template"):
        load(path, tiny.tokenizer(template=None))


def test_a_template_that_refuses(tmp_path):
    path = tiny.save_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="line 1: the chat template fails: roles must alternate"):
        load(path, tiny.tokenizer(template))


# the hub


def test_a_hub_name_without_datasets_says_what_to_install(tokenizer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(
        DataError, match=r"somebody/texts: no local file .* 'gradient-noise-scale\[experiments\]'"
    ):
        load("somebody/texts", tokenizer)


class FakeDatasets:
    """Stands in for what is called of `datasets`; the real one is tested where it is installed."""

    def load_dataset(self, name, split):
        if name != "somebody/texts":
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub\nmore lines")
        return [{"id": i, "text": f"the step {split}"} for i in range(3)]


def test_a_hub_data_set_may_have_further_columns(tokenizer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", FakeDatasets())
    examples = load("somebody/texts", tokenizer)
    assert [tokenizer.decode(row.input_ids) for row in examples.rows] == ["the step train<eos>"] * 3
    with pytest.raises(DataError, match="somebody/else: cannot be loaded .*doesn't exist on the Hub$"):
        load("somebody/else", tokenizer)


def test_data_sets_on_disk(tmp_path, tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs the extra `experiments`")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    made = datasets.Dataset.from_list([{"id": 3, "prompt": "the ", "response": "noise"}])
    made.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    made.to_parquet(tmp_path / "files" / "train.parquet")
    for name in ("saved", "splits", "files"):
        (row,) = load(tmp_path / name, tokenizer).rows
        assert tokenizer.decode(row.input_ids) == "the noise<eos>"
    with pytest.raises(DataError, match="no split 'test'; it has `train`"):
        load_examples(tmp_path / "splits", tokenizer, max_length=9, split="test")
    with pytest.raises(DataError, match="cannot be loaded as a data set"):
        (tmp_path / "empty").mkdir()
        load(tmp_path / "empty", tokenizer)


# batches


def test_batches_are_padded_on_the_right():
    batch = Collator(9)([Row([1, 2, 3], [NO_LOSS, 2, 3]), Row([4], [4])])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[NO_LOSS, 2, 3], [4, NO_LOSS, NO_LOSS]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_padding_adds_nothing_to_the_loss(tokenizer):
    model = tiny.llama().eval()
    rows = encode_texts(tiny.sentences(3), tokenizer, max_length=64, source="here").rows
    batch = Collator(tokenizer.pad_token_id)(rows)
    counts = [len(row.labels) - 1 for row in rows]
    with torch.no_grad():
        alone = [model(**Collator(0)([row])).loss.item() for row in rows]
        together = model(**batch).loss.item()
    mean = sum(loss * n for loss, n in zip(alone, counts, strict=True)) / sum(counts)
    assert together == pytest.approx(mean, rel=1e-6)


def test_a_split_is_seeded_and_loses_nothing(tokenizer):
    examples = encode_texts(tiny.sentences(20), tokenizer, max_length=64, source="here")
    train, held_out = examples.split(5, seed=1)
    assert (len(train), len(held_out)) == (15, 5)
    assert sorted(map(str, [*train, *held_out])) == sorted(map(str, examples.rows))
    assert examples.split(5, seed=1) == (train, held_out)
    assert examples.split(5, seed=2)[1] != held_out
    assert examples.split(0, seed=1) == (list(examples.rows), [])
