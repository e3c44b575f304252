"""Losses of single items against one forward pass each; nothing of the training is touched."""

import dataclasses
import math

import pytest
import torch

from experiments.configs import RunConfig
from experiments.evaluation import eval_batch, item_losses, token_mean
from gns.finetuning.data import NO_LOSS, Collator, Row, encode_texts
from tests.gns import tiny

COLLATOR = Collator(1)


@pytest.fixture(scope="module")
def rows():
    found = list(encode_texts(tiny.sentences(11), tiny.tokenizer(), max_length=40, source="test").rows)
    masked = [Row(r.input_ids, [NO_LOSS] * 3 + r.labels[3:]) for r in found[:4]]  # prompts
    return masked + found[4:]


def test_each_items_loss_is_that_of_its_own_forward_pass(rows):
    model = tiny.llama()
    found = item_losses(model, rows, COLLATOR, 4)
    with torch.no_grad():
        alone = [float(model(**COLLATOR([row])).loss) for row in rows]
    assert found == pytest.approx(alone, rel=1e-5)
    assert len(set(found)) == len(rows)  # or the order of the items could not be told
    with torch.no_grad():
        together = float(model(**COLLATOR(rows)).loss)
    assert token_mean(found, rows) == pytest.approx(together, rel=1e-5)
    assert sum(found) / len(found) != pytest.approx(together, rel=1e-5)  # the weights matter


def test_how_items_are_batched_moves_only_the_rounding(rows):
    model = tiny.llama()
    one, all_at_once = item_losses(model, rows, COLLATOR, 1), item_losses(model, rows, COLLATOR, 99)
    assert one == pytest.approx(all_at_once, rel=1e-5)
    assert eval_batch(RunConfig("b", "t", batch_size=1)) == eval_batch(RunConfig("b", "t", batch_size=512))
    assert eval_batch(RunConfig("b", "t", max_length=100_000)) == 1


def test_training_is_left_as_it_was(rows):
    model = tiny.lora(tiny.llama(), lora_dropout=0.5)
    model.train()
    model.base_model.model.model.norm.eval()
    model(**COLLATOR(rows[:2])).loss.backward()
    modes = [m.training for m in model.modules()]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    first = item_losses(model, rows, COLLATOR, 4)
    assert first == item_losses(model, rows, COLLATOR, 4)  # no dropout
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes and not all(modes)
    for p, before in zip(model.parameters(), gradients, strict=True):
        assert (p.grad is None and before is None) or torch.equal(p.grad, before)


def test_a_model_of_nan_gives_nan(rows):
    model = tiny.llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    assert all(math.isnan(x) for x in item_losses(model, rows, COLLATOR, 4))
    assert math.isnan(token_mean([math.nan] * len(rows), rows))


def test_an_item_without_a_learned_token_is_named(rows):
    bare = [*rows[:2], Row([0, 5, 6], [5, NO_LOSS, NO_LOSS])]
    with pytest.raises(ValueError, match="item 2 has no learned token; 1 of 3 have none"):
        item_losses(tiny.llama(), bare, COLLATOR, 4)


def test_the_mode_comes_back_after_an_error(rows):
    model = tiny.llama().train()
    with pytest.raises(IndexError):
        item_losses(model, [*rows[:2], Row([0, 5, 999], [0, 5, 999])], COLLATOR, 4)
    assert model.training


def test_configurations_differ_only_in_length():
    config = RunConfig("b", "t", max_length=1_024)
    assert eval_batch(config) == eval_batch(dataclasses.replace(config, micro_batch=2, n_eval=3)) == 8
