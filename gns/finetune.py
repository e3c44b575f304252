"""The small real LoRA fine-tune behind `gns demo` and `gns measure`, on `transformers.Trainer`.

Everything that bad input can break happens first, in `gns.finetuning.preparation`; then a run writes OUT:

    run.json            the configuration
    steps.jsonl         one record an optimizer step, as it happens
    curvature.jsonl     one record a reading of B_noise, if asked for
    checkpoints/        the last checkpoint, to resume from
    adapter/            the trained adapter (safetensors) and its tokenizer
    report.html, summary.json, *.png

Ctrl-C ends the run after the step it is in, with a checkpoint and a report of what was measured; a second one
ends it at once, with the report. A resumed run goes on from the last checkpoint with the readings before it.
"""

from __future__ import annotations

import math
import signal
import threading
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.utils import enable_progress_bars
from peft.tuners.lora import LoraLayer
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from gns import records
from gns.advising.capacity import AdaptedLayer
from gns.curvature.readingsfile import cut_readings
from gns.estimate import Estimate
from gns.finetuning import runfolder
from gns.finetuning.data import NO_LOSS, Collator, Row, pad_id
from gns.finetuning.preparation import ConfigError, FinetuneConfig, Prepared, prepare
from gns.integrations.transformers import GNSCallback, next_step
from gns.monitor import GNSMonitor


@dataclass(frozen=True)
class Progress:
    """One optimizer step, for a display: steps made and to make, mean loss a token, estimate so far."""

    step: int
    n_steps: int
    loss: float
    estimate: Estimate | None


@dataclass(frozen=True)
class RunResult:
    """What a run found.

    Args:
        out: its folder.
        estimate: over all its steps, those before a resume included.
        loss_before: mean loss a token on the held-out examples, None where there are none.
        loss_after: the same after training, None after an interrupt.
        steps_made: optimizer steps, those before a resume included.
        n_steps: optimizer steps that the run is to make.
        interrupted: whether the user stopped it.
    """

    out: Path
    estimate: Estimate
    loss_before: float | None
    loss_after: float | None
    steps_made: int
    n_steps: int
    interrupted: bool


class Watcher:
    """Hears of a run; this one keeps silent."""

    def remark(self, line: str) -> None:
        """Hear something the user should know."""

    def step(self, progress: Progress) -> None:
        """Hear of an optimizer step."""


def run(
    config: FinetuneConfig, out: str | Path, *, resume: bool = False, watcher: Watcher | None = None
) -> RunResult:
    """Fine-tune, measure and report.

    Args:
        config: of the run; of a resumed one, the configuration it was started with.
        out: folder to write; made if it is not there.
        resume: go on with the interrupted run in `out`.
        watcher: hears of each step.

    Returns:
        What was found. Whatever training raises comes after a report of what was measured until then.

    Raises:
        ConfigError: the run cannot start, and nothing is written (`DataError` where the data are at fault).
    """
    out, watcher = Path(out), watcher or Watcher()
    config.check()
    checkpoint = runfolder.resumable(out, config) if resume else runfolder.refuse_used(out)
    with without_bars():
        prepared = prepare(config)
        if checkpoint is not None and runfolder.steps_of(checkpoint) >= prepared.n_steps:
            raise ConfigError(
                f"{out}: the run is complete, {runfolder.steps_of(checkpoint)} steps; nothing to resume"
            )
        with runfolder.claimed(out):
            for line in prepared.remarks:
                watcher.remark(line)
            return _Run(config, prepared, out, checkpoint, watcher).go()


