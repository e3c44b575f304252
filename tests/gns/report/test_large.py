"""A report of a long run of a large model stays small."""

import numpy as np
import pytest

from gns.report import write_report
from gns.sums import Layout, from_rows

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def large(n_layers: int, n_steps: int, *, seed: int = 0) -> list:
    """Steps of a LoRA model whose layers differ; each parameter's noise has 60 directions."""
    rng = np.random.default_rng(seed)
    names = [
        f"base_model.model.model.layers.{i}.{m}.lora_{f}.default.weight"
        for i in range(n_layers)
        for m in PROJECTIONS
        for f in "AB"
    ]
    layout, n = Layout(tuple(names)), 16
    signal = np.exp(rng.normal(size=len(names))) / 150 / len(names)
    trace = np.full(len(names), 1 / len(names))
    steps = []
    for k in range(n_steps):
        noise = trace / n * rng.chisquare(60, size=len(names)) / 60
        cross = 2 * np.sqrt(signal * trace / n / 60) * rng.normal(size=len(names))
        rows = np.stack([trace + signal, signal + noise + cross], axis=1).astype(np.float32)
        steps.append(from_rows(rows, layout, step=k, n_examples=n, n_tokens=180 * n, learning_rate=2e-4))
    return steps


@pytest.mark.slow  # its figures take ten seconds; on small models each is drawn in `test_write.py`
def test_the_page_of_448_parameters_stays_below_three_megabytes(tmp_path):
    path = write_report(tmp_path, large(32, 60))
    assert path.stat().st_size < 3e6
    assert (tmp_path / "modules.png").exists() and (tmp_path / "depth.png").exists()


@pytest.mark.slow
def test_the_page_of_two_thousand_steps_stays_below_three_megabytes(tmp_path):
    assert write_report(tmp_path, large(32, 2000)).stat().st_size < 3e6
