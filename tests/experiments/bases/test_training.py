import dataclasses
import math

import pytest
import torch

from experiments.bases.training import batch, learning_rate
from tests.experiments.bases.tiny import TINY, assert_same_bits, start, weights


def test_training_lowers_the_loss(tokenizer, stream):
    run = start(tokenizer, stream, steps=60, learning_rate=1e-2, autocast=False)
    losses = [run.advance() for _ in range(60)]
    assert losses[0] == pytest.approx(math.log(TINY.vocab_size), abs=0.3)
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]


@pytest.mark.parametrize("stop", [1, 3, 5])
@pytest.mark.parametrize("autocast", [True, False])
def test_resumed_weights_equal_uninterrupted_ones(stop, autocast, tokenizer, stream, tmp_path):
    changes = {"steps": 6, "autocast": autocast}
    whole = start(tokenizer, stream, **changes)
    whole.finish(tmp_path / "whole.safetensors")
    first = start(tokenizer, stream, **changes)
    for _ in range(stop):
        first.advance()
    first.save(tmp_path / "part.safetensors")
    first.advance()  # done after the last checkpoint, and lost
    second = start(tokenizer, stream, **changes)
    second.resume(tmp_path / "part.safetensors")
    assert second.step == stop
    second.finish(tmp_path / "part.safetensors")
    assert_same_bits(weights(whole), weights(second))
    assert whole.losses == second.losses


def test_resuming_without_the_optimizer_would_be_noticed(tokenizer, stream, tmp_path):
    whole = start(tokenizer, stream, steps=6)
    whole.finish(tmp_path / "whole.safetensors")
    first = start(tokenizer, stream, steps=6)
    for _ in range(3):
        first.advance()
    first.save(tmp_path / "part.safetensors")
    second = start(tokenizer, stream, steps=6)
    second.resume(tmp_path / "part.safetensors")
    second.optimizer.state.clear()
    second.finish(tmp_path / "part.safetensors")
    with pytest.raises(AssertionError):
        assert_same_bits(weights(whole), weights(second))


@pytest.mark.parametrize("changes", [{"learning_rate": 1.0}, {"seed": 1}])
def test_checkpoint_of_another_run_is_refused(changes, tokenizer, stream, tmp_path):
    run = start(tokenizer, stream)
    run.save(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"c\.safetensors: a checkpoint of another configuration.*Delete it"):
        start(tokenizer, stream, **changes).resume(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="another Python's text"):
        start(tokenizer, stream[:-1]).resume(tmp_path / "c.safetensors")


def test_seed_and_nothing_else_sets_weights_and_order(tokenizer, stream):
    torch.manual_seed(1)
    one = start(tokenizer, stream)
    state = torch.random.get_rng_state()
    other = start(tokenizer, stream)
    assert_same_bits(weights(one), weights(other))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(batch(stream, TINY, 0), batch(stream, dataclasses.replace(TINY, seed=1), 0))


def test_an_epoch_shows_every_window_once(stream):
    steps = (len(stream) // TINY.sequence_length - 1) // TINY.batch_size
    for epoch in (0, 1):
        rows = torch.cat([batch(torch.arange(len(stream)), TINY, epoch * steps + i) for i in range(steps)])
        assert (
            len(set(rows.flatten().tolist()))
            == rows.numel()
            == steps * TINY.batch_size * TINY.sequence_length
        )
        assert bool((rows.diff(dim=1) == 1).all())
    assert not torch.equal(batch(stream, TINY, 0), batch(stream, TINY, steps))


def test_learning_rate():
    config = dataclasses.replace(TINY, steps=110, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in range(111)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5) and rates[110] == pytest.approx(0.0)
    assert sorted(rates[10:], reverse=True) == rates[10:]


def test_text_too_short(stream):
    with pytest.raises(ValueError, match=r"base tiny: 40 tokens of text; one batch of 2 × 16 needs 48"):
        batch(stream[:40], TINY, 0)
