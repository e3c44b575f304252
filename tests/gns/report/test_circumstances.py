from dataclasses import replace

import pytest

from gns.estimate import estimate
from gns.report.circumstances import MISSING, circumstances
from gns.statistics.moments import SUCCESSIVE
from tests.gns.report.conftest import draw


def told(steps, settings=None, batch_size=16) -> dict[str, str]:
    return {s.name: s.value for s in circumstances(estimate(steps), steps, settings or {}, batch_size)}


def at(rates) -> list:
    return [replace(s, learning_rate=r) for s, r in zip(draw(len(rates), 4, 0.1), rates, strict=True)]


def test_of_a_bare_monitor_only_what_the_steps_hold():
    known = told(draw(30, 16, 0.1))
    assert known["learning rate"] == "0.0002" and known["batch"] == "16 examples a step"
    assert known["schedule"] == "constant over these steps"
    assert known["tokens per example"] == "100 (means of the steps 100 … 100)"
    for name in ("clipping", "dropout", "precision", "optimizer", "seed", "versions", "commit"):
        assert known[name] == MISSING, name
    assert known["average"].startswith("ratio of averages over steps 0–29")
    assert known["interval"] == "95 %; variance: between steps"
    assert known["metric"] == "euclidean"


def test_how_the_interval_was_made_and_the_metric_are_told():
    result = replace(estimate(draw(30, 16, 0.1), level=0.9), variance=SUCCESSIVE, metric="adam")
    known = {s.name: s.value for s in circumstances(result, [], {}, 16)}
    assert known["interval"] == "90 %; variance: successive differences"
    assert known["metric"] == "adam"


def test_nothing_recorded_is_said_of_everything():
    steps = [replace(s, learning_rate=None, n_tokens=None) for s in draw(5, 4, 0.1)]
    known = told(steps, batch_size=None)
    assert {v for name, v in known.items() if name not in ("average", "interval", "metric")} == {MISSING}
    assert "average" not in told([], batch_size=None)


@pytest.mark.parametrize(
    ("rates", "rate", "phase"),
    [
        ([1e-3] * 5, "0.001", "constant over these steps"),
        ([1e-3, 8e-4, 5e-4], "0.001 → 0.0005", "falling over these steps"),
        ([1e-4, 5e-4, 1e-3], "0.0001 → 0.001", "rising until step 2"),
        ([1e-4, 1e-3, 5e-4], "0.0001 → 0.001 → 0.0005", "rising until step 1, then falling"),
        ([1e-4, 1e-3, 1e-3], "0.0001 → 0.001", "rising until step 1, then constant"),
        ([1e-3, 1e-4, 1e-3, 2e-4], "0.001 → 0.0002", "up and down over these steps"),
    ],
)
def test_learning_rate_and_phase_are_read_off_the_steps(rates, rate, phase):
    known = told(at(rates))
    assert (known["learning rate"], known["schedule"]) == (rate, phase)


def test_schedule_names_kind_phase_and_place_in_the_run():
    known = told(at([1e-3, 5e-4]), {"lr_scheduler_type": "cosine", "max_steps": 1000})
    assert told(at([1e-3] * 3), {"schedule": "constant"})["schedule"] == "constant over these steps"
    assert known["schedule"] == "cosine, falling over these steps, steps 0–1 of 1,000"
    assert told(at([1e-3, 5e-4]), {"max_steps": -1})["schedule"] == "falling over these steps"


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        ({"max_grad_norm": 1.0}, "clipping", "gradient norm to 1; measured before it"),
        ({"gradient_clip_val": 0}, "clipping", "none"),
        ({"max_grad_norm": "adaptive"}, "clipping", "adaptive"),
        ({"lora_dropout": 0.05}, "dropout", "0.05"),
        ({"dropout": 0.0, "lora_dropout": 0.1}, "dropout", "0"),
        ({"bf16": True, "fp16": False}, "precision", "bfloat16 (mixed)"),
        ({"fp16": True}, "precision", "float16 (mixed)"),
        ({"bf16": False, "dtype": "float32"}, "precision", "float32"),
        ({"optim": "adamw_torch"}, "optimizer", "adamw_torch"),
        ({"seed": 0}, "seed", "0"),
        ({"commit": "abc"}, "commit", "abc"),
        ({"versions": {"torch": "2.13", "peft": 1}}, "versions", "torch 2.13, peft 1"),
        ({"versions": "2.13"}, "versions", MISSING),
        ({"lr": 3e-4}, "learning rate", "0.0002"),  # the steps know better
    ],
)
def test_settings_of_known_trainers_are_found(settings, name, value):
    assert told(draw(3, 4, 0.1), settings)[name] == value


def test_the_rate_of_the_settings_stands_where_the_steps_have_none():
    steps = [replace(s, learning_rate=None) for s in draw(3, 4, 0.1)]
    assert told(steps, {"lr": 3e-4})["learning rate"] == "0.0003"
    assert told(steps, {"learning_rate": "found by search"})["learning rate"] == "found by search"
