"""Adapters trained before the task: what they learn, that runs start from them, and what is refused."""

import dataclasses
import json

import peft
import pytest
import torch
from peft.utils import load_peft_weights
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from experiments import foundation
from experiments.adapters import adapted
from experiments.bases.paths import SHIPPED
from experiments.configs import RunError
from experiments.foundation import FoundationConfig, comparison, train
from experiments.prepared import load_base
from experiments.run import run
from tests.experiments.small_runs import Sentences, config
from tests.gns import tiny


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Folder of a teacher that is wider than the base and sure of what it says."""
    torch.manual_seed(3)
    shape = tiny.llama().config.to_dict() | {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 8}
    model = LlamaForCausalLM(LlamaConfig.from_dict(shape))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return str(tiny.save_model(tmp_path_factory.mktemp("teacher"), model))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    items = Sentences().train(80, 5)
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    return str(tiny.save_jsonl(path, [{"text": item.prompt + item.response} for item in items]))


@pytest.fixture
def given(tiny_base, teacher, texts):
    return FoundationConfig(
        tiny_base, teacher, texts, rank=4, steps=30, batch_size=8, lr=0.05, max_length=48, held_out=16
    )


def _factors(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_both_halves_of_the_loss_are_learned(given, tmp_path):
    row = train(given, tmp_path / "half")
    assert row["after"]["text"] < row["before"]["text"] - 0.03
    only = {
        share: train(dataclasses.replace(given, share=share), tmp_path / str(share)) for share in (0.0, 1.0)
    }
    assert all(each["before"] == row["before"] for each in only.values())
    assert only[1.0]["after"]["divergence"] < row["after"]["divergence"] < only[0.0]["after"]["divergence"]
    assert max(row["after"]["text"], only[0.0]["after"]["text"]) < only[1.0]["after"]["text"] - 0.01
    assert only[1.0]["after"]["divergence"] < row["before"]["divergence"]


def test_a_foundation_is_a_function_of_its_configuration(given, tmp_path):
    given = dataclasses.replace(given, steps=4)
    state = torch.get_rng_state()
    train(given, tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    train(given, tmp_path / "b")
    train(dataclasses.replace(given, seed=1), tmp_path / "c")
    train(dataclasses.replace(given, micro_batch=3), tmp_path / "d")
    a, b, c, d = (_factors(tmp_path / name) for name in "abcd")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)
    assert all(torch.allclose(a[name], d[name], atol=1e-3) for name in a)


@pytest.mark.usefixtures("sentences")
def test_a_run_starts_from_it(given, tiny_base, tmp_path):
    init = tmp_path / "found"
    row = train(given, init)
    about = json.loads((init / "foundation.json").read_text())
    assert about["after"] == row["after"] and FoundationConfig(**about["config"]) == given
    said = (init / "README.md").read_text()
    assert f"| loss on the text | {row['before']['text']:.4f} | {row['after']['text']:.4f} |" in said
    random_start, from_it = (run(each) for each in comparison(config(tiny_base, n_train=64), init)[:2])
    assert from_it["status"] == random_start["status"] == "done", from_it["error"]
    assert from_it["validation"][0]["loss"] < random_start["validation"][0]["loss"] - 0.03


def test_runs_of_the_comparison_are_pairs(tiny_base):
    pairs = comparison(config(tiny_base, n_train=64), "folder", seeds=(0, 1))
    assert len(pairs) == 16
    for lora, found in zip(pairs[::2], pairs[1::2], strict=True):
        assert (lora.adapter, lora.init, found.adapter, found.init) == ("lora", None, "foundation", "folder")
        assert dataclasses.replace(found, adapter="lora", init=None) == lora
        assert lora.seed == lora.data_seed
    assert [pair.n_train for pair in pairs[:8:2]] == [64, 32, 16, 8]
    assert [pair.seed for pair in pairs[::8]] == [0, 1]


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"batch_size": 65}, "80 texts, of which 16 are held out; 65 more are needed"),
        ({"text": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"lr": 1e30}, r"the loss of step 1 is nan; lr 1e\+30 is too high"),
        ({"rank": 9}, "rank 9 is larger than layer"),
    ],
)
def test_what_cannot_be_trained_is_named(given, tmp_path, changed, said):
    with pytest.raises(RunError, match=said):
        train(dataclasses.replace(given, **changed), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changed, said", [({"share": 1.5}, "share is 1.5"), ({"held_out": 0}, "held_out is 0")]
)
def test_a_configuration_out_of_range_is_named(given, changed, said):
    with pytest.raises(RunError, match=said):
        dataclasses.replace(given, **changed)


def test_only_an_older_foundation_is_replaced(given, tmp_path):
    mine = tmp_path / "thesis"
    mine.mkdir()
    given = dataclasses.replace(given, steps=1)
    train(given, mine)  # empty
    train(given, mine)  # older
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis"]
    (mine / "foundation.json").unlink()
    with pytest.raises(RunError, match="holds no foundation.json, so it is not replaced"):
        train(given, mine)
    assert (mine / "adapter_model.safetensors").is_file()


def test_the_command_trains_and_says_what_was_gained(given, tmp_path, capsys):
    asked = {name: value for name, value in dataclasses.asdict(given).items() if value is not None}
    arguments = [word for k, v in asked.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    out = tmp_path / "out"
    assert foundation.main([*arguments, "--steps", "2", "--out", str(out), "--device", "cpu"]) == 0
    about = json.loads((out / "foundation.json").read_text())
    assert FoundationConfig(**about["config"]) == dataclasses.replace(given, steps=2)
    said = capsys.readouterr().out
    assert "divergence from the teacher, held out:" in said and f"{about['after']['text']:.4f}" in said
    assert foundation.main([*arguments, "--share", "7", "--out", str(out)]) == 2
    assert "share is 7.0" in capsys.readouterr().err


def test_without_texts_it_is_the_library(given, monkeypatch, tmp_path):
    monkeypatch.setattr("gns.corpus.examples", lambda part: tiny.sentences(40) if part == "base" else [])
    row = train(dataclasses.replace(given, text=None, steps=1), tmp_path / "out")
    assert row["texts"] == 24


def test_the_base_is_named_as_it_was_asked_for(texts, tmp_path):
    sizes = {"rank": 2, "steps": 1, "batch_size": 2, "max_length": 24, "held_out": 2}
    train(FoundationConfig("math-200k", "math-200k", texts, **sizes), tmp_path / "out")
    held = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert held["base_model_name_or_path"] == "math-200k"  # not where it lies on this machine


def test_a_shipped_one_is_found_by_its_name():
    shipped = config("math-200k", rank=16, adapter="foundation", init="foundation-200k")
    model, _ = load_base(shipped)
    about = json.loads((SHIPPED / "foundation-200k" / "foundation.json").read_text())
    assert about["config"]["base"] == "math-200k" and about["after"]["text"] < about["before"]["text"]
    held = load_peft_weights(str(SHIPPED / "foundation-200k"), device="cpu")
    made = peft.get_peft_model_state_dict(adapted(model, shipped))
    assert made.keys() == held.keys() and all(torch.equal(made[name], held[name]) for name in held)
    said = json.loads((SHIPPED / "foundation-200k" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == "math-200k"
