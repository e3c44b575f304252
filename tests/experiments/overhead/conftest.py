"""A shape so small that a step takes milliseconds."""

import pytest

from experiments.overhead.settings import SHAPES, Shape


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", Shape(vocab=61, width=32, inner=48, layers=2, heads=4, kv_heads=2))
