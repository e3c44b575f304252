import pytest

from experiments.configs import RunError
from experiments.tasks import task
from experiments.tasks.items import PARTS, part_of
from experiments.tasks.stdlib import pieces
from gns import corpus


def texts(items):
    return [item.response for item in items]


def test_no_piece_and_no_file_is_in_two_splits():
    found = pieces()
    everything = [piece for part in found.values() for piece in part]
    assert len(everything) == len(set(everything))
    own = {part: set() for part in PARTS}
    for document in corpus.documents("held_out"):
        own[part_of(document.name)].update(corpus.cut(document))
    assert all(found[part] and set(found[part]) <= own[part] for part in PARTS)
    # none is lost
    assert set(everything) == {p for part in own.values() for p in part if len(p) >= corpus.SHORTEST_EXAMPLE}


def test_rows_are_nested_shuffled_by_seed_and_learned_whole():
    stdlib = task("stdlib", {})
    rows = stdlib.train(50, 0)
    assert stdlib.train(20, 0) == rows[:20]
    assert texts(rows) != texts(stdlib.train(50, 1))
    assert set(texts(stdlib.train(len(pieces()["train"]), 1))) == set(pieces()["train"])
    assert {(item.prompt, item.answer) for item in rows} == {("", None)}
    assert len({item.response for item in rows}) == 50


def test_held_out_items():
    stdlib = task("stdlib", {"merged": 2, "copies": 2})
    validation, test = stdlib.held_out("validation", 40), stdlib.held_out("test", 40)
    assert validation == task("stdlib", {}).held_out("validation", 60)[:40]
    assert set(texts(validation)) <= set(pieces()["validation"]) and set(texts(test)) <= set(pieces()["test"])
    assert not stdlib.right(test[0], test[0].response)


def test_more_than_there_is():
    n = len(pieces()["train"])
    with pytest.raises(RunError, match=f"training part of stdlib has {n} items; {n + 1} are asked for"):
        task("stdlib", {}).train(n + 1, 0)
    assert len(task("stdlib", {"copies": 3}).train(n + 1, 0)) == n + 1
    with pytest.raises(RunError, match="validation part of stdlib has"):
        task("stdlib", {}).held_out("validation", 10**6)
