"""Where data-parallel ranks meet: one small all-reduce per measured step, on a gloo group of our own.

The group is made when the first measured step closes, by agreement: each rank announces itself in the store
of the default process group, and all of them, or none, go on. So a monitor that is attached on some ranks
only waits `MEET_SECONDS` once and is refused; nobody else waits. A thread of ours waits for the device,
meets and reduces, in the order of the steps; the training loop waits for a sum only where it reads one, or
where the next self-check depends on it. The group is not registered with torch.distributed: the user's own
groups, their names and their collectives are not touched.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import distributed

from gns.reasons import LOST, NO_GLOO, NOT_ALL, OTHER_PARAMETERS

MEET_SECONDS = 30.0  # from the first measured step of one rank to that of the last
REPLY_SECONDS = 120.0  # from one rank's end of a step to that of the last


class Refused(RuntimeError):
    """The ranks cannot be measured together, from here on; the message says why."""


def world_size() -> int:
    """Processes in the default group; 1 where there is none."""
    there = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if there else 1


class Reply:
    """The sum over all ranks of what each sent, when it has arrived."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._value: np.ndarray | None = None
        self._error: Exception | None = None

    def give(self, value: np.ndarray | None, error: Exception | None = None) -> None:
        """Hand over the sum, or the error that came instead."""
        self._value, self._error = value, error
        self._done.set()

    def ready(self) -> bool:
        """Whether `get` would not wait."""
        return self._done.is_set()

    def get(self) -> np.ndarray:
        """Wait for the sum.

        Raises:
            Refused: the ranks do not measure together, or no longer.
        """
        if not self._done.wait(MEET_SECONDS + 2 * REPLY_SECONDS):  # a device that hangs: no thread sees that
            raise Refused(LOST.format(why="this rank's own values did not arrive"))
        if self._error is not None:
            raise (
                self._error if isinstance(self._error, Refused) else Refused(_said(self._error))
            ) from self._error
        assert self._value is not None
        return self._value


class Ranks:
    """This rank's end of the exchange; the default process group must exist.

    Args:
        what: what all ranks must have in common to be summed; compared as text.
    """

    def __init__(self, what: str):
        self.size, self.rank = distributed.get_world_size(), distributed.get_rank()
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        meet = Meeting(what)
        # the thread knows the queue and the meeting only, so that a forgotten monitor ends it
        thread = threading.Thread(target=_serve, args=(self._queue, meet), name="gns-ranks", daemon=True)
        _serving[thread] = self._queue
        thread.start()
        self._end = weakref.finalize(self, self._queue.put, None)

    def send(
        self, make: Callable[[], np.ndarray], then: Callable[[np.ndarray], np.ndarray | None] | None = None
    ) -> Reply:
        """Add up a vector over all ranks; every rank must send as many, of the same length.

        Args:
            make: gives the vector; called on the thread, so it may wait for a device.
            then: from the sum, which is the same on all ranks, to a second vector to be added up; the reply
                holds both in a row. None, or where it gives None: there is no second.
        """
        reply = Reply()
        self._queue.put((make, then, reply))
        return reply

    def close(self) -> None:
        """End the thread after what is still to be sent, and give up the group; does not wait."""
        self._end()


_serving: dict[threading.Thread, queue.SimpleQueue] = {}


@atexit.register
def _leave() -> None:
    """Before the process ends, send what is still to be sent: others wait for it.

    A thread that is inside gloo when the interpreter goes would abort the process; each is bounded in time.
    """
    for thread, requests in list(_serving.items()):
        requests.put(None)
        thread.join(MEET_SECONDS + REPLY_SECONDS)


def _serve(requests: queue.SimpleQueue, meet: Meeting) -> None:
    """Answer requests one after another; after the first error, all with that error."""
    group: Any = None
    error: Exception | None = None
    while (request := requests.get()) is not None:
        make, then, reply = request
        try:
            if error is not None:
                raise error
            first = make()
            group = meet() if group is None else group
            total = _summed(group, first)
            second = then(total) if then is not None else None
            reply.give(total if second is None else np.concatenate([total, _summed(group, second)]))
        except Exception as caught:
            error = caught.with_traceback(None)
            reply.give(None, error)
        del request, make, then, reply  # they hold the model
    del group
    _serving.pop(threading.current_thread(), None)


def _summed(group: Any, values: np.ndarray) -> np.ndarray:
    vector = torch.from_numpy(np.array(values, dtype=np.float64))
    group.allreduce([vector]).wait(datetime.timedelta(seconds=REPLY_SECONDS))
    return vector.numpy()


class Meeting:
    """The agreement of all ranks to measure together, and the group that they then make.

    Args:
        what: what all ranks must have in common, compared as text.
        name: of meetings of one kind, which every rank comes to in the same order.
        not_all: what is said where not all ranks come, with `here`, `size` and `seconds`.
        wait: seconds that a collective of the group may take; None: `REPLY_SECONDS`.
    """

    def __init__(self, what: str, *, name: str = "gns", not_all: str = NOT_ALL, wait: float | None = None):
        self._rank, self._size, self._what = distributed.get_rank(), distributed.get_world_size(), what
        self._not_all, self._wait = not_all, wait
        store = _default_store()
        with contextlib.suppress(AttributeError, RuntimeError, NotImplementedError):
            store = store.clone()  # a connection of our own: waiting on the shared one would block the user's
        self._store = distributed.distributed_c10d.PrefixStore(name, store)

    def __call__(self) -> Any:
        """Meet.

        Returns:
            The group of all ranks.

        Raises:
            Refused: not all ranks came, or they measure different parameters.
        """
        if not distributed.is_gloo_available():
            raise Refused(NO_GLOO)
        turn = self._turn()
        keys = [f"{turn}/{rank}" for rank in range(self._size)]
        verdict = f"{turn}/verdict"
        self._store.set(keys[self._rank], self._what)
        until = time.monotonic() + MEET_SECONDS
        while not self._store.check(keys):
            if self._store.check([verdict]) or time.monotonic() > until:
                break
            time.sleep(0.005)
        here = [self._store.check([key]) for key in keys]
        mine = "go"
        if not all(here):
            mine = self._not_all.format(here=sum(here), size=self._size, seconds=MEET_SECONDS)
        elif len({self._store.get(key) for key in keys}) > 1:
            mine = OTHER_PARAMETERS
        agreed = self._store.compare_set(verdict, "", mine).decode()  # the first word stands, for all
        if agreed != "go":
            raise Refused(agreed)
        timeout = datetime.timedelta(seconds=self._wait or REPLY_SECONDS)
        place = distributed.distributed_c10d.PrefixStore(f"{turn}/group", self._store)
        return distributed.ProcessGroupGloo(place, self._rank, self._size, timeout)

    def _turn(self) -> int:
        """Number of this meeting: one more than this rank's last, past those that were refused without it."""
        while True:
            turn = self._store.add(f"turn/{self._rank}", 1) - 1
            verdict = f"{turn}/verdict"
            if not self._store.check([verdict]) or self._store.get(verdict) == b"go":
                return turn


def _default_store() -> Any:
    return distributed.distributed_c10d._get_default_store()


def _said(error: Exception) -> str:
    return LOST.format(why=why(error, REPLY_SECONDS))


def why(error: Exception, seconds: float) -> str:
    """Say why a collective failed, from what gloo raised after so many seconds at the most."""
    words = str(error).lower()
    if "timed out" in words or "timeout" in words:
        return f"no answer within {seconds:.0f} s"
    return "a connection closed" if "closed" in words else f"{type(error).__name__}: {error}"
