import ast
import subprocess
import sys
import warnings

import pytest

from gns import corpus


@pytest.fixture(scope="module")
def parts():
    return {part: corpus.documents(part) for part in ("base", "held_out")}


@pytest.fixture(scope="module")
def held_out_examples():
    return corpus.examples("held_out")


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def test_parts_share_no_file_and_hold_the_named_packages(parts):
    names = {part: [document.name for document in found] for part, found in parts.items()}
    assert not set(names["base"]) & set(names["held_out"])
    assert {name.split("/")[0] for name in names["held_out"]} == corpus.HELD_OUT
    assert all(found == sorted(found) and len(set(found)) == len(found) for found in names.values())


def test_held_out_share_of_the_text(parts):
    size = {part: sum(len(document.text) for document in found) for part, found in parts.items()}
    share = size["held_out"] / sum(size.values())
    assert size["held_out"] > 1_000_000
    # 13 % where everything is installed; 15 % where a distribution leaves idlelib and tkinter out
    assert 0.11 < share < 0.19, f"{share:.3f}"


def test_no_held_out_file_is_a_copy_of_a_base_file(parts):
    def lines(document):
        return [line for line in map(str.strip, document.text.split("\n")) if len(line) > 25]

    seen = {line for document in parts["base"] for line in lines(document)}
    shares = {
        document.name: sum(line in seen for line in found) / len(found)
        for document in parts["held_out"]
        if len(found := lines(document)) >= 20
    }
    assert max(shares.values()) < 0.3, max(shares.items(), key=lambda item: item[1])
    assert sum(shares.values()) / len(shares) < 0.05


def test_the_copies_that_are_kept_out_are_found_by_the_same_measure(parts):
    if not any(document.name.startswith("email/mime/image") for document in parts["held_out"]):
        pytest.skip("this Python has no email.mime.image")
    names = {document.name for document in parts["base"]}
    assert not names & {f"{name}.py" for name in corpus.COPIED}


def test_documents_are_the_same_twice(parts):
    assert corpus.documents("held_out") == parts["held_out"]


def test_no_tests_no_generated_files_no_third_party(parts):
    for document in (*parts["base"], *parts["held_out"]):
        folders = document.name.split("/")[:-1]
        assert corpus.SKIPPED_FOLDERS.isdisjoint(folders), document.name
        assert not document.name.startswith(("encodings/", "pydoc_data/", "_sysconfigdata")), document.name
        assert document.text.strip() and "\r" not in document.text


def test_unreadable_and_foreign_files_are_left_out(tmp_path):
    root = write(
        tmp_path,
        {
            "os.py": "import sys\n",
            "json/__init__.py": "x = 1\r\n",
            "json/tests/test_json.py": "x = 1\n",
            "abc.py": "",
            "bisect.py": "  \n\n",
            "calendar.py": b"# -*- coding: latin-1 -*-\nx = '\xe9'\n",
            "sitecustomize.py": "x = 1\n",
            "site-packages/json/__init__.py": "x = 1\n",
            "asyncio/__init__.py": "x = 1\n",
        },
    )
    assert corpus.documents("base", root) == [
        corpus.Document("json/__init__.py", "x = 1\n"),
        corpus.Document("os.py", "import sys\n"),
    ]
    assert [document.name for document in corpus.documents("held_out", root)] == ["asyncio/__init__.py"]


@pytest.mark.parametrize("part", ["base", "held_out"])
def test_no_sources(part, tmp_path):
    write(tmp_path, {"os.pyc": b"\x00", "asyncio/__init__.pyc": b"\x00"})
    with pytest.raises(
        FileNotFoundError, match=rf"no source of the '{part}' part in .*zipped or stripped.*Use a"
    ):
        corpus.documents(part, tmp_path)


@pytest.mark.parametrize("read", [corpus.documents, corpus.examples])
def test_unknown_part(read):
    with pytest.raises(ValueError, match=r"part='test'.*Known: base, held_out"):
        read("test")


SOURCE = '''\
"""Module."""
import os

@cache
@other(
    1)
def first(x):
    """Docstring."""
    def inner():
        return x
    return inner

class Short:
    a = 1
    def f(self):
        return 1

class Long(Base):
    """Head."""
    a = 1

    @property
    def one(self):
        """Text
    less indented."""
        return """PADDING"""

    async def two(self):
        return 2

    class Inner:
        pass

class Data:
    b = 1
'''.replace("PADDING", "p" * corpus.LONGEST_WHOLE_CLASS)


def test_cut_at_functions_methods_and_classes():
    found = list(corpus.cut(corpus.Document("m.py", SOURCE)))
    assert found == [
        '@cache\n@other(\n    1)\ndef first(x):\n    """Docstring."""\n    def inner():\n        return x\n'
        "    return inner",
        "class Short:\n    a = 1\n    def f(self):\n        return 1",
        'class Long(Base):\n    """Head."""\n    a = 1',
        '@property\ndef one(self):\n    """Text\nless indented."""\n    return """' + "p" * 1_000 + '"""',
        "async def two(self):\n    return 2",
        "class Data:\n    b = 1",
    ]


@pytest.mark.parametrize("text", ["print 'two'\n", "x = 1\n", "def f(:\n", "\0\n"])
def test_nothing_to_cut(text):
    assert list(corpus.cut(corpus.Document("m.py", text))) == []


def test_form_feeds_do_not_shift_the_cut():
    text = "x = 'a\\\n\x0cb'\n\x0c\ndef f():\n    return 1\n"
    assert list(corpus.cut(corpus.Document("m.py", text))) == ["def f():\n    return 1"]


def test_old_escapes_warn_nobody():
    text = "def f():\n    return '\\d'\n"
    assert len(list(corpus.cut(corpus.Document("m.py", text)))) == 1


def test_examples_are_distinct_parsable_and_of_uneven_length(held_out_examples):
    lengths = sorted(map(len, held_out_examples))
    assert len(held_out_examples) > 1_500
    assert len(set(held_out_examples)) == len(held_out_examples)
    assert lengths[0] >= corpus.SHORTEST_EXAMPLE
    assert lengths[len(lengths) * 9 // 10] > 5 * lengths[len(lengths) // 10]
    parsed = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for example in held_out_examples:
            try:
                parsed += len(ast.parse(example).body) == 1
            except SyntaxError:  # the head of a class without a body of its own
                assert example.startswith(("class ", "@"))
    assert parsed > 0.97 * len(held_out_examples)
    assert sum('"""' in example for example in held_out_examples) > 0.3 * len(held_out_examples)


def test_examples_are_the_same_twice_and_nearly_none_is_in_base(held_out_examples):
    assert corpus.examples("held_out") == held_out_examples
    assert len(set(corpus.examples("base")) & set(held_out_examples)) <= 3


def test_repeated_and_short_pieces_are_dropped(tmp_path):
    body = "def f():\n    return '" + "a" * 80 + "'\n"
    write(tmp_path, {"asyncio/a.py": body, "asyncio/b.py": body + "def g(): pass\n"})
    assert corpus.examples("held_out", tmp_path) == [body.strip()]


def test_import_is_light():
    code = "import sys, gns.corpus; print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
