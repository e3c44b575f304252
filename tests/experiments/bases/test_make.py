import dataclasses
import json
import math

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.bases import BASES, paths, primer
from experiments.bases.card import model_card
from experiments.bases.make import make, unigram_loss
from experiments.bases.text import token_stream
from experiments.bases.training import held_out_loss
from gns import corpus
from tests.experiments.bases.tiny import TINY


def test_two_steps_write_a_loadable_model(documents, tmp_path):
    row = make(
        TINY,
        tmp_path / "out",
        tmp_path / "cache",
        base={"stdlib": documents[:1]},
        held_out={"stdlib": documents[1:]},
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.num_parameters() == row["parameters"]
    assert tokenizer.decode(tokenizer("def é():")["input_ids"], skip_special_tokens=True) == "def é():"
    stored = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    # what the row says is what the written model does
    unseen = token_stream(tokenizer, documents[1:])
    assert held_out_loss(model, unseen, TINY.sequence_length) == pytest.approx(row["held_out_loss"], rel=1e-6)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md", "training.json"} <= names
    assert f"{row['held_out_loss']:.3f}" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_unigram_loss_by_hand():
    # counts 2, 1, 0 plus one each: 3/6, 2/6, 1/6
    loss = unigram_loss(torch.tensor([0, 0, 1]), torch.tensor([0, 2]), 3)
    assert loss == pytest.approx(-(math.log(3 / 6) + math.log(1 / 6)) / 2)


def test_a_row_with_a_primer_and_the_tokenizer_of_another(documents, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "SHIPPED", tmp_path)
    monkeypatch.setitem(BASES, "tiny", TINY)
    library = {"base": {"stdlib": documents[:1]}, "held_out": {"stdlib": documents[1:]}}
    make(TINY, tmp_path / "tiny", tmp_path / "cache", **library)
    config = dataclasses.replace(TINY, name="tiny-2", primer=6, single_digits=True, tokenizer="tiny")
    sheets = {part: {**text, "primer": primer.documents(part, 6)} for part, text in library.items()}
    row = make(config, tmp_path / "2", tmp_path / "cache", **sheets)
    assert (tmp_path / "2" / "tokenizer.json").read_bytes() == (
        tmp_path / "tiny" / "tokenizer.json"
    ).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "2", dtype=torch.float32)
    unseen = token_stream(AutoTokenizer.from_pretrained(tmp_path / "2"), sheets["held_out"]["primer"])
    assert held_out_loss(model, unseen, TINY.sequence_length) == pytest.approx(
        row["primer"]["held_out_loss"], rel=1e-6
    )
    assert row["primer"]["held_out_loss"] != pytest.approx(row["held_out_loss"], rel=1e-3)
    card = (tmp_path / "2" / "README.md").read_text(encoding="utf-8")
    assert f"| primer, sheets of calculations not learned | {row['primer']['held_out_loss']:.3f} |" in card


def test_the_demo_base_is_what_its_row_makes():
    """The row's fields that a checkpoint depends on are those that made the shipped one; so is the card."""
    folder = corpus.base_model_path()
    row = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    assert BASES["1m"].described() == row["config"]
    assert model_card(row) == (folder / "README.md").read_text(encoding="utf-8")
