"""The folder of a fine-tuning run: whose it is, how it was started, where it can be resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path

from gns.finetuning.preparation import ConfigError, FinetuneConfig
from gns.records import STEPS, read_steps, write_atomically

RUN, CHECKPOINTS, ADAPTER = "run.json", "checkpoints", "adapter"
_FORMAT = {"format": "gns-run", "version": 1}


def refuse_used(out: Path) -> None:
    """Let pass only a folder that is empty or not there.

    Raises:
        ConfigError: it holds something, and nothing of the user's shall be lost.
    """
    if out.is_dir() and any(out.iterdir()):
        held = "another run" if (out / RUN).exists() or (out / STEPS).exists() else "files"
        raise ConfigError(f"{out}: holds {held}; give another, or resume an interrupted run with --resume")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; a folder is needed")


def read_config(out: str | Path) -> FinetuneConfig:
    """Read the configuration that a run was started with.

    Raises:
        ConfigError: there is no run in `out`, or its run.json is damaged.
    """
    path = Path(out) / RUN
    if not path.is_file():
        raise ConfigError(f"{out}: holds no {RUN}; a folder that `gns measure` or `gns demo` wrote is needed")
    try:
        data = json.loads(path.read_bytes())
        if {name: data.pop(name) for name in _FORMAT} == _FORMAT:
            return FinetuneConfig(**data)
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise ConfigError(f"{path}: damaged or foreign; the run cannot be resumed")


def resumable(out: Path, config: FinetuneConfig) -> Path | None:
    """Find the last whole checkpoint of the run in `out`; None if it had not come to one.

    Raises:
        ConfigError: it is no run, or one with another configuration.
    """
    started = read_config(out)
    for field in fields(config):
        was, now = getattr(started, field.name), getattr(config, field.name)
        if was != now:
            raise ConfigError(
                f"{out}: was started with {field.name} {was}, not {now}; a resumed run keeps it"
            )
    found = [path for path in (out / CHECKPOINTS).glob("checkpoint-*") if _is_whole(path)]
    return max(found, key=steps_of, default=None)


def steps_of(checkpoint: Path) -> int:
    """Optimizer steps before a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the Trainer's state comes last."""
    try:
        return json.loads((checkpoint / "trainer_state.json").read_bytes())["global_step"] == steps_of(
            checkpoint
        )
    except (OSError, ValueError, KeyError):
        return False


def write_config(out: Path, config: FinetuneConfig) -> None:
    """Write how the run was started."""
    write_atomically(out / RUN, [json.dumps({**_FORMAT, **asdict(config)}, indent=1).encode() + b"\n"])


@contextmanager
def claimed(out: Path) -> Generator[None]:
    """Make the folder; take away what was made if the run ends in an error before its first reading.

    Raises:
        ConfigError: the folder cannot be made.
    """
    made = [path for path in (out, *out.parents) if not path.exists()]
    new = bool(made) or not any(out.iterdir())
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be made: {error.strerror}") from None
    try:
        yield
    except BaseException:
        if new and not _has_readings(out):
            shutil.rmtree(out)
            for path in made[1:]:
                with suppress(OSError):  # somebody else has put something there
                    path.rmdir()
            if not made:
                out.mkdir()
        raise


def _has_readings(out: Path) -> bool:
    return (out / STEPS).exists() and len(read_steps(out / STEPS, strict=False)) > 0
