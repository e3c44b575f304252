"""Which runs are executed together, and how: the one place where a sweep meets what trains.

A sweep takes `companions` and `execute` from a module by name, so that a test can give another one, and calls
them by `accompanied` and `executed`: an engine that breaks must not stop the runs after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.configs import RunConfig
from experiments.rowsfile import Row


def companions(
    config: RunConfig, waiting: Sequence[RunConfig], device: str | None, most: int
) -> list[RunConfig]:
    """Choose the runs that pay when they are executed in one program with a run.

    Those that see the same examples come first: their rows have the same lengths, so nothing is padded for
    another's sake.

    Args:
        config: run that was claimed.
        waiting: others that could be.
        device: to run on; None: the best there is.
        most: companions; the others are left to other workers, and no program for them is timed.

    Returns:
        None of them, where the machine is saturated by one run, or the run's engine is another.
    """
    if config.engine not in ("auto", "packed"):
        return []
    from experiments import packed  # torch: not needed to list or merge

    alike = [other for other in waiting if packed.packable(config, other)]
    alike.sort(key=lambda other: _data(other) != _data(config))
    slots = min(most, len(alike)) + 1
    return alike[: packed.best_width(config, device, slots) - 1] if slots > 1 else []


def _data(config: RunConfig) -> tuple[Any, ...]:
    return config.data_seed, config.n_train, sorted(config.dials.items())


def execute(configs: Sequence[RunConfig], device: str | None) -> list[dict[str, Any]]:
    """Execute one run, or several in one program; give their rows in order.

    Raises:
        KeyboardInterrupt: someone wants to stop; no row is given.
    """
    if len(configs) > 1:
        from experiments import packed

        return packed.run_packed(configs, device=device)
    from experiments import run

    return [run.run(config, device=device) for config in configs]


def accompanied(
    engine: Any, config: RunConfig, waiting: Sequence[RunConfig], device: str | None, most: int
) -> list[RunConfig]:
    """Ask an engine for a run's companions; none where it cannot tell: what is wrong, the run's row will say.

    Args:
        engine: module with `companions`.
        config: as of `companions`.
        waiting: as of `companions`.
        device: as of `companions`.
        most: as of `companions`.
    """
    try:
        return engine.companions(config, waiting, device, most)
    except Exception:
        return []


def executed(engine: Any, configs: Sequence[RunConfig], device: str | None) -> list[Row]:
    """Let an engine execute runs; whatever goes wrong inside of it is a row too.

    Args:
        engine: module with `execute`.
        configs: as of `execute`.
        device: as of `execute`.
    """
    try:
        return engine.execute(configs, device)
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}"
        return [
            {"hash": c.hash, "config": c.to_dict(), "status": "failed", "error": said, "seconds": None}
            for c in configs
        ]
