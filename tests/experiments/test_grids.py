"""Presets: what a TOML file expands to, and what is refused with its place."""

import tomllib

import pytest

from experiments import grids
from experiments.configs import RunError

HEAD = 'scale = "smoke"\n[defaults]\nbase = "1m"\ntask = "wordmath"\nn_train = 64\n'


def preset(text):
    return grids.parsed("x", tomllib.loads(HEAD + text), "x.toml")


def seen(text, *names):
    return [tuple(getattr(c, n) for n in names) for c in preset(text).configs]


def test_a_grid_is_all_combinations_in_order():
    got = seen("[grid]\nrank = [2, 4]\nseed = [0, 1]", "rank", "seed")
    assert got == [(2, 0), (2, 1), (4, 0), (4, 1)]


def test_zipped_lists_move_together_and_a_list_in_one_is_a_grid():
    got = seen("[[zip]]\nbatch_size = [1, 4]\nlr = [[0.1, 0.2], [0.2, 0.4]]", "batch_size", "lr")
    assert got == [(1, 0.1), (1, 0.2), (4, 0.2), (4, 0.4)]
    assert seen("[[zip]]\nseed = [0, 1]\ndata_seed = [5, 6]", "seed", "data_seed") == [(0, 5), (1, 6)]


def test_a_cell_replaces_the_grid_and_what_is_zipped():
    text = "[[cells]]\nrank = 2\n[[cells]]\nrank = 4\nlr = [0.5]\nseed = 7\n[grid]\nlr = [0.1, 0.2]\n"
    text += "[[zip]]\nseed = [0]\ndata_seed = [3]"
    assert seen(text, "rank", "lr", "seed", "data_seed") == [(2, 0.1, 0, 3), (2, 0.2, 0, 3), (4, 0.5, 7, 3)]


def test_a_cells_own_zip_replaces_that_of_all_cells():
    text = "[[zip]]\nbatch_size = [1, 2]\nlr = [0.1, 0.2]\n[[cells]]\nrank = 2\n[[cells]]\nrank = 4\n"
    text += "[[cells.zip]]\nbatch_size = [1, 8]\nlr = [0.3, [0.4, 0.5]]"
    got = [(2, 1, 0.1), (2, 2, 0.2), (4, 1, 0.3), (4, 8, 0.4), (4, 8, 0.5)]
    assert seen(text, "rank", "batch_size", "lr") == got
    with pytest.raises(RunError, match=r"\[\[cells\]\] 2, \[\[zip\]\] 1: lists of one length"):
        preset(text.replace("[1, 8]", "[1]"))


def test_dials_are_fields_in_either_spelling():
    configs = preset('dials = {difficulty = 2}\n[grid]\n"dials.label_noise" = [0.0, 0.5]').configs
    assert [dict(c.dials) for c in configs] == [{"difficulty": 2, "label_noise": x} for x in (0.0, 0.5)]
    assert preset("[grid.dials]\nlabel_noise = [0.0, 0.5]").configs[1].dials["label_noise"] == 0.5


def test_starved_cells_are_left_out_and_counted_without_their_seeds():
    text = "[rules]\nleast_steps = 16\n[grid]\nbatch_size = [4, 8, 128]\nseed = [0, 1]"
    assert [c.batch_size for c in preset(text).configs] == [4, 4]
    assert preset(text).starved == 2
    assert preset(text.replace("16", "8")).starved == 1
    # so many steps are made whatever the data
    assert preset(text + '\nprotocol = ["steps"]\nsteps = [4]\n[[exclude]]\nbatch_size = 128').starved == 0


def test_exclusions_match_all_their_fields():
    text = '[grid]\nadapter = ["lora", "full"]\nrank = [2, 4]\n[[exclude]]\nadapter = "full"\nrank = [4, 8]'
    assert seen(text, "adapter", "rank") == [("lora", 2), ("lora", 4), ("full", 2)]


@pytest.mark.parametrize(
    "text, said",
    [
        ("[grids]\nrank = [1]", r"x.toml: unknown key\(s\) grids; known: title"),
        ("[grid]\nranks = [1]", r"x.toml, \[grid\]: unknown field 'ranks'; did you mean 'rank'. Known: "),
        ("[grid]\nrank = 1", r"x.toml, \[grid\]: rank is 1; a list"),
        ("[grid]\nrank = []", r"\[grid\]: rank is \[\]; a list with at least one"),
        ("[grid]\nrank = [2, 4, 2]", r"x.toml: the same run twice \(rank = 2\); remove"),
        ("[[cells]]\nrank = 2\n[[cells]]\nrank = [4, 2]", r"\[\[cells\]\] 2: the same run twice"),
        ("[grid]\nbatch_size = [32, 128]", "x.toml: batch_size 128 is larger than the data: n_train 64"),
        ('[[cells]]\nadapter = "lokr"', r"x.toml, \[\[cells\]\] 1: adapter is 'lokr'"),
        ("[[zip]]\nseed = [0, 1]\nlr = [0.1]", r"\[\[zip\]\] 1: lists of one length.*seed 2, lr 1"),
        ("[[exclude]]\nranks = 2", r"\[\[exclude\]\] 1: unknown field 'ranks'"),
        ("[rules]\nmost_steps = 2", r"\[rules\]: unknown key\(s\) most_steps"),
        ("[rules]\nleast_steps = 0", "least_steps is 0; a whole number"),
        ("[rules]\nleast_steps = 100", r"no run is left \(1 cell\(s\) with fewer than 100 steps\)"),
        ('[grid]\nrank = [1]\n[figures]\nx = 1', "x.toml, figures: unknown x; known: curves, rates"),
        ("dials = 3", r"\[defaults\]: dials is 3; a table"),
        ("lr = [0.1]", r"x.toml, \[defaults\]: lr is \[0.1\]; a list belongs into \[grid\]"),
        ("[cells]\nrank = 2", r"cells is a list of tables, written \[\[cells\]\]"),
    ],
)  # fmt: skip
def test_what_is_no_sweep_is_named_with_its_place(text, said):
    with pytest.raises(RunError, match=said):
        preset(text)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(RunError, match="no preset 'nothing'; known: "):
        grids.load("nothing")
    (tmp_path / "bad.toml").write_text("a = ")
    with pytest.raises(RunError, match="bad.toml: no TOML"):
        grids.load(tmp_path / "bad.toml")
    with pytest.raises(RunError, match="scale is 'huge'; known: smoke, laptop"):
        grids.parsed("x", {"scale": "huge"}, "x.toml")
