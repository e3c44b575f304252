import pytest

from experiments.markdown import insert, marks, table


def test_a_table():
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_a_part_is_replaced_and_the_rest_kept(tmp_path):
    page, (begin, end) = tmp_path / "a.md", marks("part")
    other = "\n".join(marks("other"))
    page.write_text(f"before\n{begin}\nold\n{end}\n{other}\nafter\n")
    for text in ("new", "newer\n\nlines"):
        insert(page, "part", text)
        assert page.read_text() == f"before\n{begin}\n{text}\n{end}\n{other}\nafter\n"


@pytest.mark.parametrize("text", ["none", "<!-- part: end -->\n<!-- part: begin, from rows -->\n"])
def test_a_page_without_marks_in_their_order_is_left_and_named(tmp_path, text):
    page = tmp_path / "a.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=r"a.md has no '<!-- part: begin, from rows -->' followed by"):
        insert(page, "part", "new")
    assert page.read_text() == text
