"""The settings that belong beside every number: what is known of them, and "not recorded" for the rest.

A noise scale moves with learning rate, schedule, batch, sequence length, clipping, dropout and precision; a
number without them cannot be compared. Nothing is guessed: what neither the settings nor the steps hold is
said to be missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gns.estimate import Estimate, format_count
from gns.sums import StepSums

MISSING = "not recorded"
# name for a reader → names under which settings of common trainers hold it, the first found counts
KEYS: dict[str, tuple[str, ...]] = {
    "schedule": ("schedule", "lr_scheduler_type", "lr_scheduler"),
    "clipping": ("max_grad_norm", "gradient_clip_val", "gradient_clipping", "clip_grad_norm", "clipping"),
    "dropout": ("dropout", "lora_dropout"),
    "precision": ("precision", "mixed_precision", "dtype", "torch_dtype"),
    "optimizer": ("optimizer", "optim"),
    "seed": ("seed",),
    "commit": ("commit", "git_commit", "git_sha"),
}


@dataclass(frozen=True)
class Setting:
    """One line of what a number was measured under.

    Args:
        name: for a reader.
        value: text, `MISSING` where nothing is known.
    """

    name: str
    value: str

    @property
    def known(self) -> bool:
        """Whether it was recorded."""
        return self.value != MISSING


def circumstances(
    result: Estimate,
    steps: Sequence[StepSums],
    settings: Mapping[str, Any],
    batch_size: int | None,
) -> list[Setting]:
    """Collect what the number was measured under, in an order of how much it moves it.

    Args:
        result: the estimate.
        steps: all records of the run.
        settings: of the run.
        batch_size: examples an optimizer step in use, or None.
    """
    usable = [s for s in steps if s.usable]
    told: dict[str, Callable[[], str]] = {
        "learning rate": lambda: _learning_rate(usable, settings),
        "schedule": lambda: _schedule(usable, settings),
        "batch": lambda: f"{batch_size} examples a step" if batch_size else MISSING,
        "tokens per example": lambda: _tokens(usable),
        "clipping": lambda: _clipping(settings),
        "dropout": lambda: _plain(settings, "dropout"),
        "precision": lambda: _precision(settings),
        "optimizer": lambda: _plain(settings, "optimizer"),
        "seed": lambda: _plain(settings, "seed"),
        "versions": lambda: _versions(settings),
        "commit": lambda: _plain(settings, "commit"),
    }
    found = [Setting(name, value()) for name, value in told.items()]
    about = [
        Setting("average", result.target),
        Setting("interval", f"{100 * result.level:g} %; variance: {result.variance}"),
        Setting("metric", result.metric),
    ]
    return [*found, *about] if result.n_steps else found


def _held(settings: Mapping[str, Any], name: str) -> Any:
    """Find a setting under any of its names; None where it is missing."""
    return next((settings[key] for key in KEYS[name] if settings.get(key) is not None), None)


def _plain(settings: Mapping[str, Any], name: str) -> str:
    value = _held(settings, name)
    return MISSING if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _learning_rate(steps: Sequence[StepSums], settings: Mapping[str, Any]) -> str:
    """Tell the learning rate of the steps, first → peak → last; else the one in the settings."""
    rates = [s.learning_rate for s in steps if s.learning_rate is not None]
    if not rates:
        given = settings.get("learning_rate", settings.get("lr"))
        return MISSING if given is None else f"{given:.3g}" if isinstance(given, float) else str(given)
    first, peak, last = rates[0], max(rates), rates[-1]
    if min(rates) == peak:
        return f"{first:.3g}"
    top = f" → {peak:.3g}" if peak > max(first, last) else ""
    return f"{first:.3g}{top} → {last:.3g}"


def _schedule(steps: Sequence[StepSums], settings: Mapping[str, Any]) -> str:
    """Name the schedule and the phase of it that the steps saw, as far as their learning rates show it."""
    known = _held(settings, "schedule")
    rates = [(s.step, s.learning_rate) for s in steps if s.learning_rate is not None]
    parts = [] if known is None else [str(known)]
    if rates:
        phase = _phase(rates)
        parts = [phase] if phase.startswith(f"{known} ") else [*parts, phase]
    total = settings.get("steps_planned", settings.get("max_steps"))
    if steps and isinstance(total, int) and total > 0:
        parts.append(f"steps {steps[0].step}–{steps[-1].step} of {total:,}")
    return ", ".join(parts) or MISSING


def _phase(rates: Sequence[tuple[int, float]]) -> str:
    """Say how the learning rate went over the steps."""
    values = [rate for _, rate in rates]
    top = values.index(max(values))
    if min(values) == max(values):
        return "constant over these steps"
    rising, falling = values[: top + 1], values[top:]
    if rising != sorted(rising) or falling != sorted(falling, reverse=True):
        return "up and down over these steps"
    if rising[0] == rising[-1]:
        return "falling over these steps"
    if falling[0] == falling[-1]:
        return f"rising until step {rates[top][0]}" + ("" if len(falling) == 1 else ", then constant")
    return f"rising until step {rates[top][0]}, then falling"


def _tokens(steps: Sequence[StepSums]) -> str:
    counted = [(s.n_tokens, s.n_examples) for s in steps if s.n_tokens is not None]
    if not counted or len(counted) < len(steps):
        return MISSING
    tokens, examples = (sum(column) for column in zip(*counted, strict=True))
    each = [t / n for t, n in counted]
    ends = f"{format_count(min(each))} … {format_count(max(each))}"
    return f"{format_count(tokens / examples)} (means of the steps {ends})"


def _clipping(settings: Mapping[str, Any]) -> str:
    """Tell the largest gradient norm that clipping lets pass; the sums are taken before it."""
    value = _held(settings, "clipping")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"gradient norm to {value:g}; measured before it" if value > 0 else "none"
    return MISSING if value is None else str(value)


def _precision(settings: Mapping[str, Any]) -> str:
    """Tell the precision, also from the flags of transformers' TrainingArguments."""
    flags = [name for name, flag in (("bfloat16", "bf16"), ("float16", "fp16")) if settings.get(flag) is True]
    return f"{flags[0]} (mixed)" if flags else _plain(settings, "precision")


def _versions(settings: Mapping[str, Any]) -> str:
    known = settings.get("versions")
    if not isinstance(known, Mapping) or not known:
        return MISSING
    return ", ".join(f"{name} {value}" for name, value in known.items())
