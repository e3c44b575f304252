"""`RunConfig`: one fine-tuning run of a sweep, frozen. Its hash is the key under which its row is kept.

Defaults are the paper's Table 1 (arXiv:2602.09492): AdamW, no dropout, no weight decay, cosine schedule
without warm-up, one epoch, adapters on all linear layers, alpha = rank.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from gns.checking import check_choice, check_whole

ADAPTERS = ("lora", "rslora", "dora", "pissa", "milora", "full", "foundation")
PROTOCOLS = ("epochs", "steps", "target")
SCHEDULES = ("constant", "cosine", "linear")
OPTIMIZERS = ("adamw", "sgd")
ENGINES = ("auto", "loop", "trainer", "packed")


class RunError(ValueError):
    """A run or a sweep cannot start as configured; the message is one line that says what to do."""


@dataclass(frozen=True)
class RunConfig:
    """One run. Equal configurations on one machine give equal rows.

    Args:
        base: row of `experiments.bases.BASES`, or the folder or hub id of a causal language model.
        task: name in `experiments.tasks`.
        dials: of the task, e.g. {"difficulty": 2, "label_noise": 0.2, "merged": 2, "copies": 2}.
        n_train: examples of the training set, N; the sets of one `data_seed` are nested.
        adapter: one of `ADAPTERS`.
        init: folder of trained adapters to start from, or name of a shipped one, with adapter "foundation".
        rank: r of the factors; not used by "full".
        alpha: LoRA scale; None: the rank.
        batch_size: examples in an optimizer step, over all micro-batches and ranks.
        micro_batch: examples in a forward pass at the most; None: the whole batch.
        optimizer: "adamw" or "sgd" (without momentum).
        lr: peak learning rate.
        schedule: "constant", "cosine" or "linear", after the warm-up.
        warmup: share of the steps.
        weight_decay: decoupled.
        beta1: of AdamW.
        beta2: of AdamW, at `beta2_batch` examples a step.
        beta2_batch: B_ref; β₂ becomes beta2^(batch_size/B_ref), so that its memory is so many examples
            (arXiv:2507.07101). None: `beta2` as it is.
        clip: largest norm of a gradient; None: no clipping.
        dropout: of the adapters.
        protocol: "epochs": `epochs` passes over the N examples (one: a fixed sample); "steps": `steps` steps;
            "target": until the validation loss is at `target_loss`, at most `epochs` passes.
        epochs: passes over the data.
        steps: optimizer steps of protocol "steps".
        target_loss: in nats per token, of protocol "target".
        evals: evaluations on the validation split over the run, the last one at its end.
        n_eval: items of each held-out split; every run of a task sees the same ones.
        generate: items to answer by generation, the first of the test split; 0: no accuracy.
        max_length: most tokens of an example.
        dtype: of the base, "float32" or "bfloat16"; adapters stay float32.
        seed: of the adapters and of dropout.
        data_seed: of the training set and its order.
        gns_every: measure the noise scale in one step of so many; 0: never.
        gns_metric: "euclidean" or "adam".
        engine: "loop" (a plain loop), "trainer" (`transformers.Trainer`: several processes), "packed" (many
            runs of one base at once), or "auto". No part of the hash: it must not move the result.
        trust_remote_code: run code that comes with the base.
    """

    base: str
    task: str
    dials: Mapping[str, Any] = field(default_factory=dict)
    n_train: int = 1_024
    adapter: str = "lora"
    init: str | None = None
    rank: int = 16
    alpha: float | None = None
    batch_size: int = 16
    micro_batch: int | None = None
    optimizer: str = "adamw"
    lr: float = 1e-3
    schedule: str = "cosine"
    warmup: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    beta2_batch: int | None = None
    clip: float | None = None
    dropout: float = 0.0
    protocol: str = "epochs"
    epochs: int = 1
    steps: int | None = None
    target_loss: float | None = None
    evals: int = 1
    n_eval: int = 256
    generate: int = 0
    max_length: int = 256
    dtype: str = "float32"
    seed: int = 0
    data_seed: int = 0
    gns_every: int = 0
    gns_metric: str = "euclidean"
    engine: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in _NUMBERS:  # 32 and 32.0 are one run: the hash is of what is written
            value = getattr(self, name)
            if isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, name, float(value))
        _check(self)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> RunConfig:
        """Make a configuration of a mapping, as a row or a preset holds it.

        Raises:
            RunError: a key is unknown or missing, or a value does not fit.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(given) - known):
            raise RunError(f"unknown key(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        if missing := sorted({"base", "task"} - set(given)):
            raise RunError(f"a run needs {' and '.join(missing)}")
        try:
            return cls(**given)
        except TypeError as error:
            raise RunError(f"a value has the wrong type: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Give all fields as JSON can hold them."""
        return asdict(replace(self, dials=dict(self.dials)))

    @property
    def hash(self) -> str:
        """16 hex digits of all that the result depends on."""
        said = {key: value for key, value in self.to_dict().items() if key != "engine"}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def scale(self) -> float:
        """Alpha, where it is not given the rank."""
        return float(self.rank if self.alpha is None else self.alpha)

    @property
    def n_steps(self) -> int:
        """Optimizer steps of the whole run, at the most; an epoch's last, smaller batch is a step too."""
        if self.protocol == "steps":
            assert self.steps is not None
            return self.steps
        return self.epochs * math.ceil(self.n_train / self.batch_size)

    @property
    def betas(self) -> tuple[float, float]:
        """(β₁, β₂) that AdamW is given."""
        power = 1.0 if self.beta2_batch is None else self.batch_size / self.beta2_batch
        return self.beta1, self.beta2**power


_CHOICES = {
    "adapter": ADAPTERS,
    "protocol": PROTOCOLS,
    "schedule": SCHEDULES,
    "optimizer": OPTIMIZERS,
    "engine": ENGINES,
    "dtype": ("float32", "bfloat16"),
    "gns_metric": ("euclidean", "adam"),
}
_NUMBERS = ("lr", "alpha", "warmup", "weight_decay", "beta1", "beta2", "clip", "dropout", "target_loss")
_COUNTS = ("n_train", "rank", "batch_size", "epochs", "evals", "n_eval", "max_length")
_COUNTS_OR_NONE = ("micro_batch", "beta2_batch", "steps")
_FROM_ZERO = ("generate", "seed", "data_seed", "gns_every")


def _check(config: RunConfig) -> None:
    """Refuse what cannot be run.

    Raises:
        RunError: a value is out of range, or two contradict each other.
    """
    for name, known in _CHOICES.items():
        check_choice(name, getattr(config, name), known, RunError)
    for names, least, none in ((_COUNTS, 1, False), (_COUNTS_OR_NONE, 1, True), (_FROM_ZERO, 0, False)):
        for name in names:
            if not (none and getattr(config, name) is None):
                check_whole(name, getattr(config, name), least, error=RunError)
    for name in ("lr", "alpha", "clip", "target_loss"):
        value = getattr(config, name)
        if value is None and name != "lr":
            continue
        if not (math.isfinite(value) and value > 0):
            raise RunError(f"{name} is {value}; a number above 0 is needed")
    if not (math.isfinite(config.weight_decay) and config.weight_decay >= 0):
        raise RunError(f"weight_decay is {config.weight_decay}; a number, 0 or more, is needed")
    for name in ("warmup", "beta1", "beta2", "dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise RunError(f"{name} is {getattr(config, name)}; a number in [0, 1) is needed")
    if config.batch_size > config.n_train:
        raise RunError(f"batch_size {config.batch_size} is larger than the data: n_train {config.n_train}")
    if (config.protocol == "steps") != (config.steps is not None):
        raise RunError(f"protocol is {config.protocol!r} and steps is {config.steps}; they go together")
    if (config.protocol == "target") != (config.target_loss is not None):
        raise RunError(
            f"protocol is {config.protocol!r} and target_loss is {config.target_loss}; they go together"
        )
    if (config.adapter == "foundation") != (config.init is not None):
        raise RunError(
            f"adapter is {config.adapter!r} and init is {config.init!r}; a foundation needs its folder, and "
            "no other adapter has one"
        )
