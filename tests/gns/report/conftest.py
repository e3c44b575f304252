import math

import numpy as np
import pytest

from gns.coverage import Coverage
from gns.sums import Layout, StepSums, from_rows

EVIL = '<script>alert("x")</script>'
NAMES = tuple(
    f"base_model.model.layers.{i}.self_attn.{m}.lora_{f}.default.weight"
    for i in range(2)
    for m in ("q_proj", "v_proj")
    for f in "AB"
)


def draw(count: int, n: int, signal: float, *, seed: int = 5, repel: float = 0.0) -> list[StepSums]:
    """Per-example Gaussian gradients with tr Σ = 1 and |G|² = `signal`.

    With `repel` the examples of a step avoid each other, which drives the estimate of |G|² below zero.
    """
    rng, layout = np.random.default_rng(seed), Layout(NAMES)
    shape = (len(NAMES), 40)
    mean = math.sqrt(signal / math.prod(shape))
    steps = []
    for i in range(count):
        g = mean + rng.normal(size=(n, *shape)) / math.sqrt(math.prod(shape))
        g -= repel * (g.mean(0) - mean)
        rows = np.stack([(g**2).sum(2).mean(0), (g.mean(0) ** 2).sum(1)], axis=1).astype(np.float32)
        steps.append(from_rows(rows, layout, step=i, n_examples=n, n_tokens=100 * n, learning_rate=2e-4))
    return steps


def texts(figure) -> str:
    """All that is written on a figure."""
    found = [
        t.get_text() for ax in figure.axes for t in (ax.xaxis.label, ax.yaxis.label, ax.title, *ax.texts)
    ]
    found += [t.get_text() for ax in figure.axes for t in (*ax.get_yticklabels(), *ax.get_xticklabels())]
    found += [ax.get_title(loc="left") for ax in figure.axes]
    legends = [*figure.legends, *(ax.get_legend() for ax in figure.axes if ax.get_legend())]
    return "\n".join(found + [t.get_text() for legend in legends for t in legend.get_texts()])


@pytest.fixture(scope="session")
def runs() -> dict[str, list[StepSums]]:
    """One run for each status, and runs without a usable step."""
    overflow = StepSums(step=30, n_examples=16, mean_sq_norm=math.inf, sq_norm_of_mean=1.0)
    alone = StepSums(step=0, n_examples=1, mean_sq_norm=1.0, sq_norm_of_mean=1.0)
    measured = draw(60, 16, 1 / 50)
    return {
        "measured": [*measured[:30], overflow, *measured[31:]],
        "lower bound": draw(40, 8, 1 / 2000, seed=1),
        "not detectable": draw(40, 8, 0.0, repel=0.1),
        "collecting": draw(9, 16, 1 / 50),
        "skipped": [alone],
        "empty": [],
    }


def covered() -> Coverage:
    """Most parameters measured, one with a hostile name left out."""
    return Coverage(dict.fromkeys(NAMES, 40), {f"model.{EVIL}": 80}, {f"model.{EVIL}": f"no rule {EVIL}"})


@pytest.fixture
def coverage() -> Coverage:
    """The same, as a fixture."""
    return covered()
