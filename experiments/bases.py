"""`OMP_NUM_THREADS=1 python -m experiments.bases 1m`: train a base model and its tokenizer from nothing.

`1m`: 4,500 steps of 8 × 256 tokens in 18 minutes on one core of an AMD EPYC (Zen 4). Training loss 2.40 nats
per token; held out 2.79 (1.24 bits per byte), where token frequencies alone give 6.37, a uniform guess 7.62.
`gns/assets/base-1m` is that model; `--out gns/assets/base-1m` replaces it.

The text is the running interpreter's, so another Python gives another model. A run that was interrupted and
started again with the same command ends in the same weights. A new size is a new row of `BASES`.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import safetensors
import safetensors.torch
import tokenizers
import torch
import transformers
from rich.progress import Progress
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gns import corpus
from gns.corpus import Document

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"


@dataclass(frozen=True)
class BaseConfig:
    """One base model: its shape and its training. The weights are a function of this and of the text."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    steps: int
    batch_size: int = 8
    sequence_length: int = 256
    context: int = 1_024
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    autocast: bool = True  # matrix products in bfloat16: 1.5 times as fast on a CPU that has them
    seed: int = 0


BASES = {
    config.name: config
    for config in (
        BaseConfig(
            "1m", vocab_size=2_048, hidden_size=128, intermediate_size=344, layers=4, heads=4, steps=4_500
        ),
        BaseConfig(  # for a GPU
            "25m",
            vocab_size=4_096,
            hidden_size=512,
            intermediate_size=1_376,
            layers=8,
            heads=8,
            steps=1_500,
            batch_size=32,
            sequence_length=512,
            learning_rate=1.5e-3,
        ),
    )
}


