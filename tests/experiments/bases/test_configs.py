import dataclasses

import pytest
import torch
from transformers import AutoTokenizer

from experiments.bases import BASES, base_path
from experiments.bases.training import build_model
from tests.experiments.bases.tiny import TINY

MILLIONS = {"math-200k": 0.25, "math-1m": 1, "math-5m": 5, "math-25m": 25, "math-100m": 100}


def test_every_row_is_named_as_it_is_keyed_and_one_family_has_one_text_and_tokenizer():
    assert all(name == config.name for name, config in BASES.items())
    family = [config for name, config in BASES.items() if name.startswith("math-")]
    assert {config.name for config in family} == set(MILLIONS)
    assert len({(c.vocab_size, c.primer, c.single_digits, c.tokenizer or c.name) for c in family}) == 1


@pytest.mark.parametrize("name", MILLIONS)
def test_a_row_is_as_large_as_it_says(name):
    tokenizer = AutoTokenizer.from_pretrained(base_path("1m"))
    with torch.device("meta"):
        model = build_model(BASES[name], tokenizer)
    assert model.num_parameters() / 1e6 == pytest.approx(MILLIONS[name], rel=0.07)


def test_later_fields_are_described_where_they_are_set():
    first = {"name", "vocab_size", "steps", "seed", "autocast"}
    assert first <= TINY.described().keys()
    assert not {"primer", "single_digits", "tokenizer"} & TINY.described().keys()
    changed = dataclasses.replace(TINY, primer=3, tokenizer="1m").described()
    assert changed == TINY.described() | {"primer": 3, "tokenizer": "1m"}
