"""Packed runs against their solo twins over whole runs, and what cannot be packed."""

import dataclasses
import statistics

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from experiments import outcome, prepared
from experiments.course import Course
from experiments.loop import train
from experiments.packed import engine, packable, program, refusal, run_packed
from experiments.packed.layers import state_of
from experiments.packed.program import Program, Slot
from experiments.run import run
from tests.experiments.small_runs import Sentences, config

pytestmark = pytest.mark.usefixtures("sentences")

SLOTS = (  # each differs from the first in several ways; the last diverges
    {},
    {"lr": 3e-3, "seed": 1, "schedule": "constant", "weight_decay": 0.2},
    {"lr": 2e-2, "seed": 2, "data_seed": 1, "warmup": 0.3, "schedule": "linear", "beta1": 0.8, "beta2": 0.95},
    {"lr": 1e200, "seed": 1, "schedule": "constant"},
)
COMMON = {
    "lora": {"evals": 2, "beta2": 0.99},
    "rslora, epochs": {"adapter": "rslora", "epochs": 2, "clip": 0.02, "evals": 3},
    "pissa, micro-batches": {"adapter": "pissa", "micro_batch": 3, "alpha": 2.0},
    "milora, clip": {"adapter": "milora", "clip": 0.5},
    "dora, micro-batches, epochs": {"adapter": "dora", "micro_batch": 3, "epochs": 2},
    "sgd, steps": {"optimizer": "sgd", "protocol": "steps", "steps": 9, "clip": 1.0},
    "batch 1": {"batch_size": 1, "n_train": 7, "beta2_batch": 8, "beta2": 0.9},
    "target": {"protocol": "target", "target_loss": 5.7, "epochs": 3, "evals": 6},
}


def _wide_norm(self, x):
    return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


@pytest.fixture
def double(monkeypatch):
    """Do all that models and losses do in float32 in float64, in both engines."""
    adapted = prepared.adapted
    monkeypatch.setattr(prepared, "adapted", lambda *given: adapted(*given).double())
    monkeypatch.setattr(LlamaRMSNorm, "forward", _wide_norm)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def _slots(base, common):
    sgd = {"lr": 0.5} if common.get("optimizer") == "sgd" else {}
    first = config(base, **common, **sgd)
    rows = [{k: v for k, v in slot.items() if not (sgd and k == "lr" and v < 1)} for slot in SLOTS]
    if first.adapter == "dora":
        rows.pop()  # its weights keep their length: no learning rate makes its loss leave all bounds
    return [dataclasses.replace(first, **row) for row in rows]


ROUNDED = {"train_loss": 2e-5, "test_losses": 2e-6}  # what is stored with few digits
TIMES = {"engine", "seconds", "started"}


def _close(one, other, rel, path=""):
    """All that two rows say but how they were made; numbers within `rel` or their own rounding."""
    if isinstance(other, dict):
        assert {*one} == {*other}
        for name in {*other} - TIMES:
            _close(one[name], other[name], max(rel, ROUNDED.get(name, 0)), f"{path}.{name}")
    elif isinstance(other, list):
        assert len(one) == len(other), path
        for i, (mine, its) in enumerate(zip(one, other, strict=True)):
            _close(mine, its, rel, f"{path}[{i}]")
    elif isinstance(other, float):
        assert one == pytest.approx(other, rel=rel), path
    else:
        assert one == other, path


@pytest.mark.parametrize("name", COMMON)
def test_every_slot_is_its_solo_twin(tiny_base, double, name):
    configs = _slots(tiny_base, COMMON[name])
    rows, twins = run_packed(configs, device="cpu"), [run(c, device="cpu") for c in configs]
    for row, twin in zip(rows, twins, strict=True):
        assert (row["error"], row["engine"], twin["engine"]) == (None, "packed", "loop")
        _close(row, twin, rel=1e-9)
    assert [row["status"] for row in rows] == ["done", "done", "done", "diverged"][: len(rows)]


@pytest.mark.parametrize("adapter", ["lora", "pissa", "dora"])
def test_every_slot_ends_in_the_weights_of_its_solo_twin(tiny_base, double, adapter):
    configs = _slots(tiny_base, {"adapter": adapter, "epochs": 2, "clip": 0.5, "micro_batch": 3})[:3]
    program = Program([Slot(c, prepared.data_of(c)) for c in configs], torch.device("cpu"))
    start = program._stack.rows()
    program.train()
    for slot, first in zip(program.slots, start, strict=True):
        twin, course = prepared.prepare(slot.config, torch.device("cpu")), Course(slot.config)
        course.evaluated(twin.validation_loss())
        train(twin, course)
        weights = torch.cat([w.flatten() for w in state_of(twin.model).values()])
        assert float((weights - first).norm()) > 1e-2
        torch.testing.assert_close(program._trained[id(slot)], weights, rtol=0, atol=1e-10)


