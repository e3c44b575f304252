import dataclasses
import math

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import bases
from gns.corpus import Document

TINY = bases.BaseConfig(
    "tiny",
    vocab_size=300,
    hidden_size=16,
    intermediate_size=24,
    layers=1,
    heads=2,
    steps=2,
    batch_size=2,
    sequence_length=16,
    context=32,
    warmup_steps=1,
)


@pytest.fixture(scope="module")
def text():
    words = [f"def name_{i % 7}(value):\n    return value + {i}\n\n" for i in range(200)]
    return [Document("a.py", "".join(words[:150])), Document("b.py", "".join(words[150:]))]


@pytest.fixture(scope="module")
def tokenizer(text):
    return bases.train_tokenizer(text, TINY)


@pytest.fixture(scope="module")
def stream(text, tokenizer):
    return bases.token_stream(tokenizer, text)


def start(tokenizer, stream, **changes):
    config = dataclasses.replace(TINY, **changes)
    return bases.Run(config, bases.build_model(config, tokenizer), stream)


def weights(run):
    return {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_two_steps_write_a_loadable_model(text, tmp_path):
    row = bases.run(TINY, tmp_path / "out", tmp_path / "cache", base=text[:1], held_out=text[1:])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.num_parameters() == row["parameters"]
    assert tokenizer.decode(tokenizer("def é():")["input_ids"], skip_special_tokens=True) == "def é():"
    stored = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    # what the row says is what the written model does
    unseen = bases.token_stream(tokenizer, text[1:])
    assert bases.held_out_loss(model, unseen, TINY.sequence_length) == pytest.approx(
        row["held_out_loss"], rel=1e-6
    )
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md", "training.json"} <= names
    assert f"{row['held_out_loss']:.3f}" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


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


def test_interrupted_command_goes_on(text, tmp_path, monkeypatch):
    advance = bases.Run.advance

    def stop_at_third(run):
        if run.step == 2:
            run.save(tmp_path / "cache" / "tiny.safetensors")
            raise KeyboardInterrupt
        return advance(run)

    monkeypatch.setitem(bases.BASES, "tiny", dataclasses.replace(TINY, steps=4))
    monkeypatch.setattr(bases.corpus, "documents", lambda part: text)
    arguments = ["tiny", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    monkeypatch.setattr(bases.Run, "advance", stop_at_third)
    with pytest.raises(SystemExit) as stopped:
        bases.main(arguments)
    assert stopped.value.code == 130
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(bases.Run, "advance", advance)
    bases.main(arguments)
    resumed = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    bases.main(["tiny", "--out", str(tmp_path / "again"), "--cache", str(tmp_path / "other")])
    assert_same_bits(safetensors.torch.load_file(tmp_path / "again" / "model.safetensors"), resumed)
    assert "several sittings" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


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
    assert not torch.equal(
        bases.batch(stream, TINY, 0), bases.batch(stream, dataclasses.replace(TINY, seed=1), 0)
    )


def test_an_epoch_shows_every_window_once(stream):
    steps = (len(stream) // TINY.sequence_length - 1) // TINY.batch_size
    for epoch in (0, 1):
        rows = torch.cat(
            [bases.batch(torch.arange(len(stream)), TINY, epoch * steps + i) for i in range(steps)]
        )
        assert (
            len(set(rows.flatten().tolist()))
            == rows.numel()
            == steps * TINY.batch_size * TINY.sequence_length
        )
        assert bool((rows.diff(dim=1) == 1).all())
    assert not torch.equal(bases.batch(stream, TINY, 0), bases.batch(stream, TINY, steps))


def test_learning_rate():
    config = dataclasses.replace(TINY, steps=110, warmup_steps=10, learning_rate=1.0)
    rates = [bases.learning_rate(config, step) for step in range(111)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5) and rates[110] == pytest.approx(0.0)
    assert sorted(rates[10:], reverse=True) == rates[10:]


def test_unigram_loss_by_hand():
    # counts 2, 1, 0 plus one each: 3/6, 2/6, 1/6
    loss = bases.unigram_loss(torch.tensor([0, 0, 1]), torch.tensor([0, 2]), 3)
    assert loss == pytest.approx(-(math.log(3 / 6) + math.log(1 / 6)) / 2)


def test_text_too_short(text, tokenizer, stream):
    with pytest.raises(ValueError, match=r"base tiny: 40 tokens of text; one batch of 2 × 16 needs 48"):
        bases.batch(stream[:40], TINY, 0)
    with pytest.raises(ValueError, match=r"base tiny: the text gave .* vocab_size=5000; more text"):
        bases.train_tokenizer(text, dataclasses.replace(TINY, vocab_size=5_000))


def test_command_line_names_the_known_sizes(capsys):
    with pytest.raises(SystemExit) as stopped:
        bases.main(["70b"])
    assert stopped.value.code == 2
    assert "1m" in capsys.readouterr().err


def test_command_line_refuses_a_foreign_checkpoint_in_one_line(
    text, tmp_path, monkeypatch, capsys, tokenizer, stream
):
    start(tokenizer, stream).save(tmp_path / "tiny.safetensors")
    monkeypatch.setitem(bases.BASES, "tiny", dataclasses.replace(TINY, seed=1))
    monkeypatch.setattr(bases.corpus, "documents", lambda part: text)
    with pytest.raises(SystemExit) as stopped:
        bases.main(["tiny", "--out", str(tmp_path / "out"), "--cache", str(tmp_path)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()
