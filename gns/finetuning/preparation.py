"""A run's configuration, model, data and adapters: all that bad input can break. Writes nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from gns import corpus
from gns.estimate import MIN_STEPS
from gns.finetuning.data import Examples, Row, encode_texts, load_examples, pad_id
from gns.finetuning.sources import first_line
from gns.metrics import EUCLIDEAN, METRICS

SCHEDULES = ("constant", "cosine", "linear")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BASE = "gns:base"  # names the shipped base model
HELD_OUT = "gns:held-out"  # names the part of the standard library that the shipped base never saw
MAX_SEED = 2**32 - 1  # NumPy, which the Trainer seeds too, takes no larger one
_COUNTS = ("rank", "batch_size", "grad_accum", "max_length", "every", "save_every")


class ConfigError(ValueError):
    """A run cannot start as configured; the message is one line that says what to do."""


@dataclass(frozen=True)
class FinetuneConfig:
    """A fine-tuning run. Equal configurations on one machine give equal runs.

    Args:
        model: folder or hub id of a causal language model, or "gns:base", the shipped one.
        data: see `gns.finetuning.sources`, or "gns:held-out", source text that the shipped model never saw.
        rank: r of the LoRA factors.
        alpha: LoRA scale, the adapters' output is multiplied by alpha / rank.
        target_modules: "all-linear", or names of layers to adapt.
        batch_size: examples in a forward pass.
        grad_accum: forward passes in an optimizer step.
        lr: peak learning rate of AdamW.
        schedule: "constant", "cosine" or "linear", without warm-up.
        steps: optimizer steps; None: as many as `epochs` need.
        epochs: passes over the data; None: 1, or as many as `steps` need.
        max_length: most tokens in an example.
        dtype: of the base model: "float32", "bfloat16", "float16" (needs a GPU), or "auto": bfloat16 on a GPU
            that has it, else float32. The adapters stay float32.
        seed: of the adapters' initial values and of the order of the data, 0 … 2³² − 1.
        every: measure one optimizer step in `every`.
        metric: in which norms are taken, "euclidean" or "adam", see `GNSMonitor`; in Adam's, steps before the
            optimizer has second moments are not usable.
        curvature_every: read B_noise once in so many optimizer steps; None: never.
        curvature_spectrum: products to spend in each such reading on the largest eigenvalue of H; 0: none.
        held_out: examples kept out of training to tell the loss before and after; at most a tenth.
        save_every: optimizer steps between two checkpoints.
        trust_remote_code: run code that comes with the model.
    """

    model: str
    data: str
    rank: int = 16
    alpha: float = 16.0
    target_modules: str | tuple[str, ...] = "all-linear"
    batch_size: int = 8
    grad_accum: int = 1
    lr: float = 2e-4
    schedule: str = "constant"
    steps: int | None = None
    epochs: float | None = None
    max_length: int = 512
    dtype: str = "auto"
    seed: int = 0
    every: int = 1
    held_out: int = 64
    save_every: int = 50
    curvature_every: int | None = None
    curvature_spectrum: int = 0
    metric: str = EUCLIDEAN.name
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, list):  # as JSON gives it back
            object.__setattr__(self, "target_modules", tuple(self.target_modules))

    @property
    def examples_per_step(self) -> int:
        """Examples in an optimizer step."""
        return self.batch_size * self.grad_accum

    def check(self) -> None:
        """Check what can be checked without model and data.

        Raises:
            ConfigError: a value is out of range, or two contradict each other.
        """
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; 1 or more is needed")
        if self.curvature_every is not None and self.curvature_every < 1:
            raise ConfigError(f"curvature_every is {self.curvature_every}; 1 or more is needed, or None")
        if self.curvature_spectrum < 0 or (self.curvature_spectrum and self.curvature_every is None):
            raise ConfigError(
                f"curvature_spectrum is {self.curvature_spectrum}, curvature_every {self.curvature_every}; 0 "
                "or more is needed, and more than 0 only goes with readings of B_noise"
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"seed is {self.seed}; a number from 0 to {MAX_SEED} is needed")
        if not self.target_modules:
            raise ConfigError("target_modules names no layer; names with commas between, or all-linear")
        for name in ("alpha", "lr", "steps", "epochs"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{name} is {value}; a number above 0 is needed")
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(f"steps is {self.steps} and epochs is {self.epochs}; give one of the two")
        for name, known in (("schedule", SCHEDULES), ("dtype", ("auto", *DTYPES)), ("metric", METRICS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; known: {', '.join(known)}")
        if self.dtype == "float16" and not torch.cuda.is_available():
            raise ConfigError(
                "dtype is 'float16', which needs a GPU and there is none; take bfloat16 or float32"
            )

    @property
    def base_dtype(self) -> torch.dtype:
        """Dtype of the base model on this machine."""
        if self.dtype == "auto":
            return (
                torch.bfloat16
                if torch.cuda.is_available() and torch.cuda.is_bf16_supported()
                else torch.float32
            )
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Prepared:
    """All that a run needs before it writes anything.

    Args:
        model: with its adapters.
        tokenizer: of the model.
        train: examples to learn.
        held_out: examples to tell the loss before and after.
        n_steps: optimizer steps to make.
        remarks: what the user should know, one line each.
    """

    model: Any
    tokenizer: Any
    train: Sequence[Row]
    held_out: Sequence[Row]
    n_steps: int
    remarks: tuple[str, ...] = ()


def prepare(config: FinetuneConfig, *, adapter: Path | None = None) -> Prepared:
    """Load model and data, build the adapters, check everything; write nothing.

    Args:
        config: of the run.
        adapter: folder of trained adapters to load; None: fresh ones.

    Returns:
        What the run needs.

    Raises:
        ConfigError: the run cannot start as configured (`DataError` where the data are at fault).
    """
    config.check()
    _check_model_path(config.model)
    tokenizer = _from_pretrained(AutoTokenizer, config)
    examples = _examples(config, tokenizer)
    train, held_out = examples.split(min(config.held_out, len(examples) // 10), config.seed)
    if len(train) < config.examples_per_step:
        size = (
            f"{config.batch_size} × {config.grad_accum}" if config.grad_accum > 1 else f"{config.batch_size}"
        )
        kept = f" (after {len(held_out)} are held out)" if held_out else ""
        raise ConfigError(f"a batch of {size} is larger than the data: {len(train)} examples{kept}")
    largest = max(i for row in (*train, *held_out) for i in (*row.input_ids, pad_id(tokenizer)))
    model = _adapted(config, adapter, largest)
    updates = math.ceil(math.ceil(len(train) / config.batch_size) / config.grad_accum)
    n_steps = config.steps or max(1, math.ceil((config.epochs or 1) * updates))
    remarks = list(examples.remarks())
    if n_steps // config.every < MIN_STEPS:
        remarks.append(
            f"{n_steps // config.every} measured steps: fewer than the {MIN_STEPS} an estimate needs"
        )
    return Prepared(model, tokenizer, train, held_out, n_steps, tuple(remarks))


def prepare_model(config: FinetuneConfig) -> Any:
    """Load the model and build its adapters, as for a run, without any data; write nothing.

    Raises:
        ConfigError: the model cannot be trained as configured.
    """
    config.check()
    _check_model_path(config.model)
    return _adapted(config)


def _adapted(config: FinetuneConfig, adapter: Path | None = None, largest_id: int = 0) -> Any:
    """Load the base model and put adapters on it: trained ones, if given, else fresh ones."""
    model = _from_pretrained(AutoModelForCausalLM, config, dtype=config.base_dtype)
    _check_fit(config, model, largest_id)
    transformers.set_seed(config.seed)  # the adapters' initial values
    lora = None if adapter is not None else _lora(config, model)
    with quiet_peft():
        return _trained(model, adapter) if lora is None else get_peft_model(model, lora)


@contextmanager
def quiet_peft() -> Generator[None]:
    """Keep quiet, while adapters are made, of peft asking transformers for the old name of a property."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Give the linear layers of a causal language model by name, without the one that gives the logits."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def _trained(model: Any, adapter: Path | None) -> Any:
    """Put trained adapters on a base model, trainable.

    Raises:
        ConfigError: they cannot be loaded, or are not of this model.
    """
    try:
        return PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    except Exception as error:  # whatever a file raises, it ends in one line
        raise ConfigError(f"{adapter}: the adapter cannot be loaded: {first_line(error)}") from error