def test_the_comparison_can_fail(tiny_base, double):
    first, second = (config(tiny_base, lr=lr) for lr in (1e-2, 1e-2 * (1 + 1e-4)))
    row, twin = run_packed([first], device="cpu")[0], run(second, device="cpu")
    with pytest.raises(AssertionError, match="loss"):
        _close(row, twin | {name: row[name] for name in ("hash", "config")}, rel=1e-9)


def test_a_slot_that_diverges_leaves_the_others_alone(tiny_base, double):
    configs = _slots(tiny_base, {"clip": 0.5, "epochs": 2})
    together, without = run_packed(configs, device="cpu"), run_packed(configs[:3], device="cpu")
    assert together[3]["status"] == "diverged" and together[3]["steps_done"] < together[0]["steps_done"]
    assert together[3]["train_loss"][-1] is None and together[3]["test_loss"] is None
    for one, other in zip(together, without, strict=False):
        _close(one, other, rel=1e-12)


def test_a_slot_at_its_target_keeps_what_it_had_learned(tiny_base, double):
    first = config(tiny_base, protocol="target", target_loss=5.7765, epochs=2, evals=8)
    configs = [first, dataclasses.replace(first, lr=1e-4)]
    rows, twins = run_packed(configs, device="cpu"), [run(c, device="cpu") for c in configs]
    assert rows[0]["steps_done"] < rows[1]["steps_done"] and rows[1]["target_step"] is None
    for row, twin in zip(rows, twins, strict=True):
        _close(row, twin, rel=1e-9)


def test_slots_with_other_numbers_of_examples_share_a_program(tiny_base, double):
    configs = [config(tiny_base, n_train=n, epochs=2, data_seed=n) for n in (30, 26)]  # last batches: 6 and 2
    assert packable(*configs)
    for row, c in zip(run_packed(configs, device="cpu"), configs, strict=True):
        _close(row, run(c, device="cpu"), rel=1e-9)


def test_in_float32_a_twin_is_nearer_than_another_seed(tiny_base):
    configs = [config(tiny_base, lr=3e-2, epochs=3, seed=seed) for seed in range(5)]
    rows, twins = run_packed(configs, device="cpu"), [run(c, device="cpu") for c in configs]
    apart = max(abs(a["test_loss"] - b["test_loss"]) for a, b in zip(rows, twins, strict=True))
    between = statistics.stdev(row["test_loss"] for row in twins)
    assert apart < between / 100, (apart, between, apart / between)


def test_a_bfloat16_base_is_trained_under_autocast_as_the_loop_does(tiny_base):
    configs = [config(tiny_base, lr=3e-2, epochs=3, dtype="bfloat16", seed=seed) for seed in range(2)]
    for row, c in zip(run_packed(configs, device="cpu"), configs, strict=True):
        twin = run(c, device="cpu")
        assert row["error"] is None and row["test_loss"] < row["validation"][0]["loss"] - 0.05
        assert row["test_loss"] == pytest.approx(twin["test_loss"], abs=0.02)


def test_answers_have_the_same_room_in_a_program_and_alone(tiny_base, monkeypatch):
    asked, given = [], config(tiny_base, generate=5)
    answers = lambda model, tokenizer, items, **more: asked.append(more) or [""] * len(items)  # noqa: E731
    for module in (outcome, program):
        monkeypatch.setattr(module, "answers", answers)
    monkeypatch.setattr(outcome, "ROOM", 1)
    assert run_packed([given], device="cpu")[0]["items_right"] == run(given, device="cpu")["items_right"]
    longest = [each["max_new_tokens"] for each in asked]
    assert len(longest) == 2 and longest[0] == longest[1] < given.max_length


