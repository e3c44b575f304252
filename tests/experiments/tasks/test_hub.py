import builtins
import json
import sys

import datasets
import pytest

from experiments.configs import RunError
from experiments.tasks import hub, task
from experiments.tasks.hub import for_validation, records

ROWS = [{"query": f"q{i}", "response": "r", "type": "t", "more": i} for i in range(5)]


@pytest.fixture
def source(tmp_path, data):
    """Makes the same records in any format."""

    def make(name):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".parquet":
            datasets.Dataset.from_list(ROWS).to_parquet(path)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        else:
            path.write_text(json.dumps(ROWS))
        return str(path)

    return make


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet"])
def test_every_format_gives_the_same_records(name, source):
    assert list(records(source(name), "train", ("query", "type"))) == ROWS


def test_a_folder_of_files_is_one_source_in_the_order_of_names(source, tmp_path):
    source("folder/b.jsonl"), source("folder/a.jsonl")
    assert list(records(str(tmp_path / "folder"), "train", ("query",))) == ROWS + ROWS


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: str(path / "no.json"), r"no\.json: no such file or folder"),
        (lambda path: "./nowhere", r"\./nowhere: no such file or folder"),
        (lambda path: path / "a.csv", r"a\.csv: of no known format; known: \.json, \.jsonl, \.parquet"),
        (lambda path: path, r"one of \.json, \.jsonl, \.parquet files is needed in it, there is: none"),
        (lambda path: path / "broken.json", r"broken\.json: cannot be read: "),
        (lambda path: path / "other.json", r"no column query, type \(there are a\); needed: query, type"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(make, message, tmp_path, data):
    made = make(tmp_path)
    for name, content in {"a.csv": "a", "broken.json": '{"a": ', "other.json": '[{"a": 1}]'}.items():
        if str(made).endswith(name):
            made.write_text(content)
    with pytest.raises(RunError, match=message) as refused:
        records(str(made), "train", ("query", "type"))
    assert "\n" not in str(refused.value)


def test_a_hub_name_is_loaded_with_its_split_and_config(monkeypatch):
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(records("someone/something-new", "test", ("query",), "main")) == ROWS
    assert asked == [(("someone/something-new", "main"), {"split": "test"})]


def test_without_datasets_only_real_data_is_out_of_reach(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "datasets"]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def without(name, *given, **more):
        if name.partition(".")[0] == "datasets":
            raise ImportError(name)
        return real(name, *given, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RunError, match=r"need the package datasets: pip install .*\[experiments\]"):
        task("metamath-gsm8k", {"data": "nobody/nothing"}).train(1, 0)
    assert task("wordmath", {}).train(1, 0) and task("stdlib", {}).train(1, 0)


def test_a_group_is_held_out_by_what_it_is():
    held_out = [for_validation(f"group {i}") for i in range(5_000)]
    assert sum(held_out) == pytest.approx(5_000 / hub.HELD_OUT_SHARE, abs=38)  # 3.8 standard deviations
    assert held_out == [for_validation(f"group {i}") for i in range(5_000)]


def test_a_data_set_that_does_not_say_what_its_items_are_cannot_be_made():
    class Half(hub.HubRows):
        def _pairs(self):
            return [], []

    with pytest.raises(TypeError, match="abstract methods '?_items'?, '?_tested'?"):
        Half(data="a", test_data="b")
