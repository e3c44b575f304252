"""One run's configuration: what is refused, the resume key, what it derives."""

import dataclasses
import json

import pytest

from experiments.configs import RunConfig, RunError

RUN = RunConfig("1m", "wordmath")


def test_a_row_gives_its_configuration_back():
    config = dataclasses.replace(RUN, dials={"difficulty": 2}, lr=3e-4, protocol="steps", steps=7)
    assert RunConfig.of(json.loads(json.dumps(config.to_dict()))) == config


def test_the_hash_depends_on_every_field_but_the_engine():
    others = {
        "base": "5m", "task": "stdlib", "dials": {"difficulty": 3}, "n_train": 99, "adapter": "dora",
        "rank": 3,
        "alpha": 1.5, "batch_size": 3, "micro_batch": 3, "optimizer": "sgd", "lr": 0.7, "schedule": "linear",
        "warmup": 0.5, "weight_decay": 0.5, "beta1": 0.5, "beta2": 0.5, "beta2_batch": 3, "clip": 0.5,
        "dropout": 0.5, "epochs": 3, "evals": 3, "n_eval": 3, "generate": 3, "max_length": 3,
        "dtype": "bfloat16", "seed": 3, "data_seed": 3, "gns_every": 3, "gns_metric": "adam",
        "trust_remote_code": True,
    }  # fmt: skip
    pairs = [{"protocol": "steps", "steps": 3}, {"protocol": "target", "target_loss": 1.0}]
    pairs += [{"adapter": "foundation", "init": "x"}]
    names = {f.name for f in dataclasses.fields(RunConfig)}
    assert names == {*others, *(k for pair in pairs for k in pair), "engine"}
    changed = [dataclasses.replace(RUN, **{k: v}) for k, v in others.items()]
    changed += [dataclasses.replace(RUN, **pair) for pair in pairs]
    assert len({RUN.hash, *(c.hash for c in changed)}) == len(changed) + 1
    assert dataclasses.replace(RUN, engine="packed").hash == RUN.hash


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"adapter": "lokr"}, "adapter is 'lokr'; known: 'lora', 'rslora'"),
        ({"rank": 0}, "rank is 0; a whole number, 1 or more"),
        ({"rank": True}, "rank is True"),
        ({"gns_every": -1}, "gns_every is -1; a whole number, 0 or more"),
        ({"lr": float("nan")}, "lr is nan; a number above 0"),
        ({"clip": 0.0}, "clip is 0.0; a number above 0"),
        ({"alpha": -1.0}, "alpha is -1.0; a number above 0"),
        ({"weight_decay": float("nan")}, "weight_decay is nan; a number, 0 or more"),
        ({"beta2": 1.0}, r"beta2 is 1.0; a number in \[0, 1\)"),
        ({"batch_size": 2048}, "batch_size 2048 is larger than the data: n_train 1024"),
        ({"steps": 5}, "protocol is 'epochs' and steps is 5"),
        ({"protocol": "target"}, "target_loss is None; they go together"),
        ({"adapter": "foundation"}, "a foundation needs its folder"),
    ],
)
def test_what_cannot_be_run_is_named(changed, said):
    with pytest.raises(RunError, match=said):
        dataclasses.replace(RUN, **changed)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"base": "1m"}, "a run needs task"),
        ({"base": "1m", "task": "x", "learning_rate": 1}, r"unknown key\(s\) learning_rate; known: adapter"),
        ({"base": "1m", "task": "x", "lr": "fast"}, "wrong type"),
    ],
)
def test_a_mapping_that_is_no_run_is_named(given, said):
    with pytest.raises(RunError, match=said):
        RunConfig.of(given)


def test_a_whole_number_is_the_same_run_as_that_number():
    whole, other = (dataclasses.replace(RUN, alpha=a, lr=a) for a in (1, 1.0))
    assert whole.hash == other.hash


def test_steps_count_the_last_small_batch():
    assert dataclasses.replace(RUN, n_train=33, epochs=2).n_steps == 6
    assert dataclasses.replace(RUN, protocol="steps", steps=7).n_steps == 7


def test_beta2_remembers_so_many_examples():
    assert RUN.betas == (0.9, 0.999)
    quarter = dataclasses.replace(RUN, batch_size=4, beta2_batch=16)
    assert quarter.betas[1] ** 4 == pytest.approx(0.999)
