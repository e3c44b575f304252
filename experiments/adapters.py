"""What is trained of a base: a low-rank adapter of some kind on all linear layers but the head, or these.

At the start every kind computes what the base computes. Fresh adapters depend on the seed alone: runs of one
seed begin with the same factors, whatever their batch size, learning rate or data. Trainable parameters are
float32, whatever the base is.

    lora, rslora, dora    peft's: A random, B zero
    pissa                 peft's: B·A are the first r singular directions, W becomes the residual
    milora                the last r singular directions, in the same way (peft has no MiLoRA)
    foundation            adapters that `experiments.foundation` trained beforehand; one ships under assets/
    full                  the weights of the same layers, without an adapter: only the rank differs from LoRA
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from experiments.bases.paths import SHIPPED
from experiments.configs import RunConfig, RunError
from experiments.seeding import seeded
from gns.finetuning.preparation import linear_layers, quiet_peft

FAST_SVD = 2_048  # layers wider than this are decomposed by random projections: exact takes minutes a layer
_FLAGS = {"rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


def adapted(model: Any, config: RunConfig) -> nn.Module:
    """Make a base trainable as the configuration says; global random numbers are left as they were.

    Args:
        model: causal language model; it is changed in place, and its weights too by "pissa" and "milora".
        config: `adapter`, `rank`, `alpha`, `dropout`, `seed` and `init` are used.

    Returns:
        The model to train, on the device of `model`.

    Raises:
        RunError: the rank is larger than a layer, there is no layer to adapt, or `init` holds no adapters
            for this model, rank and alpha.
    """
    layers = linear_layers(model)
    if not layers:
        raise RunError(f"{type(model).__name__} has no linear layer but its head; there is nothing to adapt")
    if config.adapter == "full":
        return _full(model, layers)
    _refuse_rank(layers, config.rank)
    found = _with_lora(model, layers, config)
    if config.adapter == "milora":
        for name, layer in found.named_modules():
            if isinstance(layer, LoraLayer):
                _to_minor(name, layer)
    if config.adapter == "foundation":
        _load(found, config)
    return found


def _refuse_rank(layers: dict[str, nn.Module], rank: int) -> None:
    """Refuse a rank that a layer does not have.

    Raises:
        RunError: the smaller side of a layer is below the rank.
    """
    name, layer = min(layers.items(), key=lambda item: min(item[1].weight.shape))
    limit = min(layer.weight.shape)
    if rank > limit:
        shape = " × ".join(map(str, layer.weight.shape))
        raise RunError(f"rank {rank} is larger than layer `{name}` ({shape}); {limit} is the largest rank")


def _full(model: Any, layers: dict[str, nn.Module]) -> nn.Module:
    """Let the weights of the layers train, and nothing else."""
    model.requires_grad_(False)
    for layer in layers.values():
        layer.weight.data = layer.weight.data.float()
        layer.weight.requires_grad_(True)
    return model


def _with_lora(model: Any, layers: dict[str, nn.Module], config: RunConfig) -> nn.Module:
    """Add fresh adapters, drawn from the seed."""
    fast = max(min(layer.weight.shape) for layer in layers.values()) > FAST_SVD
    pissa = "pissa_niter_16" if fast else "pissa"
    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.scale,  # type: ignore[arg-type]  # only ever divided by the rank
        lora_dropout=config.dropout,
        target_modules=sorted(layers),
        init_lora_weights=pissa if config.adapter == "pissa" else True,
        fan_in_fan_out=all(isinstance(layer, Conv1D) for layer in layers.values()),
        task_type="CAUSAL_LM",
        **_FLAGS.get(config.adapter, {}),
    )
    with seeded(config.seed, next(model.parameters()).device), quiet_peft():
        return peft.get_peft_model(model, lora)  # makes adapters float32 by itself


def _to_minor(where: str, layer: LoraLayer) -> None:
    """Turn a fresh adapter into MiLoRA's: B·A are the minor singular directions, W the residual.

    With W = U S Vᵀ and scale s, of the last r columns: B = U √(S/s), A = √(S/s) Vᵀ, W ← W − s B A.

    Raises:
        RunError: the new parts do not add up to the old weight, to the rounding of its dtype.

    Source: Wang et al. 2024, arXiv:2406.09044.
    Slow twin: tests/experiments/test_adapters.py, by numpy in float64.
    """
    (name,) = layer.lora_A
    base, scale = layer.get_base_layer().weight, layer.scaling[name]
    weight = _turned(base.data.float(), layer)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    rank = layer.r[name]
    root = (s[-rank:] / scale).sqrt()
    a, b = root[:, None] * vt[-rank:], u[:, -rank:] * root
    added = scale * b @ a
    base.data = _turned(weight - added, layer).to(base.dtype)
    off = (_turned(base.data.float(), layer) + added - weight).abs().max()
    if not off <= 4 * torch.finfo(base.dtype).eps * weight.abs().max():
        raise RunError(f"`{where}`: its singular directions do not give it back, off by {off.item():.2g}")
    layer.lora_A[name].weight.data = a.contiguous()
    layer.lora_B[name].weight.data = b.contiguous()


def shipped() -> list[str]:
    """Name the trained adapters under assets/."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/adapter_config.json"))


def _turned(weight: Tensor, layer: LoraLayer) -> Tensor:
    """[O, I] from a layer's weight or back; only GPT-2's layers hold it the other way round."""
    return weight.T.contiguous() if layer.fan_in_fan_out else weight


def _load(model: nn.Module, config: RunConfig) -> None:
    """Replace fresh adapters by trained ones.

    Raises:
        RunError: there are none in the folder, or they are of another rank, alpha or base.
    """
    folder = Path(str(config.init))
    if str(folder) in (names := shipped()):
        folder = SHIPPED / folder
    if not (folder / "adapter_config.json").is_file():
        raise RunError(
            f"init {folder}: no adapter_config.json; a folder that `python -m experiments.foundation` wrote "
            f"is needed, or the name of a shipped one: {', '.join(names)}"
        )
    held = peft.LoraConfig.from_pretrained(str(folder))
    for name, seen, needed in (("rank", held.r, config.rank), ("alpha", held.lora_alpha, config.scale)):
        if seen != needed:
            raise RunError(f"init {folder}: trained with {name} {seen:g}; this run has {name} {needed:g}")
    weights = load_peft_weights(str(folder), device="cpu")
    mine = peft.get_peft_model_state_dict(model)
    odd = [n for n in sorted({*mine, *weights}) if n not in mine or n not in weights]
    odd += [n for n in sorted({*mine} & {*weights}) if mine[n].shape != weights[n].shape]
    if odd:
        raise RunError(f"init {folder}: adapters of another base; {len(odd)} tensors differ, as `{odd[0]}`")
    set_peft_model_state_dict(model, weights)
