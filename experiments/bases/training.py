"""Train one base model from nothing: its untrained weights, its batches, a run that can stop and go on."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from statistics import fmean

import safetensors
import safetensors.torch
import torch
from rich.progress import Progress
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from experiments.bases.configs import BaseConfig
from experiments.schedules import scheduled


def build_model(config: BaseConfig, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Return the untrained model, its weights a function of the seed."""
    shape = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=config.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = LlamaForCausalLM(shape)
    model.generation_config = GenerationConfig.from_model_config(shape)
    return model


def batch(stream: Tensor, config: BaseConfig, step: int) -> Tensor:
    """[batch_size, sequence_length], the windows of one step: a function of the seed and the step alone.

    Every epoch shifts the window borders and draws a new order; so nothing needs to be stored to resume.

    Raises:
        ValueError: if the text is too short for one batch.
    """
    length, windows = config.sequence_length, len(stream) // config.sequence_length - 1
    steps_an_epoch = windows // config.batch_size
    if steps_an_epoch < 1:
        raise ValueError(
            f"base {config.name}: {len(stream)} tokens of text; one batch of {config.batch_size} × {length} "
            f"needs {(config.batch_size + 1) * length}. Give more text or a smaller batch_size."
        )
    epoch, place = divmod(step, steps_an_epoch)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    shift = int(torch.randint(length, (), generator=generator))
    order = torch.randperm(windows, generator=generator)
    chosen = order[place * config.batch_size : (place + 1) * config.batch_size]
    return stream[shift + chosen[:, None] * length + torch.arange(length)]


def learning_rate(config: BaseConfig, step: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    return scheduled("cosine", config.learning_rate, step, config.warmup_steps, config.steps)


class Run:
    """A training run that can stop after any step and go on later with the same result."""

    def __init__(self, config: BaseConfig, model: LlamaForCausalLM, stream: Tensor, device: str = "cpu"):
        """Start at step 0; `resume` moves on to where a checkpoint left off."""
        self.config, self.model, self.stream, self.device = config, model.to(device), stream, device
        # norm weights are vectors and are not decayed
        groups = [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
        self.step = 0
        self.losses: list[float] = []
        described = json.dumps(config.described(), sort_keys=True).encode()
        self.fingerprint = hashlib.sha256(described + stream.numpy().tobytes()).hexdigest()

    def advance(self) -> float:
        """One optimizer step; returns its loss in nats per token."""
        ids = batch(self.stream, self.config, self.step).to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        self.model.train()
        with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.config.autocast):
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.losses.append(loss.item())
        return self.losses[-1]

    def save(self, path: Path) -> None:
        """Write everything that the remaining steps depend on, whole or not at all."""
        tensors = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        for name, parameter in self.model.named_parameters():
            tensors[f"weight/{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}/{name}"] = value
        partial = path.with_suffix(".partial")
        metadata = {"fingerprint": self.fingerprint, "step": str(self.step)}
        safetensors.torch.save_file(tensors, partial, metadata)
        os.replace(partial, path)

    def resume(self, path: Path) -> None:
        """Continue from a file that `save` wrote.

        Raises:
            ValueError: if it belongs to another configuration or another text.
        """
        with safetensors.safe_open(path, "pt", device=self.device) as file:
            metadata = file.metadata() or {}
            if metadata.get("fingerprint") != self.fingerprint:
                raise ValueError(
                    f"{path}: a checkpoint of another configuration or another Python's text "
                    f"({str(metadata.get('fingerprint'))[:12]}, this run is {self.fingerprint[:12]}). "
                    "Delete it, or give another --cache folder."
                )
            keys = sorted({key.split("/")[0] for key in file.keys() if "/" in key} - {"weight"})
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(file.get_tensor(f"weight/{name}"))
                    self.optimizer.state[parameter] = {key: file.get_tensor(f"{key}/{name}") for key in keys}
            self.losses = file.get_tensor("losses").tolist()
        self.step = int(metadata["step"])

    def finish(self, checkpoint: Path, save_every: int = 200) -> None:
        """Train to the last step behind a progress bar; a line of the log every `save_every` steps."""
        with Progress() as progress:
            task = progress.add_task(self.config.name, total=self.config.steps, completed=self.step)
            while self.step < self.config.steps:
                loss = self.advance()
                progress.update(task, completed=self.step, description=f"{self.config.name} loss {loss:.3f}")
                if self.step % save_every == 0 or self.step == self.config.steps:
                    self.save(checkpoint)
                    progress.print(f"step {self.step} loss {fmean(self.losses[-save_every:]):.4f}")


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: Tensor, length: int, batch_size: int = 16) -> float:
    """Nats per token over consecutive windows of the stream; the first token of each window is given."""
    model.eval()
    windows = stream[: len(stream) // length * length].view(-1, length)
    device = next(model.parameters()).device
    total = sum(
        model(input_ids=ids.to(device), labels=ids.to(device), use_cache=False).loss.item() * len(ids)
        for ids in windows.split(batch_size)
    )
    return total / len(windows)
