import doctest

import pytest

from gns.report import places
from gns.report.places import Place, block_labels, place_of, short_names, short_paths


def test_the_examples_run():
    failed, attempted = doctest.testmod(places)
    assert attempted >= 4 and failed == 0


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("transformer.h.11.attn.c_attn", Place("transformer.h", 11, "attn.c_attn")),
        ("model.layers.0.mlp.experts.7.up_proj", Place("model.layers", 0, "mlp.experts.7.up_proj")),
        ("0.weight", Place("", 0, "weight")),
        ("model.layers.2", Place("model.layers", 2, "")),
        ("lm_head", None),
        ("", None),
    ],
)
def test_the_first_number_is_the_depth(path, place):
    assert place_of(path) == place


def test_names_are_shortened_only_as_far_as_they_stay_apart():
    names = ["attn.q", "cross.q", "mlp.up"]
    assert short_names(names) == {"attn.q": "attn.q", "cross.q": "cross.q", "mlp.up": "mlp.up"}
    assert short_names([]) == {} and short_names(["a.b"]) == {"a.b": "b"}
    assert short_names(["q", "a.q"]) == {"q": "q", "a.q": "a.q"}


def test_blocks_of_several_stacks_carry_its_name():
    one = [Place("model.layers", i, "q") for i in (0, 1, 0)]
    assert block_labels(one) == {("model.layers", 0): "0", ("model.layers", 1): "1"}
    two = [Place("encoder.block", 0, "q"), Place("decoder.block", 0, "q")]
    assert list(block_labels(two).values()) == ["encoder.block 0", "decoder.block 0"]


def test_folders_of_one_name_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert short_paths(["x/run.1", "y/run.1"]) == {"x/run.1": "x/run.1", "y/run.1": "y/run.1"}
    assert short_paths(["x/a.1", str(tmp_path / "b")]) == {"x/a.1": "a.1", str(tmp_path / "b"): "b"}
