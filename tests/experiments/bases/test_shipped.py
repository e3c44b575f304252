import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.bases import BASES, base_path, paths, primer
from experiments.bases.card import model_card
from experiments.bases.text import token_stream
from experiments.bases.training import held_out_loss

SHIPPED = ("math-200k", "math-1m", "math-5m")


@pytest.fixture(params=SHIPPED)
def folder(request):
    return base_path(request.param)


def test_together_they_are_small_and_of_one_tokenizer():
    folders = [base_path(name) for name in SHIPPED]
    assert all(folder == paths.SHIPPED / name for folder, name in zip(folders, SHIPPED, strict=True))
    assert sum(file.stat().st_size for file in paths.SHIPPED.rglob("*") if file.is_file()) <= 20 * 2**20
    assert len({(folder / "tokenizer.json").read_bytes() for folder in folders}) == 1


def test_a_shipped_base_is_what_its_row_makes(folder):
    row = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    config = BASES[row["config"]["name"]]
    assert config.described() == type(config)(**row["config"]).described()
    assert model_card(row) == (folder / "README.md").read_text(encoding="utf-8")
    stored = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert row["status"] == "done" and row["held_out_loss"] < 0.75 * row["unigram_loss"]


def test_model_and_tokenizer_agree_and_know_the_primer(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size == 2_048
    for mark in ("bos", "eos", "pad"):
        assert getattr(tokenizer, f"{mark}_token_id") == getattr(model.config, f"{mark}_token_id") is not None
    assert tokenizer.convert_ids_to_tokens(tokenizer("1234")["input_ids"])[1:] == list("1234")
    row = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    unseen = token_stream(tokenizer, primer.documents("held_out", 20))
    # the first sheets of those that the card's loss is of: near it, and far below the frequencies alone
    loss = held_out_loss(model, unseen, 256)
    assert math.isclose(loss, row["primer"]["held_out_loss"], rel_tol=0.15)
    assert loss < 0.4 * row["primer"]["unigram_loss"]
