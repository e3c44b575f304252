import itertools
import re

import pytest

from experiments.bases.primer import FILLERS, FIRST, GOODS, LEADS, NOTES, PEOPLE, SECOND, documents
from experiments.tasks import stories, task
from experiments.tasks.stories import NAMES, SENTENCES, START, THINGS

FACT = re.compile(r"(\d+ [-+*/] \d+) = (\d+)")


def calculations(sheets):
    return {key: int(result) for sheet in sheets for key, result in FACT.findall(sheet.text)}


@pytest.fixture(scope="module")
def sheets():
    return documents("base", 400)


def test_calculations_are_right(sheets):
    found = calculations(sheets)
    assert {key.split()[1] for key in found} == set("+-*/")
    for key, result in found.items():
        a, sign, b = key.split()
        assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}.get(
            sign, int(a) / int(b)
        ) == result
    # a story poses what it solves
    stories = [
        story for i, sheet in enumerate(sheets) if i % 3 == 2 for story in sheet.text.strip().split("\n\n")
    ]
    assert len(stories) > 700
    for story in stories:
        told, a, b, result = re.match(r"([^=]+)\s(\d+) [-+*/] (\d+) = (\d+)", story).groups()
        assert re.findall(r"\d+", told) == [a, b], story
        assert re.findall(r"\d+", story)[-1] == result


def test_sheets_are_nested_and_seeded(sheets):
    assert documents("base", 10) == sheets[:10]
    assert {sheet.text for sheet in documents("base", 10, seed=1)}.isdisjoint(s.text for s in sheets)


def test_no_held_out_calculation_was_learned(sheets):
    learned = calculations(sheets).keys()
    assert not learned & calculations(documents("held_out", 200)).keys()
    wordmath = task("wordmath", {"difficulty": 1})
    for split in ("validation", "test"):
        asked = [item.response.partition(" = ")[0] for item in wordmath.held_out(split, 300)]
        assert not learned & set(asked)
    # the control: its training problems are of the same calculations
    assert learned & {item.response.partition(" = ")[0] for item in wordmath.train(300, 0)}


def test_people_things_and_sentences_are_not_those_of_wordmath(sheets):
    assert not set(PEOPLE) & set(NAMES) and not set(GOODS) & set(THINGS)
    ours = {*FIRST, *FILLERS, *LEADS, *itertools.chain(*SECOND.values(), *NOTES.values())}
    theirs = {*START, *stories.ASK, *itertools.chain.from_iterable(SENTENCES.values())}
    assert not {skeleton(s) for s in ours} & {skeleton(s) for s in theirs}
    items = [item for d in (1, 3) for item in task("wordmath", {"difficulty": d}).train(300, 0)]
    prompts = " ".join(item.prompt for item in items)
    primer = " ".join(sheet.text for sheet in sheets)
    for word in (*PEOPLE, *GOODS):
        assert not re.search(rf"\b{word}\b", prompts), word
    for word in (*NAMES, *THINGS):
        assert not re.search(rf"\b{word}\b", primer), word
    assert not phrases(prompts) & phrases(primer)
    assert phrases(prompts) & phrases(" ".join(i.prompt for i in task("wordmath", {}).train(50, 1)))


def skeleton(sentence):
    return re.sub(r"\{\w+\}", "_", sentence)


def phrases(text):
    """Runs of four words, numbers left out."""
    words = re.findall(r"[A-Za-z]+", text)
    return {tuple(words[i : i + 4]) for i in range(len(words) - 3)}