def _check_model_path(model: str) -> None:
    """Refuse early what the loaders answer with a riddle.

    Raises:
        ConfigError: the folder is not there, is a file, or holds an adapter or no model.
    """
    path = Path(model).expanduser()
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ConfigError(f"{model}: an adapter, not a model; give its base model")
    if model == BASE:
        return
    if path.is_file():
        raise ConfigError(f"{model}: is a file; a model folder or a hub id is needed")
    if path.is_dir() and not (path / "config.json").is_file():
        needs = "config.json, weights and tokenizer files"
        raise ConfigError(f"{model}: holds no config.json; a model folder needs {needs}")
    if path.exists():
        return
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ConfigError(f"{model}: no such folder")


def _from_pretrained(auto: Any, config: FinetuneConfig, **options: Any) -> Any:
    """Load a tokenizer or a model.

    Raises:
        ConfigError: it cannot be loaded.
    """
    path = corpus.base_model_path() if config.model == BASE else Path(config.model).expanduser()
    source = str(path) if path.exists() else config.model
    what = "model" if auto is AutoModelForCausalLM else "tokenizer"
    try:
        return auto.from_pretrained(source, trust_remote_code=config.trust_remote_code, **options)
    except Exception as error:  # whatever a file, the hub or the network raises, it ends in one line
        raise ConfigError(f"{config.model}: its {what} cannot be loaded: {first_line(error)}") from error


