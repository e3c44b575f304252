import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from gns import GNSCallback, GNSMonitor
from gns.estimate import Estimate
from gns.finetuning.data import Collator, encode_texts
from gns.integrations.shared import LOGGED, Readings
from gns.integrations.transformers import next_step
from gns.monitor import GNSWarning
from gns.packing import pack, unpack
from gns.statistics.live import live
from gns.sums import Layout, StepSums, from_rows
from tests.gns import tiny

STEPS = 6


@pytest.fixture(scope="module")
def rows():
    return encode_texts(tiny.sentences(40), tiny.tokenizer(), max_length=32, source="here").rows


@pytest.fixture
def make(rows, tmp_path):
    """Build a trainer of a tiny Llama with LoRA; equal calls give equal trainings."""

    def make(callbacks=None, **options):
        options = {
            "max_steps": STEPS,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            **options,
        }
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=True,
            **options,
        )
        torch.manual_seed(1)
        model = tiny.lora(tiny.llama())
        trainer = Trainer(
            model,
            arguments,
            train_dataset=rows,
            eval_dataset=rows[:4],
            data_collator=Collator(1),
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    return make


def hooks(model):
    return [
        (name, kind)
        for name, module in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if getattr(module, kind)
    ]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def same(some, others):
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def records(steps):
    """All figures of the steps, bit for bit; NaN equals NaN."""
    return [(repr(replace(s, rows=None, layout=None)), s.rows.tobytes(), s.layout.names) for s in steps]


# what is logged


def test_readings_reach_tensorboard_and_the_log_history(make, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    callback = GNSCallback()
    trainer = make([callback], report_to="tensorboard", max_steps=25)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    tags = {tag for tag in events.Tags()["scalars"] if tag.startswith("train/gns/")}
    assert tags | {"train/gns/b_simple_high"} == {f"train/{key}" for key in LOGGED}  # no upper end so early
    for key in sorted(tag.removeprefix("train/") for tag in tags):
        curve = [(point.step, point.value) for point in events.Scalars(f"train/{key}")]
        logged = [(log["step"], log[key]) for log in trainer.state.log_history if key in log]
        assert [step for step, _ in curve] == [step for step, _ in logged]
        assert [value for _, value in curve] == pytest.approx([value for _, value in logged], rel=1e-6)
    logged = [(log["step"], log["gns/grad_sq_norm"]) for log in trainer.state.log_history]
    everywhere = [step for step, _ in logged]
    assert everywhere == [*range(1, 26), 25]  # the last log is of the whole training
    assert logged[-1][1] == callback.monitor.estimate().grad_sq_norm


def test_the_logged_interval_is_the_live_one_and_appears_at_its_looks(make):
    callback = GNSCallback()
    trainer = make([callback], max_steps=26)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "gns/trace_sigma" in log]
    low = {log["step"]: log.get("gns/b_simple_low") for log in logs}
    assert all(low[step] is None for step in range(1, 20))
    looks = {step: live(callback.monitor.history[:step]) for step in (20, 25)}
    assert [low[step] for step in (20, 24, 25, 26)] == [looks[step].low for step in (20, 20, 25, 25)]
    assert low[25] != low[20] and low[26] < callback.monitor.estimate().low
    assert (callback.shown.low, callback.shown.high) == (looks[25].low, looks[25].high)
    assert callback.shown.set_level == looks[25].set_level
    assert callback.shown.b_simple == callback.monitor.estimate().b_simple


@pytest.mark.parametrize("how", ["passed", "added", "installed"])
def test_it_runs_before_reporters(make, how):
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append("gns/trace_sigma" in logs)

    trainer = make([Reporter(), GNSCallback()] if how == "passed" else [Reporter()])
    if how == "added":
        trainer.add_callback(GNSCallback())
    if how == "installed":
        GNSCallback.install(trainer)
    trainer.train()
    assert isinstance(trainer.callback_handler.callbacks[0], GNSCallback)
    assert seen == [True] * (STEPS + 1)  # the last log is of the whole training


def test_moving_to_the_front_calls_no_other_callback_twice(make):
    begun = []

    class Counter(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            begun.append(self)

    class Another(Counter):
        pass

    counters = [Counter(), Another()]
    make([counters[0], GNSCallback(), counters[1]]).train()
    assert begun == counters


def test_a_value_that_is_not_finite_is_left_out(make, monkeypatch):
    callback = GNSCallback()
    trainer = make([callback])
    true = GNSMonitor.estimate
    monkeypatch.setattr(GNSMonitor, "estimate", lambda self: replace(true(self), b_simple=float("nan")))
    bound = {"low": 3.0, "high": float("inf"), "status": "lower bound"}
    monkeypatch.setattr(GNSMonitor, "live", lambda self: replace(true(self), **bound))
    trainer.train()
    last = trainer.state.log_history[-1]
    assert last["gns/b_simple_low"] == 3.0
    assert not {"gns/b_simple", "gns/b_simple_high"} & set(last)
    json.dumps(trainer.state.log_history, allow_nan=False)


def test_evaluation_neither_counts_nor_carries_readings(make):
    callback = GNSCallback()
    trainer = make([callback], eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert [step.n_examples for step in callback.monitor.history] == [4] * STEPS
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evaluations) == 3
    assert not any(key.startswith("gns/") for log in evaluations for key in log)


def test_late_in_a_long_run_a_logged_estimate_may_be_one_percent_old():
    readings, asked = Readings(), []
    step = StepSums(step=0, n_examples=4, mean_sq_norm=2.0, sq_norm_of_mean=1.0)
    found = Estimate(1.0, 1.0, 2.0, 0.95, "measured", 1.0, 1.0, 9.0, 30, 120)
    monitor = SimpleNamespace(latest=step, estimate=lambda: asked.append(1) or found, live=lambda: found)
    for number in range(1000):
        monitor.latest = replace(step, step=number)
        readings.of(monitor)
    assert 250 < len(asked) < 350


# what training is like with it


def test_training_is_bit_identical_and_nothing_is_left(make):
    plain, measured = make(), make([GNSCallback()], gradient_accumulation_steps=2)
    before = hooks(measured.model), set(vars(measured.model))
    plain = make(gradient_accumulation_steps=2)
    plain.train()
    measured.train()
    assert same(weights(plain), weights(measured))
    assert (hooks(measured.model), set(vars(measured.model)) - set(vars(plain.model))) == (before[0], set())


def test_accumulation_counts_all_examples_of_a_step(make):
    callback = GNSCallback()
    make([callback], gradient_accumulation_steps=2).train()
    assert [step.n_examples for step in callback.monitor.history] == [8] * 5 + [8]
    assert callback.monitor.latest.learning_rate is not None


@pytest.mark.parametrize("given", [{"every": 2}, None], ids=["mapping", "keywords"])
def test_arguments_of_the_monitor(make, given):
    callback = GNSCallback(given) if given else GNSCallback(every=2)
    make([callback]).train()
    assert [step.step for step in callback.monitor.history] == [0, 2, 4]


def test_a_monitor_of_ones_own(make):
    trainer = make()
    monitor = GNSMonitor(trainer.model)
    trainer.add_callback(GNSCallback(monitor))
    trainer.train()
    assert len(monitor.history) == STEPS and not monitor.attached


def test_a_monitor_that_the_user_attached_stays_attached(make):
    trainer = make()
    with GNSMonitor(trainer.model) as monitor:
        trainer.add_callback(GNSCallback(monitor))
        trainer.train()
        assert len(monitor.history) == STEPS and monitor.attached


def test_wrong_arguments(make):
    with pytest.raises(TypeError, match="got a int; a GNSMonitor or a mapping"):
        GNSCallback(3)
    with pytest.raises(TypeError, match="GNSMonitor has no evry; it has every, history"):
        GNSCallback(evry=3)
    with pytest.raises(TypeError, match="got a GNSMonitor and every"):
        GNSCallback(GNSMonitor(torch.nn.Linear(2, 2)), every=3)
    with pytest.raises(ValueError, match="belongs to another model than the Trainer trains"):
        make([GNSCallback(GNSMonitor(torch.nn.Linear(2, 2)))]).train()


def test_the_loss_scale_comes_from_the_trainer(make):
    callback, scaler = GNSCallback(), object()
    state = SimpleNamespace(global_step=0, stateful_callbacks={})
    model = tiny.lora(tiny.llama())
    callback.on_train_begin(None, state, None, model=model, optimizer=SimpleNamespace(scaler=scaler))
    assert callback.monitor.scaler is scaler
    callback.on_train_end(None, state, None)
    assert hooks(model) == []


# when training ends badly


class Bomb(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = None
            raise RuntimeError("out of luck")


def test_after_an_exception_the_with_block_detaches(make):
    trainer = make([Bomb(3)])
    with pytest.raises(RuntimeError, match="out of luck"), GNSCallback.install(trainer) as callback:
        trainer.train()
    assert hooks(trainer.model) == [] and len(callback.monitor.history) == 3


def test_after_an_exception_the_next_training_starts_clean(make):
    callback = GNSCallback()
    trainer = make([callback, Bomb(3)])
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.train()
    assert callback.monitor.attached
    trainer.train()
    assert len(callback.monitor.history) == 3 + STEPS and hooks(trainer.model) == []


# checkpoints


def test_a_resumed_training_goes_on_with_its_readings(make, tmp_path):
    whole = GNSCallback()
    reference = make([whole])
    reference.train()
    broken = make([GNSCallback(), Bomb(5)], save_strategy="steps", save_steps=2)
    with pytest.raises(RuntimeError, match="out of luck"):
        broken.train()
    checkpoint = tmp_path / "out" / "checkpoint-4"
    assert next_step(checkpoint) == 4
    resumed = GNSCallback()
    trainer = make([resumed], save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert records(resumed.monitor.history) == records(whole.monitor.history)
    assert same(weights(trainer), weights(reference))
    assert next_step(tmp_path / "out" / "checkpoint-6") == 6


def test_a_checkpoint_without_readings_still_gives_the_step_numbers(make, tmp_path):
    make(save_strategy="steps", save_steps=2).train()
    callback = GNSCallback()
    trainer = make([callback], save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert [step.step for step in callback.monitor.history] == [4, 5]


def test_the_trainers_own_restoring_of_callbacks(make, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4, "restore_callback_states_from_checkpoint": True}
    make([GNSCallback(every=2)], **options).train()
    trainer = make([GNSCallback(every=2)], **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    (callback,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, GNSCallback)]
    assert [step.step for step in callback.monitor.history] == [0, 2, 4]
    assert callback.monitor.every == 2


def test_readings_survive_json_bit_for_bit():
    layout, other = Layout(("a.lora_A.weight", "a.lora_B.weight")), Layout(("a.lora_A.weight",))
    rows = np.array([[1 / 3, 0.1], [float("nan"), float("inf")]], dtype=np.float32)
    steps = [
        from_rows(rows, layout, step=0, n_examples=4),
        from_rows(np.array([[1e-30, 2.0]]), other, step=1, n_examples=3, n_tokens=7, learning_rate=1e-3),
    ]
    bare = StepSums(step=2, n_examples=1, mean_sq_norm=1.0, sq_norm_of_mean=2.0)
    packed = json.loads(json.dumps(pack(3, [*steps, bare])))
    found = unpack(packed)
    assert packed["next_step"] == 3
    assert records(found[:2]) == records(steps)
    assert found[2] == bare
    assert found[0].rows.dtype == np.float32


def test_a_second_training_of_another_model_has_readings_of_its_own(make):
    callback = GNSCallback(on_error="raise")
    make([callback]).train()
    first = callback.monitor
    make([callback]).train()
    assert callback.monitor is not first and not first.attached
    assert [s.step for s in callback.monitor.history] == [s.step for s in first.history]


def test_a_model_with_nothing_to_measure_is_trained_all_the_same(make, monkeypatch):
    def refused(self):
        raise ValueError("none of the 3 trainable parameters can be measured")

    monkeypatch.setattr("gns.monitor.GNSMonitor.attach", refused)
    with pytest.warns(GNSWarning, match="nothing is measured in this training: none of the 3"):
        make([GNSCallback()]).train()
    with pytest.raises(ValueError, match="none of the 3"):
        make([GNSCallback(on_error="raise")]).train()