def train_tokenizer(documents: Sequence[Document], config: BaseConfig) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE: any text comes back from it unchanged; a beginning mark is put before it.

    Raises:
        ValueError: if the text is too short for that many entries.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    if tokenizer.get_vocab_size() != config.vocab_size:
        raise ValueError(
            f"base {config.name}: the text gave {tokenizer.get_vocab_size()} vocabulary entries where "
            f"vocab_size={config.vocab_size}; more text is needed, or a smaller vocab_size."
        )
    marks = [(BOS, tokenizer.token_to_id(BOS))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=marks)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],  # a Llama knows no token types
        model_max_length=config.context,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> Tensor:
    """[tokens], int64: the documents one after the other, each between its two marks."""
    ids: list[int] = []
    for document in documents:
        ids += [*tokenizer(document.text, verbose=False)["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(ids)


def build_model(config: BaseConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
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
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


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
        described = json.dumps(dataclasses.asdict(config), sort_keys=True).encode()
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


def unigram_loss(base: Tensor, held_out: Tensor, vocab_size: int) -> float:
    """Nats per token of the best model without context: the base part's token counts, plus one each."""
    counts = torch.bincount(base, minlength=vocab_size).double() + 1
    return -(counts / counts.sum()).log()[held_out].mean().item()


def run(
    config: BaseConfig,
    out: Path,
    cache: Path,
    *,
    device: str = "cpu",
    base: Sequence[Document] | None = None,
    held_out: Sequence[Document] | None = None,
) -> dict:
    """Train one base model, write its folder and return its row of results.

    Args:
        config: what to train.
        out: folder of the finished model, made if missing; written only at the end.
        cache: folder of the checkpoint of the unfinished run, made if missing.
        device: of torch.
        base: text to train on; by default the standard library's base part.
        held_out: text to evaluate on; by default its held-out part.

    Returns:
        Configuration, sizes, losses and versions, as written to `training.json`.
    """
    base = corpus.documents("base") if base is None else base
    held_out = corpus.documents("held_out") if held_out is None else held_out
    tokenizer = train_tokenizer(base, config)
    stream, unseen = token_stream(tokenizer, base), token_stream(tokenizer, held_out)
    training = Run(config, build_model(config, tokenizer), stream, device)
    cache.mkdir(parents=True, exist_ok=True)
    checkpoint = cache / f"{config.name}.safetensors"
    if checkpoint.exists():
        training.resume(checkpoint)
    started, before = time.monotonic(), training.step
    training.finish(checkpoint)
    minutes = (time.monotonic() - started) / 60

    model = training.model.to(torch.bfloat16)
    row = _results(training, unseen, sum(len(document.text.encode()) for document in held_out))
    row["minutes"] = minutes if before == 0 else None  # of a run in several sittings only the last is known
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "training.json").write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    (out / "README.md").write_text(model_card(row), encoding="utf-8")
    return row


def _results(training: Run, unseen: Tensor, unseen_bytes: int) -> dict:
    """What was run, with which versions, how good the model is and what that has to be compared with."""
    config = training.config
    # the weights are bfloat16 by now, as they ship; arithmetic in float32 tells nothing but their worth
    loss = held_out_loss(training.model.float(), unseen, config.sequence_length)
    return {
        "status": "done",
        "config": dataclasses.asdict(config),
        "hash": training.fingerprint,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "device": training.device,
        "parameters": training.model.num_parameters(),
        "base_tokens": len(training.stream),
        "trained_tokens": config.steps * config.batch_size * config.sequence_length,
        "train_loss": fmean(training.losses[-200:]),
        "held_out_bytes": unseen_bytes,
        "held_out_tokens": len(unseen),
        "held_out_loss": loss,
        "held_out_bits_per_byte": loss / math.log(2) * len(unseen) / unseen_bytes,
        "unigram_loss": unigram_loss(training.stream, unseen, config.vocab_size),
        "uniform_loss": math.log(config.vocab_size),
    }


def model_card(row: dict) -> str:
    """Return the README of a trained base: what it is, what made it, how good it is."""
    config = BaseConfig(**row["config"])
    took = (
        "in several sittings"
        if row["minutes"] is None
        else f"{row['minutes']:.0f} minutes on {row['device']}"
    )
    return f"""---
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
library_name: transformers
---
# base-{config.name}

A Llama-architecture language model of {row["parameters"]:,} parameters with a byte-level BPE tokenizer of
{config.vocab_size:,} entries. It is small on purpose: a real model on real text, to try a LoRA fine-tune and
what measures one without a network. It has no other use; do not expect it to write programs.

Made by `OMP_NUM_THREADS={row["threads"]} python -m experiments.bases {config.name} --out FOLDER`, {took}.

**Data.** Source, comments and docstrings of the standard library of CPython {row["python"]}
({row["base_tokens"]:,} tokens), without tests and generated files, and without the packages
{", ".join(f"`{name}`" for name in sorted(corpus.HELD_OUT))}: those are held out for fine-tuning, and
neither the tokenizer nor the model saw them. `gns/corpus.py` makes the split.

**Training.** {config.steps:,} steps of {config.batch_size} × {config.sequence_length} tokens \
({row["trained_tokens"] / row["base_tokens"]:.1f} epochs), AdamW, peak learning rate {config.learning_rate:g},
{config.warmup_steps} steps of warm-up, cosine to zero, weight decay {config.weight_decay:g}, seed \
{config.seed}, {"bfloat16 autocast" if config.autocast else "float32"}, torch {row["torch"]}, \
transformers {row["transformers"]}. Weights are stored in bfloat16.

| loss, nats per token | |
| --- | --- |
| training, mean of the last 200 steps | {row["train_loss"]:.3f} |
| held out, in windows of {config.sequence_length} tokens | {row["held_out_loss"]:.3f} |
| the same in bits per byte | {row["held_out_bits_per_byte"]:.3f} |
| held out, token frequencies alone | {row["unigram_loss"]:.3f} |
| held out, uniform guess | {row["uniform_loss"]:.3f} |

**Licence.** The training text is under the Python Software Foundation License Version 2, with the licences of
incorporated software listed at the link above. Copyright © 2001 Python Software Foundation;
All Rights Reserved.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and train one row of `BASES`."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bases", description="Train a base model.")
    parser.add_argument("name", nargs="?", default="1m", choices=BASES, help="row of BASES (default: 1m)")
    parser.add_argument("--out", type=Path, help="folder of the model (default: runs/bases/NAME)")
    parser.add_argument("--cache", type=Path, default=Path("runs/bases/cache"), help="checkpoint folder")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    chosen = parser.parse_args(arguments)
    out = chosen.out or Path("runs/bases") / chosen.name
    try:
        row = run(BASES[chosen.name], out, chosen.cache, device=chosen.device)
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"Stopped. The same command goes on from the checkpoint in {chosen.cache}.\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
