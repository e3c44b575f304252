"""One run, one row: what is in it, that it is repeated to the last digit, and that nothing escapes."""

import dataclasses
import json
import random

import pytest
import torch

from experiments import loop
from experiments import run as running
from experiments.configs import RunConfig, RunError
from experiments.outcome import one_line, summary
from experiments.prepared import Prepared
from experiments.readings import steps_of
from experiments.run import run
from gns.estimate import estimate
from gns.monitor import GNSWarning
from tests.experiments.small_runs import config, without_times

pytestmark = pytest.mark.usefixtures("sentences")
KEYS = {
    *("hash", "config", "status", "error", "commit", "versions", "device", "engine", "threads", "started"),
    *("seconds", "steps_done", "examples_seen", "tokens_seen", "train_loss", "validation", "test_loss"),
    *("test_losses", "accuracy", "items_right", "target_step", "target_examples", "gns"),
}


def test_a_row_says_what_was_run_and_what_came_out(tiny_base):
    given = config(tiny_base, evals=2, generate=3, gns_every=1, epochs=2)
    row = run(given)
    assert set(row) == KEYS
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert (row["status"], row["error"], row["engine"]) == ("done", None, "loop")
    assert RunConfig.of(row["config"]) == given and row["hash"] == given.hash
    assert {"python", "numpy", "torch", "transformers", "peft"} <= set(row["versions"])
    assert row["device"].startswith("cpu ") and row["threads"] == torch.get_num_threads()
    assert row["started"].endswith("+00:00") and row["seconds"] > 0
    assert (row["steps_done"], row["examples_seen"], len(row["train_loss"])) == (8, 60, 8)
    assert [e["step"] for e in row["validation"]] == [0, 4, 8]
    assert row["validation"][-1]["loss"] < row["validation"][0]["loss"]
    assert len(row["test_losses"]) == given.n_eval
    assert row["items_right"] == [int(x) for x in row["items_right"]] and len(row["items_right"]) == 3
    assert row["accuracy"] == sum(row["items_right"]) / 3
    assert row["gns"]["summary"]["B"]["n_steps"] == len(row["gns"]["steps"]) == 8
    assert estimate(steps_of(row["gns"])).b_simple == pytest.approx(
        row["gns"]["summary"]["joint"]["b_simple"], rel=1e-6, nan_ok=True
    )


def test_a_row_repeats_to_the_last_digit_and_leaves_random_numbers_alone(tiny_base):
    given = config(tiny_base, dropout=0.3, gns_every=2)
    torch.manual_seed(1)
    states = torch.get_rng_state(), random.getstate()
    first = run(given)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    torch.manual_seed(2)
    assert without_times(run(given)) == without_times(first)
    other = run(dataclasses.replace(given, seed=1))
    assert other["train_loss"] != first["train_loss"]


def test_measuring_does_not_move_the_result(tiny_base):
    given = config(tiny_base)
    plain, measured = run(given), run(dataclasses.replace(given, gns_every=1))
    assert measured["gns"] and plain["gns"] is None
    assert measured["test_losses"] == plain["test_losses"]
    assert measured["train_loss"] == plain["train_loss"]


def test_an_interrupt_leaves_and_a_rerun_gives_the_row_as_if_it_had_not_been(tiny_base, monkeypatch):
    given = config(tiny_base, dropout=0.3, gns_every=1)
    expected = run(given)
    steps = []

    def interrupted(prepared, numbers, tokens):
        if len(steps) == 2:
            raise KeyboardInterrupt
        steps.append(numbers)
        return backward(prepared, numbers, tokens)

    backward = loop._backward
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(loop, "_backward", interrupted)
        run(given)
    assert len(steps) == 2
    assert without_times(run(given)) == without_times(expected)


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"task": "sentnces"}, "no task 'sentnces'; known: wordmath"),
        ({"dials": {"hardness": 3}}, "task sentences: no dial hardness"),
        ({"rank": 9}, "rank 9 is larger than layer `model.layers.0.self_attn.k_proj`"),
        ({"max_length": 3}, "no token to learn within max_length 3"),
        ({"adapter": "foundation", "init": "nowhere"}, "init nowhere: no adapter_config.json"),
        ({"adapter": "full", "engine": "packed"}, "adapter 'full' has weights of its own"),
    ],
)
def test_what_is_wrong_with_a_run_is_its_row(tiny_base, changed, said):
    row = run(config(tiny_base, **changed))
    assert row["status"] == "failed" and said in row["error"]
    assert "\n" not in row["error"] and "(" not in row["error"].split(said)[0]
    assert set(row) == KEYS and row["test_loss"] is None and row["steps_done"] is None
    assert row["hash"] == config(tiny_base, **changed).hash


def test_an_error_inside_a_run_is_its_row_and_says_where(tiny_base, monkeypatch):
    def broken(*given):
        raise RuntimeError("CUDA out of memory.\nTried to allocate 3 GiB")

    monkeypatch.setattr(loop, "_backward", broken)
    row = run(config(tiny_base, gns_every=1))
    assert row["error"].startswith("RuntimeError: CUDA out of memory. (test_run.py, line ")
    monkeypatch.undo()
    assert one_line(RunError("first\nsecond")) == "first"


def test_a_device_that_is_not_there_is_a_row(tiny_base):
    row = run(config(tiny_base), device="tpu9")
    assert row["status"] == "failed" and "tpu9" in row["error"]


