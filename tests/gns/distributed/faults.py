"""What goes wrong on several ranks, on purpose. Each function runs on every rank and gives what it saw."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from gns import GNSMonitor
from gns.capture import ranks
from gns.capture.ownership import FOREIGN
from tests.gns.distributed.cases import losses, net
from tests.gns.hiding import Hiding

KEPT: list[GNSMonitor] = []  # a monitor that is never detached
FAULTS: dict[str, Callable[[], dict[str, Any]]] = {}


def fault(run: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    FAULTS[run.__name__] = run
    return run


def data(step: int, rank: int | None = None, n: int = 4) -> torch.Tensor:
    here = distributed.get_rank() if rank is None else rank
    generator = torch.Generator().manual_seed(100 * step + here)
    return torch.randn(n, 3, generator=generator, dtype=torch.float64)


HIDDEN_STEPS = FOREIGN + 4


def hidden_rows(step: int, rank: int | None = None) -> torch.Tensor:
    here = distributed.get_rank() if rank is None else rank
    return data(step, here, n=1 if step == FOREIGN + 2 and here == 1 else 4)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def train(model: nn.Module, steps: range, each: Callable[[int], torch.Tensor] = data) -> list[list[float]]:
    optimizer = optimizer_of(model)
    for step in steps:
        losses(model(each(step))).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().flatten().tolist() for p in model.parameters()]


def seen(monitor: GNSMonitor, weights: list | None = None) -> dict[str, Any]:
    steps = [[s.step, s.n_examples, s.reason, s.mean_sq_norm, s.sq_norm_of_mean] for s in monitor.history]
    reasons = dict(monitor.coverage().reasons)
    return {"steps": steps, "reasons": reasons, "stopped": monitor.coverage().stopped, "weights": weights}


@fault
def rank_0_only() -> dict[str, Any]:
    ranks.MEET_SECONDS = 0.5
    inner = net(torch.float64)
    monitor = GNSMonitor(inner)
    if distributed.get_rank() == 0:
        monitor.attach()
    weights = train(DistributedDataParallel(inner), range(3))
    found = {"weights": weights}
    if distributed.get_rank() == 0:
        found = seen(monitor, weights)
        monitor.detach()
    ranks.MEET_SECONDS = 30.0
    return found


@fault
def all_ranks_after_that() -> dict[str, Any]:
    with GNSMonitor(net(torch.float64), on_error="raise") as monitor:
        train(DistributedDataParallel(monitor.model), range(3))
    return seen(monitor)


@fault
def idle_rank() -> dict[str, Any]:
    """All ranks have the same rows, so that their gradients are equal without an engine."""
    model = net(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with GNSMonitor(model, on_error="raise") as monitor:
        for step in range(8):
            if step not in (2, 4, 5) or distributed.get_rank() != 1:
                losses(model(data(step, rank=0))).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return seen(monitor)


@fault
def not_averaged() -> dict[str, Any]:
    with GNSMonitor(net(torch.float64), on_error="raise") as monitor:
        train(monitor.model, range(2))
    return seen(monitor)


@fault
def last_pass_not_synchronised() -> dict[str, Any]:
    with GNSMonitor(net(torch.float64), on_error="raise") as monitor:
        model = DistributedDataParallel(monitor.model)
        train(model, range(1))
        with model.no_sync():
            train(model, range(1, 2))
    return seen(monitor)


def _doubles_a_bias(_, bucket):  # torch looks at annotations, and these are text
    for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
        gradient.mul_(2 if parameter.shape == (4,) else 1)
    done = distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
    return done.then(lambda future: future.value()[0].div_(distributed.get_world_size()))


@fault
def comm_hook() -> dict[str, Any]:
    with GNSMonitor(net(torch.float64), on_error="raise") as monitor:
        model = DistributedDataParallel(monitor.model)
        model.register_comm_hook(None, _doubles_a_bias)
        train(model, range(1))
        return seen(monitor)


@fault
def other_parameters() -> dict[str, Any]:
    model = net(torch.float64)
    if distributed.get_rank() == 1:
        model[0].requires_grad_(False)
    with GNSMonitor(model, on_error="raise") as monitor:
        train(model, range(2))
    return seen(monitor)


@fault
def other_steps() -> dict[str, Any]:
    with GNSMonitor(net(torch.float64), every=1 + distributed.get_rank(), on_error="raise") as monitor:
        train(DistributedDataParallel(monitor.model), range(4))
    return seen(monitor)


@fault
def one_stands_down() -> dict[str, Any]:
    """An error of the monitor's own on rank 1."""
    monitor = GNSMonitor(net(torch.float64)).attach()
    model = DistributedDataParallel(monitor.model)
    train(model, range(2))
    before = len(monitor.history)
    if distributed.get_rank() == 1:
        monitor._collector.fail(RuntimeError("of our own"))
    weights = train(model, range(2, 4))
    found = seen(monitor, weights)
    monitor.detach()
    return {**found, "before": before}


