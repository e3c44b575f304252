"""What every engine needs before its first step: the base with its adapter, and the encoded data."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate.utils import str_to_bool
from torch import Tensor, nn

from experiments.adapters import adapted
from experiments.bases import base_path
from experiments.configs import RunConfig, RunError
from experiments.evaluation import eval_batch, item_losses, token_mean
from experiments.tasks import Item, Task, encoded, task
from gns.finetune import without_bars
from gns.finetuning.data import NO_LOSS, Collator, Row, pad_id


@dataclass(frozen=True)
class Data:
    """Encoded examples of a run; the first token of each, predicted from nothing, has no label.

    Args:
        task: they come from.
        train: [n_train], in the task's order.
        validation: [n_eval], for choices during and between runs.
        test: [n_eval], for nothing but the result.
        answered: the first items of the test split, to be answered by generation.
    """

    task: Task
    train: Sequence[Row]
    validation: Sequence[Row]
    test: Sequence[Row]
    answered: Sequence[Item]

    @functools.cached_property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(len(row.input_ids) for row in (*self.train, *self.validation, *self.test))

    @functools.cached_property
    def largest_id(self) -> int:
        """Largest token id of all examples."""
        return max(max(row.input_ids) for row in (*self.train, *self.validation, *self.test))


@dataclass
class Prepared:
    """A model to train, on its device, and its data.

    Args:
        config: of the run.
        model: with the adapter in it.
        tokenizer: of the base.
        data: of the task.
        device: the model is on.
    """

    config: RunConfig
    model: Any
    tokenizer: Any
    data: Data
    device: torch.device

    def __post_init__(self) -> None:
        self.collator = Collator(pad_id(self.tokenizer))

    @property
    def trainable(self) -> list[nn.Parameter]:
        """Parameters that the optimizer gets."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Give training examples as one batch on the device, each entry [B, T]."""
        batch = self.collator([self.data.train[i] for i in numbers])
        return {name: value.to(self.device) for name, value in batch.items()}

    def autocast(self) -> torch.autocast:
        """Compute matrix products in bfloat16 where the base is in it: in training and in evaluation."""
        enabled = self.config.dtype == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def item_losses(self, rows: Sequence[Row]) -> list[float]:
        """Mean loss of each item, nats per token; NaN for all if the model's weights are not finite."""
        with self.autocast():
            return item_losses(self.model, rows, self.collator, eval_batch(self.config))

    def validation_loss(self) -> float:
        """Mean over the tokens of the validation split, nats per token."""
        return token_mean(self.item_losses(self.data.validation), self.data.validation)


def device_of(wanted: str | None) -> torch.device:
    """Give the device asked for; None: this process's own accelerator if there is one, else the CPU.

    `accelerate launch --cpu` asks for the CPU, and its Trainer obeys: so does everything else.
    """
    if wanted is not None:
        return torch.device(wanted)
    if str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "false")):
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def load_base(config: RunConfig) -> tuple[Any, Any]:
    """Load the base in its dtype, on the CPU, and its tokenizer.

    Raises:
        RunError: `base` names nothing that is there.
    """
    path, trust = base_path(config.base), config.trust_remote_code
    with without_bars():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, config.dtype), trust_remote_code=trust
        )
    model.config.use_cache = False  # generation has a setting of its own
    return model, load_tokenizer(str(path), trust)


@functools.lru_cache(maxsize=4)
def load_tokenizer(path: str, trust_remote_code: bool = False) -> Any:
    """Load a base's tokenizer, once for runs that follow each other."""
    return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def data_of(config: RunConfig) -> Data:
    """Give the data of a run, kept for the next run with the same.

    Raises:
        RunError: the task or a dial is unknown, there are too few items, or one has no token to learn.
    """
    dials = json.dumps(dict(config.dials), sort_keys=True)
    base = str(base_path(config.base))
    sizes = config.n_train, config.n_eval, config.generate, config.max_length
    return _data(base, config.trust_remote_code, config.task, dials, config.data_seed, *sizes)


@functools.lru_cache(maxsize=4)
def _data(
    base: str, trust: bool, name: str, dials: str, seed: int, n: int, n_eval: int, answers: int, length: int
) -> Data:
    found, tokenizer = task(name, json.loads(dials)), load_tokenizer(base, trust)

    def rows(items: Sequence[Item]) -> list[Row]:
        return [Row(r.input_ids, [NO_LOSS, *r.labels[1:]]) for r in encoded(items, tokenizer, length)]

    return Data(
        found,
        rows(found.train(n, seed)),
        rows(found.held_out("validation", n_eval)),
        rows(found.held_out("test", n_eval)),
        found.held_out("test", answers) if answers else [],
    )


def prepare(config: RunConfig, device: torch.device) -> Prepared:
    """Load, adapt and encode.

    Raises:
        RunError: the run cannot be made as configured, or base and data do not go together.
    """
    data = data_of(config)  # first: what is wrong with it is found before minutes of loading
    model, tokenizer = load_base(config)
    _check_fit(config, model, data)
    if config.adapter in ("pissa", "milora"):
        model.to(device)  # where their decompositions are fast
    return Prepared(config, adapted(model, config).to(device), tokenizer, data, device)


def _check_fit(config: RunConfig, model: Any, data: Data) -> None:
    """Check that a model can read its data: an index beyond a table ends a GPU's program without a word.

    Ids are those that occur: a tokenizer may have entries that no text has (Gemma 3's has one for images).

    Raises:
        RunError: an example is longer than the model has positions, or a token has no embedding.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and data.longest > positions:
        raise RunError(
            f"base {config.base} has {positions} positions, the longest example {data.longest} tokens; set "
            f"max_length to {positions} or less"
        )
    embeddings = model.get_input_embeddings().num_embeddings
    if data.largest_id >= embeddings:
        raise RunError(
            f"base {config.base} has {embeddings} embeddings, the data hold token {data.largest_id}; give a "
            "base with its own tokenizer"
        )
