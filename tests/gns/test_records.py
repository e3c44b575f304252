import dataclasses
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gns.coverage import Coverage
from gns.estimate import estimate
from gns.packing import pack, unpack
from gns.records import (
    RecordsError,
    StepsWriter,
    cut_after,
    load,
    read_steps,
    read_summary,
    write_steps,
    write_summary,
)
from gns.sums import Layout, StepSums, from_rows

SEED = 7
NAMES = tuple(
    f"base_model.model.layers.0.self_attn.{m}.lora_{f}.default.weight"
    for m in ("q_proj", "v_proj")
    for f in "AB"
)
LAYOUT = Layout(NAMES)


def draw(count: int, start: int = 0, layout: Layout = LAYOUT, dtype: type = np.float32) -> list[StepSums]:
    """Per-example Gaussian gradients in 5 dimensions a parameter, summed as a monitor would."""
    rng = np.random.default_rng(SEED + start)
    steps = []
    for i in range(start, start + count):
        g = 0.1 + rng.normal(size=(8, len(layout.names), 5))
        rows = np.stack([(g**2).sum(2).mean(0), (g.mean(0) ** 2).sum(1)], axis=1).astype(dtype)
        fields = {
            "n_examples": 8,
            "n_tokens": 801 + i,
            "learning_rate": 1e-4 / (i + 1),
            "sum_sq_weights": 0.1251,
            "mean_fourth": float(((g**2).sum((1, 2)) ** 2).mean()),
            "top_sq_norms": (float((g**2).sum((1, 2)).max()),),
            "metric": "adam",
        }
        steps.append(from_rows(rows, layout, step=i, **fields))
    return steps


def same(a: StepSums, b: StepSums) -> bool:
    """Equal field by field and bit by bit, NaN to NaN."""
    for f in dataclasses.fields(StepSums):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if f.name == "rows" and x is not None and y is not None:
            equal = x.dtype == y.dtype and x.shape == y.shape and np.array_equal(x, y, equal_nan=True)
        elif f.name == "layout":
            equal = (x and x.names) == (y and y.names)
        else:
            equal = type(x) is type(y) and (x == y or (isinstance(x, float) and x != x and y != y))
        if not equal:
            print(f"step {a.step}: {f.name}: {x!r} != {y!r}")
            return False
    return True


def all_same(a: list[StepSums], b: list[StepSums]) -> bool:
    return len(a) == len(b) and all(map(same, a, b))


def written(path: Path, steps: list[StepSums]) -> Path:
    writer = StepsWriter(path)
    for step in steps:
        writer.write(step)
    return path


