"""Where data-parallel ranks meet for a curvature: each has batches of its own, all get the same numbers.

Ranks exchange what they found on a gloo group of our own, made for one reading, so that the user's groups and
a monitor's are not touched. An error on one rank travels with its next exchange and becomes the same error on
all; a rank that does not come, or dies, ends in an error after a bounded wait.

The batches of all ranks are one list: the first of every rank in the order of the ranks, then the second of
every rank that has one, and so on. One process with that list gives the same numbers.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import pickle
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, distributed

from gns.capture.ranks import Meeting, Refused, why, world_size
from gns.curvature.errors import CurvatureError
from gns.probing.calling import ProbeError

ANSWER_SECONDS = 600.0  # from one rank's exchange to that of the last: their batches may be unequal
SUM_BYTES = 64 * 2**20  # copied to the host at once, before ranks say that they can go on
NOT_ALL = (
    "only {here} of {size} data-parallel ranks came to measure B_noise within {seconds:.0f} s: let every "
    "rank do so, each with batches of its own"
)
LEFT = "a data-parallel rank left while B_noise was measured: {why}"


class Elsewhere(CurvatureError):
    """Another rank cannot go on."""


class NotAll(CurvatureError):
    """The ranks do not measure together."""


class Alone:
    """One process."""

    rank, size = 0, 1

    def all(self, value: Any) -> list[Any]:
        """Give what every rank has, by rank."""
        return [value]

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add up tensors over the ranks, in place."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave; there is nobody to tell."""


class Together(Alone):
    """All ranks of the default process group; to be entered by every one of them."""

    def __init__(self) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self._group: Any = None

    def __enter__(self) -> Self:
        """Meet.

        Raises:
            NotAll: not all ranks came.
        """
        try:
            self._group = Meeting("B_noise", name="gns/b_noise", not_all=NOT_ALL, wait=ANSWER_SECONDS)()
        except Refused as error:
            raise NotAll(str(error)) from error
        return self

    def all(self, value: Any) -> list[Any]:
        """Give what every rank has, by rank.

        Raises:
            Elsewhere: another rank has an error instead.
            NotAll: a rank left.
        """
        answers = self._exchange((None, value))
        if (error := _first(answers)) is not None:
            raise Elsewhere(error)
        return [value for _, value in answers]

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add up tensors over the ranks, in place; every rank has the same names and shapes."""
        for group in _by_bytes(tensors.values(), SUM_BYTES):
            hosts = [_on_host(tensor) for tensor in group]
            self.all(None)  # so that nobody waits in a sum for a rank with an error, or without memory
            for tensor, host in zip(group, hosts, strict=True):
                self._wait(self._group.allreduce([host]))
                tensor.copy_(host)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tell the others of an error, and raise the one that all raise."""
        try:
            if isinstance(error, Exception) and not isinstance(error, NotAll):
                self._raise(error)
        finally:
            self._group = None  # others that wait hear that a connection closed

    def _raise(self, error: Exception) -> None:
        if isinstance(error, Elsewhere):
            raise _as_said(error.args[0]) from None
        text = " ".join(str(error).split())
        plain = isinstance(error, CurvatureError | ProbeError)
        told = (
            type(error).__name__,
            f"rank {self.rank}: {text if plain else f'{type(error).__name__}: {text}'}",
        )
        with contextlib.suppress(NotAll):
            told = _first(self._exchange((told, None))) or told
        raise _as_said(told) from error

    def _exchange(self, sent: tuple[tuple[str, str] | None, Any]) -> list[tuple[Any, Any]]:
        data = torch.frombuffer(bytearray(pickle.dumps(sent)), dtype=torch.uint8)
        lengths = [int(n) for n in self._gathered(torch.tensor([len(data)]))]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(data)] = data
        answers = zip(self._gathered(padded), lengths, strict=True)
        return [pickle.loads(bytes(t[:n].numpy())) for t, n in answers]

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        self._wait(self._group.allgather([found], [tensor]))
        return found

    def _wait(self, work: Any) -> None:
        try:
            work.wait(datetime.timedelta(seconds=ANSWER_SECONDS))
        except RuntimeError as error:
            raise NotAll(LEFT.format(why=why(error, ANSWER_SECONDS))) from error


def _on_host(tensor: Tensor) -> Tensor:
    """A copy of a tensor that a gloo group can add to."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _by_bytes(tensors: Iterable[Tensor], limit: int) -> list[list[Tensor]]:
    """Group neighbours, so many bytes at once, or one tensor that has more."""
    groups: list[list[Tensor]] = []
    left = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if not groups or size > left:
            groups.append([])
            left = limit
        groups[-1].append(tensor)
        left -= size
    return groups


def _first(answers: Sequence[tuple[Any, Any]]) -> Any:
    """The error of the first rank that has one, or None."""
    return next((error for error, _ in answers if error is not None), None)


def _as_said(told: tuple[str, str]) -> Exception:
    kind, text = told
    return ProbeError(text) if kind == ProbeError.__name__ else CurvatureError(text)


def everyone() -> Alone:
    """All ranks of the default process group, or this process alone where there is no other."""
    return Together() if world_size() > 1 else Alone()


def digest(tensors: Iterable[Tensor]) -> str:
    """Give a hash of the bits of some tensors, to compare them between ranks."""
    found = hashlib.sha1(usedforsecurity=False)
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Places:
    """Where the batches of this rank stand in the list of all.

    Args:
        counts: batches of each rank.
        ranks: all of them.
    """

    def __init__(self, counts: Sequence[int], ranks: Alone):
        self.counts, self.ranks = counts, ranks
        self.total, self.rounds = sum(counts), max(counts)
        self.numbers = [self.number(ranks.rank, k) for k in range(counts[ranks.rank])]

    def number(self, rank: int, k: int) -> int:
        """Number in the list of all of a rank's batch k."""
        return sum(min(n, k) + (n > k and other < rank) for other, n in enumerate(self.counts))

    def sizes(self, k: int, n: int) -> dict[int, int]:
        """Give number → examples of every rank's batch k; n is that of this rank's, 0 where it has none."""
        found = self.ranks.all(n)
        return {self.number(r, k): size for r, size in enumerate(found) if k < self.counts[r]}
