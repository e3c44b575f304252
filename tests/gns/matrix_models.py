"""The models of the matrix test: every family with every adapter, tiny, from one seed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import peft
import torch
from torch import Tensor, nn

from tests.gns.small_models import FAMILIES

GPT2_TARGETS = ("c_attn", "c_proj", "c_fc")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EMBEDDING = {"gpt2": "wte"}  # elsewhere embed_tokens


@contextmanager
def quiet() -> Generator[None]:
    """Leave out what peft says while it builds: renamed attributes, tied heads, biases that a layer lacks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _targets(family: str) -> list[str]:
    return list(GPT2_TARGETS if family == "gpt2" else TARGETS)


def _config(family: str, **options: Any) -> peft.LoraConfig:
    shared = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": _targets(family),
        "fan_in_fan_out": family == "gpt2",
        "task_type": "CAUSAL_LM",
    }
    return peft.LoraConfig(**{**shared, **options})


def _olora(family: str) -> dict[str, Any]:
    """Give OLoRA's options; its decomposition takes GPT-2's weights as [O, I], so only square ones fit."""
    square = {"target_modules": r".*\.attn\.c_proj"} if family == "gpt2" else {}
    return {"init_lora_weights": "olora", **square}


Options = Callable[[str], dict[str, Any]]
LORA: dict[str, Options] = {
    "lora": lambda family: {},
    "rslora": lambda family: {"use_rslora": True},
    "pissa": lambda family: {"init_lora_weights": "pissa"},
    "olora": _olora,
    "dora": lambda family: {"use_dora": True},
    "lora with bias": lambda family: {"bias": "lora_only", "lora_bias": True},
    "modules_to_save": lambda family: {"modules_to_save": ["lm_head"]},
    "lora on embeddings": lambda family: {
        "target_modules": [*_targets(family), EMBEDDING.get(family, "embed_tokens")]
    },
    "several adapters": lambda family: {},
}
ADAPTERS = (*LORA, "full")


def build(
    family: str, adapter: str, dtype: torch.dtype = torch.float32, *, layers: int = 2, dropout: float = 0.0
) -> nn.Module:
    """Make a model; equal arguments give equal weights.

    Args:
        family: a key of `FAMILIES`.
        adapter: one of `ADAPTERS`.
        dtype: of all weights; adapters are initialised in float32 first.
        layers: transformer blocks.
        dropout: of the attention, and of LoRA's input.
    """
    torch.manual_seed(0)
    shape: dict[str, Any] = {"num_hidden_layers": layers}
    if adapter == "lora with bias" and family != "gpt2":
        shape["attention_bias"] = True
    if dropout:
        shape["attn_pdrop" if family == "gpt2" else "attention_dropout"] = dropout
    with quiet():
        model = FAMILIES[family](**shape)
        if adapter != "full":
            on_x = {} if adapter == "lora on embeddings" else {"lora_dropout": dropout}
            config = _config(family, **on_x, **LORA[adapter](family))
            model = peft.get_peft_model(model, config)
        if adapter == "several adapters":
            model.add_adapter("other", _config(family, r=3, lora_alpha=3))
            model.set_adapter("other")
    for name, p in model.named_parameters():
        if "lora_" in name and not p.any():  # else the other factor has no gradient
            nn.init.normal_(p, std=0.1)
    return model.to(dtype).train()


def batch(n: int = 4, t: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """A batch with a padded row, of fewer tokens, and a row whose labels are all masked."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (n, t), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[0, t - 2 :], labels[0, t - 2 :] = 0, -100
    if n > 2:
        labels[2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
