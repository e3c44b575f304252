"""`python -m experiments.branches --config run.json --at 64 --multiples 1 2 4 8`: go on at larger batches.

One run, the trunk, is made up to a point; from its weights and optimizer state branches go on over the same
next examples, with k times the batch and a rescaled learning rate: √k times with AdamW, k times with SGD. How
much loss a larger batch costs is what `experiments.critical.branched` reads.

The branch at the trunk's own batch is the trunk going on, with its random numbers (of dropout; there are no
others). Every other branch has a stream of its own, from the seed and its k: it must not depend on which
branches were made before it, and masks that branches share would hide a part of what differs between them.

Source: Merrill et al. 2025, arXiv:2505.23971.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from experiments import loop
from experiments.configs import RunConfig, RunError
from experiments.course import DIVERGED
from experiments.critical import branched
from experiments.order import epoch_batches
from experiments.outcome import device_name, header, one_line
from experiments.prepared import Prepared, device_of, prepare
from experiments.rowsfile import append, finite
from experiments.seeding import seeded

POWERS = {"adamw": 0.5, "sgd": 1.0}  # of k, in the learning rate


class State(NamedTuple):
    """What a branch starts from.

    Args:
        weights: of the trainable parameters.
        optimizer: its state.
        random: of the generator that dropout draws from.
    """

    weights: list[torch.Tensor]
    optimizer: dict[str, Any]
    random: torch.Tensor


def branch_runs(
    config: RunConfig, at: int, examples: int, multiples: Sequence[int], device: str | None = None
) -> list[dict[str, Any]]:
    """Make a trunk and its branches.

    Args:
        config: of the trunk; its learning rate is constant, its data are passed through once.
        at: steps of the trunk before the branches.
        examples: that each branch goes on for, the next ones of the same order.
        multiples: k of each branch; 1 belongs to them.
        device: of torch; None: an accelerator if there is one.

    Returns:
        A row a branch: as of `experiments.run`, without its results, but with "branch" (multiple, batch_size,
        lr, at_step, at_examples, examples), "trunk_loss" at the branching point and "loss" at its own end,
        both on the validation split, nats per token. What goes wrong is "failed" in the rows.
    """
    rows, started = [_begun(config, at, examples, k) for k in multiples], time.monotonic()
    try:
        _check(config, at, examples, multiples)
        where = device_of(device)
        with seeded(config.seed, where):
            found = _made(prepare(config, where), at, [row["branch"] for row in rows])
        rows = [row | {"device": device_name(where)} | each for row, each in zip(rows, found, strict=True)]
    except (Exception, SystemExit) as error:
        rows = [row | {"status": "failed", "error": one_line(error)} for row in rows]
    seconds = round((time.monotonic() - started) / max(1, len(rows)), 3)
    return [finite(row | {"seconds": seconds}) for row in rows]


def _begun(config: RunConfig, at: int, examples: int, multiple: int) -> dict[str, Any]:
    """Begin the row of a branch."""
    about = {"multiple": multiple, "batch_size": multiple * config.batch_size}
    about |= {"lr": config.lr * multiple ** POWERS[config.optimizer]}
    about |= {"at_step": at, "at_examples": at * config.batch_size, "examples": examples}
    kept = (
        "hash",
        "config",
        "status",
        "error",
        "commit",
        "versions",
        "device",
        "engine",
        "threads",
        "started",
    )
    begun = header(config, "loop")
    row = {name: begun[name] for name in kept}
    return row | {"hash": f"{config.hash}-{at}-{examples}-{multiple}", "branch": about, "loss": None}


def _check(config: RunConfig, at: int, examples: int, multiples: Sequence[int]) -> None:
    """Refuse what cannot be branched.

    Raises:
        RunError: the data do not suffice, or the branches do not end together.
    """
    if config.schedule != "constant" or config.warmup:
        raise RunError(
            f"schedule is {config.schedule!r}, warmup {config.warmup}; a branch needs constant, and 0"
        )
    needed = at * config.batch_size + examples
    if needed > config.n_train:
        raise RunError(
            f"{needed} examples are needed, n_train is {config.n_train}; branch earlier or take more"
        )
    for k in multiples:
        if k < 1 or examples % (k * config.batch_size):
            raise RunError(
                f"examples is {examples}; a multiple of {k} × {config.batch_size}, branch by branch"
            )


def _made(prepared: Prepared, at: int, branches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make the trunk, keep its state, and each branch from there."""
    config = prepared.config
    prepared.model.train()
    start = prepared.validation_loss()
    torch.manual_seed(config.seed)  # of the dropout, as in `experiments.run`
    trunk = epoch_batches(config.n_train, config.batch_size, config.data_seed, 0)[:at]
    optimizer = loop.optimizer_of(prepared.trainable, config)
    if not all(math.isfinite(loop.step(prepared, optimizer, numbers, config.lr)) for numbers in trunk):
        raise RunError(f"the trunk diverged before step {at}; take a smaller learning rate")
    state = _state(prepared, optimizer)
    before = prepared.validation_loss()
    return [{"trunk_loss": before} | _branch(prepared, state, about, DIVERGED * start) for about in branches]