@fault
def one_hangs() -> dict[str, Any]:
    """Rank 1 stops sending without a word, as if it hung; rank 0 must not."""
    ranks.REPLY_SECONDS = 1.0
    monitor = GNSMonitor(net(torch.float64)).attach()
    model = DistributedDataParallel(monitor.model)
    train(model, range(2))
    if distributed.get_rank() == 1:
        monitor._collector.pool.send = lambda own: ranks.Reply()
    weights = train(model, range(2, 3))
    found = seen(monitor, weights) if distributed.get_rank() == 0 else {"weights": weights}
    distributed.barrier()
    if distributed.get_rank() == 1:
        monitor._arriving.clear()
    monitor.detach()
    ranks.REPLY_SECONDS = 120.0
    return found


@fault
def join() -> dict[str, Any]:
    model = DistributedDataParallel(net(torch.float64))
    with GNSMonitor(model, on_error="raise") as monitor, model.join():
        train(model, range(3 - distributed.get_rank() % 2))
    return seen(monitor)


@fault
def hidden() -> dict[str, Any]:
    """An engine that hides `.grad`; a step on rank 1 has one example, which is no batch."""
    model = net(torch.float64)
    engine = Hiding(model, lr=0.05)
    with GNSMonitor(model, on_error="raise") as monitor:
        for step in range(HIDDEN_STEPS):
            losses(model(hidden_rows(step))).mean().backward()
            engine.step()
        return {**seen(monitor), "text": str(monitor.estimate()), "local": [s.local for s in monitor.history]}


@fault
def attached_again() -> dict[str, Any]:
    with GNSMonitor(net(torch.float64), on_error="raise") as monitor:
        model = DistributedDataParallel(monitor.model)
        train(model, range(2))
        monitor.detach()
        monitor.attach()
        train(model, range(2, 4))
    return seen(monitor)


@fault
def forgotten() -> dict[str, Any]:
    """A monitor that goes with its model, never detached: its thread ends."""
    before = _threads()
    monitor = GNSMonitor(net(torch.float64), on_error="raise").attach()
    model = DistributedDataParallel(monitor.model)
    train(model, range(2))
    steps, new = seen(monitor), _threads() - before
    del monitor, model
    gc.collect()
    for thread in new:
        thread.join(10)
    return {**steps, "threads": [len(new), sum(thread.is_alive() for thread in new)]}


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "gns-ranks"}


@fault
def never_detached() -> dict[str, Any]:
    """The last scenario: rank 1 ends with its last sums unsent."""
    monitor = GNSMonitor(net(torch.float64)).attach()
    model = DistributedDataParallel(monitor.model)
    train(model, range(1))
    found = seen(monitor)
    if distributed.get_rank() == 1:
        vector, pool = monitor._collector.pool._vector, monitor._collector.pool
        pool._vector = lambda own: time.sleep(1) or vector(own)
    train(model, range(1, 2))
    KEPT.append(monitor)
    return seen(monitor) if distributed.get_rank() == 0 else found
