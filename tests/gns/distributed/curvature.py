"""B_noise on several ranks, each with batches of its own, and what goes wrong there on purpose."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gns import GNSMonitor, b_noise
from gns.capture import ranks
from gns.curvature import together
from tests.gns.small_models import lora, tokens

CURVATURE: dict[str, Callable[[], dict[str, Any]]] = {}
# (batches for g, batches for H) of ranks 0 and 1, and of two more; with 4 probes whole batches belong to one
COUNTS = {"many": ([5, 3, 4, 3], [2, 1, 1, 3]), "few": ([2, 1, 1, 1], [1, 1, 2, 1])}
ASKED: dict[str, dict[str, Any]] = {
    "exact": {"probes": 4, "spectrum": 4, "blocks": True},
    "ggn": {"probes": 4, "operator": "ggn"},
    "difference": {"probes": 4, "method": "difference"},
    "few": {"probes": 8},
}
STEPS, EVERY = 6, 2


def scenario(run: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    CURVATURE[run.__name__] = run
    return run


def token_mean(model: nn.Module, batch: dict[str, torch.Tensor], then: Any = None) -> torch.Tensor:
    """The loss that a GPT-2 gives itself, without its rounding to float32."""
    logits, labels = model(**batch).logits[:, :-1], batch["labels"][:, 1:]
    logits = logits if then is None else then(logits)
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def batches(counts: str, rank: int) -> tuple[list[Any], list[Any]]:
    """A rank's batches for g and for H, of unequal sizes."""
    for_g, for_h = (of_rank[rank] for of_rank in COUNTS[counts])
    sizes = [4 + (k + rank) % 3 for k in range(for_g + for_h)]
    made = [tokens(n, t=11, seed=1000 * (rank + 1) + k) for k, n in enumerate(sizes)]
    return made[:for_g], made[for_g:]


def in_order(of_ranks: list[list[Any]]) -> list[Any]:
    """The list of all: the first batch of every rank, then the second ones, and so on."""
    rounds = range(max(map(len, of_ranks)))
    return [each[k] for k in rounds for each in of_ranks if k < len(each)]


def measure(name: str, for_g: list[Any], for_h: list[Any], *, wrap: bool) -> dict[str, Any]:
    model = lora("gpt2", torch.float64)
    given = DistributedDataParallel(model) if wrap else model
    found = b_noise(given, for_g, hessian_batches=for_h, loss=token_mean, seed=3, **ASKED[name])
    return {**dataclasses.asdict(found), "cost": None}


@scenario
def same_numbers() -> dict[str, Any]:
    rank = distributed.get_rank()
    return {
        name: measure(name, *batches("few" if name == "few" else "many", rank), wrap=True) for name in ASKED
    }


def training(curvature_every: int | None) -> tuple[list[Any], dict[str, Any]]:
    """Train under DDP; ranks have unequal batches."""
    rank, model = distributed.get_rank(), lora("gpt2").train()
    engine = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    kept = []
    with GNSMonitor(engine, on_error="raise", curvature_every=curvature_every) as monitor:
        for step in range(STEPS):
            if curvature_every and step % EVERY == EVERY - 1:
                kept.append({n: p.detach().tolist() for n, p in model.named_parameters() if p.requires_grad})
            engine(**tokens(3 + rank, seed=10 * step + rank)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        weights = [p.detach().flatten().tolist() for p in model.parameters() if p.requires_grad]
        history = [[s.mean_sq_norm, s.sq_norm_of_mean, s.reason] for s in monitor.history]
        readings = [[r.step, r.estimate.trace_h_sigma, r.estimate.g_h_g] for r in monitor.curvature]
    return readings, {"weights": weights, "history": history, "drawn": torch.rand(1).item(), "kept": kept}


@scenario
def during_a_training() -> dict[str, Any]:
    readings, watched = training(EVERY)
    _, plain = training(None)
    kept = watched.pop("kept")
    plain.pop("kept")
    return {"readings": readings, "untouched": watched == plain, "weights": kept}


def said(call: Callable[[], Any]) -> str:
    try:
        return f"nothing: {call()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def asked(**options: Any) -> str:
    for_g, for_h = batches("many", distributed.get_rank())
    how = {"hessian_batches": for_h, "loss": token_mean, "probes": 4}
    model = lora("gpt2", torch.float64)
    if options.pop("elsewhere", False):
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).view(-1)[0] += 1.0
    return said(lambda: b_noise(model, options.pop("for_g", for_g), **{**how, **options}))


