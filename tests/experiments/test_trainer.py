"""The Trainer's run is the loop's, and so is that of several processes."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from experiments.configs import RunError
from experiments.run import run
from experiments.trainer import _same, _Sampler, shares
from tests.experiments.small_runs import config

pytestmark = pytest.mark.usefixtures("sentences")


def _pair(given):
    """The rows of both engines."""
    return [run(dataclasses.replace(given, engine=engine), device="cpu") for engine in ("loop", "trainer")]


@pytest.mark.parametrize(
    "changed",
    [
        {"epochs": 2, "evals": 3},
        {"micro_batch": 3, "clip": 0.05, "warmup": 0.4, "schedule": "linear", "epochs": 2},
        {"optimizer": "sgd", "lr": 5.0, "protocol": "steps", "steps": 6},
        {"dropout": 0.3, "weight_decay": 0.1, "beta2_batch": 2},
        {"dtype": "bfloat16", "epochs": 3},
    ],
    ids=str,
)
def test_the_trainers_run_is_the_loops(tiny_base, changed):
    mine, theirs = _pair(config(tiny_base, **{"lr": 0.05, **changed}))
    assert (theirs["status"], theirs["error"], theirs["engine"]) == ("done", None, "trainer")
    loose = 1e-3 if changed.get("dtype") else 1e-5
    assert theirs["train_loss"] == pytest.approx(mine["train_loss"], rel=loose)
    assert theirs["test_losses"] == pytest.approx(mine["test_losses"], rel=loose)
    for name in ("steps_done", "examples_seen", "tokens_seen"):
        assert theirs[name] == mine[name]
    assert [e["step"] for e in theirs["validation"]] == [e["step"] for e in mine["validation"]]
    start, end = (mine["validation"][i]["loss"] for i in (0, -1))
    assert abs(end - start) > 10 * loose * start  # something was learned, or the engines could not differ


def test_both_engines_measure_the_same_noise(tiny_base):
    mine, theirs = _pair(config(tiny_base, gns_every=1, micro_batch=3, epochs=3))
    names = mine["gns"]["columns"]
    assert theirs["gns"]["columns"] == names and len(theirs["gns"]["steps"]) == 12
    for a, b in zip(mine["gns"]["steps"], theirs["gns"]["steps"], strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-9)
    assert theirs["gns"]["remarks"] == mine["gns"]["remarks"] == []


def test_a_target_stops_the_trainer_where_it_stops_the_loop(tiny_base):
    given = config(tiny_base, epochs=4, evals=16)
    losses = [e["loss"] for e in run(given)["validation"]]
    given = dataclasses.replace(given, protocol="target", target_loss=(losses[5] + losses[6]) / 2)
    mine, theirs = _pair(given)
    assert theirs["steps_done"] == mine["steps_done"] == 6
    assert theirs["target_examples"] == pytest.approx(mine["target_examples"], rel=1e-2)


def test_a_trainer_that_fails_is_a_row(tiny_base, monkeypatch):
    def broken(*given, **options):
        raise RuntimeError("no memory")

    monkeypatch.setattr("experiments.trainer._Trainer.compute_loss", broken)
    row = run(config(tiny_base, engine="trainer", gns_every=1), device="cpu")
    assert row["status"] == "failed" and row["error"].startswith("RuntimeError: no memory (")


@pytest.mark.parametrize(
    "one, other, same",
    [("cpu", "cpu:0", True), ("cuda", "cuda:0", True), ("cuda:1", "cuda:0", False), ("cpu", "cuda", False)],
)
def test_devices_are_compared_as_what_they_are(one, other, same):
    assert _same(torch.device(one), torch.device(other)) is same


def test_another_device_than_the_trainers_is_named(tiny_base, monkeypatch):
    monkeypatch.setattr("experiments.trainer._same", lambda one, other: False)
    row = run(config(tiny_base, engine="trainer"), device="cpu")
    assert row["status"] == "failed" and "engine trainer computes on cpu and cpu is asked for" in row["error"]


@pytest.mark.parametrize(
    "n, processes, micro_batch, sizes",
    [
        (8, 1, None, [[8]]),
        (8, 1, 3, [[2, 3, 3]]),
        (8, 2, None, [[4], [4]]),
        (7, 2, None, [[3], [4]]),
        (16, 2, 3, [[2, 3, 3], [2, 3, 3]]),
        (5, 2, 2, [[1, 1], [1, 2]]),
        (2, 2, 1, [[1], [1]]),
    ],
)
def test_a_batch_is_shared_evenly_and_whole(n, processes, micro_batch, sizes):
    found = shares(range(n), processes, micro_batch)
    assert [[len(part) for part in mine] for mine in found] == sizes
    assert [i for mine in found for part in mine for i in part] == list(range(n))
    assert max(size for mine in sizes for size in mine) <= (micro_batch or n)


@pytest.mark.parametrize("n, processes, micro_batch", [(1, 2, None), (3, 2, 1)])
def test_a_batch_that_cannot_be_shared_is_named(n, processes, micro_batch):
    with pytest.raises(RunError, match=f"of {n} examples cannot be shared by {processes} processes"):
        shares(range(n), processes, micro_batch)


def test_processes_together_see_every_example_once(tiny_base):
    given = config(tiny_base, micro_batch=2)
    samplers = [_Sampler(given, rank, 2) for rank in range(2)]
    for epoch in range(2):
        for sampler in samplers:
            sampler.epoch = epoch
        seen = [i for sampler in samplers for part in sampler for i in part]
        assert sorted(seen) == list(range(30))
        assert len(samplers[0]) == len(samplers[1]) == len(list(samplers[0])) == 8
    samplers[0].epoch = 0
    assert list(samplers[0]) != list(_Sampler(given, 0, 1))


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, micro_batch",
    [(TORCHRUN, None), (TORCHRUN, 2), ([*ACCELERATE, "--mixed_precision=no", "--dynamo_backend=no"], None)],
    ids=["torchrun", "torchrun, micro-batches", "accelerate launch"],
)
def test_two_processes_make_the_loops_run(tmp_path, launcher, micro_batch):
    from gns import corpus

    given = config(str(corpus.base_model_path()), task="wordmath", n_train=36, gns_every=1, evals=2)
    given = dataclasses.replace(given, micro_batch=micro_batch, max_length=256)
    out, file = tmp_path / "rows.jsonl", tmp_path / "run.json"
    file.write_text(json.dumps(given.to_dict()))
    command = [
        sys.executable,
        *launcher,
        "-m",
        "experiments.run",
        "--config",
        str(file),
        "--out",
        str(out),
        "--device",
        "cpu",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = out.read_text().splitlines()
    row, alone = json.loads(line), run(given, device="cpu")
    assert (row["status"], row["engine"], alone["engine"]) == ("done", "trainer", "loop")
    assert row["examples_seen"] == alone["examples_seen"] == 36
    assert row["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-3)
    assert row["test_losses"] == pytest.approx(alone["test_losses"], rel=1e-3)
    for mine, theirs in zip(alone["gns"]["steps"], row["gns"]["steps"], strict=True):
        assert theirs == pytest.approx(mine, rel=1e-2, abs=1e-9)
