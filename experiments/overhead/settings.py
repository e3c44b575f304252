"""What is measured: a model of a real shape with random weights, its adapters, and a batch."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import peft
import torch
import transformers
from torch import nn


@dataclass(frozen=True)
class Shape:
    """A Llama's shape; the weights are random, time and memory do not depend on them.

    Args:
        vocab: entries of the vocabulary.
        width: of the residual stream.
        inner: of the feed-forward layers.
        layers: how many.
        heads: of queries.
        kv_heads: of keys and values.
    """

    vocab: int
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int

    def config(self, positions: int) -> transformers.LlamaConfig:
        """Make the configuration for sequences of up to so many tokens."""
        return transformers.LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=positions,
            use_cache=False,
        )


def _narrow(width: int) -> Shape:
    heads = width // 64
    return Shape(2_048, width, 8 * width // 3 // 8 * 8, 4, heads, heads)


SHAPES = {
    "llama-2-7b": Shape(32_000, 4_096, 11_008, 32, 32, 32),
    "llama-3.2-1b": Shape(128_256, 2_048, 8_192, 16, 32, 8),
    **{f"width-{width}": _narrow(width) for width in (128, 256, 512, 768, 1_024)},
}


@dataclass(frozen=True)
class Setting:
    """One setting of the benchmark.

    Args:
        name: of the row.
        shape: one of `SHAPES`.
        rank: of LoRA on all linear layers but the head; None: full fine-tuning.
        batch: B, sequences in a forward pass.
        tokens: T in a sequence.
        dtype: "float32"; "bfloat16": base in bfloat16, adapters in float32 under autocast, as
            `transformers.Trainer(bf16=True)` trains; "pure bfloat16": adapters too, no autocast.
        accumulate: forward passes in an optimizer step.
        layers: of the model, instead of its shape's own.
        adapted: so many linear layers have an adapter, from the first; None: all.
    """

    name: str
    shape: str
    rank: int | None
    batch: int
    tokens: int
    dtype: str = "float32"
    accumulate: int = 1
    layers: int | None = None
    adapted: int | None = None

    def row(self) -> dict[str, Any]:
        """Give the setting as plain data."""
        return asdict(self)

    @property
    def autocast(self) -> bool:
        """Whether steps run under bfloat16 autocast."""
        return self.dtype == "bfloat16"


def build(setting: Setting, device: str, seed: int = 0) -> nn.Module:
    """Make the model of a setting, with its adapters, in training mode."""
    shape = SHAPES[setting.shape]
    config = shape.config(setting.tokens)
    if setting.layers is not None:
        config.num_hidden_layers = setting.layers
    torch.manual_seed(seed)
    dtype = torch.float32 if setting.dtype == "float32" else torch.bfloat16
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        if setting.rank is None:
            return model.train()
        wanted = "all-linear" if setting.adapted is None else _linear(model)[: setting.adapted]
        lora = peft.LoraConfig(
            r=setting.rank, lora_alpha=setting.rank, target_modules=wanted, task_type="CAUSAL_LM"
        )
        with warnings.catch_warnings():  # peft asks transformers for the old name of a property
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            model = peft.get_peft_model(model, lora, autocast_adapter_dtype=setting.autocast)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # past initialisation, so that both factors have a gradient
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def _linear(model: nn.Module) -> list[str]:
    """Name the linear layers but for the head, in their order."""
    head = model.get_output_embeddings()  # type: ignore[reportCallIssue]
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]


def batches(setting: Setting, device: str, count: int = 4, seed: int = 1) -> list[torch.Tensor]:
    """Random token ids, [B, T] each; several, so that no step repeats the last one's input."""
    made = torch.Generator().manual_seed(seed)
    high = SHAPES[setting.shape].vocab
    size = (setting.batch, setting.tokens)
    return [torch.randint(0, high, size, generator=made).to(device) for _ in range(count)]
