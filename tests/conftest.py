"""Shared by all tests: hypothesis draws the same examples on every run and prints how to repeat a failure."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

# before anything imports torch, and for subprocesses: on small tensors a second thread costs more than it
# gives, ten times over when two processes share two cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

# a shell that starts the tests in the background lets them ignore Ctrl-C, which some tests send themselves
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "tests",
    derandomize=True,  # the seed is the test's own source: fixed
    database=None,
    deadline=None,
    print_blob=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("tests")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Seed torch's global generator with a number that a failure shows as `seed`."""
    import torch

    value = getattr(request, "param", 20_260_212)
    torch.manual_seed(value)
    return value
