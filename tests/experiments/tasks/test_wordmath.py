import re
from random import Random

import pytest
import scipy.stats

from experiments.configs import RunError
from experiments.tasks import task
from experiments.tasks.items import PARTS, part_of
from experiments.tasks.stories import LARGEST, Chain, draw_chain, tell

DIALS = [
    {},
    {"label_noise": 0.5},
    {"merged": 3},
    {"copies": 2},
    {"difficulty": 2, "merged": 2, "copies": 2, "label_noise": 1.0},
]
LINE = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


def singles(rows):
    return [part for row in rows for part in (*row.before, row)]


def calculation(item):
    """Numbers and signs of a problem, from its worked solution, in which noise changes results only."""
    steps = LINE.findall(item.response)
    return " ".join([steps[0][0], *(f"{sign} {n}" for _, sign, n, _ in steps)])


def true_answer(item):
    value, *steps = re.findall(r"\d+|[-+*/]", calculation(item))
    value = int(value)
    for sign, n in zip(steps[::2], steps[1::2], strict=True):
        value = eval(f"{value} {'//' if sign == '/' else sign} {n}")
    return value


GOLDEN = (
    "Question: In the morning Jamal owns 69 shells. On the way 2 shells get lost. "
    "On the way 35 shells get lost. What number of shells remains?\n",
    "69 - 2 = 67\n67 - 35 = 32\n#### 32",
    "32",
)


def test_one_item_word_for_word():
    """The same on every Python: a golden item of a fixed seed."""
    (item,) = task("wordmath", {"difficulty": 2}).train(1, 0)
    assert (item.prompt, item.response, item.answer) == GOLDEN


@pytest.mark.parametrize("difficulty", [1, 2, 4, 8])
def test_clean_items_are_right_and_as_long_as_asked(difficulty):
    wordmath = task("wordmath", {"difficulty": difficulty})
    for item in wordmath.train(200, 3) + wordmath.held_out("test", 50):
        lines = LINE.findall(item.response)
        assert len(lines) == difficulty
        assert item.answer == str(true_answer(item)) == lines[-1][3]
        for value, sign, n, result in lines:
            assert int(result) == eval(f"{value} {'//' if sign == '/' else sign} {n}"), item.response
            assert sign != "/" or int(value) % int(n) == 0
        assert all(1 <= int(number) <= LARGEST for number in re.findall(r"\d+", item.response))
        # the story says the numbers of the calculation, in its order
        assert re.findall(r"\d+", item.prompt) == re.findall(r"\d+", calculation(item))
        assert wordmath.right(item, item.response)


@pytest.mark.parametrize("dials", DIALS, ids=str)
def test_training_sets_are_nested_and_of_the_size_asked(dials):
    wordmath = task("wordmath", dials)
    rows = wordmath.train(20, 1)
    assert len(rows) == 20
    assert [wordmath.train(n, 1) for n in (1, 7, 12)] == [rows[:1], rows[:7], rows[:12]]
    assert not {item.prompt for item in singles(rows)} & {i.prompt for i in singles(wordmath.train(20, 2))}


def test_splits_are_disjoint_at_all_dials():
    learned = {
        calculation(item)
        for dials in [*DIALS, *({"difficulty": d} for d in (2, 3))]
        for seed in (0, 1)
        for item in singles(task("wordmath", dials).train(500, seed))
    }
    held_out = {
        split: {
            calculation(item)
            for d in (1, 2, 3)
            for item in task("wordmath", {"difficulty": d}).held_out(split, 200)
        }
        for split in ("validation", "test")
    }
    assert not learned & held_out["validation"]
    assert not learned & held_out["test"]
    assert not held_out["validation"] & held_out["test"]
    # and the same draws without the rule would overlap: at one step calculations are few
    rng = Random(0)
    free = [{draw_chain(1, rng).key for _ in range(500)} for _ in range(2)]
    assert free[0] & free[1]


def test_a_part_is_a_property_of_the_calculation():
    rng = Random(0)
    chains = [draw_chain(2, rng) for _ in range(4_000)]
    counts = {part: sum(part_of(chain.key) == part for chain in chains) for part in set(PARTS)}
    assert counts["validation"] == pytest.approx(500, abs=80)  # 3.8 standard deviations
    assert counts["test"] == pytest.approx(500, abs=80)
    chain = Chain(7, (("+", 5), ("*", 2)))
    assert chain.key == "7 + 5 * 2" and chain.results() == [12, 24]
    assert {tell(chain, Random(i)) for i in range(9)} != {tell(chain, Random(0))}


@pytest.mark.parametrize("dials", DIALS, ids=str)
def test_held_out_items_are_single_clean_and_the_same_whatever_the_dials(dials):
    difficulty = dials.get("difficulty", 1)
    plain = task("wordmath", {"difficulty": difficulty}).held_out("test", 30)
    assert task("wordmath", dials).held_out("test", 30) == plain
    assert task("wordmath", dials).held_out("test", 10) == plain[:10]
    assert len({item.prompt for item in plain}) == 30
    assert all(item.before == () and item.answer == str(true_answer(item)) for item in plain)


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_label_noise_is_the_share_of_wrong_items(share):
    n = 400
    rows = task("wordmath", {"label_noise": share}).train(n, 0)
    clean = task("wordmath", {}).train(n, 0)
    wrong = [item.answer != str(true_answer(item)) for item in rows]
    assert sum(wrong) / n == pytest.approx(share, abs=3.5 * (share * (1 - share) / n) ** 0.5)
    for row, truth, is_wrong in zip(rows, clean, wrong, strict=True):
        assert row.prompt == truth.prompt
        assert is_wrong or row == truth  # an item is all clean or all noise
        assert row.response.endswith(f"#### {row.answer}")
    more = task("wordmath", {"label_noise": min(1.0, share + 0.2)}).train(n, 0)
    assert all(b == a for a, b, is_wrong in zip(rows, more, wrong, strict=True) if is_wrong)  # nested


def test_noise_keeps_the_distribution_of_results():
    n = 1_500
    noisy, clean = (
        [int(i.answer) for i in task("wordmath", {"difficulty": 4, "label_noise": noise}).train(n, seed)]
        for noise, seed in ((1.0, 0), (0.0, 1))
    )
    assert scipy.stats.ks_2samp(noisy, clean).pvalue > 1e-3
    # what another rule, numbers drawn uniformly, would give is told apart
    uniform = [1 + i % LARGEST for i in range(n)]
    assert scipy.stats.ks_2samp(uniform, clean).pvalue < 1e-3


def test_rows_of_a_dial_hold_what_they_say():
    plain = task("wordmath", {}).train(12, 5)
    merged = task("wordmath", {"merged": 2}).train(6, 5)
    assert [(i.prompt, i.response) for i in singles(merged)] == [(i.prompt, i.response) for i in plain]
    copied = task("wordmath", {"copies": 3}).train(12, 5)
    assert copied == [item for item in plain[:4] for _ in range(3)]


@pytest.mark.parametrize(
    ("generated", "right"),
    [
        ("7 + 5 = 12\n#### 12", True),
        ("#### 12\n#### 13", True),
        ("#### 13", False),
        ("#### 120", False),
        ("12", False),
        ("", False),
    ],
)
def test_right(generated, right):
    wordmath = task("wordmath", {})
    (item,) = wordmath.held_out("test", 1)
    item = type(item)(item.prompt, item.response, "12")
    assert wordmath.right(item, generated) is right


def test_no_such_split():
    with pytest.raises(RunError, match="no split 'dev'; known: validation, test"):
        task("wordmath", {}).held_out("dev", 1)
