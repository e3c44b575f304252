"""The same run by `transformers.Trainer`: alone, or over the processes of `torchrun` or `accelerate launch`.

Examples, learning rates, loss and evaluations are those of the plain loop; the Trainer brings the engines
(data parallelism, FSDP, devices). `batch_size` is over all processes: each takes an even, consecutive share
of every batch. All processes evaluate the same items, so that they agree on when to stop.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from experiments.configs import RunConfig, RunError
from experiments.course import Course
from experiments.loop import optimizer_of
from experiments.order import batches_of, epoch_batches
from experiments.prepared import Prepared
from experiments.schedules import lr_at
from gns.finetune import n_labels
from gns.integrations.transformers import GNSCallback
from gns.monitor import GNSMonitor


def train(prepared: Prepared, course: Course, monitor: GNSMonitor | None) -> None:
    """Make the steps of a run until its course is over.

    Args:
        prepared: whose model is trained.
        course: hears of every step, and of every evaluation after the first step; the same in all processes.
        monitor: of that model, not attached; None: nothing is measured.

    Raises:
        RunError: a batch cannot be shared by the processes, or the Trainer takes another device.
    """
    with tempfile.TemporaryDirectory() as folder:  # the Trainer wants one, and nothing is written
        settings = _settings(prepared.config, folder, on_cpu=prepared.device.type == "cpu")
        if not _same(settings.device, prepared.device):
            raise RunError(
                f"engine trainer computes on {settings.device} and {prepared.device} is asked for; choose by "
                "CUDA_VISIBLE_DEVICES, or take engine loop"
            )
        trainer = _Trainer(prepared, settings)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Follower(trainer, course))
        if monitor is None:
            trainer.train()
            return
        with GNSCallback.install(trainer, monitor):
            trainer.train()


def _same(one: torch.device, other: torch.device) -> bool:
    """Whether two devices are one; a CPU is, whatever its number."""
    return one.type == other.type and (one.type == "cpu" or (one.index or 0) == (other.index or 0))


def shares(numbers: Sequence[int], processes: int, micro_batch: int | None) -> list[list[list[int]]]:
    """Share the examples of one optimizer step: for each process its micro-batches, equally many for all.

    Args:
        numbers: of the examples.
        processes: to share them.
        micro_batch: most examples in a forward pass; None: a process's whole share.

    Returns:
        [processes][micro-batches], consecutive slices that differ in size by one at the most.

    Raises:
        RunError: there are fewer examples than forward passes.
    """
    size = micro_batch or math.ceil(len(numbers) / processes)
    parts = processes * math.ceil(len(numbers) / (processes * size))
    if len(numbers) < parts:
        raise RunError(
            f"an optimizer step of {len(numbers)} examples cannot be shared by {processes} processes in "
            f"micro-batches of {size}: one would have none. Choose n_train and batch_size as multiples of "
            "the processes"
        )
    ends = [len(numbers) * part // parts for part in range(parts + 1)]
    cut = [list(numbers[start:stop]) for start, stop in zip(ends, ends[1:], strict=False)]
    each = parts // processes
    return [cut[i * each : (i + 1) * each] for i in range(processes)]


def _settings(config: RunConfig, folder: str, *, on_cpu: bool) -> TrainingArguments:
    """Arguments of the Trainer; what it would do by itself (logs, checkpoints, seeds of the data) is off."""
    settings = TrainingArguments(
        output_dir=folder,
        max_steps=config.n_steps,
        max_grad_norm=config.clip or 0.0,
        bf16=config.dtype == "bfloat16",
        seed=config.seed,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        use_cpu=on_cpu,
    )
    if settings.n_gpu > 1:  # one process: it would fall back on nn.DataParallel, which no monitor can read
        settings._n_gpu = 1
    processes = settings.world_size
    smallest = config.n_train % config.batch_size or config.batch_size
    for n in (config.batch_size, smallest):
        each = len(shares(range(n), processes, config.micro_batch)[0])
        settings.gradient_accumulation_steps = max(settings.gradient_accumulation_steps, each)
    return settings


class _Trainer(Trainer):
    """A Trainer with the order, the schedule and the optimizer of the plain loop; its loss is the same."""

    def __init__(self, prepared: Prepared, settings: TrainingArguments) -> None:
        self.run, self.collate, self.validation_loss = (
            prepared.config,
            prepared.collator,
            prepared.validation_loss,
        )
        self.step_loss = torch.zeros((), dtype=torch.float64)
        super().__init__(
            prepared.model,
            settings,
            train_dataset=prepared.data.train,  # type: ignore[arg-type]
            data_collator=prepared.collator,
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Give the loop's optimizer."""
        if self.optimizer is None:
            trained = self.model if model is None else model
            self.optimizer = optimizer_of([p for p in trained.parameters() if p.requires_grad], self.run)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Give the loop's learning rates."""
        if self.lr_scheduler is None:
            # a prepared optimizer hides the one that a scheduler may hold
            inner = getattr(self.optimizer, "optimizer", self.optimizer)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                inner, lambda step: lr_at(self.run, step) / self.run.lr
            )
        return self.lr_scheduler

    def get_train_dataloader(self) -> DataLoader:
        """Give this process's share of the batches, in the order of `experiments.order`."""
        sampler = _Sampler(self.run, self.args.process_index, self.args.world_size)
        return _Loader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=sampler,  # type: ignore[arg-type]
            collate_fn=self.collate,
            generator=torch.Generator(),  # a loader draws a seed, which would move the dropout
        )

    def training_step(self, model: Any, inputs: dict, num_items_in_batch: Any = None) -> Tensor:
        """Make a forward and backward pass, and add its loss to the step's."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_loss = self.step_loss.to(loss.device) + loss.double()
        return loss

    def taken_loss(self) -> float:
        """Give the loss of the step that has ended, over all processes, and begin another."""
        total = self.accelerator.reduce(self.step_loss, reduction="mean")
        self.step_loss = torch.zeros_like(self.step_loss)
        return float(total)


class _Sampler:
    """The micro-batches of one process, epoch after epoch.

    Args:
        config: of the run.
        rank: of the process.
        processes: of the run.
    """

    def __init__(self, config: RunConfig, rank: int, processes: int) -> None:
        self.config, self.rank, self.processes, self.epoch = config, rank, processes, 0

    def _batches(self) -> Iterator[list[int]]:
        config = self.config
        for numbers in epoch_batches(config.n_train, config.batch_size, config.data_seed, self.epoch):
            yield from shares(numbers, self.processes, config.micro_batch)[self.rank]

    def __iter__(self) -> Iterator[list[int]]:
        return self._batches()

    def __len__(self) -> int:
        return sum(1 for _ in self._batches())


class _Loader(DataLoader):
    """Tells its sampler which epoch it is, as the Trainer asks of a loader of one's own."""

    def set_epoch(self, epoch: int) -> None:
        """Hear of the epoch that begins."""
        self.batch_sampler.epoch = epoch  # type: ignore[union-attr]


class _Follower(TrainerCallback):
    """Tells a course of every step, evaluates where it is due, and stops where it is over.

    Args:
        trainer: that calls.
        course: of its run.
    """

    def __init__(self, trainer: _Trainer, course: Course) -> None:
        self.trainer, self.course = trainer, course
        self.batches = batches_of(course.config)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hear of an optimizer step."""
        numbers, rows = next(self.batches), self.trainer.train_dataset
        tokens = sum(n_labels(rows[i]) for i in numbers)  # type: ignore[index]
        self.course.stepped(self.trainer.taken_loss(), len(numbers), tokens)
        if self.course.due:
            self.course.evaluated(self.trainer.validation_loss())
        control.should_training_stop |= self.course.over
