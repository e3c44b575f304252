"""A LoRA Llama on several ranks: DDP by hand, accelerate's loop, the Trainer. Each gives its readings."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gns import GNSCallback, GNSMonitor
from tests.gns.small_models import lora, tokens

REAL: dict[str, Callable[[], dict[str, Any]]] = {}
STEPS = 3


def real(run: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    REAL[run.__name__] = run
    return run


def batch(step: int, rank: int, micro: int = 0) -> dict[str, torch.Tensor]:
    """Rows and tokens differ over steps, ranks and micro-batches."""
    return tokens(2 + (step + rank) % 3, t=11 + rank, seed=100 * step + 10 * rank + micro)


def seen(monitor: GNSMonitor) -> dict[str, Any]:
    coverage = monitor.coverage()
    steps = [
        [s.step, s.n_examples, s.reason, s.n_tokens, s.sum_sq_weights, s.mean_sq_norm, s.sq_norm_of_mean]
        for s in monitor.history
    ]
    share = [coverage.share, len(coverage.verified), coverage.stopped]
    return {"steps": steps, "share": share, "unit": monitor.estimate().unit}


@real
def lora_ddp() -> dict[str, Any]:
    model = lora("llama", torch.float64)
    engine = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with GNSMonitor(engine, on_error="raise") as monitor:
        for step in range(STEPS):
            engine(**batch(step, distributed.get_rank())).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return seen(monitor)


@real
def lora_fsdp() -> dict[str, Any]:
    """FSDP2 as users of LoRA do: each decoder layer, then the whole."""
    model = lora("llama", torch.float64)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with GNSMonitor(model, on_error="raise") as monitor:
        for step in range(STEPS):
            model(**batch(step, distributed.get_rank())).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return seen(monitor)


@real
def lora_accelerate() -> dict[str, Any]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = lora("llama", torch.float64)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    with GNSMonitor(model, on_error="raise") as monitor:
        for step in range(STEPS):
            for micro in range(2):
                with accelerator.accumulate(model):
                    accelerator.backward(model(**batch(step, accelerator.process_index, micro)).loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.05)
                    optimizer.step()
                    optimizer.zero_grad()
        return seen(monitor)


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        full = [tokens(3, seed=i) for i in range(12)]
        self.rows = [{k: v[i] for k, v in each.items()} for each in full for i in range(3)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return self.rows[i]


def train_with_trainer(per_device: int) -> dict[str, Any]:
    """Used in the tests' own process too, with all ranks' rows in one batch."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=per_device, gradient_accumulation_steps=2,
            use_cpu=True, report_to=[], logging_steps=1, save_strategy="no", learning_rate=1e-3, seed=1,
            disable_tqdm=True,
        )  # fmt: skip
        callback = GNSCallback(on_error="raise")
        model = lora("llama", torch.float32)
        trainer = transformers.Trainer(model, arguments, train_dataset=Rows(), callbacks=[callback])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            trainer.train()
    logged = [row for row in trainer.state.log_history if "gns/trace_sigma" in row]
    return {**seen(callback.monitor), "logged": len(logged)}


@real
def lora_trainer() -> dict[str, Any]:
    return train_with_trainer(3)
