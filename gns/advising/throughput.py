"""How many examples a second a machine trains at each batch size: the curve, its file, how it is measured.

What touches torch is behind `Trial` (see `gns/finetuning/timing.py`), so that nothing here needs a model.
Micro-batches grow by powers of two as long as memory and patience allow; larger batches are made of the
fastest micro-batch by accumulation. Before each growth the memory it will take is predicted from the sizes
before it, and what would pass the limit is never tried: a machine out of memory may kill any process, not
only this one.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from gns._version import __version__
from gns.advising.tradeoff import positive
from gns.stepsfile import write_atomically
from gns.sums import StepSums

FILE = "throughput.json"
_FORMAT = {"format": "gns-throughput", "version": 1}
REPEATS = 7  # most timed steps of one batch size
SHORTEST = 64  # tokens of the first, careful step
GIB = 2**30


class ThroughputError(ValueError):
    """A throughput file cannot be used; the message is one line that says what to do."""


class OutOfMemory(Exception):
    """A step did not fit into memory; the trial has cleaned up after it."""


@dataclass(frozen=True)
class Memory:
    """Memory of the device.

    Args:
        held: bytes that this process holds now.
        limit: bytes that it may hold at most.
        margin: factor by which a growth may turn out larger than predicted.
    """

    held: int
    limit: int
    margin: float = 1.0


class Trial(Protocol):
    """A model in training, of which single steps can be made."""

    tokens: int

    def memory(self) -> Memory:
        """What is held, and what may be."""
        ...

    def peak(self, micro_batch: int, tokens: int) -> int:
        """Make one untimed step; give the most memory held during it, bytes. Raises `OutOfMemory`."""
        ...

    def seconds(self, micro_batch: int, accumulation: int) -> float:
        """Make one step and time it. Raises `OutOfMemory`."""
        ...


@dataclass(frozen=True)
class Speed:
    """One batch size, timed.

    Args:
        batch_size: examples a step, micro_batch × accumulation.
        micro_batch: examples in a forward pass.
        accumulation: forward passes in a step.
        seconds: median time of a full step: forward, backward, clipping, optimizer.
        fastest: least time of a step.
        slowest: most.
        repeats: steps timed, after an untimed one.
        peak_bytes: most memory held during a step; None for accumulated batches, which hold no more.

    Raises:
        ValueError: a number is out of range.
    """

    batch_size: int
    micro_batch: int
    accumulation: int
    seconds: float
    fastest: float
    slowest: float
    repeats: int
    peak_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batch", "accumulation", "repeats"):
            positive(name, getattr(self, name), whole=True)
        for name in ("seconds", "fastest", "slowest"):
            positive(name, getattr(self, name))

    @property
    def examples_per_second(self) -> float:
        """Examples a second at the median."""
        return self.batch_size / self.seconds


@dataclass(frozen=True)
class Throughput:
    """A measured curve.

    Args:
        points: one a batch size, rising.
        stopped: why no larger batch was timed, a sentence.
        settings: model, tokens an example, rank, dtype, device, versions …
        interrupted: whether the user ended the measurement.
        latest: the batch size timed last, whether kept or not; None where that is unknown.
    """

    points: tuple[Speed, ...]
    stopped: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    interrupted: bool = False
    latest: Speed | None = field(default=None, compare=False)

    @property
    def speeds(self) -> dict[int, float]:
        """Batch size → examples a second, as `advise(throughput=…)` takes it."""
        return {point.batch_size: point.examples_per_second for point in self.points}


def write(path: str | Path, curve: Throughput) -> None:
    """Write a curve atomically as JSON."""
    data = {**_FORMAT, "gns": __version__, "stopped": curve.stopped, "interrupted": curve.interrupted}
    data |= {"settings": curve.settings, "points": [asdict(point) for point in curve.points]}
    write_atomically(Path(path), [json.dumps(data, indent=1, allow_nan=False).encode() + b"\n"])


def read(path: str | Path) -> Throughput:
    """Read a curve.

    Raises:
        FileNotFoundError: there is no such file.
        ThroughputError: it is damaged or foreign, or holds no batch size.
    """
    try:
        data = json.loads(Path(path).read_bytes())
        if {name: data[name] for name in _FORMAT} != _FORMAT:
            raise ValueError
        names = {f.name for f in fields(Speed)}
        points = [Speed(**{k: v for k, v in row.items() if k in names}) for row in data["points"]]
        curve = Throughput(tuple(points), data["stopped"], dict(data["settings"]), data["interrupted"])
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise ThroughputError(
            f"{path}: damaged or foreign; a file that `gns throughput` wrote is needed"
        ) from None
    if not curve.points:
        raise ThroughputError(f"{path}: holds no timed batch size; measure again with `gns throughput`")
    return curve


def length_remark(curve: Throughput, steps: Iterable[StepSums]) -> str | None:
    """Remark on a curve that was timed on examples of quite another length than a run's; None where alike."""
    counted = [(s.n_tokens, s.n_examples) for s in steps if s.n_tokens]
    timed = curve.settings.get("tokens_per_example")
    if not counted or not isinstance(timed, int) or timed < 1:
        return None
    mean = sum(tokens for tokens, _ in counted) / sum(n for _, n in counted)
    if 0.5 <= mean / timed <= 2:
        return None
    return (
        f"the throughput was timed with {timed} tokens an example, the run's have a loss on {mean:.0f} "
        "on average: times are those of the timed length, and the order may differ."
    )