def _state(prepared: Prepared, optimizer: torch.optim.Optimizer) -> State:
    """Copy what a branch starts from."""
    weights = [p.detach().clone() for p in prepared.trainable]
    return State(weights, copy.deepcopy(optimizer.state_dict()), _generator(prepared.device).get_state())


def _generator(device: torch.device) -> torch.Generator:
    """Give the generator that dropout draws from on a device."""
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[device.index or 0]


def _seed_branch(prepared: Prepared, state: State, multiple: int) -> None:
    """Let dropout go on where the trunk's stopped, or for a larger batch in a stream of its own."""
    if multiple == 1:
        _generator(prepared.device).set_state(state.random)
        return
    own = np.random.SeedSequence([prepared.config.seed, multiple]).generate_state(1, np.uint64)
    torch.manual_seed(int(own[0]))


def _branch(prepared: Prepared, state: State, about: dict[str, Any], limit: float) -> dict[str, Any]:
    """Go on from a state over the examples after it; "diverged": not finite, or above `limit` at the end."""
    _seed_branch(prepared, state, about["multiple"])
    config = replace(prepared.config, batch_size=about["batch_size"])
    with torch.no_grad():
        for parameter, kept in zip(prepared.trainable, state.weights, strict=True):
            parameter.copy_(kept)
    optimizer = loop.optimizer_of(prepared.trainable, config)
    fresh = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(copy.deepcopy(state.optimizer))
    for group, own in zip(optimizer.param_groups, fresh, strict=True):
        if "betas" in own:  # β₂ may follow the batch
            _carry_over(optimizer, group, own["betas"])
    first, last = about["at_examples"], about["at_examples"] + about["examples"]
    (order,) = epoch_batches(config.n_train, config.n_train, config.data_seed, 0)
    size = about["batch_size"]
    for at in range(first, last, size):
        if not math.isfinite(loop.step(prepared, optimizer, order[at : at + size], about["lr"])):
            return {"status": "diverged", "loss": None}
    loss = prepared.validation_loss()
    fine = math.isfinite(loss) and loss <= limit
    return {"status": "done" if fine else "diverged", "loss": loss}


def _carry_over(optimizer: torch.optim.Optimizer, group: dict[str, Any], betas: tuple[float, float]) -> None:
    """Change β₂ of moments that are under way: what was stored is scaled, so that v̂ = v/(1 − β₂ᵗ) stays."""
    old, new = group["betas"][1], betas[1]
    group["betas"] = betas
    for parameter in group["params"]:
        state = optimizer.state[parameter]
        t = float(state["step"])
        state["exp_avg_sq"].mul_((1 - new**t) / (1 - old**t))


def main(arguments: Sequence[str] | None = None) -> int:
    """Make branches for each seed, write their rows, say the critical batch size; 1 where a row failed."""
    asked = argparse.ArgumentParser(prog="python -m experiments.branches", description=__doc__)
    asked.add_argument("--config", required=True, help="JSON of the trunk's RunConfig, or a file with it")
    asked.add_argument("--at", type=int, required=True, help="steps of the trunk")
    asked.add_argument("--examples", type=int, help="of a branch (default: 16 steps at the least)")
    asked.add_argument("--multiples", type=int, nargs="+", default=[1, 2, 4, 8])
    asked.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    asked.add_argument("--out", type=Path, help="file of JSON lines that the rows are added to")
    asked.add_argument("--device", help="of torch (default: an accelerator if there is one)")
    given = asked.parse_args(arguments)
    if 1 not in given.multiples:
        asked.error("--multiples without 1: the branch at the trunk's own batch is what others are held to")
    text = given.config if given.config.lstrip().startswith("{") else Path(given.config).read_text()
    try:
        config = RunConfig.of({"schedule": "constant"} | json.loads(text))
    except (RunError, json.JSONDecodeError) as error:
        asked.error(f"--config: {error}")
    examples = given.examples or 16 * math.lcm(*given.multiples) * config.batch_size
    rows: list[dict[str, Any]] = []
    for seed in given.seeds:
        made = branch_runs(
            replace(config, seed=seed, data_seed=seed), given.at, examples, given.multiples, given.device
        )
        rows += made
        if given.out is not None:
            append(given.out, made)
        for row in made:
            print(f"seed {seed}, batch {row['branch']['batch_size']}: {row['error'] or row['loss']}")
    if any(row["status"] == "failed" for row in rows):
        return 1
    found = branched(rows)
    print(f"within 0.01 nat up to batch {found.value:.3g} ({found.low:.3g} … {found.high:.3g}) {found.note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
