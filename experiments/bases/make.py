"""Make a base model: its text, its training, its folder with a card, its row of results."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from experiments.bases.card import model_card
from experiments.bases.configs import BaseConfig
from experiments.bases.paths import base_path
from experiments.bases.text import Text, text, token_stream, train_tokenizer
from experiments.bases.training import Run, build_model, held_out_loss
from gns.corpus import Document


def make(
    config: BaseConfig,
    out: Path,
    cache: Path,
    *,
    device: str = "cpu",
    base: Text | None = None,
    held_out: Text | None = None,
) -> dict:
    """Train one base model, write its folder and return its row of results.

    Args:
        config: what to train.
        out: folder of the finished model, made if missing; written only at the end.
        cache: folder of the checkpoint of the unfinished run, made if missing.
        device: of torch.
        base: text to train on, by kind; by default what the configuration says.
        held_out: text to evaluate on, by kind; by default likewise.

    Returns:
        Configuration, sizes, losses and versions, as written to `training.json`.
    """
    base = text(config, "base") if base is None else base
    held_out = text(config, "held_out") if held_out is None else held_out
    learned = [document for documents in base.values() for document in documents]
    tokenizer = _tokenizer(learned, config)
    training = Run(config, build_model(config, tokenizer), token_stream(tokenizer, learned), device)
    cache.mkdir(parents=True, exist_ok=True)
    checkpoint = cache / f"{config.name}.safetensors"
    if checkpoint.exists():
        training.resume(checkpoint)
    started, before = time.monotonic(), training.step
    training.finish(checkpoint)
    minutes = (time.monotonic() - started) / 60

    model = training.model.to(torch.bfloat16)
    # the weights are bfloat16 by now, as they ship; arithmetic in float32 tells nothing but their worth
    measured = {
        kind: _measured(training, tokenizer, base[kind], held_out[kind], model.float()) for kind in held_out
    }
    row = _row(training, measured)
    row["minutes"] = minutes if before == 0 else None  # of a run in several sittings only the last is known
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "training.json").write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    (out / "README.md").write_text(model_card(row), encoding="utf-8")
    return row


def _tokenizer(learned: Sequence[Document], config: BaseConfig) -> PreTrainedTokenizerBase:
    """Train the tokenizer, or take that of the row which the configuration names."""
    if config.tokenizer is None:
        return train_tokenizer(learned, config)
    return AutoTokenizer.from_pretrained(base_path(config.tokenizer))


def _measured(
    training: Run,
    tokenizer: PreTrainedTokenizerBase,
    base: Sequence[Document],
    held_out: Sequence[Document],
    model: LlamaForCausalLM,
) -> dict:
    """How good the model is on one kind of text, and what that has to be compared with."""
    known, unseen = token_stream(tokenizer, base), token_stream(tokenizer, held_out)
    n_bytes = sum(len(document.text.encode()) for document in held_out)
    loss = held_out_loss(model, unseen, training.config.sequence_length)
    return {
        "base_tokens": len(known),
        "held_out_bytes": n_bytes,
        "held_out_tokens": len(unseen),
        "held_out_loss": loss,
        "held_out_bits_per_byte": loss / math.log(2) * len(unseen) / n_bytes,
        "unigram_loss": unigram_loss(known, unseen, training.config.vocab_size),
    }


def _row(training: Run, measured: dict[str, dict]) -> dict:
    """What was run, with which versions and what result; figures of the library's text stand on top."""
    config = training.config
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
        "trained_tokens": config.steps * config.batch_size * config.sequence_length,
        "train_loss": fmean(training.losses[-200:]),
        "uniform_loss": math.log(config.vocab_size),
        **measured["stdlib"],
        **{kind: figures for kind, figures in measured.items() if kind != "stdlib"},
    }


def unigram_loss(base: Tensor, held_out: Tensor, vocab_size: int) -> float:
    """Nats per token of the best model without context: the base part's token counts, plus one each."""
    counts = torch.bincount(base, minlength=vocab_size).double() + 1
    return -(counts / counts.sum()).log()[held_out].mean().item()
