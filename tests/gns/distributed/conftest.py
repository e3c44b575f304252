"""One launch a world size: every scenario runs in it, since imports cost more than the scenarios."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gns.distributed.launching import launch


@pytest.fixture(scope="session", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank wrote, scenario by scenario."""
    return launch(tmp_path_factory.mktemp("ranks"), request.param)


@pytest.fixture
def found(ranks: list[dict[str, Any]], request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each rank saw in the scenario that the test is named for."""
    seen = [rank[request.node.originalname.removeprefix("test_")] for rank in ranks]
    assert not any("error" in each for each in seen), seen
    return seen
