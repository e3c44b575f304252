"""Training steps of a model with LoRA adapters on this machine: their time and memory, for a `Sweep`."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from gns.advising.throughput import Memory, OutOfMemory
from gns.finetuning.preparation import FinetuneConfig, prepare_model

SHARE = {"cuda": 0.9, "cpu": 0.8}  # of the free memory that a measurement may use
# growth seen over growth predicted: the host allocator keeps some freed blocks and returns others (up to 1.45
# was measured); CUDA counts whole blocks of 2 or 20 MiB
MARGIN = {"cuda": 1.1, "cpu": 1.5}
SAMPLE = 0.002  # seconds between two looks at the memory of this process
CGROUP = Path("/sys/fs/cgroup")


class LoraTrial:
    """A model with fresh adapters that learns random tokens, all examples of one length.

    The optimizer's learning rate is zero, so its full work is done and no weight moves.

    Args:
        config: of the model and its adapters; `max_length` is the length of every example.

    Raises:
        ConfigError: the model cannot be trained as configured.
    """

    def __init__(self, config: FinetuneConfig) -> None:
        self.config, self.tokens = config, config.max_length
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = prepare_model(config).to(self.device)
        self.model.train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.0)
        self.vocabulary = self.model.get_input_embeddings().num_embeddings
        self.draw = torch.Generator().manual_seed(config.seed)

    def settings(self) -> dict[str, Any]:
        """Say what was timed and on what."""
        cuda = self.device.type == "cuda"
        return {
            "model": self.config.model,
            "tokens_per_example": self.tokens,
            "rank": self.config.rank,
            "target_modules": self.config.target_modules,
            "dtype": str(self.config.base_dtype).removeprefix("torch."),
            "trainable_parameters": sum(p.numel() for p in self.trained),
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def memory(self) -> Memory:
        """What this process holds on the device, and what it may hold."""
        share, margin = SHARE[self.device.type], MARGIN[self.device.type]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            held, (free, _) = torch.cuda.memory_reserved(self.device), torch.cuda.mem_get_info(self.device)
            return Memory(held, int(held + share * free), margin)
        gc.collect()
        held = psutil.Process().memory_info().rss
        return Memory(held, int(held + share * free_host_memory()), margin)

    def peak(self, micro_batch: int, tokens: int) -> int:
        """Make one untimed step and give the most memory held during it, bytes."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self._step(micro_batch, 1, tokens)
            return torch.cuda.max_memory_reserved(self.device)
        with watched_host_memory() as seen:
            self._step(micro_batch, 1, tokens)
        return seen[0]

    def seconds(self, micro_batch: int, accumulation: int) -> float:
        """Make one step and time it."""
        self._wait()
        start = time.perf_counter()
        self._step(micro_batch, accumulation, self.tokens)
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _step(self, micro_batch: int, accumulation: int, tokens: int) -> None:
        """Make one optimizer step, as the Trainer does by default.

        Raises:
            OutOfMemory: it does not fit; what it held is freed.
        """
        try:
            self._forward_backward(micro_batch, accumulation, tokens)
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            failed = True  # leave the handler first: its traceback holds the tensors of the step
        else:
            failed = False
        self.optimizer.zero_grad(set_to_none=True)
        if failed:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            raise OutOfMemory

    def _forward_backward(self, micro_batch: int, accumulation: int, tokens: int) -> None:
        dtype = self.config.base_dtype
        for _ in range(accumulation):
            ids = torch.randint(self.vocabulary, (micro_batch, tokens), generator=self.draw).to(self.device)
            mask = torch.ones_like(ids)
            with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not torch.float32):
                loss = self.model(input_ids=ids, attention_mask=mask, labels=ids).loss / accumulation
            loss.backward()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: CUDA's own kind, or what torch raises on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return any(sign in text for sign in ("out of memory", "can't allocate memory", "not enough memory"))


def free_host_memory() -> int:
    """Bytes that can be used without swapping, within the control group of a container too."""
    free = psutil.virtual_memory().available
    try:  # version 2: "max" where there is no limit
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        cache = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        reclaimable = int(cache.get("inactive_file", 0))
    except (OSError, ValueError):
        return free
    return max(0, min(free, limit - used + reclaimable))


def high_water() -> int:
    """Most resident memory of this process so far, as the system keeps it, bytes."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def watched_host_memory() -> Generator[list[int]]:
    """Find the most resident memory of this process; the list yielded holds it in the end.

    The system's own mark is exact, but it never falls: it counts where it rose. Below it, a thread looks
    again and again, which on a busy machine can miss a short peak.
    """
    process, seen, done, before = psutil.Process(), [0], threading.Event(), high_water()

    def watch() -> None:
        while True:
            seen[0] = max(seen[0], process.memory_info().rss)
            if done.wait(SAMPLE):
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()
        after = high_water()
        seen[0] = max(seen[0], process.memory_info().rss, after if after > before else 0)