@pytest.mark.parametrize("first", [32, 3])  # all in one go, and gathered anew after 3, 6, 12, … tokens
def test_generated_answers_are_the_twins(tiny_base, double, monkeypatch, first):
    monkeypatch.setattr("experiments.tasks.accuracy.FIRST", first)
    given = []
    monkeypatch.setattr(Sentences, "right", lambda self, item, text: given.append(text) or len(text) % 2)
    configs = [config(tiny_base, lr=lr, epochs=6, generate=5, max_length=32) for lr in (3e-2, 1e-1)]
    rows = run_packed(configs, device="cpu")
    together = given.copy()
    given.clear()
    twins = [run(c, device="cpu") for c in configs]
    assert together == given and len(given) == 10
    assert given[:5] != given[5:] and len(set(given)) > 2  # slots and items do not answer alike
    assert [row["items_right"] for row in rows] == [twin["items_right"] for twin in twins]


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"adapter": "full"}, "adapter 'full' has weights of its own"),
        ({"gns_every": 2}, "gns_every is 2; the monitor reads one run at a time"),
        ({"dropout": 0.1}, "dropout is 0.1; its random numbers"),
    ],
)
def test_what_cannot_be_packed_is_a_failed_row_that_says_why(tiny_base, changed, said):
    config_ = config(tiny_base, **changed)
    assert said in refusal(config_) and not packable(config_, config_)
    (row,) = run_packed([config_], device="cpu")
    assert row["status"] == "failed" and said in row["error"] and 'engine "loop"' in row["error"]
    assert run(dataclasses.replace(config_, engine="packed"), device="cpu")["error"] == row["error"]


@pytest.mark.parametrize(
    "changed, fits",
    [
        ({"lr": 1.0, "seed": 5, "data_seed": 7, "beta2": 0.9, "weight_decay": 0.1, "warmup": 0.1}, True),
        ({"schedule": "constant", "clip": 1.0, "engine": "packed", "dials": {"answered": False}}, True),
        ({"n_train": 31}, True),
        ({"n_train": 33}, False),
        ({"epochs": 2}, False),
        ({"n_train": 15, "epochs": 2}, True),
        ({"batch_size": 4, "n_train": 15}, False),
        ({"rank": 2}, False),
        ({"adapter": "rslora"}, False),
        ({"optimizer": "sgd"}, False),
        ({"evals": 2}, False),
        ({"gns_every": 1}, False),
    ],
    ids=str,
)
def test_what_shares_a_program(changed, fits):
    first = config("x")
    assert packable(first, first)
    assert packable(first, dataclasses.replace(first, **changed)) is fits


def test_answers_are_generated_for_the_same_items():
    first = config("x", generate=2)
    assert not packable(first, dataclasses.replace(first, dials={"answered": False}))


def test_one_slots_missing_data_fail_that_slot(tiny_base):
    good = config(tiny_base)
    bad = dataclasses.replace(good, dials={"no": 1})
    failed, done = run_packed([bad, good], device="cpu")
    assert (failed["status"], done["status"]) == ("failed", "done")
    assert failed["hash"] == bad.hash and "no" in failed["error"]


def test_runs_of_two_kinds_are_refused(tiny_base):
    rows = run_packed([config(tiny_base), config(tiny_base, rank=2)], device="cpu")
    assert [row["status"] for row in rows] == ["failed"] * 2
    assert "cannot share a program" in rows[0]["error"]


def test_a_program_too_large_for_the_memory_is_halved(tiny_base, monkeypatch):
    sizes = []

    class Small(Program):
        def train(self, progress=None):
            sizes.append(len(self.slots))
            if len(self.slots) > 2:
                raise torch.OutOfMemoryError("out of memory")
            super().train(progress)

    monkeypatch.setattr(engine, "Program", Small)
    configs = [config(tiny_base, lr=lr) for lr in (1e-3, 2e-3, 3e-3, 4e-3, 5e-3)]
    rows = run_packed(configs, device="cpu")
    assert sizes == [5, 2, 3, 1, 2]
    assert [row["hash"] for row in rows] == [c.hash for c in configs]
    assert {row["status"] for row in rows} == {"done"}


def test_progress_is_told(tiny_base):
    heard = []
    run_packed([config(tiny_base)], device="cpu", progress=lambda *steps: heard.append(steps))
    assert heard == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_base_with_dropout_is_refused(tiny_base, monkeypatch):
    load = prepared.load_base

    def with_dropout(given):
        model, tokenizer = load(given)
        model.config.attention_dropout = 0.1
        return model, tokenizer

    monkeypatch.setattr(prepared, "load_base", with_dropout)
    (row,) = run_packed([config(tiny_base)], device="cpu")
    assert "has dropout" in row["error"]


def test_adapters_that_leave_another_base_behind_are_refused(tiny_base, monkeypatch):
    adapted = prepared.adapted

    def shifted(model, given):
        found = adapted(model, given)
        next(p for p in found.parameters() if not p.requires_grad).data.add_(given.seed)
        return found

    monkeypatch.setattr(prepared, "adapted", shifted)
    rows = run_packed([config(tiny_base, seed=seed) for seed in (0, 1)], device="cpu")
    assert "pack runs of one seed only" in rows[0]["error"]