def test_a_run_whose_loss_is_not_finite_is_a_result(tiny_base):
    given = config(tiny_base, lr=1e38, optimizer="sgd", adapter="full", evals=4, generate=2, gns_every=1)
    row = run(given)
    assert (row["status"], row["error"]) == ("diverged", None)
    assert row["test_loss"] is row["accuracy"] is row["test_losses"] is None
    assert 1 <= row["steps_done"] <= 2 and row["validation"][0]["loss"] > 0
    assert None in [*row["train_loss"], *(e["loss"] for e in row["validation"])]
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_a_run_whose_validation_loss_is_too_high_is_a_result(tiny_base, monkeypatch):
    losses = iter([5.0, 15.1])  # a tiny model's logits are too bounded for that
    monkeypatch.setattr(Prepared, "validation_loss", lambda self: next(losses))
    row = run(config(tiny_base, evals=2))
    assert (row["status"], row["steps_done"], row["test_loss"]) == ("diverged", 2, None)
    assert len(row["validation"]) == 2


def test_a_target_stops_the_run_between_two_evaluations(tiny_base):
    given = config(tiny_base, epochs=4, evals=16)
    losses = [e["loss"] for e in run(given)["validation"]]
    target = (losses[5] + losses[6]) / 2
    row = run(dataclasses.replace(given, protocol="target", target_loss=target))
    assert [e["loss"] for e in row["validation"]] == losses[:7] and row["status"] == "done"
    assert 38 < row["target_examples"] < 46 and row["test_loss"] is not None
    never = run(dataclasses.replace(given, protocol="target", target_loss=0.1))
    assert (never["status"], never["target_examples"], never["steps_done"]) == ("done", None, 16)


def test_a_task_without_answers_has_no_accuracy(tiny_base):
    row = run(config(tiny_base, generate=2, dials={"answered": False}))
    assert (row["status"], row["accuracy"], row["items_right"]) == ("done", None, None)


def test_what_the_monitor_says_is_in_the_row_and_not_on_the_screen(tiny_base, recwarn):
    row = run(config(tiny_base, batch_size=1, n_train=3, gns_every=1))
    assert row["status"] == "done" and row["gns"]["skipped"] == 3
    assert any("1 example(s) in the step" in remark for remark in row["gns"]["remarks"])
    assert not [w for w in recwarn if issubclass(w.category, GNSWarning)]


def test_other_warnings_reach_the_user():
    import warnings

    with pytest.warns(DeprecationWarning, match="old"), warnings.catch_warnings():
        warnings.simplefilter("always", DeprecationWarning)
        assert running.heard(lambda: warnings.warn("old", DeprecationWarning, stacklevel=1)) == []


def test_runs_of_one_seed_share_their_data_and_their_first_loss(tiny_base):
    given = config(tiny_base, n_train=24)
    small, large = run(given), run(dataclasses.replace(given, batch_size=24, lr=0.3))
    assert small["validation"][0] == large["validation"][0]
    assert small["tokens_seen"] == large["tokens_seen"]


def test_a_packed_run_of_one_is_the_loops(tiny_base):
    given = config(tiny_base, generate=2)
    mine, packed = run(given), run(dataclasses.replace(given, engine="packed"))
    assert (packed["status"], packed["engine"], set(packed)) == ("done", "packed", KEYS)
    assert packed["test_losses"] == pytest.approx(mine["test_losses"], rel=1e-4)


def test_several_processes_take_the_trainer(tiny_base, monkeypatch):
    given = config(tiny_base)
    assert running.engine_of(given) == "loop"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert running.engine_of(given) == "trainer"
    assert running.engine_of(dataclasses.replace(given, engine="loop")) == "loop"


def test_the_command_adds_a_row_and_prints_a_line(tiny_base, tmp_path, capsys):
    out, given = tmp_path / "new" / "rows.jsonl", config(tiny_base, generate=2, gns_every=1)
    file = tmp_path / "run.json"
    file.write_text(json.dumps(given.to_dict()))
    for written in (str(file), file.read_text()):
        assert running.main(["--config", written, "--out", str(out), "--device", "cpu"]) == 0
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    assert without_times(first) == without_times(second)
    line = capsys.readouterr().out.splitlines()[0]
    assert line == summary(first)
    assert all(said in line for said in (given.hash, "B=8", "4 steps", "test loss", "right", "B_simple"))


@pytest.mark.parametrize(
    "written, said",
    [
        ("{", "--config: Expecting property name"),
        ('{"base": "1m", "task": "x", "lr": -1}', "--config: lr is -1"),
        ("nowhere.json", "No such file"),
    ],
)
def test_a_command_that_is_no_run_is_refused(capsys, written, said):
    assert running.main(["--config", written]) == running.EXIT_REFUSED
    assert said in capsys.readouterr().err


def test_a_failed_command_says_why(tiny_base, capsys, tmp_path):
    out = tmp_path / "rows.jsonl"
    given = json.dumps(config(tiny_base, rank=99).to_dict())
    assert running.main(["--config", given, "--out", str(out)]) == running.EXIT_FAILED
    assert "failed: rank 99 is larger" in capsys.readouterr().out
    assert json.loads(out.read_text())["status"] == "failed"


def test_only_the_first_process_writes(tiny_base, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    out = tmp_path / "rows.jsonl"
    running.main(["--config", json.dumps(config(tiny_base).to_dict()), "--out", str(out)])
    assert not out.exists() and not capsys.readouterr().out
