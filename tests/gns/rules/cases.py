"""What the rule tests run on: for each registered kind at least one layer, built from a seed.

A row is (kind, id, make); `make(draw)` gives a layer and, for chosen examples, the arguments of its call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import peft
import torch
import transformers
from peft.tuners.lora.dora import DoraConv2dLayer, DoraLinearLayer
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D


class Draw:
    """Random numbers of one dtype from one seed.

    Args:
        seed: of the numbers.
        dtype: of layers and activations.
        examples: B.
    """

    def __init__(self, seed: int, dtype: torch.dtype, examples: int):
        self.generator, self.dtype, self.examples = torch.Generator().manual_seed(seed), dtype, examples

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def ids(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator)

    def fill(self, layer: nn.Module) -> nn.Module:
        """Give a layer the dtype, and every parameter random values."""
        layer = layer.to(self.dtype)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(self.normal(*p.shape))
        return layer


class Case(NamedTuple):
    """A layer and its call.

    Args:
        layer: it.
        call: example numbers → (args, kwargs) of its call on these examples.
    """

    layer: nn.Module
    call: Callable[[Sequence[int]], tuple[tuple, dict[str, Any]]]

    def run(self, rows: Sequence[int]) -> Tensor:
        args, kwargs = self.call(rows)
        return self.layer(*args, **kwargs)


def on(make: Callable[[], nn.Module], *shape: int) -> Callable[[Draw], Case]:
    """A layer that takes one activation [B, *shape]."""

    def build(draw: Draw) -> Case:
        layer, x = draw.fill(make()), draw.normal(draw.examples, *shape)
        return Case(layer, lambda rows: ((x[rows],), {}))

    return build


def on_ids(make: Callable[[], nn.Module], high: int, *shape: int) -> Callable[[Draw], Case]:
    """A layer that takes integers [B, *shape]."""

    def build(draw: Draw) -> Case:
        layer, ids = draw.fill(make()), draw.ids(high, draw.examples, *shape)
        return Case(layer, lambda rows: ((ids[rows],), {}))

    return build


class LayerScale(nn.Module):
    """As in vision transformers."""

    def __init__(self, features):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(features))

    def forward(self, x):
        return x * self.gamma


class OddNorm(nn.Module):
    """A norm that nobody has named: mean absolute deviation, scale 1 + w, a shift called differently."""

    def __init__(self, features):
        super().__init__()
        self.g, self.shift = nn.Parameter(torch.zeros(features)), nn.Parameter(torch.zeros(features))

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.abs().mean(-1, keepdim=True) + 1e-3) * (1 + self.g) + self.shift


class OwnLinear(nn.Linear):
    """Another forward, the same product."""

    def forward(self, x):
        return (x.unsqueeze(-2) * self.weight).sum(-1) + self.bias


def lora_embedding(scaled: bool) -> Callable[[Draw], Case]:
    """`peft`'s LoRA on an embedding, alone."""

    def build(draw: Draw) -> Case:
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = (
                    Gemma3TextScaledWordEmbedding(11, 6, 0, embed_scale=6**0.5)
                    if scaled
                    else nn.Embedding(11, 6, padding_idx=0)
                )

        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["table"])
        layer = draw.fill(peft.get_peft_model(Model(), config)).base_model.model.table
        ids = draw.ids(11, draw.examples, 5)
        return Case(layer, lambda rows: ((ids[rows],), {}))

    return build


def dora_linear(given: bool, bias: bool) -> Callable[[Draw], Case]:
    """`peft`'s DoRA layer, with the base layer's result or without, as under dropout."""

    def build(draw: Draw) -> Case:
        base, a, b = nn.Linear(5, 4, bias=bias), nn.Linear(5, 2, bias=False), nn.Linear(2, 4, bias=False)
        base, a, b = (draw.fill(m).requires_grad_(False) for m in (base, a, b))
        layer = DoraLinearLayer(fan_in_fan_out=False)
        layer.weight = nn.Parameter(draw.normal(4).abs() + 0.5)
        x = draw.normal(draw.examples, 3, 5)
        parts = {"lora_A": a, "lora_B": b, "scaling": 0.7, "base_layer": base}

        def call(rows):
            known = {"base_result": base(x[rows])} if given else {}
            return (x[rows],), parts | known

        return Case(layer, call)

    return build


def dora_conv(draw: Draw) -> Case:
    base, a, b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 2, 3, bias=False), nn.Conv2d(2, 4, 1, bias=False)
    base, a, b = (draw.fill(m).requires_grad_(False) for m in (base, a, b))
    layer = DoraConv2dLayer(fan_in_fan_out=False)
    layer.weight = nn.Parameter(draw.normal(1, 4, 1, 1).abs() + 0.5)
    x = draw.normal(draw.examples, 3, 6, 5)
    parts = {"lora_A": a, "lora_B": b, "scaling": 0.7, "base_layer": base}
    return Case(layer, lambda rows: ((x[rows],), parts | {"base_result": base(x[rows])}))


def config_of(kind: str) -> Any:
    return transformers.AutoConfig.for_model(kind)


