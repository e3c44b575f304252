"""Small device tensors to the host: one asynchronous copy a device and dtype, waited for only when read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class HostCopy:
    """Values of many small tensors on their way to the host.

    Args:
        tensors: of any shape, device and floating dtype; they may change after this returns.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self._shapes = [t.shape for t in tensors]
        places: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
        for i, t in enumerate(tensors):
            places[t.device, t.dtype].append(i)
        self._parts: list[tuple[list[int], Tensor]] = []
        self._events: list[torch.cuda.Event] = []
        for (device, _), rows in places.items():
            with torch.no_grad():
                flat = torch.cat([t if t.ndim == 1 else t.reshape(-1) for t in (tensors[i] for i in rows)])
            self._parts.append((rows, self._start(flat, device)))

    def _start(self, flat: Tensor, device: torch.device) -> Tensor:
        if device.type != "cuda":
            return flat.cpu()
        host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        host.copy_(flat, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        self._events.append(event)
        return host

    def ready(self) -> bool:
        """Whether `get` would not wait."""
        return all(event.query() for event in self._events)

    def get(self) -> list[np.ndarray]:
        """Wait for the copy and give the values, each in its tensor's shape and dtype."""
        for event in self._events:
            event.synchronize()
        found: dict[int, np.ndarray] = {}
        for rows, host in self._parts:
            sizes = [self._shapes[i].numel() for i in rows]
            values, start = host.numpy(), 0
            for i, size in zip(rows, sizes, strict=True):
                found[i] = values[start : start + size].reshape(tuple(self._shapes[i]))
                start += size
        return [found[i] for i in range(len(self._shapes))]


class HostValues:
    """Named lists of small device tensors on their way to the host, in one copy.

    Args:
        **lists: name → tensors.
    """

    def __init__(self, **lists: Sequence[Tensor]):
        self._counts = {name: len(tensors) for name, tensors in lists.items()}
        self._copy = HostCopy([t for tensors in lists.values() for t in tensors])

    def ready(self) -> bool:
        """Whether `get` would not wait."""
        return self._copy.ready()

    def get(self) -> dict[str, list[np.ndarray]]:
        """Wait for the copy and give the values by name."""
        values = iter(self._copy.get())
        return {name: [next(values) for _ in range(count)] for name, count in self._counts.items()}