class _Run:
    """One run on its way: the Trainer, the monitor, and what is known so far."""

    def __init__(
        self, config: FinetuneConfig, prepared: Prepared, out: Path, checkpoint: Path | None, watcher: Watcher
    ) -> None:
        self.config, self.prepared, self.out, self.checkpoint = config, prepared, out, checkpoint
        steps = out / records.STEPS
        if steps.exists():  # steps after the checkpoint will be made again
            last = (next_step(checkpoint) or 0) - 1 if checkpoint else -1
            records.cut_after(steps, last)
            cut_readings(out, last)
        runfolder.write_config(out, config)
        self.collator = Collator(pad_id(prepared.tokenizer))
        self.monitor = GNSMonitor(
            prepared.model,
            every=config.every,
            sink=steps,
            curvature_every=config.curvature_every,
            curvature_spectrum=config.curvature_spectrum,
            metric=config.metric,
        )
        self.trainer = Trainer(
            prepared.model,
            _arguments(config, prepared.n_steps, out / runfolder.CHECKPOINTS),
            train_dataset=prepared.train,  # type: ignore[arg-type]
            data_collator=self.collator,
        )
        self.trainer.remove_callback(PrinterCallback)
        self.callback = GNSCallback.install(self.trainer, self.monitor)
        self.stop = _Stop()
        self.trainer.add_callback(_Reporter(watcher, self.callback))
        self.trainer.add_callback(self.stop)
        self.loss_before: float | None = None
        self.loss_after: float | None = None

    def go(self) -> RunResult:
        """Train, then report, whatever ended the training.

        Raises:
            KeyboardInterrupt: the user ended it at once, before there was a reading to report.
        """
        interrupted = False
        with self.stop.on_signal():
            try:
                self.loss_before = self._held_out_loss()
                self.trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
                interrupted = self.stop.asked
                if not interrupted:
                    self.loss_after = self._held_out_loss()
            except KeyboardInterrupt:
                interrupted = True
                if not self.monitor.history:
                    raise
            finally:
                self.stop.shield()
                self.callback.detach()
                if self.monitor.history:
                    self._report()
        state = self.trainer.state
        losses = self.loss_before, self.loss_after
        # of the file, as in the report: a bounded history may have forgotten the first steps
        estimate = records.load(self.out) if self.monitor.history else self.monitor.estimate()
        return RunResult(self.out, estimate, *losses, state.global_step, self.prepared.n_steps, interrupted)

    def _report(self) -> None:
        model = self.prepared.model
        for part in (model, self.prepared.tokenizer):
            part.save_pretrained(self.out / runfolder.ADAPTER)
        settings = {
            **asdict(self.config),
            "steps_made": self.trainer.state.global_step,
            "learning_rate": self.config.lr,
            "dataset_size": len(self.prepared.train),
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "adapted_layers": [list(astuple(layer)) for layer in adapted_layers(model)],
            **first_epoch(self.trainer.state.log_history),
            "loss_tokens": sum(n_labels(row) for row in self.prepared.train),
            "held_out_loss_before": self.loss_before,
            "held_out_loss_after": self.loss_after,
            "steps_planned": self.prepared.n_steps,
            "optimizer": self.trainer.args.optim.value,  # type: ignore[union-attr]
            "max_grad_norm": self.trainer.args.max_grad_norm,
            "dropout": dropout_of(model),
            "precision": f"{self.config.base_dtype} base, float32 adapters".removeprefix("torch."),
            "device": str(model.device),
        }
        self.monitor.report(self.out, settings=settings, batch_size=self.config.examples_per_step)

    def _held_out_loss(self) -> float | None:
        model, dtype = self.prepared.model, self.config.base_dtype
        with torch.autocast(
            model.device.type, dtype=dtype, enabled=dtype is not torch.float32
        ):  # as in training
            return mean_loss(model, self.prepared.held_out, self.collator, self.config.batch_size)


def mean_loss(model: Any, rows: Sequence[Row], collator: Collator, batch_size: int) -> float | None:
    """Mean loss a token over examples, in nats; None without examples. Training mode is left as it was."""
    was_training, total, count = model.training, 0.0, 0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            batch = {k: v.to(model.device) for k, v in collator(rows[start : start + batch_size]).items()}
            n_labels = int((batch["labels"][:, 1:] != NO_LOSS).sum())
            total += float(model(**batch).loss) * n_labels
            count += n_labels
    model.train(was_training)
    return total / count if count else None