ODD = [
    StepSums(step=0, n_examples=4, mean_sq_norm=1 / 3, sq_norm_of_mean=0.1),
    StepSums(step=1, n_examples=0, mean_sq_norm=math.nan, sq_norm_of_mean=math.inf),
    StepSums(step=2, n_examples=4, mean_sq_norm=-math.inf, sq_norm_of_mean=5e-324, loss_scaled=True),
    StepSums(step=3, n_examples=4, mean_sq_norm=1.0, sq_norm_of_mean=1.0, reason='NaN "quoted" ,"rows": Σ\n'),
    StepSums(step=4, n_examples=1, mean_sq_norm=1.0, sq_norm_of_mean=1.0, sum_sq_weights=1.0, n_tokens=3),
    StepSums(step=5, n_examples=4, mean_sq_norm=1.0, sq_norm_of_mean=1.0, mean_fourth=math.inf),
    StepSums(step=6, n_examples=4, mean_sq_norm=1.0, sq_norm_of_mean=1.0, top_sq_norms=(math.inf, 1 / 3)),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_round_trip_is_exact(tmp_path, dtype):
    steps = draw(5, dtype=dtype)
    back = read_steps(written(tmp_path / "steps.jsonl", steps))
    assert all_same(steps, back)
    assert back[0].layout is back[4].layout


def test_a_record_from_before_a_field_was_known_takes_its_default(tmp_path):
    path = tmp_path / "steps.jsonl"
    header = b'{"format":"gns-steps","version":1,"dtype":"float64","names":[]}\n'
    path.write_bytes(header + b'{"step":2,"n_examples":8,"mean_sq_norm":1,"sq_norm_of_mean":1}\n')
    (step,) = read_steps(path)
    assert (step.mean_fourth, step.top_sq_norms, step.metric) == (None, (), "euclidean")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_steps_in_which_no_parameter_could_be_measured_are_read_back(tmp_path, dtype):
    nothing = from_rows(np.zeros((0, 2), dtype), Layout(()), step=3, n_examples=8, reason="none measured")
    steps = [*draw(3), nothing, replace(nothing, step=4), *draw(2, start=5)]
    for some in (steps, steps[3:5]):
        path = written(tmp_path / f"{len(some)}" / "steps.jsonl", some)
        assert all_same(read_steps(path), some)
        assert load(path.parent).n_skipped == 2 and load(path.parent).n_steps == len(some) - 2
        assert all_same(write_steps(path, some), some)
        assert cut_after(path, 3) == len([s for s in some if s.step > 3])
    short = (path.parent / "steps.jsonl").read_bytes().replace(b'"names":[]', b'"names":["a"]')
    path.write_bytes(short)
    with pytest.raises(RecordsError, match=r"rows of shape \(0, 2\); its header names 1"):
        read_steps(path)


def test_a_packed_history_is_plain_data_that_unpacks_exactly():
    steps = draw(3)
    packed = json.loads(json.dumps(pack(3, steps)))
    assert all_same(steps, unpack(packed))
    for step in packed["steps"]:
        del step["mean_fourth"], step["top_sq_norms"], step["metric"]
    (old, *_) = unpack(packed)
    assert (old.mean_fourth, old.top_sq_norms, old.metric) == (None, (), "euclidean")


def test_every_field_survives_on_odd_steps(tmp_path):
    assert all_same(ODD, read_steps(written(tmp_path / "steps.jsonl", ODD)))


@pytest.mark.parametrize("dtype,bits", [(np.float32, np.uint32), (np.float64, np.uint64)])
def test_any_bit_pattern_survives_in_rows(tmp_path, dtype, bits):
    patterns = np.random.default_rng(SEED).integers(0, 2 ** (8 * dtype(0).itemsize), size=4000, dtype=bits)
    rows = patterns.view(dtype).reshape(-1, 2)
    assert not np.isfinite(rows).all()
    names = tuple(f"p{i}" for i in range(len(rows)))
    step = StepSums(
        step=0, n_examples=2, mean_sq_norm=1.0, sq_norm_of_mean=1.0, rows=rows, layout=Layout(names)
    )
    assert all_same([step], read_steps(written(tmp_path / "steps.jsonl", [step])))


def test_float32_rows_are_written_with_their_shortest_decimals(tmp_path):
    rows = np.array([[0.1, 1e-7], [0.123456789, 3.0]], dtype=np.float32)
    path = written(tmp_path / "steps.jsonl", [from_rows(rows, Layout(("p", "q")), step=0, n_examples=2)])
    assert b'"rows":[[0.1,1e-07],[0.12345679,3.0]]' in path.read_bytes()


def test_a_decimal_that_would_round_twice_is_written_in_full(tmp_path):
    twice = np.array([0x15AE43FD], dtype=np.uint32).view(np.float32)[0]
    assert str(twice) == "7.038531e-26" and np.float32(float(str(twice))) != twice
    step = from_rows(np.array([[twice, 1]], dtype=np.float32), Layout(("p",)), step=0, n_examples=2)
    assert all_same([step], read_steps(written(tmp_path / "steps.jsonl", [step])))


def test_every_line_is_strict_json_with_joint_sums(tmp_path):
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = written(tmp_path / "steps.jsonl", draw(2) + ODD).read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    assert records[0]["format"] == "gns-steps" and records[0]["version"] == 1
    first = next(r for r in records if "step" in r)
    assert first["mean_sq_norm"] == draw(1)[0].mean_sq_norm


def test_a_new_layout_gets_a_new_header_and_each_step_its_own_names(tmp_path):
    steps = draw(2) + [s.without([NAMES[1]]) for s in draw(2, start=2)] + ODD[:1] + draw(1, start=4)
    path = written(tmp_path / "steps.jsonl", steps)
    back = read_steps(path)
    assert all_same(steps, back)
    assert back[0].layout is back[-1].layout
    headers = [line for line in path.read_text().splitlines() if "format" in line]
    assert len(headers) == 1 + 4  # the first one, and a change before steps 0, 2, 0 without rows, and 4


def test_rows_that_cannot_be_read_back_exactly_are_refused(tmp_path):
    writer = StepsWriter(tmp_path / "steps.jsonl")
    half = from_rows(np.ones((1, 2), dtype=np.float16), Layout(("p",)), step=3, n_examples=2)
    with pytest.raises(ValueError, match="step 3: rows of dtype float16.*float32 or float64"):
        writer.write(half)
    assert read_steps(writer.path) == []


def test_cut_at_every_byte_it_can_be_appended_to_and_keeps_the_whole_records(tmp_path):
    steps = draw(3)
    data = written(tmp_path / "whole.jsonl", steps[:2]).read_bytes()
    path = tmp_path / "steps.jsonl"
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        whole = [s for s in steps[:2] if data.find(b'{"step":%d' % s.step) + len(_line(data, s.step)) <= size]
        cut_off = size and data[size - 1 : size] != b"\n" and data[size : size + 1] != b"\n"
        if cut_off:
            with pytest.warns(UserWarning, match="not whole"):
                writer = StepsWriter(path)
        else:
            writer = StepsWriter(path)
        writer.write(steps[2])
        assert all_same(whole + [steps[2]], read_steps(path)), size


def _line(data: bytes, step: int) -> bytes:
    start = data.find(b'{"step":%d' % step)
    return data[start : data.find(b"\n", start)]


def test_truncated_file_raises_and_keeps_the_good_records(tmp_path):
    steps = draw(4)
    path = written(tmp_path / "steps.jsonl", steps)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(
        RecordsError, match=r"steps\.jsonl, line 6 is cut short.*seen.*3 good record"
    ) as caught:
        read_steps(path)
    assert isinstance(caught.value, ValueError)
    assert all_same(steps[:3], caught.value.steps)
    with pytest.warns(UserWarning, match="line 6"):
        assert all_same(steps[:3], read_steps(path, strict=False))


BAD_LINES = [
    ("not json", b"hello\n", "is not a JSON object"),
    ("array", b"[1]\n", "is not a JSON object"),
    ("bad utf-8", b"\xff\xfe\n", "is not a JSON object"),
    ("missing field", b'{"step":2,"n_examples":8}\n', "lacks mean_sq_norm, sq_norm_of_mean"),
    (
        "wrong kind",
        b'{"step":"x","n_examples":8,"mean_sq_norm":1,"sq_norm_of_mean":1}\n',
        "step = 'x'; a whole",
    ),
    ("no number", b'{"step":2,"n_examples":8,"mean_sq_norm":"x","sq_norm_of_mean":1}\n', "float"),
    (
        "no list",
        b'{"step":2,"n_examples":8,"mean_sq_norm":1,"sq_norm_of_mean":1,"top_sq_norms":3}\n',
        "top_sq_norms = 3; a list of numbers is needed",
    ),
    (
        "no name",
        b'{"step":2,"n_examples":8,"mean_sq_norm":1,"sq_norm_of_mean":1,"metric":null}\n',
        "metric = None; a name is needed",
    ),
    (
        "no truth",
        b'{"step":2,"n_examples":8,"mean_sq_norm":1,"sq_norm_of_mean":1,"call_seen":"no"}\n',
        "call_seen = 'no'; true or false is needed",
    ),
    ("negative n", b'{"step":2,"n_examples":-1,"mean_sq_norm":1,"sq_norm_of_mean":1}\n', "n_examples is -1"),
    (
        "too few rows",
        b'{"step":2,"n_examples":8,"mean_sq_norm":1,"sq_norm_of_mean":1,"rows":[[1,2]]}\n',
        r"shape \(1, 2\); its header names 4",
    ),
    ("newer version", b'{"format":"gns-steps","version":2,"dtype":"float64","names":[]}\n', "version 2"),
]


@pytest.mark.parametrize("line,message", [b[1:] for b in BAD_LINES], ids=[b[0] for b in BAD_LINES])
def test_bad_line_in_the_middle_is_named_and_the_records_around_it_are_kept(tmp_path, line, message):
    steps = draw(5)
    path = written(tmp_path / "steps.jsonl", steps)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[4] = line  # in the place of step 2
    path.write_bytes(b"".join(lines))
    with pytest.raises(RecordsError, match=f"line 5 .*{message}") as caught:
        read_steps(path)
    kept = steps[:2] if b"version" in line else steps[:2] + steps[3:]
    assert all_same(kept, caught.value.steps)


def test_steps_after_a_damaged_header_keep_their_sums_but_get_no_names(tmp_path):
    other = [s.without([NAMES[0]]) for s in draw(2, start=2)]
    path = written(tmp_path / "steps.jsonl", draw(2) + other)
    lines = path.read_bytes().splitlines(keepends=True)
    assert lines[4].startswith(b'{"format"')
    lines[4] = lines[4][:50] + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(RecordsError) as caught:
        read_steps(path)
    assert all_same(draw(2) + [replace(s, rows=None, layout=None) for s in other], caught.value.steps)


FOREIGN = [b'{"text": "a data set"}\n{"text": "b"}\n', b"\x89PNG\r\n", b'{"format":"other"}\n']


@pytest.mark.parametrize("content", FOREIGN)
def test_foreign_file_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "steps.jsonl"
    path.write_bytes(content)
    with pytest.raises(RecordsError, match="line 1 is not a gns-steps header") as caught:
        read_steps(path)
    assert caught.value.steps == []
    for act in (
        lambda: StepsWriter(path),
        lambda: StepsWriter(path, append=False),
        lambda: cut_after(path, 3),
        lambda: write_steps(path, draw(1)),
    ):
        with pytest.raises(RecordsError, match="left as it is"):
            act()
    assert path.read_bytes() == content


def test_append_continues_and_append_false_starts_anew(tmp_path):
    path, steps = tmp_path / "a" / "steps.jsonl", draw(4)
    written(path, steps[:2])
    written(path, steps[2:])
    assert all_same(steps, read_steps(path))
    StepsWriter(path, append=False).write(steps[3])
    assert all_same(steps[3:], read_steps(path))


def test_writer_notices_that_the_file_was_changed_between_two_writes(tmp_path):
    path = tmp_path / "steps.jsonl"
    steps = draw(3)
    less = [s.without([NAMES[0]]) for s in steps]
    writer = StepsWriter(path)
    writer.write(steps[0])
    write_steps(path, less[:2])  # another layout is now the latest
    writer.write(steps[2])
    assert all_same(less[:2] + steps[2:], read_steps(path))


def test_cut_after_keeps_the_records_up_to_a_step(tmp_path):
    steps = draw(6)
    path = written(tmp_path / "steps.jsonl", steps)
    with path.open("ab") as file:
        file.write(b'{"step":6,"n_ex')
    assert cut_after(path, 3) == 2
    assert all_same(steps[:4], read_steps(path))
    written(path, draw(2, start=4))
    assert [s.step for s in read_steps(path)] == [0, 1, 2, 3, 4, 5]
    assert os.listdir(tmp_path) == ["steps.jsonl"]


def test_cut_after_leaves_a_file_with_a_bad_line_alone(tmp_path):
    path = written(tmp_path / "steps.jsonl", draw(3))
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = b"".join([*lines[:3], b"oops\n", *lines[3:]])
    path.write_bytes(damaged)
    with pytest.raises(RecordsError, match="line 4"):
        cut_after(path, 1)
    assert path.read_bytes() == damaged


# what the file holds, what is given, what it holds afterwards, and whether its old bytes stay where they are
UPDATES = [
    ("same", range(5), range(5), range(5), True),
    ("longer", range(3), range(5), range(5), True),
    ("bounded history", range(5), range(2, 5), range(5), True),
    ("bounded history, longer", range(5), range(3, 8), range(8), True),
    ("after a gap", range(2), range(4, 6), [0, 1, 4, 5], True),
    ("none given", range(2), [], range(2), True),
    ("shorter, another run", range(5), range(3), range(3), False),
]


@pytest.mark.parametrize("held,given,after,stays", [u[1:] for u in UPDATES], ids=[u[0] for u in UPDATES])
def test_write_steps_writes_only_what_is_missing(tmp_path, held, given, after, stays):
    steps = draw(8)
    path = written(tmp_path / "steps.jsonl", [steps[i] for i in held])
    before, file = path.read_bytes(), path.stat().st_ino
    result = write_steps(path, [steps[i] for i in given])
    assert all_same([steps[i] for i in after], result)
    assert all_same([steps[i] for i in after], read_steps(path))
    assert (path.stat().st_ino == file) is stays
    assert path.read_bytes().startswith(before) is stays
    if not stays:
        assert path.with_name("steps.old.jsonl").read_bytes() == before


def test_write_steps_takes_the_given_values_where_they_differ(tmp_path):
    path = written(tmp_path / "steps.jsonl", draw(4))
    less = [s.without([NAMES[0]]) for s in draw(4)]
    write_steps(path, less)
    assert all_same(less, read_steps(path))


def test_write_steps_repairs_a_truncated_file(tmp_path):
    path = written(tmp_path / "steps.jsonl", draw(4))
    path.write_bytes(path.read_bytes()[:-9])
    write_steps(path, draw(4))
    assert all_same(draw(4), read_steps(path))


COVERAGE = Coverage({NAMES[0]: 30, NAMES[1]: 30}, {"head": 20}, {"head": "no rule"}, frozenset(NAMES[:1]))


def test_load_gives_back_the_estimate_with_history_coverage_and_groups(tmp_path):
    steps = draw(40)
    written(tmp_path / "steps.jsonl", steps)
    result = estimate(steps, level=0.9)
    write_summary(tmp_path, result, coverage=COVERAGE, settings={"seed": 3}, batch_size=8)
    for folder in (tmp_path, str(tmp_path)):
        loaded = load(folder)
        assert all_same(steps, list(loaded.history))
        assert loaded.coverage == 0.75
        assert set(loaded.groups) == {"A", "B"}
        assert replace(loaded, history=(), coverage=None) == result


def test_summary_reads_back_and_is_strict_json_whatever_the_settings(tmp_path):
    settings = {
        "path": Path("x"),
        3: math.inf,
        "nested": {"t": (1, np.float32(2))},
        "dtype": np.float32,
        "no": None,
    }
    path = write_summary(tmp_path, estimate([]), coverage=COVERAGE, settings=settings, batch_size=np.int64(8))
    data = json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(c))
    assert data["estimate"]["b_simple"] == "NaN" and data["estimate"]["high"] == "Infinity"
    assert data["settings"] == {
        "path": "x",
        "3": "Infinity",
        "nested": {"t": [1, 2.0]},
        "dtype": "<class 'numpy.float32'>",
        "no": None,
    }
    summary = read_summary(tmp_path)
    assert summary.coverage == COVERAGE
    assert (summary.level, summary.batch_size) == (0.95, 8)
    assert os.listdir(tmp_path) == ["summary.json"]


