import pytest

from tests.gns.commands import running


@pytest.fixture
def gns(capsys, monkeypatch, tmp_path):
    """Run a command in an empty folder; give exit code, lines of standard output and of standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: running.run(capsys, *arguments)


@pytest.fixture
def undrawn(monkeypatch):
    """No figures, which take seconds, for tests of what a report says."""
    monkeypatch.setattr("gns.report.drawn", lambda found: [])