def _examples(config: FinetuneConfig, tokenizer: Any) -> Examples:
    if config.data == HELD_OUT:
        texts = corpus.examples("held_out")
        return encode_texts(texts, tokenizer, max_length=config.max_length, source=HELD_OUT)
    return load_examples(config.data, tokenizer, max_length=config.max_length)


def _check_fit(config: FinetuneConfig, model: nn.Module, largest_id: int) -> None:
    """Check that model, token ids and length go together.

    Ids are those that occur: a tokenizer may have entries that no text has (Gemma 3's has one for images).

    Raises:
        ConfigError: they do not.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr]
    if longest is not None and config.max_length > longest:
        raise ConfigError(f"max_length is {config.max_length}; {config.model} has {longest} positions")
    n_rows = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if largest_id >= n_rows:
        raise ConfigError(
            f"{config.model} has {n_rows} embeddings, the data hold token {largest_id}; give a model "
            "with its own tokenizer"
        )


def _lora(config: FinetuneConfig, model: nn.Module) -> LoraConfig:
    """Give peft's configuration.

    Raises:
        ConfigError: there is no layer to adapt, a target names none, or the rank is larger than any of them.
    """
    layers = linear_layers(model)
    if not layers:
        raise ConfigError(f"{config.model}: no linear layer that LoRA can adapt")
    names = sorted({name.rpartition(".")[2] for name in layers})
    targets: str | list[str] = "all-linear"
    if config.target_modules != targets:
        chosen = config.target_modules
        targets = [chosen] if isinstance(chosen, str) else list(chosen)
        for target in targets:
            if not any(_names(target, name) for name in layers):
                known = ", ".join(names)
                raise ConfigError(f"target module {target!r} is not in {config.model}; known: {known}")
        layers = {name: layer for name, layer in layers.items() if any(_names(t, name) for t in targets)}
    largest = max(max(layer.weight.shape) for layer in layers.values())  # type: ignore[reportArgumentType]
    if config.rank > largest:
        raise ConfigError(
            f"rank is {config.rank}, but the largest dimension of the layers to adapt is {largest}; "
            f"take {largest} or less"
        )
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        target_modules=targets,
        fan_in_fan_out=all(isinstance(module, Conv1D) for module in layers.values()),  # else peft warns of it
        task_type="CAUSAL_LM",
    )


def _names(target: str, name: str) -> bool:
    """Whether peft would adapt the layer at path `name` for this target."""
    return name == target or name.endswith(f".{target}")
