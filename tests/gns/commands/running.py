"""Run a command of the command line in a test, and recorded steps to run it on."""

from __future__ import annotations

from pathlib import Path

import pytest

from gns.cli import main
from gns.records import STEPS, write_steps
from gns.sums import StepSums


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str], list[str]]:
    """Give exit code, lines of standard output and of standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return end.value.code, said.out.splitlines(), said.err.splitlines()


def of(b: float, n: int = 16, *, count: int = 40, tokens: int | None = None) -> list[StepSums]:
    """Forty noiseless-looking steps of noise scale `b`."""
    return [
        StepSums(
            step=i,
            n_examples=n,
            n_tokens=tokens and tokens * n,
            mean_sq_norm=b + 1 + 0.1 * (i % 3),
            sq_norm_of_mean=b / n + 1 + 0.05 * (i % 4),
            learning_rate=1e-3,
        )
        for i in range(count)
    ]


def recorded(folder: Path, steps: list[StepSums]) -> Path:
    """Write steps as a run's folder."""
    folder.mkdir()
    write_steps(folder / STEPS, steps)
    return folder
