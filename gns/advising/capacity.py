"""Whether the adapters can hold what the data teach, and what a LoRA step costs beside a full one. Pure.

Both are rules of thumb beside the noise scale, not consequences of it. Source: Schulman et al. 2025, "LoRA
Without Regret", thinkingmachines.ai: LoRA keeps up with full fine-tuning as long as the first-epoch log-loss
of the data set, in bits, stays below about 2 bits for each trainable parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gns.advising.tradeoff import positive

if TYPE_CHECKING:
    from gns.coverage import Coverage

BITS_PER_PARAMETER = 2.0
LARGEST = 1e100  # beyond it no recorded setting makes sense, and products of two overflow
WHOLE = 0.995  # of an epoch and more is called all of it


@dataclass(frozen=True)
class Capacity:
    """What the data carry against what the adapters hold.

    The log-loss of the first epoch is an upper bound on what there is to learn: data with structure compress
    further. So "fits" is a safe answer, "does not fit" a warning.

    Args:
        data_bits: log-loss of the data in the first epoch, summed over its tokens, bits.
        parameters: trainable numbers.
        share: of the epoch that the log-loss was seen on, 0 … 1; the rest is taken to be like it.

    Raises:
        ValueError: one of them is no finite number > 0, or `parameters` no whole one.
    """

    data_bits: float
    parameters: int
    share: float = 1.0

    def __post_init__(self) -> None:
        positive("data_bits", self.data_bits)
        positive("parameters", self.parameters, whole=True)
        positive("share", self.share)

    @property
    def adapter_bits(self) -> float:
        """What the adapters hold, bits: 2 a parameter."""
        return BITS_PER_PARAMETER * self.parameters

    @property
    def load(self) -> float:
        """Data over adapters: above 1 the data carry more than the adapters hold."""
        return self.data_bits / self.adapter_bits

    @property
    def fits(self) -> bool:
        """Whether the adapters hold the data."""
        return self.load <= 1


def first_epoch_bits(loss: float, tokens: int) -> float:
    """Log-loss of a data set in bits.

    loss·tokens / ln 2

    Args:
        loss: mean training loss over the first epoch, nats a token.
        tokens: tokens with a loss in the data set.

    Raises:
        ValueError: one of them is no finite number > 0, or `tokens` no whole one.
    """
    positive("loss", loss)
    positive("tokens", tokens, whole=True)
    return loss * tokens / math.log(2)


@dataclass(frozen=True)
class AdaptedLayer:
    """Some linear layers of one shape.

    Args:
        in_features: I.
        out_features: O.
        rank: R of their adapters; 0 for a frozen layer without one.
        count: how many such layers.

    Raises:
        ValueError: a number is out of range.
    """

    in_features: int
    out_features: int
    rank: int
    count: int = 1

    def __post_init__(self) -> None:
        for name in ("in_features", "out_features", "count"):
            positive(name, getattr(self, name), whole=True)
        if self.rank != 0:
            positive("rank", self.rank, whole=True)


@dataclass(frozen=True)
class StepCost:
    """Multiply-adds for one token, forward and backward, in the matrices of some layers.

    Args:
        lora: with frozen matrices and adapters.
        full: with the matrices themselves trained.
    """

    lora: int
    full: int

    @property
    def ratio(self) -> float:
        """LoRA over full fine-tuning; 2/3 for a rank far below the width."""
        return self.lora / self.full


def step_cost(layers: Iterable[AdaptedLayer]) -> StepCost:
    """What a token costs in linear layers, LoRA against full fine-tuning.

    A product with an I×O matrix takes I·O multiply-adds. Full: forward, gradient of the input, gradient of
    the weight: 3·I·O. LoRA: the frozen matrix needs only the first two, 2·I·O; the factors I×R and R×O need
    all three, 3·R·(I + O). For I = O = N this is 2N² + 6NR against 3N².

    Not counted: attention, norms, embeddings, the optimizer (which LoRA makes cheaper), and the first layer's
    gradient of its input, which nobody needs.

    Args:
        layers: at least one.

    Raises:
        ValueError: there is none.

    Source: Schulman et al. 2025, for I = O.
    """
    layers = list(layers)
    if not layers:
        raise ValueError("layers is empty; at least one linear layer is needed")
    square = sum(a.count * a.in_features * a.out_features for a in layers)
    factors = sum(a.count * a.rank * (a.in_features + a.out_features) for a in layers)
    return StepCost(2 * square + 3 * factors, 3 * square)


def read_layers(recorded: Any) -> list[AdaptedLayer]:
    """Read layers as a run's settings hold them, `[[I, O, R, count], …]`; nothing where that is not so."""
    rows = recorded if isinstance(recorded, list) else []
    good = [row for row in rows if _is_shape(row)]
    return [AdaptedLayer(*row) for row in good] if len(good) == len(rows) else []


def recorded(
    settings: Mapping[str, Any], parameters: int | None = None
) -> tuple[Capacity | None, StepCost | None]:
    """Build what a run's settings tell of capacity and cost; None where they do not.

    Args:
        settings: of the run, as `gns measure` records them: "first_epoch_loss" (nats a token), "loss_tokens",
            "first_epoch_share" (of the epoch that the loss is of), "trainable_parameters", "adapted_layers".
            What is no number above 0 counts as missing.
        parameters: trainable numbers, where they are known better.
    """
    loss, tokens = number_in(settings, "first_epoch_loss"), number_in(settings, "loss_tokens")
    count = parameters or number_in(settings, "trainable_parameters")
    capacity = None
    if loss is not None and tokens is not None and count is not None and min(tokens, count) >= 1:
        share = min(1.0, number_in(settings, "first_epoch_share") or 1.0)
        capacity = Capacity(first_epoch_bits(loss, int(tokens)), int(count), share)
    layers = read_layers(settings.get("adapted_layers"))
    return capacity, step_cost(layers) if layers else None


def trainable(settings: Mapping[str, Any], coverage: Coverage | None) -> int | None:
    """Trainable numbers of a run, by its settings or else by its coverage; None where neither tells."""
    count = number_in(settings, "trainable_parameters")
    if count is None and coverage is not None:
        count = sum(coverage.measured.values()) + sum(coverage.unmeasured.values())
    return None if count is None else int(count) or None


def number_in(settings: Mapping[str, Any], name: str) -> float | None:
    """Give a setting that is a number above 0; None where it is missing or something else."""
    value = settings.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if 0 < value <= LARGEST else None


def _is_shape(row: Any) -> bool:
    whole = isinstance(row, Sequence) and all(isinstance(x, int) and not isinstance(x, bool) for x in row)
    return whole and len(row) == 4 and min(row[0], row[1], row[3]) > 0 and row[2] >= 0
