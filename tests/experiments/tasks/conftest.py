"""Small files in the published schemas of the real data sets, written for these tests."""

from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"


@pytest.fixture
def data(tmp_path, monkeypatch):
    """The folder of the files; what `datasets` makes of them goes into a folder of the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return DATA
