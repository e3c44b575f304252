"""`probe`: the noise scale at frozen weights, from many batches at one parameter point, without any training.

Each batch is run forward and backward once. The taps of `gns.monitor` give Σ‖cᵢ‖², `.grad` the batch's
gradient, and `gns.statistics.pairs` makes of both the average over all pairs of examples of all batches.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from gns.capture.ranks import world_size
from gns.checking import check_whole
from gns.probing.calling import Loss, ProbeError
from gns.probing.gradrows import MAX_BYTES, SIZE, GradientRows
from gns.probing.largest import Largest
from gns.probing.result import FrozenEstimate
from gns.probing.run import Run, StillMonitor, check_metric
from gns.probing.still import gradient_hook, still
from gns.segments import SegmentsOf
from gns.statistics.looks import declared


def probe(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    level: float = 0.95,
    relative_width: float | None = None,
    max_batches: int | None = None,
    dropout: bool = False,
    split_dropout: bool = False,
    largest: int = 0,
    describe: Any = None,
    progress: bool | None = None,
    seed: int = 0,
    weights: str = "auto",
    segments: SegmentsOf | str | None = None,
    metric: str = "euclidean",
    optimizer: Any = None,
    max_bytes: int = MAX_BYTES,
    sketch: int = SIZE,
) -> FrozenEstimate:
    """Measure the gradient noise scale at the model's weights as they are; nothing is trained.

    Weights, `.grad`, buffers, training modes and random states are bit by bit the same afterwards, also after
    an exception or Ctrl-C. Optimizers are never touched.

    Args:
        model: the module to call, e.g. a `peft` model; its trainable parameters are measured.
        batches: what to call it with: mappings (keyword arguments), (args, kwargs), tuples or lists
            (positional arguments) or tensors. Their tensors are moved to the model's device. Batches may
            differ in size; the loss is to be a mean over its examples or tokens.
        loss: (model, batch) → scalar; None: `model(**batch).loss`.
        level: nominal coverage of the confidence set, over all looks together.
        relative_width: stop at the first declared look (20, 40, 80, … batches) at which the set's relative
            half-width, (high − low) / 2B, is at most this.
        max_batches: use no more batches than this.
        dropout: False: evaluation mode (batch norms and router noise too), but for layers that would stop
            checkpointing their activations by it. True: training mode, but for batch norms.
        split_dropout: run each batch a second time with other dropout masks, and say how much of tr Σ is
            dropout's; implies `dropout`.
        largest: how many of the examples with the largest gradients to name.
        describe: how to show them: a tokenizer, or a function (batch, row) → text; None, or where examples
            are not rows (packed texts, pairs): by number only.
        progress: show a bar on standard error; None: if that is a terminal.
        seed: of dropout masks, sketch and sign-flip test.
        weights: of the examples in the loss, see `GNSMonitor`.
        segments: which rows or positions are which example, see `GNSMonitor`.
        metric: in which norms are taken: "euclidean"; "adam", that of the second moments of `optimizer`; or
            "sign", the ℓ₁ norms of sign-like optimizers (`gns.probing.signs`), for batches of one size.
        optimizer: whose state `metric="adam"` reads; it must have made a step. It is not changed.
        max_bytes: of whole gradients kept on the host; beyond it they are sketched, and the result says so.
        sketch: numbers in the sketch of a batch's gradient.

    Returns:
        The estimate. After Ctrl-C, or if `batches` raises it, what was found until then, which says so.

    Raises:
        ProbeError: an argument does not fit, several processes are under way, a parameter's hook would act on
            the gradients, or there is no loss.
        KeyboardInterrupt: Ctrl-C before the first batch was done.
        RuntimeError: a monitor is attached to the model, or the model wrote to a buffer over 64 MiB
            (`StillError`).
        TypeError: `describe` is neither a tokenizer nor a function.
        ValueError: nothing trainable can be measured.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> batches = torch.randn(30, 8, 4)
        >>> found = probe(model, batches, loss=lambda model, x: (model(x) - 1).square().mean())
        >>> found.n_steps, found.n_examples
        (30, 240)
    """
    if isinstance(batches, Mapping):
        seen = f"batches is a {type(batches).__name__}, one batch"
        raise ProbeError(f"{seen}; a list of batches is needed, two or more")
    most = _most(batches, max_batches)
    looks = _looks(relative_width, most)
    _check(model, level)
    wholes = ("seed", seed, 0), ("max_bytes", max_bytes, 0), ("sketch", sketch, 1), ("largest", largest, 0)
    for name, value, least in wholes:
        check_whole(name, value, least, error=ProbeError)
    check_metric(model, metric, optimizer, largest)
    run = Run(
        model,
        loss,
        metric=metric,
        dropout=bool(dropout or split_dropout),
        split=split_dropout,
        seed=seed,
        rows=GradientRows(max_bytes=max_bytes, size=sketch, seed=seed),
        largest=Largest(largest, describe) if largest else None,
    )
    with (
        still(model, dropout=run.dropout),
        StillMonitor.of(model, optimizer, metric, weights=weights, segments=segments) as run.monitor,
    ):
        stopped = None
        try:
            with _bar(progress, most) as tick:
                for batch in _first(batches, max_batches):
                    run.feed(batch)
                    tick(len(run.done))
                    if relative_width is not None and len(run.done) in looks[:-1]:
                        found = run.result(level, looks)
                        if found.status == "measured" and _narrow(found, relative_width):
                            return replace(found, stopped=f"±{100 * relative_width:g} % was reached")
        except KeyboardInterrupt:
            if not run.done:
                raise
            stopped = f"interrupted after {len(run.done)} batches"
        return run.result(level, looks, stopped)


def _most(batches: Iterable[Any], max_batches: int | None) -> int | None:
    """Say how many batches there will be at the most, or None where nobody knows."""
    if max_batches is not None:
        check_whole("max_batches", max_batches, 1, error=ProbeError, more=", or None")
    try:
        there = len(batches) if isinstance(batches, Sized) else None
    except TypeError:  # a DataLoader over an iterable data set has a length in name only
        there = None
    known = [n for n in (there, max_batches) if n is not None]
    return min(known, default=None)


def _looks(relative_width: float | None, most: int | None) -> tuple[int, ...]:
    if relative_width is None:
        return ()
    if isinstance(relative_width, bool | str) or not 0 < relative_width < math.inf:
        raise ProbeError(
            f"relative_width is {relative_width!r}; a number above 0 is needed, e.g. 0.2 for ±20 %"
        )
    if most is None:
        raise ProbeError(
            "relative_width needs to know the largest number of batches, so that looks are declared "
            "beforehand; pass max_batches"
        )
    return declared(most)


def _check(model: nn.Module, level: float) -> None:
    if not isinstance(model, nn.Module):
        raise ProbeError(f"model is a {type(model).__name__}; a torch.nn.Module is needed")
    if isinstance(level, str) or not 0 < level < 1:
        raise ProbeError(f"level is {level!r}; a coverage in (0, 1) is needed, e.g. 0.95")
    if world_size() > 1:
        raise ProbeError(
            f"{world_size()} processes are under way; a probe runs in one: call it in a process of its own"
        )
    if (hooked := gradient_hook(model)) is not None:
        raise ProbeError(hooked)


def _narrow(found: FrozenEstimate, width: float) -> bool:
    return (found.high - found.low) / (2 * found.b_simple) <= width


def _first(batches: Iterable[Any], most: int | None) -> Iterator[Any]:
    """Yield no more than `most` batches, and ask for no more."""
    return iter(batches) if most is None else itertools.islice(batches, most)


@contextmanager
def _bar(shown: bool | None, most: int | None) -> Generator[Callable[[int], None]]:
    """Show a bar on standard error, if asked for or if that is a terminal; gives what moves it."""
    if not (sys.stderr.isatty() if shown is None else shown):
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=console.is_terminal) as bar:
        task = bar.add_task("batches at frozen weights", total=most)
        yield lambda done: bar.update(task, completed=done)
