import pytest

from experiments import prepared, tasks
from tests.experiments.small_runs import Sentences
from tests.gns import tiny


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """Folder of a tiny base and its tokenizer."""
    return str(tiny.save_model(tmp_path_factory.mktemp("base")))


@pytest.fixture
def sentences(monkeypatch):
    """Make the task of `small_runs` known."""
    monkeypatch.setitem(tasks._KINDS, "sentences", Sentences)
    prepared._data.cache_clear()
    yield
    prepared._data.cache_clear()
