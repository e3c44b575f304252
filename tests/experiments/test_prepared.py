"""What every engine gets: data and model on their device, alike for runs that share them."""

import dataclasses
import math

import pytest
import torch

from experiments import prepared
from experiments.configs import RunError
from experiments.prepared import data_of, device_of, load_base, prepare
from experiments.tasks import encoded
from gns.finetuning.data import NO_LOSS
from tests.experiments.small_runs import Sentences, config

pytestmark = pytest.mark.usefixtures("sentences")
CPU = torch.device("cpu")


@pytest.mark.parametrize("prompted", [True, False])
def test_data_are_the_tasks_without_a_label_for_the_first_token(tiny_base, prompted):
    given = config(tiny_base, data_seed=3, generate=2, dials={"prompted": prompted})
    data, (_, tokenizer), task = data_of(given), load_base(given), Sentences(prompted=prompted)
    for rows, items in (
        (data.train, task.train(30, 3)),
        (data.validation, task.held_out("validation", 6)),
        (data.test, task.held_out("test", 6)),
    ):
        expected = encoded(items, tokenizer, given.max_length)
        assert [row.input_ids for row in rows] == [row.input_ids for row in expected]
        assert [row.labels[1:] for row in rows] == [row.labels[1:] for row in expected]
        assert all(row.labels[0] == NO_LOSS for row in rows)
    assert data.answered == task.held_out("test", 2)


def test_runs_that_differ_in_training_only_share_their_data(tiny_base):
    given = config(tiny_base)
    shared = dataclasses.replace(given, lr=0.5, batch_size=3, rank=2, seed=4, adapter="dora", epochs=3)
    assert data_of(shared) is data_of(given)
    for changed in ({"n_train": 20}, {"data_seed": 1}, {"max_length": 30}, {"dials": {"answered": False}}):
        assert data_of(dataclasses.replace(given, **changed)) is not data_of(given)
    small = data_of(dataclasses.replace(given, n_train=20))
    assert list(small.train) == list(data_of(given).train[:20])


def test_the_cpu_that_accelerate_was_asked_for_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device_of(None) == torch.device("cuda", 1)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")  # as `accelerate launch --cpu` writes it
    assert device_of(None) == CPU and device_of("cuda") == torch.device("cuda")


def test_what_is_wrong_with_the_data_is_found_before_the_model_is_loaded(tiny_base, monkeypatch):
    monkeypatch.setattr(prepared, "load_base", lambda given: pytest.fail("loaded"))
    with pytest.raises(RunError, match="no token to learn within max_length 3"):
        prepare(config(tiny_base, max_length=3), CPU)


def test_data_that_the_base_cannot_read_are_named(tiny_base, monkeypatch):
    """Beyond a table of positions or embeddings, a GPU's program ends without a word on why."""
    load = prepared.load_base

    def short(given, **changed):
        model, tokenizer = load(given)
        model.config.update(changed)
        return model, tokenizer

    longest = data_of(config(tiny_base)).longest
    made = prepare(config(tiny_base, max_length=4_096), CPU)  # which no example reaches
    assert made.data.longest == longest
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "load_base", lambda given: short(given, max_position_embeddings=longest - 1))
        said = f"has {longest - 1} positions, the longest example {longest} tokens; set max_length to"
        with pytest.raises(RunError, match=said):
            prepare(config(tiny_base), CPU)
    largest = data_of(config(tiny_base)).largest_id
    model, tokenizer = load(config(tiny_base))
    model.set_input_embeddings(
        torch.nn.Embedding.from_pretrained(model.get_input_embeddings().weight[:largest])
    )
    monkeypatch.setattr(prepared, "load_base", lambda given: (model, tokenizer))
    with pytest.raises(
        RunError, match=f"has {largest} embeddings, the data hold token {largest}; give a base"
    ):
        prepare(config(tiny_base), CPU)


def test_a_base_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RunError, match="no such folder"):
        prepare(config(str(tmp_path / "nothing")), CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_in_the_dtype_of_the_base(tiny_base, dtype):
    made = prepare(config(tiny_base, dtype=dtype), CPU)
    with made.autocast():
        assert str((torch.ones(2, 2) @ torch.ones(2, 2)).dtype) == f"torch.{dtype}"
    assert {str(p.dtype) for p in made.model.parameters() if not p.requires_grad} == {f"torch.{dtype}"}
    assert made.model.config.use_cache is False
    assert len(made.trainable) == 14 and math.isfinite(made.validation_loss())


def test_a_process_takes_its_own_accelerator(monkeypatch):
    assert device_of("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device_of(None) == torch.device("cuda", 3)
    assert device_of("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of(None) == CPU
