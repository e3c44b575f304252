"""The README of a trained base: what it is, what made it, how good it is."""

from __future__ import annotations

from experiments.bases.configs import BaseConfig
from gns import corpus


def model_card(row: dict) -> str:
    """Write the card from a row of results alone."""
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
{_primer(row, config)}
**Training.** {config.steps:,} steps of {config.batch_size} × {config.sequence_length} tokens \
({row["trained_tokens"] / _tokens(row):.1f} epochs), AdamW, peak learning rate {config.learning_rate:g},
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
{_primer_losses(row, config)}
**Licence.** The training text is under the Python Software Foundation License Version 2, with the licences of
incorporated software listed at the link above. Copyright © 2001 Python Software Foundation;
All Rights Reserved.
"""


def _tokens(row: dict) -> int:
    """Tokens of one epoch, of all kinds of text."""
    return row["base_tokens"] + row.get("primer", {}).get("base_tokens", 0)


def _primer(row: dict, config: BaseConfig) -> str:
    if not config.primer:
        return ""
    return f"""
Beside it a generated primer ({row["primer"]["base_tokens"]:,} tokens): {config.primer:,} sheets of
calculations with numbers to 99 and of one-step word problems, in other words than `wordmath`'s and without
the calculations that it holds out. `experiments/bases/primer.py` makes it. Every digit is a token; all bases
named math-* have one tokenizer.
"""


def _primer_losses(row: dict, config: BaseConfig) -> str:
    if not config.primer:
        return ""
    return f"""| primer, sheets of calculations not learned | {row["primer"]["held_out_loss"]:.3f} |
| primer, the same by token frequencies alone | {row["primer"]["unigram_loss"]:.3f} |
"""
