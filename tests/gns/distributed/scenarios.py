"""Run every case on this rank and write what each rank measured: `torchrun … scenarios.py OUT CASE …`."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import traceback
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[3]))
from gns import GNSMonitor
from tests.gns.distributed.cases import BY_NAME, Case, losses, net, optimizer_of, rows
from tests.gns.distributed.curvature import CURVATURE
from tests.gns.distributed.faults import FAULTS
from tests.gns.distributed.real import REAL


def engine(case: Case, model: nn.Module) -> nn.Module:
    if case.engine == "ddp":
        return DistributedDataParallel(model, **case.engine_options)
    options = dict(case.engine_options)
    divide = options.pop("divide", None)
    shard: dict[str, Any] = {"mp_policy": MixedPrecisionPolicy(**options)}
    if case.engine == "hsdp":
        shard["mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for part in (model[2], model[4], model):
        fully_shard(part, **shard)
        if divide is not None:
            part.set_gradient_divide_factor(divide)
    return model


def unsynchronised(case: Case, model: nn.Module, last: bool) -> Any:
    if case.engine == "ddp":
        return contextlib.nullcontext() if last else model.no_sync()
    model.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


def known(x: float) -> float | None:
    return None if math.isnan(x) else x


def record(sums: Any) -> dict[str, Any]:
    return {
        "step": sums.step, "n": sums.n_examples, "reason": sums.reason, "weights": sums.sum_sq_weights,
        "m": known(sums.mean_sq_norm), "q": known(sums.sq_norm_of_mean),
        "tokens": sums.n_tokens, "finite": sums.finite,
        "spread": None if sums.mean_fourth is None else [sums.mean_fourth, *sums.top_sq_norms],
        "rows": {name: [s.mean_sq_norm, s.sq_norm_of_mean] for name, s in sums.parameters()},
    }  # fmt: skip


def result(monitor: GNSMonitor, model: nn.Module, caught: list) -> dict[str, Any]:
    coverage = monitor.coverage()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return {
        "steps": [record(s) for s in monitor.history],
        "unmeasured": dict(coverage.reasons),
        "verified": sorted(coverage.verified),
        "shared": None if coverage.shared is None else sorted(coverage.shared),
        "stopped": coverage.stopped,
        "warnings": [str(w.message) for w in caught],
        "weights": [p.detach().double().flatten().tolist() for p in whole],
        "estimate": str(monitor.estimate()),
    }


def run(case: Case) -> dict[str, Any]:
    rank = distributed.get_rank()
    if case.ranks not in (None, distributed.get_world_size()):
        return {"skipped": f"needs {case.ranks} ranks"}
    inner = net(case.dtype)
    monitor = GNSMonitor(inner, on_error="raise", **case.monitor)
    if case.attach_first:
        monitor.attach()
    model = engine(case, inner)
    if case.wrapper:
        monitor = GNSMonitor(model, on_error="raise", **case.monitor)
    if case.monitored and not monitor.attached:
        monitor.attach()
    optimizer = optimizer_of(model, case)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # as Linear does
        for step in range(case.steps):
            count = len(case.sizes(step, rank))
            for micro in range(count):
                with unsynchronised(case, model, micro == count - 1):
                    each = losses(model(rows(case, step, rank, micro)))
                    (each.mean() if case.reduce == "mean" else each.sum() / 10).div(count).backward()
            if case.clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), case.clip)
            optimizer.step()
            optimizer.zero_grad()
            if case.tokens and case.monitored:
                monitor.flush()  # what the ranks' sums verify is known to every rank before the next step
        if case.monitored:
            found = result(monitor, model, caught)
        else:
            whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
            found = {"weights": [p.detach().double().flatten().tolist() for p in whole]}
        monitor.detach()
    return found


def main() -> None:
    out, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    found = {}
    everything = {
        **{name: partial(run, case) for name, case in BY_NAME.items()},
        **REAL,
        **FAULTS,
        **CURVATURE,
    }
    for name in names or everything:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found[name] = everything[name]()
            found[name].setdefault("warnings", [str(w.message) for w in caught])
        except Exception as error:
            traceback.print_exc()
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    (out / f"{distributed.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
