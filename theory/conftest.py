"""Shared by the theorems' tests: the ledger of Monte Carlo comparisons, printed at the end of the run."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from scipy import stats

from theory.verdict import COMPARISONS, Comparison, Estimate, alarm_level, z_bound

settings.register_profile(
    "theory",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("theory")

_LEDGER: list[str] = []


def _book(row: str) -> None:
    _LEDGER.append(row)
    if len(_LEDGER) > COMPARISONS:
        raise AssertionError(f"more than {COMPARISONS} comparisons: the family-wise rate no longer holds")


@pytest.fixture
def agree() -> Callable[[str, Estimate, float], None]:
    """Assert that a simulated mean agrees with its exact value, at the suite's false-alarm rate."""

    def check(name: str, estimate: Estimate, truth: float) -> None:
        row = Comparison(name, estimate, truth)
        _book(str(row))
        assert estimate.agrees(truth), f"|z| > {z_bound():.2f}: {row}"

    return check


@pytest.fixture
def caught() -> Callable[[str, Estimate, float], None]:
    """Assert that a broken formula or a broken simulation is rejected at the sample size used."""

    def check(name: str, estimate: Estimate, wrong: float) -> None:
        assert np.isfinite([estimate.value, estimate.se, wrong]).all(), (
            f"a control must fail by a number: {name}"
        )
        row = Comparison(f"[control] {name}", estimate, wrong)
        _LEDGER.append(str(row))
        assert not estimate.agrees(wrong), f"a broken control got through: {row}"

    return check


@pytest.fixture
def record() -> Callable[[str, np.ndarray, float], float]:
    """The share of hits, put on the ledger beside its nominal value; the test states its own bounds."""

    def book(name: str, hits: np.ndarray, nominal: float) -> float:
        rate = float(np.mean(hits))
        se = float(np.sqrt(nominal * (1 - nominal) / hits.size))
        _book(str(Comparison(f"[rate] {name}", Estimate(rate, se, hits.size), nominal)))
        return rate

    return book


@pytest.fixture
def same_law() -> Callable[[str, np.ndarray, Callable[[np.ndarray], np.ndarray]], None]:
    """Assert by Kolmogorov-Smirnov that a sample follows a distribution function."""

    def check(name: str, sample: np.ndarray, cdf: Callable[[np.ndarray], np.ndarray]) -> None:
        result = stats.kstest(sample, cdf)
        bound = float(stats.kstwo.isf(alarm_level(), sample.size))
        _book(f"{name:<58.58} KS distance {result.statistic:.5f}, bound {bound:.5f}  n {sample.size:>8}")
        assert result.statistic <= bound, (
            f"{name}: KS {result.statistic:.5f} > {bound:.5f}, n = {sample.size}"
        )

    return check


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print every Monte Carlo comparison with the smallest bias it would have caught."""
    if _LEDGER:
        terminalreporter.section("theory: simulation against formula")
        terminalreporter.line(
            f"bound |z| <= {z_bound():.2f} from one family-wise false-alarm rate; "
            "'catches' is the smallest relative bias seen with probability 0.95"
        )
        for row in _LEDGER:
            terminalreporter.line(row)