def predicted_peak(known: Sequence[tuple[int, int]], base: int, size: int) -> int:
    """Memory that a micro-batch will take, the larger of two extrapolations.

    The line through the last two sizes, and the last size's use above `base` in proportion. Where a step
    takes a + b·size bytes above the base, a ≥ 0, neither is too small; where something grows faster than the
    batch, the first is the better one.

    Args:
        known: (size, peak bytes), rising; at least one.
        base: bytes held before the first step.
        size: micro-batch to come.
    """
    last, peak = known[-1]
    proportional = base + (peak - base) * size / last
    if len(known) == 1:
        return round(proportional)
    before, lower = known[-2]
    return round(max(proportional, peak + (peak - lower) * (size - last) / (last - before)))


class Sweep:
    """The measurement of one curve.

    Args:
        trial: makes the steps.
        largest: no batch beyond it is timed, examples.
        seconds: most time to spend on one batch size, as far as it can be foreseen.
        hear: is told of the curve after every batch size.
        announce: is told what is timed next, (micro-batch, accumulation).
    """

    def __init__(
        self,
        trial: Trial,
        *,
        largest: int = 256,
        seconds: float = 30.0,
        hear: Callable[[Throughput], None] = lambda curve: None,
        announce: Callable[[int, int], None] = lambda micro, accumulation: None,
    ) -> None:
        positive("largest", largest, whole=True)
        positive("seconds", seconds)
        self.trial, self.largest, self.patience = trial, largest, seconds
        self.hear, self.announce = hear, announce
        self.points: dict[int, Speed] = {}
        self.latest: Speed | None = None

    def run(self) -> Throughput:
        """Measure; Ctrl-C ends it with the curve so far."""
        try:
            reasons = [self._grow()]
            reasons += [self._accumulate()] if self.points else []
        except KeyboardInterrupt:
            return self._curve("you interrupted it", interrupted=True)
        return self._curve(", and ".join(dict.fromkeys(reasons)))

    def _curve(self, stopped: str, *, interrupted: bool = False) -> Throughput:
        points = tuple(self.points[size] for size in sorted(self.points))
        return Throughput(points, stopped, interrupted=interrupted, latest=self.latest)

    def _grow(self) -> str:
        """Time growing micro-batches; say why it ended."""
        base = self.trial.memory().held
        known: list[tuple[int, int]] = []
        size = 1
        while size <= self.largest:
            self.announce(size, 1)
            refused = self._refused(known, base, size)
            if refused:
                return refused
            start = time.perf_counter()
            try:
                known.append((size, self.trial.peak(size, self.trial.tokens)))
                self._time(size, 1, known[-1][1], time.perf_counter() - start)
            except OutOfMemory:
                return f"a micro-batch of {size} does not fit into memory"
            size *= 2
        return f"no batch beyond {self.largest} was asked for"

    def _refused(self, known: Sequence[tuple[int, int]], base: int, size: int) -> str | None:
        """Say why a micro-batch is not to be tried, or None."""
        if not known:
            return self._too_long(base)
        return self._too_large(known, base, size) or self._too_slow(size, 2 * self.points[size // 2].seconds)

    def _too_long(self, base: int) -> str | None:
        """Come close to one example of full length by doublings, as nothing is known of its memory yet."""
        peak = base
        for tokens in _lengths(self.trial.tokens):
            expected = base + 4 * (peak - base)  # twice the length takes at most four times the memory
            limit = self.trial.memory().limit
            if expected > limit:
                return f"one example of {tokens:,} tokens could take {_against(expected, limit)}"
            if tokens < self.trial.tokens:
                try:
                    peak = max(peak, self.trial.peak(1, tokens))
                except OutOfMemory:
                    return f"one example of {tokens:,} tokens does not fit into memory"
        return None

    def _too_large(self, known: Sequence[tuple[int, int]], base: int, size: int) -> str | None:
        memory, expected = self.trial.memory(), predicted_peak(known, base, size)
        limit, expected = memory.limit, round(base + memory.margin * (expected - base))
        if expected <= limit:
            return None
        return f"a micro-batch of {size} could take {_against(expected, limit)}"

    def _too_slow(self, size: int, expected: float) -> str | None:
        if 2 * expected <= self.patience:  # one step to warm up and one to time
            return None
        return f"a step of {size} would take about {expected:.2g} s, too long for the time allowed"

    def _accumulate(self) -> str:
        """Time larger batches made of the fastest micro-batch; say why it ended."""
        best = max(self.points.values(), key=lambda point: point.examples_per_second)
        size = 2 * best.micro_batch
        while size <= self.largest:
            direct, expected = self.points.get(size), size / best.examples_per_second
            if direct is None or expected < direct.seconds:
                refused = self._too_slow(size, expected)
                if refused:
                    return refused
                self.announce(best.micro_batch, size // best.micro_batch)
                self._time(best.micro_batch, size // best.micro_batch, None, expected)
            size *= 2
        return f"no batch beyond {self.largest} was asked for"

    def _time(self, micro: int, accumulation: int, peak: int | None, expected: float) -> None:
        """Time a batch size, whose memory is warm, and keep it unless it was faster in another way."""
        count = max(1, min(REPEATS, int(self.patience / max(expected, 1e-9)) - 1))
        times = [self.trial.seconds(micro, accumulation) for _ in range(count)]
        size = micro * accumulation
        found = Speed(
            size, micro, accumulation, statistics.median(times), min(times), max(times), count, peak
        )
        before = self.points.get(size)
        if before is None or found.seconds < before.seconds:
            self.points[size] = found
        self.latest = found
        self.hear(self._curve("it was not at its end yet"))


def _against(expected: int, limit: int) -> str:
    """Set the memory that is needed against the memory that may be used."""
    return f"{expected / GIB:.3g} GiB, more than the {limit / GIB:.3g} GiB that may be used"


def _lengths(tokens: int) -> Iterator[int]:
    """Yield lengths that double up to `tokens`."""
    length = min(SHORTEST, tokens)
    while length < tokens:
        yield length
        length *= 2
    yield tokens
