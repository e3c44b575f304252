import mmap

import psutil
import pytest
import torch

from gns.advising.throughput import OutOfMemory, Sweep
from gns.finetuning import timing
from gns.finetuning.preparation import FinetuneConfig
from gns.finetuning.timing import LoraTrial, free_host_memory, is_out_of_memory, watched_host_memory
from tests.gns import tiny


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    folder = tiny.save_model(tmp_path_factory.mktemp("home") / "llama")
    return LoraTrial(FinetuneConfig(str(folder), "", rank=4, max_length=32))


def weights(trial):
    return {name: p.detach().clone() for name, p in trial.model.named_parameters()}


def test_a_sweep_of_a_real_model(trial):
    before = weights(trial)
    curve = Sweep(trial, largest=4, seconds=2.0).run()
    assert list(curve.speeds) == [1, 2, 4]
    assert all(speed > 0 for speed in curve.speeds.values())
    assert all(p.peak_bytes is None or p.peak_bytes > 10**7 for p in curve.points)
    assert trial.settings()["tokens_per_example"] == 32 and trial.settings()["rank"] == 4
    for name, p in trial.model.named_parameters():
        assert torch.equal(p, before[name]), name
    assert trial.optimizer.state and all(p.grad is None for p in trial.trained)


def test_a_step_is_a_full_one_with_as_many_passes_as_asked_for(trial, monkeypatch):
    seen, steps = [], []
    hook = trial.model.register_forward_pre_hook(
        lambda _, args, given: seen.append(
            (tuple(given["input_ids"].shape), given["attention_mask"].all().item())
        ),
        with_kwargs=True,
    )
    monkeypatch.setattr(
        trial.optimizer, "step", lambda: steps.append([p.grad is not None for p in trial.trained])
    )
    try:
        trial.seconds(3, 2)
    finally:
        hook.remove()
    assert seen == [((3, 32), True)] * 2
    assert len(steps) == 1 and all(steps[0])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_runs_out_is_told_apart_and_cleaned_up_after(trial, monkeypatch, error):
    assert is_out_of_memory(error)

    def fails(*_):
        trial.trained[0].grad = torch.ones_like(trial.trained[0])
        raise error

    monkeypatch.setattr(trial, "_forward_backward", fails)
    with pytest.raises(OutOfMemory):
        trial.seconds(1, 1)
    assert all(p.grad is None for p in trial.trained)


def test_any_other_error_is_not_hidden(trial, monkeypatch):
    def fails(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(trial, "_forward_backward", fails)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trial.peak(1, 32)


def test_the_watch_sees_memory_that_is_held_for_a_while_only():
    size = 100 * 2**20
    before = psutil.Process().memory_info().rss
    with watched_host_memory() as seen:
        block = mmap.mmap(-1, size)
        for page in range(0, size, mmap.PAGESIZE):
            block[page] = 1
        threading_pause()
        block.close()
    assert seen[0] - before > 0.9 * size


def threading_pause():
    import time

    time.sleep(20 * timing.SAMPLE)


def test_a_container_bounds_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "CGROUP", tmp_path)
    whole = psutil.virtual_memory().available
    assert free_host_memory() == pytest.approx(whole, rel=0.2)
    (tmp_path / "memory.max").write_text("max\n")
    assert free_host_memory() == pytest.approx(whole, rel=0.2)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 600000\ninactive_file 50000\n")
    assert free_host_memory() == 350_000
    (tmp_path / "memory.current").write_text("2000000\n")
    assert free_host_memory() == 0


def test_the_limit_leaves_a_share_free(trial, monkeypatch):
    monkeypatch.setattr(timing, "free_host_memory", lambda: 10**9)
    memory = trial.memory()
    if trial.device.type == "cpu":
        assert memory.limit == memory.held + 8 * 10**8


@pytest.mark.gpu
def test_on_a_gpu_the_limit_is_found_without_a_crash(tmp_path):
    folder = tiny.save_model(tmp_path / "llama")
    trial = LoraTrial(FinetuneConfig(str(folder), "", rank=4, max_length=64, dtype="float32"))
    assert trial.device.type == "cuda"
    free = torch.cuda.mem_get_info()[0]
    hoard = torch.empty(int(free * 0.97), dtype=torch.uint8, device="cuda")
    try:
        curve = Sweep(trial, largest=1 << 20, seconds=5.0).run()
        held = torch.cuda.memory_allocated()
        with pytest.raises(OutOfMemory):
            trial.seconds(1 << 20, 1)
        assert torch.cuda.memory_allocated() <= held
    finally:
        del hoard
        torch.cuda.empty_cache()
    assert curve.points and ("GiB" in curve.stopped or "does not fit" in curve.stopped)
    assert trial.seconds(2, 2) > 0