def failing(kind: type[Exception]) -> Any:
    """A loss that raises on rank 1 in its third batch."""
    calls = []

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        calls.append(None)
        if distributed.get_rank() == 1 and len(calls) == 3:
            raise kind("of its own")
        return token_mean(model, batch)

    return loss


@scenario
def refusals() -> dict[str, Any]:
    rank = distributed.get_rank()
    of_0, _ = batches("many", 0)
    nan = lambda model, batch: token_mean(model, batch) * (torch.nan if rank else 1.0)  # noqa: E731
    return {
        "in a loss": asked(loss=failing(RuntimeError)),
        "gradients": asked(loss=nan),
        "no H": asked(hessian_batches=[] if rank else batches("many", 0)[1]),
        "argument": asked(probes=4 if rank else 1),
        "other arguments": asked(probes=4 + (rank == 1)),
        "other weights": asked(elsewhere=rank == 1),
        "no loss": asked(loss=(lambda model, batch: None) if rank else token_mean),
        "same g": asked(for_g=of_0),
        "H of another's g": asked(hessian_batches=of_0[:1] if rank == 1 else batches("many", rank)[1]),
        "after all that": asked(),
    }


@scenario
def one_has_no_memory() -> dict[str, Any]:
    """Rank 1 has none left for the copy of a tensor in the middle of a sum."""
    made, copied = together._on_host, 0

    def scarce(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal copied
        copied += 1
        if copied == 3 and distributed.get_rank() == 1:
            raise MemoryError("no room for a copy")
        return made(tensor)

    # nobody waits longer: a rank that is left alone in a sum would say so
    together.ANSWER_SECONDS, together._on_host, together.SUM_BYTES = 20.0, scarce, 1
    start = time.monotonic()
    found = asked()
    seconds = time.monotonic() - start
    together.ANSWER_SECONDS, together._on_host, together.SUM_BYTES = 600.0, made, 64 * 2**20
    return {"said": found, "seconds": seconds, "copied": copied, "then": asked()}


@scenario
def sharded() -> dict[str, Any]:
    model = lora("gpt2", torch.float64)
    fully_shard(model)
    for_g, for_h = batches("many", distributed.get_rank())
    return {"said": said(lambda: b_noise(model, for_g, hessian_batches=for_h, loss=token_mean))}


@scenario
def one_does_not_come() -> dict[str, Any]:
    ranks.MEET_SECONDS = 0.5
    found = {"said": asked() if distributed.get_rank() == 0 else None}
    ranks.MEET_SECONDS = 30.0
    distributed.barrier()
    return {**found, "then": asked()}


@scenario
def one_is_too_late() -> dict[str, Any]:
    """Rank 1 takes longer over a batch than anybody waits."""
    together.ANSWER_SECONDS, start = 0.5, time.monotonic()

    def slow(model: nn.Module, batch: Any) -> torch.Tensor:
        if distributed.get_rank() == 1:
            time.sleep(1.0)
        return token_mean(model, batch)

    found = asked(loss=slow)
    together.ANSWER_SECONDS = 600.0
    distributed.barrier()
    return {"said": found, "seconds": time.monotonic() - start, "then": asked()}


class Once(torch.autograd.Function):
    """The identity, without a second derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return dy


@scenario
def one_has_no_second_derivative() -> dict[str, Any]:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return token_mean(model, batch, Once.apply if distributed.get_rank() else None)

    for_g, for_h = batches("many", distributed.get_rank())
    model = lora("gpt2", torch.float64)
    found = b_noise(model, for_g, hessian_batches=for_h, loss=loss, probes=4, seed=3)
    return {"method": found.method, "numbers": [found.trace_h_sigma, found.g_h_g], "notes": found.warnings}


@scenario
def one_is_idle() -> dict[str, Any]:
    """Rank 1 makes no call in step 3, whose reading is then missing; all others are there."""
    model = lora("gpt2").train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with GNSMonitor(model, curvature_every=2) as monitor:
        for step in range(8):
            if step != 3 or distributed.get_rank() != 1:
                model(**tokens(4, seed=10 * step + distributed.get_rank())).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return {"steps": [r.step for r in monitor.curvature], "stopped": monitor.coverage().stopped}
