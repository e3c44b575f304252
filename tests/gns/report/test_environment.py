import platform
import subprocess
import sys
from importlib.metadata import version

import numpy

import gns
from gns.report.environment import environment


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def test_versions_of_what_is_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", numpy)  # imported, but not installed as a package
    monkeypatch.delitem(sys.modules, "trl", raising=False)
    versions = environment()["versions"]
    assert versions["python"] == platform.python_version()
    assert versions["gradient-noise-scale"] == gns.__version__
    assert versions["numpy"] == version("numpy")
    assert versions["bitsandbytes"] == numpy.__version__ and "trl" not in versions


def test_commit_of_the_working_directory_and_whether_it_was_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert "commit" not in environment()
    git(tmp_path, "init")
    assert "commit" not in environment()  # nothing committed yet
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "x")
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert environment()["commit"] == head[:12]
    (tmp_path / "untracked").write_text("2")
    assert environment()["commit"] == head[:12]
    (tmp_path / "a").write_text("2")
    assert environment()["commit"] == f"{head[:12]} with uncommitted changes"


def test_no_git_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert set(environment()) == {"versions"}


def test_a_git_that_hangs_does_not_hang_the_report(monkeypatch):
    def hang(*command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    assert "commit" not in environment()
