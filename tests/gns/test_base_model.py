import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gns import corpus


@pytest.fixture(scope="module")
def path():
    return corpus.base_model_path()


@pytest.fixture(scope="module")
def tokenizer(path):
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def model(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def test_size(path, model):
    assert sum(file.stat().st_size for file in path.iterdir()) <= 4 * 2**20
    assert model.num_parameters() == 1_053_824
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not [file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pkl")]


def test_model_and_tokenizer_agree(model, tokenizer):
    assert len(tokenizer) == model.config.vocab_size == 2_048
    for mark in ("bos", "eos", "pad"):
        number = getattr(tokenizer, f"{mark}_token_id")
        assert number is not None and number == getattr(model.config, f"{mark}_token_id")
        assert number == getattr(model.generation_config, f"{mark}_token_id")
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert tokenizer.model_max_length == model.config.max_position_embeddings


def test_padding(tokenizer):
    found = tokenizer(["x = 1", "x = 1 + 2 + 3"], padding=True, return_tensors="pt")
    assert tokenizer.padding_side == "right"
    assert found["input_ids"][:, 0].tolist() == [tokenizer.bos_token_id] * 2
    assert found["input_ids"][0, -1] == tokenizer.pad_token_id
    assert found["attention_mask"].sum(1).tolist() == [
        len(tokenizer("x = 1")["input_ids"]),
        found["input_ids"].shape[1],
    ]


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n\n    return  x\t# two  blanks , a comma\n",
        "\n\n  leading, trailing  \n\n",
        "don't ' s 're  ! ? .",
        "naïve 北京 🙂 \u200b\u0301 עברית \x00\x7f \r\n \u2028",
        "<s> </s> <unk> [PAD] <pad>",
        "",
    ],
)
def test_text_survives_the_tokenizer(text, tokenizer):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_real_files_survive_the_tokenizer(tokenizer):
    for document in corpus.documents("held_out")[::8]:
        ids = tokenizer(document.text, verbose=False)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == document.text, document.name
        assert len(ids) < 0.5 * len(document.text.encode())


@pytest.fixture(scope="module")
def windows(tokenizer):
    """[24, 256], windows from files all over the held-out part."""
    files = [document for document in corpus.documents("held_out") if len(document.text) > 2_000][::3][:24]
    return torch.stack(
        [
            tokenizer(document.text, return_tensors="pt", verbose=False)["input_ids"][0, 200:456]
            for document in files
        ]
    )


def test_held_out_loss_is_that_of_a_language_model(model, windows):
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss.item()
    counts = torch.bincount(windows.flatten()).double()
    share = counts[counts > 0] / counts.sum()
    unigram = -(share * share.log()).sum().item()  # fitted to these very tokens: kinder than any real unigram
    assert loss < 3.2, loss
    assert loss < 0.7 * unigram < math.log(2_048)


def test_loss_depends_on_the_order_of_the_tokens(model, windows):
    shuffled = windows[:, torch.randperm(windows.shape[1], generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        losses = [model(input_ids=ids, labels=ids).loss.item() for ids in (windows, shuffled)]
    assert losses[1] > losses[0] + 2


def test_padding_does_not_change_the_predictions(model, tokenizer):
    texts = [
        "def read(self, size=-1):",
        "class Message:\n    def __init__(self, policy=None):\n        return",
    ]
    both = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        together = model(**both).logits[0]
        alone = model(**tokenizer(texts[0], return_tensors="pt")).logits[0]
    torch.testing.assert_close(together[: len(alone)], alone, atol=1e-4, rtol=1e-4)


def test_card_states_what_was_measured(path):
    row = json.loads((path / "training.json").read_text())
    card = (path / "README.md").read_text(encoding="utf-8")
    assert row["status"] == "done"
    assert row["held_out_loss"] < 0.6 * row["unigram_loss"] < row["uniform_loss"]
    for said in (
        f"{row['held_out_loss']:.3f}",
        f"{row['held_out_bits_per_byte']:.3f}",
        row["python"],
        "psf-2.0",
    ):
        assert said in card
    assert "asyncio" in card and "seed 0" in card


def test_missing_checkpoint(monkeypatch, tmp_path):
    monkeypatch.setattr(corpus.importlib.resources, "files", lambda package: tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"no model.safetensors in .*base-1m.*Reinstall.*experiments.bases"
    ):
        corpus.base_model_path()