def test_a_failed_write_leaves_the_old_summary(tmp_path, monkeypatch):
    path = write_summary(tmp_path, estimate([]), settings={"seed": 1})
    old = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        write_summary(tmp_path, estimate([]), settings={"seed": 2})
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["summary.json"]


def test_load_without_summary_uses_the_default_level(tmp_path):
    written(tmp_path / "steps.jsonl", draw(30))
    loaded = load(tmp_path)
    assert (loaded.level, loaded.coverage, loaded.n_steps) == (0.95, None, 30)


def test_a_file_of_steps_is_read_as_it_is(tmp_path):
    steps = draw(30)
    written(tmp_path / "mine.jsonl", steps)
    loaded = load(tmp_path / "mine.jsonl")
    assert str(loaded) == str(estimate(steps)) and len(loaded.history) == 30
    assert loaded.coverage is None and loaded.curvature == ()


def test_load_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not there; a folder that `gns measure` or"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no steps\.jsonl"):
        load(tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-30], lambda b: b"{}", lambda b: b"[]", lambda b: b.replace(b"gns-s", b"x")]
)
def test_load_refuses_a_damaged_summary_and_keeps_the_records(tmp_path, damage):
    steps = draw(3)
    written(tmp_path / "steps.jsonl", steps)
    path = write_summary(tmp_path, estimate(steps), coverage=COVERAGE)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RecordsError, match=r"summary\.json: truncated, malformed or foreign") as caught:
        load(tmp_path)
    assert all_same(steps, caught.value.steps)


def test_load_refuses_truncated_steps_and_keeps_the_good_ones(tmp_path):
    path = written(tmp_path / "steps.jsonl", draw(3))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(RecordsError, match="is cut short") as caught:
        load(tmp_path)
    assert all_same(draw(2), caught.value.steps)


def test_why_measuring_stopped_is_kept(tmp_path):
    steps = [StepSums(k, 8, 2.0 + k, 1.0) for k in range(3)]
    write_steps(tmp_path / "steps.jsonl", steps)
    stopped = Coverage({"a": 3}, {}, {}, frozenset("a"), "ValueError: planted")
    write_summary(tmp_path, estimate(steps), coverage=stopped)
    assert read_summary(tmp_path).coverage == stopped