def first_epoch(logs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Summarise the training loss of the first epoch from the Trainer's log of every step.

    Args:
        logs: entries with "loss" (nats a token) and "epoch" are looked at; a resumed run has those before it.

    Returns:
        `first_epoch_loss`, the mean loss in nats a token, None where it is not finite; `first_epoch_share`,
        how much of the epoch it is of, 0 … 1.
    """
    inside = [entry for entry in logs if "loss" in entry and entry.get("epoch", math.inf) <= 1 + 1e-6]
    losses = [float(entry["loss"]) for entry in inside]
    mean = math.fsum(losses) / len(losses) if losses else math.nan
    share = max((float(entry["epoch"]) for entry in inside), default=0.0)
    return {"first_epoch_loss": mean if math.isfinite(mean) else None, "first_epoch_share": min(share, 1.0)}


def adapted_layers(model: Any) -> list[AdaptedLayer]:
    """List the linear layers of a model that carry a LoRA adapter, those of one shape together."""
    found: Counter[tuple[int, int, int]] = Counter()
    for module in model.modules():
        if not isinstance(module, LoraLayer) or not module.lora_A:
            continue
        rank = sum(module.r[name] for name in module.lora_A)  # several adapters at once add their ranks
        if module.in_features and module.out_features:
            found[(module.in_features, module.out_features, rank)] += 1
    return [AdaptedLayer(*shape, count) for shape, count in found.items()]


def n_labels(row: Row) -> int:
    """Count the tokens of an example that have a loss: the first is predicted from nothing."""
    return sum(label != NO_LOSS for label in row.labels[1:])


class _Reporter(TrainerCallback):
    """Hands each step's loss and the estimate so far to the watcher."""

    def __init__(self, watcher: Watcher, callback: GNSCallback) -> None:
        self.watcher, self.callback = watcher, callback

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Hear of a step's loss."""
        if logs and "loss" in logs:
            self.watcher.step(Progress(state.global_step, state.max_steps, logs["loss"], self.callback.shown))


class _Stop(TrainerCallback):
    """Ctrl-C: the first ends training after the step it is in, with a checkpoint; the second at once."""

    def __init__(self) -> None:
        self.asked = self._shielded = False

    def on_step_end(self, args, state, control, **kwargs):
        """End here if the user asked."""
        if self.asked:
            control.should_training_stop = control.should_save = True
        return control

    def shield(self) -> None:
        """Let nothing interrupt the report."""
        self._shielded = True

    @contextmanager
    def on_signal(self) -> Generator[None]:
        """Listen to SIGINT; only the main thread can, in any other this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _hear(self, number: int, frame: object) -> None:
        if self.asked and not self._shielded:
            raise KeyboardInterrupt
        self.asked = True


def _arguments(config: FinetuneConfig, n_steps: int, folder: Path) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=n_steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.grad_accum,
        learning_rate=config.lr,
        lr_scheduler_type=config.schedule,
        optim="adamw_torch",
        bf16=config.base_dtype is torch.bfloat16,
        fp16=config.base_dtype is torch.float16,
        seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # show a NaN loss as what it is
        save_steps=config.save_every,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )
    if (
        arguments.n_gpu > 1
    ):  # the Trainer would fall back on nn.DataParallel, whose replicas no monitor can read
        arguments._n_gpu = 1
    return arguments


def dropout_of(model: Any) -> float:
    """Largest dropout probability in a model and its adapters: of its modules, and of functions by config."""
    kinds = (torch.nn.Dropout, torch.nn.Dropout1d, torch.nn.Dropout2d, torch.nn.AlphaDropout)
    found = [m.p for m in model.modules() if isinstance(m, kinds)]
    known = model.config.get_text_config().to_dict()  # attention_dropout, attn_pdrop …
    numbers = {name: p for name, p in known.items() if type(p) in (int, float)}  # a flag is no probability
    found += [p for name, p in numbers.items() if "drop" in name]
    return float(max(found, default=0.0))


@contextmanager
def without_bars() -> Generator[None]:
    """Switch transformers' own progress bars off for a while; downloads keep theirs, and warnings stay."""
    bars = transformers.utils.logging
    if not bars.is_progress_bar_enabled():
        yield
        return
    bars.disable_progress_bar()
    enable_progress_bars()  # of the hub's downloads, which were switched off with the others
    try:
        yield
    finally:
        bars.enable_progress_bar()