SHAPES = [  # (middle dimensions, in, out): 2-d to 4-d inputs, T = 1, Gram form on both sides of its crossing
    ((), 5, 3),
    ((1,), 4, 6),
    ((1,), 1, 1),
    ((7,), 5, 3),
    ((2,), 16, 16),
    ((3, 4), 5, 3),
    ((2, 2), 16, 12),
    ((1, 1), 3, 8),
]

CASES: list[tuple[str, str, Callable[[Draw], Case]]] = [
    *[
        (
            "Linear",
            f"{middle} {i} → {o}{' bias' * bias}",
            on(lambda i=i, o=o, bias=bias: nn.Linear(i, o, bias), *middle, i),
        )
        for middle, i, o in SHAPES
        for bias in (False, True)
    ],
    ("Linear", "another forward", on(lambda: OwnLinear(5, 3), 4, 5)),
    *[
        ("Conv1D", f"{middle} {i} → {o}", on(lambda i=i, o=o: Conv1D(o, i), *middle, i))
        for middle, i, o in SHAPES
        if i * o > 1  # else it is a linear layer
    ],
    ("Conv", "1d", on(lambda: nn.Conv1d(3, 4, 3), 3, 7)),
    (
        "Conv",
        "1d dilated, circular",
        on(lambda: nn.Conv1d(2, 3, 3, padding=2, dilation=2, padding_mode="circular"), 2, 9),
    ),
    ("Conv", "1d same", on(lambda: nn.Conv1d(2, 3, 4, padding="same", dilation=2), 2, 9)),
    ("Conv", "2d", on(lambda: nn.Conv2d(3, 4, 3), 3, 6, 5)),
    ("Conv", "2d 1×1, no bias", on(lambda: nn.Conv2d(3, 4, 1, bias=False), 3, 2, 5)),
    (
        "Conv",
        "2d strided, padded",
        on(lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 3), padding=(1, 2)), 3, 8, 7),
    ),
    ("Conv", "2d grouped, dilated", on(lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), 4, 7, 8)),
    (
        "Conv",
        "2d depthwise, reflected",
        on(lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="reflect"), 4, 5, 6),
    ),
    ("Conv", "3d", on(lambda: nn.Conv3d(2, 3, 2, padding=1), 2, 3, 4, 3)),
    ("Elementwise", "LayerNorm", on(lambda: nn.LayerNorm(6), 4, 6)),
    ("Elementwise", "LayerNorm 2-d input", on(lambda: nn.LayerNorm(6), 6)),
    (
        "Elementwise",
        "LayerNorm over two dimensions, no bias",
        on(lambda: nn.LayerNorm((3, 4), bias=False), 2, 3, 4),
    ),
    ("Elementwise", "RMSNorm", on(lambda: nn.RMSNorm(6), 4, 6)),
    ("Elementwise", "Llama", on(lambda: LlamaRMSNorm(6), 4, 6)),
    ("Elementwise", "Llama per head", on(lambda: LlamaRMSNorm(6), 4, 2, 6)),
    ("Elementwise", "Gemma, 1 + w", on(lambda: Gemma3RMSNorm(6), 4, 6)),
    ("Elementwise", "T5", on(lambda: T5LayerNorm(6), 4, 6)),
    ("Elementwise", "LayerScale", on(lambda: LayerScale(6), 4, 6)),
    ("Elementwise", "unheard of", on(lambda: OddNorm(6), 4, 6)),
    ("Elementwise", "GroupNorm", on(lambda: nn.GroupNorm(2, 6), 6, 3, 5)),
    ("Elementwise", "batch norm in eval mode", on(lambda: nn.BatchNorm2d(6).eval(), 6, 3, 5)),
    ("Elementwise", "instance norm", on(lambda: nn.InstanceNorm1d(6, affine=True), 6, 5)),
    ("Elementwise", "PReLU", on(lambda: nn.PReLU(4), 4, 5)),
    ("Elementwise", "PReLU of one slope", on(nn.PReLU, 4, 5)),
    ("Elementwise", "one scale for all", on(lambda: LayerScale(1), 4, 6)),
    ("Embedding", "plain", on_ids(lambda: nn.Embedding(9, 4), 9, 7)),
    ("Embedding", "padded", on_ids(lambda: nn.Embedding(5, 4, padding_idx=2), 5, 7)),
    ("Embedding", "one id an example", on_ids(lambda: nn.Embedding(9, 4), 9)),
    ("Embedding", "3-d ids", on_ids(lambda: nn.Embedding(4, 3), 4, 3, 2)),
    (
        "Embedding",
        "Gemma, scaled",
        on_ids(lambda: Gemma3TextScaledWordEmbedding(9, 4, 0, embed_scale=2.0), 9, 7),
    ),
    ("LoraEmbedding", "plain", lora_embedding(False)),
    ("LoraEmbedding", "Gemma, scaled", lora_embedding(True)),
    ("DoRA", "linear", dora_linear(True, False)),
    ("DoRA", "linear, base bias", dora_linear(True, True)),
    ("DoRA", "linear, base result not given", dora_linear(False, True)),
    ("DoRA", "conv", dora_conv),
]
