import pytest

from experiments.bases import base_path, paths
from experiments.configs import RunError
from gns.corpus import base_model_path


def test_the_demo_base_is_the_packages():
    assert base_path("1m") == base_model_path()


def test_shipped_comes_before_made(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(paths, "MADE", tmp_path / "made")
    for folder in (tmp_path / "made" / "math-1m", tmp_path / "shipped" / "math-1m"):
        with pytest.raises(
            RunError, match="base math-25m: no model.safetensors in .*experiments.bases math-25m"
        ):
            base_path("math-25m")
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
        assert base_path("math-1m") == folder


def test_folders_and_hub_names_pass(tmp_path):
    assert base_path(str(tmp_path)) == tmp_path
    assert base_path("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert base_path("gpt2") == "gpt2"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "base ./nowhere: no such folder; known rows: 1m, 25m"),
        ("a/b/c", "base a/b/c: no such folder"),
        ("math-1M", "no base 'math-1M'; known rows: .*math-1m"),
        ("maths-1m", "no base 'maths-1m'; known rows"),
    ],
)
def test_what_is_not_there_is_named(name, message):
    with pytest.raises(RunError, match=message):
        base_path(name)


@pytest.mark.parametrize(("name", "n"), [("math-200k", 254_400), ("math-1m", 1_053_824), ("1m", 1_053_824)])
def test_parameters_of_a_shipped_model_are_counted(name, n):
    assert paths.parameters(name) == n


def test_parameters_of_a_model_that_is_not_here_are_those_of_its_name(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "MADE", tmp_path)
    assert paths.parameters("25m") == 25_000_000
    with pytest.raises(RunError, match="base 'some/model': no training.json, and no size such as 25m"):
        paths.parameters("some/model")
