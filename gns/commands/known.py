"""What a run and its user's options tell `gns advise`, each with the source it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gns.commands.shared import settings_of

if TYPE_CHECKING:
    from gns.estimate import Estimate
    from gns.records import Summary

RUN = "the run"


@dataclass
class Known:
    """Arguments of `gns.advice.advise`, and what to tell of them.

    Args:
        arguments: name → value, None where unknown.
        rows: (name, value with its unit, source), in the order of the table.
        remarks: what does not fit, one line each.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def take(self, name: str, value: Any, shown: str, source: str, *, label: str | None = None) -> None:
        """Keep an argument and its row in the table."""
        self.arguments[name] = value
        self.rows.append((label or name.replace("_", " "), shown, source))


def known_of(folder: Path, estimate: Estimate, given: Mapping[str, Any]) -> Known:
    """Gather what is known of a run; an option wins over what was recorded.

    Args:
        folder: of the run.
        estimate: as loaded from it.
        given: options by name, None where not given.

    Returns:
        The arguments and their sources.

    Raises:
        ThroughputError: a throughput file cannot be used.
        ValueError: an option is out of range.
    """
    from gns.records import read_summary

    summary, recorded, known = read_summary(folder), settings_of(folder, estimate), Known()
    batch = recorded["batch_size"] if given["batch_size"] is None else given["batch_size"]
    if batch is None:
        raise ValueError(f"{folder}: no usable step tells the batch size; give it with --batch-size")
    same_batch = batch == recorded["batch_size"]
    _numbers(known, given, recorded, batch, same_batch)
    _price(known, given)
    _needed(known, given, summary, batch if same_batch else None)
    _throughput(known, given["throughput"], folder, estimate)
    _lora(known, given, summary)
    return known


def _numbers(
    known: Known, given: Mapping[str, Any], recorded: Mapping[str, Any], batch: int, same_batch: bool
) -> None:
    """Take batch, data size and learning rate."""
    source = RUN if given["batch_size"] is None else "--batch-size"
    known.take("batch_size", batch, f"{batch} examples a step", source, label="batch in use")
    data = recorded["dataset_size"] if given["dataset_size"] is None else given["dataset_size"]
    if data is not None:
        source = RUN if given["dataset_size"] is None else "--dataset-size"
        known.take("dataset_size", data, f"{data:,} examples", source, label="data set")
    rate = given["learning_rate"]
    source = "--learning-rate"
    if rate is None and same_batch:
        rate, source = recorded["learning_rate"], f"{RUN}, its highest"
    if rate is not None:
        known.take("learning_rate", rate, f"{rate:.3g} at batch {batch}", source, label="learning rate")


def _price(known: Known, given: Mapping[str, Any]) -> None:
    time, step = given["time_price"], given["step_price"]
    if time is not None:
        shown = f"{time:g}: the fewest possible steps cost {time:g} × the fewest possible examples"
        known.take("time_price", time, shown, "--time-price", label="price of time")
    if step is not None:
        known.take("step_price", step, f"{step:g} examples for a step", "--step-price", label="price of time")
    if time is None and step is None:
        known.rows.append(
            ("price of time", "1: time and examples matter equally", "default; see --time-price")
        )


def _needed(known: Known, given: Mapping[str, Any], summary: Summary, batch: int | None) -> None:
    """Take what the loss aimed at takes; by default what the run itself took, if less than an epoch."""
    from gns.advising.capacity import number_in

    needed, source = given["examples_needed"], "--examples-needed"
    steps, data = number_in(summary.settings, "steps_made"), known.arguments.get("dataset_size")
    if needed is None and batch and steps and data and steps * batch < data:
        needed, source = steps * batch, f"{RUN}: what it took to the loss it ended at"
    if needed is not None:
        shown = f"{needed:,.6g} examples at the batch in use"
        known.take("examples_needed", needed, shown, source, label="loss aimed at takes")


def _throughput(known: Known, given: list[str] | None, folder: Path, estimate: Estimate) -> None:
    """Take the throughput from files and BATCH=SPEED pairs, by default from the run's own file."""
    from gns.advising.throughput import FILE, length_remark, read

    parts = given or ([str(folder / FILE)] if (folder / FILE).is_file() else [])
    speeds: dict[int, float] = {}
    for part in parts:
        if not Path(part).is_file():  # the path of a file may hold "=" too
            batch, speed = _speed(part)
            speeds[batch] = speed
            continue
        curve = read(part)
        speeds |= curve.speeds
        known.remarks += filter(None, [length_remark(curve, estimate.history)])
    if speeds:
        shown = f"{len(speeds)} batch sizes, {min(speeds)} … {max(speeds)}"
        known.take("throughput", speeds, shown, ", ".join(parts))


def _speed(text: str) -> tuple[int, float]:
    """Read BATCH=EXAMPLES_PER_SECOND.

    Raises:
        ValueError: it is not of that form, and no file either.
    """
    batch, _, speed = text.partition("=")
    try:
        return int(batch), float(speed)
    except ValueError:
        needs = "a file that `gns throughput` wrote is needed, or BATCH=EXAMPLES_PER_SECOND, e.g. 16=3.5"
        raise ValueError(f"throughput {text!r}: no such file; {needs}") from None


def _lora(known: Known, given: Mapping[str, Any], summary: Summary) -> None:
    """Take what the adapters hold against what the data carry, and what a step costs.

    Raises:
        ValueError: an option is out of range, or one is given without the other that it needs.
    """
    from gns.advising.capacity import Capacity, read_layers, recorded, trainable
    from gns.advising.phrases import bits
    from gns.advising.tradeoff import positive

    settings, parameters = summary.settings, given["trainable_parameters"]
    if parameters is None:
        parameters = trainable(settings, summary.coverage)
    else:
        positive("trainable_parameters", parameters, whole=True)
    capacity, cost = recorded(settings, parameters)
    source = _source_of_bits(settings) if capacity else ""
    if given["data_bits"] is not None:
        if parameters is None:
            raise ValueError("data_bits says what the data carry; --trainable-parameters is needed beside it")
        capacity, source = Capacity(given["data_bits"], parameters), "--data-bits"
    if capacity is not None:
        shown = f"{bits(capacity.data_bits)} against {capacity.parameters:,} parameters"
        known.take("capacity", capacity, shown, source, label="data and adapters")
    if cost is not None:
        count = sum(layer.count for layer in read_layers(settings["adapted_layers"]))
        known.take("cost", cost, f"{count} matrices", RUN, label="adapted")


def _source_of_bits(settings: Mapping[str, Any]) -> str:
    from gns.advising.capacity import WHOLE

    loss, tokens = settings["first_epoch_loss"], settings["loss_tokens"]
    share = settings.get("first_epoch_share")
    source = f"{RUN}: {loss:.3g} nats a token × {tokens:,} tokens"
    if isinstance(share, int | float) and share < WHOLE:
        return f"{source}; the loss is of the first {100 * share:.0f} % of an epoch"
    return source
