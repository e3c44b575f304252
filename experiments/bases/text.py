"""What a base model reads: the standard library and the primer, and the tokenizer made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from experiments.bases import primer
from experiments.bases.configs import BaseConfig
from gns import corpus
from gns.corpus import Document, Part

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
HELD_OUT_SHEETS = 400  # of the primer, to evaluate on

Text = Mapping[str, Sequence[Document]]  # by kind: "stdlib", "primer"


def text(config: BaseConfig, part: Part) -> Text:
    """Give what a base learns from ("base") or is evaluated on ("held_out"), by kind."""
    found: dict[str, Sequence[Document]] = {"stdlib": corpus.documents(part)}
    if config.primer:
        sheets = config.primer if part == "base" else HELD_OUT_SHEETS
        found["primer"] = primer.documents(part, sheets)
    return found


def train_tokenizer(documents: Iterable[Document], config: BaseConfig) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE: any text comes back from it unchanged; a beginning mark is put before it.

    Raises:
        ValueError: if the text is too short for that many entries.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False)
    single = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([single, bytewise]) if config.single_digits else bytewise
    )
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


def token_stream(tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document]) -> Tensor:
    """[tokens], int64: the documents one after the other, each between its two marks."""
    ids: list[int] = []
    for document in documents:
        ids += [*tokenizer(document.text, verbose=False)["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(ids)
