import json
import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gns.advising.throughput import (
    REPEATS,
    Memory,
    OutOfMemory,
    Speed,
    Sweep,
    Throughput,
    ThroughputError,
    predicted_peak,
    read,
    write,
)

GIB = 2**30


class Machine:
    """A machine with a memory model and a clock of its own; a step beyond its memory is a crash."""

    tokens = 100

    def __init__(self, *, base=1.0, each=0.1, memory=10.0, share=0.8, slow=lambda micro: 0.1 + 0.01 * micro):
        self.base, self.each, self.memory_gib, self.share, self.slow = base, each, memory, share, slow
        self.made: list[tuple[str, int, int]] = []
        self.raises: dict[int, type[BaseException]] = {}

    def memory(self):
        free = self.memory_gib - self.base
        return Memory(int(self.base * GIB), int((self.base + self.share * free) * GIB))

    def peak(self, micro_batch, tokens):
        self.made.append(("peak", micro_batch, tokens))
        if micro_batch in self.raises:
            raise self.raises[micro_batch]
        took = self.base + self.each * micro_batch * tokens / self.tokens
        assert took <= self.memory_gib, "the machine went down"
        return int(took * GIB)

    def seconds(self, micro_batch, accumulation):
        self.made.append(("seconds", micro_batch, accumulation))
        return accumulation * self.slow(micro_batch)


def sizes(machine):
    return [micro for kind, micro, _ in machine.made if kind == "peak"]


def test_powers_of_two_up_to_the_largest():
    machine = Machine()
    curve = Sweep(machine, largest=32).run()
    assert list(curve.speeds) == [1, 2, 4, 8, 16, 32]
    assert curve.speeds[8] == pytest.approx(8 / 0.18)
    assert all(p.accumulation == 1 and p.repeats == REPEATS for p in curve.points)
    assert curve.points[3].peak_bytes == int(1.8 * GIB)
    assert curve.stopped == "no batch beyond 32 was asked for" and not curve.interrupted


def test_memory_is_predicted_and_never_passed():
    """0.8 of 9 GiB free may be used: 8.2 GiB. 64 takes 7.4, 128 would take 13.8 and crash."""
    machine = Machine()
    curve = Sweep(machine, largest=512).run()
    assert max(sizes(machine)) == 64
    assert "a micro-batch of 128 could take 13.8 GiB, more than the 8.2 GiB that may be used" in curve.stopped
    assert "no batch beyond 512 was asked for" in curve.stopped
    assert [(p.batch_size, p.micro_batch, p.accumulation) for p in curve.points[-3:]] == [
        (128, 64, 2),
        (256, 64, 4),
        (512, 64, 8),
    ]
    assert all(p.peak_bytes is None for p in curve.points[-3:])


@given(st.floats(0.1, 20), st.floats(1e-4, 3), st.floats(1, 64), st.floats(0.05, 0.95), st.integers(1, 5000))
def test_no_step_beyond_the_share_is_ever_tried(base, each, memory, share, tokens):
    assume(each * min(64, tokens) / tokens <= memory)  # the first step is a leap: of at most 64 tokens
    machine = Machine(base=base, each=each, memory=base + memory, share=share)
    machine.tokens = tokens
    Sweep(machine, largest=1024).run()
    allowed = machine.memory().limit
    for kind, micro, length in machine.made:
        if kind == "peak" and (micro, length) != (
            1,
            min(64, tokens),
        ):  # the first step is a leap of 64 tokens
            assert (base + each * micro * length / tokens) * GIB <= allowed + 1


@given(st.lists(st.floats(0.75, 1.05), min_size=11, max_size=11), st.floats(0.01, 1), st.floats(1, 64))
def test_an_allocator_that_keeps_some_blocks_is_allowed_for(noise, each, memory):
    """A growth of up to 1.05/0.75 = 1.4 × the predicted one stays within the limit."""

    class Noisy(Machine):
        tokens = 64

        def memory(self):
            return replace(super().memory(), margin=1.5)

        def peak(self, micro_batch, tokens):
            self.made.append(("peak", micro_batch, tokens))
            return int((self.base + self.each * micro_batch * noise[micro_batch.bit_length() - 1]) * GIB)

    machine = Noisy(each=each, memory=1 + memory)
    Sweep(machine, largest=1024).run()
    for micro in sizes(machine)[1:]:
        grown = each * micro * noise[micro.bit_length() - 1]
        assert (1 + grown) * GIB <= machine.memory().limit + 1


def test_long_examples_are_approached_by_doublings():
    machine = Machine(each=0.1)
    machine.tokens = 300
    Sweep(machine, largest=1).run()
    assert [tokens for kind, _, tokens in machine.made if kind == "peak"] == [64, 128, 256, 300]
    short = Machine()
    short.tokens = 20
    Sweep(short, largest=1).run()
    assert [tokens for kind, _, tokens in short.made if kind == "peak"] == [20]
    huge = Machine(each=100.0)
    huge.tokens = 4096
    curve = Sweep(huge, largest=8).run()
    assert curve.points == () and max(tokens for _, _, tokens in huge.made) < 4096
    assert curve.stopped.startswith("one example of ") and "more than the 8.2 GiB" in curve.stopped


def test_what_does_not_fit_ends_the_growth_and_the_rest_goes_on():
    machine = Machine()
    machine.raises = {16: OutOfMemory}
    curve = Sweep(machine, largest=32).run()
    assert list(curve.speeds) == [1, 2, 4, 8, 16, 32]
    assert curve.points[-1].micro_batch == 8
    assert curve.stopped.startswith("a micro-batch of 16 does not fit into memory")
    machine = Machine()
    machine.raises = {1: OutOfMemory}
    assert Sweep(machine).run().points == ()


def test_accumulation_of_a_faster_micro_batch_replaces_a_slow_large_one():
    """Beyond 8 the machine gets slower than twice per doubling."""
    machine = Machine(slow=lambda micro: 0.01 * micro + (0.5 if micro > 8 else 0.1))
    curve = Sweep(machine, largest=32).run()
    assert [(p.micro_batch, p.accumulation) for p in curve.points] == [
        (1, 1),
        (2, 1),
        (4, 1),
        (8, 1),
        (8, 2),
        (8, 4),
    ]
    machine = Machine(slow=lambda micro: 1.0)  # a flat machine: the largest is fastest, nothing is replaced
    assert all(p.accumulation == 1 for p in Sweep(machine, largest=32).run().points)


def test_patience_bounds_what_is_started():
    machine = Machine(slow=lambda micro: float(micro))
    curve = Sweep(machine, largest=256, seconds=20.0).run()
    # each step is expected to take twice the one before; one to warm up and one to time must be within 20 s
    assert list(curve.speeds) == [1, 2, 4, 8]
    assert "a step of 16 would take about 16 s, too long for the time allowed" in curve.stopped
    for point in curve.points:
        assert point.repeats >= 1


def test_ctrl_c_keeps_the_curve_so_far():
    machine, heard = Machine(), []
    machine.raises = {8: KeyboardInterrupt}
    curve = Sweep(machine, largest=64, hear=heard.append).run()
    assert list(curve.speeds) == [1, 2, 4] and curve.interrupted
    assert [len(c.points) for c in heard] == [1, 2, 3] and heard[-1].latest == curve.points[-1]


def test_the_median_counts():
    times = iter([0.1, 9.0, 0.2, 0.3, 0.1, 0.15, 0.4])
    machine = Machine(slow=lambda micro: next(times))
    (point,) = Sweep(machine, largest=1).run().points
    assert (point.seconds, point.fastest, point.slowest) == (0.2, 0.1, 9.0)
    assert point.examples_per_second == pytest.approx(5.0)


@given(st.floats(0, 1e10), st.floats(0, 1e10), st.floats(1, 1e9), st.integers(0, 8))
def test_a_linear_use_of_memory_is_never_underestimated(base, fixed, each, doublings):
    def peak(size):
        return round(base + fixed + each * size)

    known = [(2**i, peak(2**i)) for i in range(doublings + 1)]
    truth = peak(2 ** (doublings + 1))
    found = predicted_peak(known, round(base), 2 ** (doublings + 1))
    assert found >= truth - 4
    if fixed == 0:
        assert found == pytest.approx(truth, rel=1e-3, abs=8)


def test_growth_faster_than_the_batch_is_followed():
    assert predicted_peak([(4, 100), (8, 300)], 90, 16) == 700
    assert predicted_peak([(4, 100), (8, 100)], 60, 16) == 140  # no growth seen: in proportion all the same


# the file

CURVE = Throughput(
    (Speed(1, 1, 1, 0.5, 0.4, 0.7, 7, 10**9), Speed(64, 8, 8, 4.0, 3.9, 4.5, 2)),
    "no batch beyond 64 was asked for",
    {"model": "m", "tokens_per_example": 256},
)


def test_the_file_gives_back_the_curve(tmp_path):
    write(tmp_path / "t.json", CURVE)
    assert read(tmp_path / "t.json") == CURVE
    assert read(tmp_path / "t.json").speeds == {1: 2.0, 64: 16.0}
    data = json.loads((tmp_path / "t.json").read_text())
    data["points"][0]["added_later"] = 3  # a newer version may say more
    (tmp_path / "t.json").write_text(json.dumps(data))
    assert read(tmp_path / "t.json") == CURVE


def test_damaged_and_foreign_files(tmp_path):
    path = tmp_path / "t.json"
    write(path, CURVE)
    whole = path.read_text()
    bad = [
        "",
        whole[:-40],
        "[]",
        '{"format": "gns-summary", "version": 1}',
        whole.replace("0.5", "-1", 1),
        "null",
        whole.replace("gns-throughput", "gns-summary"),
        whole.replace('"version": 1', '"version": 2'),
    ]
    bad += [whole.replace('"points"', '"pts"'), whole.replace('"seconds": 4.0', '"seconds": "4"')]
    for text in bad:
        path.write_text(text)
        with pytest.raises(
            ThroughputError, match="t.json: damaged or foreign; a file that `gns throughput` wrote"
        ):
            read(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ThroughputError, match="damaged or foreign"):
        read(path)
    write(path, replace(CURVE, points=()))
    with pytest.raises(ThroughputError, match="holds no timed batch size; measure again"):
        read(path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Sweep(Machine(), largest=0), "largest is 0; a whole number, 1 or more, is needed"),
        (lambda: Sweep(Machine(), seconds=math.inf), "seconds is inf; a finite number > 0 is needed"),
        (lambda: Speed(1, 1, 1, 0.0, 1.0, 1.0, 1), "seconds is 0.0"),
        (lambda: Speed(1, 1, 1, 1.0, 1.0, 1.0, 0), "repeats is 0"),
    ],
)
def test_bad_input(made, message):
    with pytest.raises(ValueError, match=message):
        made()


def test_a_length_whose_memory_grows_with_its_square_is_not_tried():
    """One example takes 2 GiB at 256 tokens and would take 8 at 512; 7.2 may be used."""

    class Quadratic(Machine):
        tokens = 512

        def peak(self, micro_batch, tokens):
            self.made.append(("peak", micro_batch, tokens))
            return int((1 + 8 * (tokens / self.tokens) ** 2) * GIB)

    machine = Quadratic()
    curve = Sweep(machine, largest=8).run()
    assert curve.points == () and "one example of 512 tokens could take 9 GiB" in curve.stopped
    assert [tokens for _, _, tokens in machine.made] == [64, 128, 256]


def test_the_faster_way_to_make_a_batch_is_kept():
    """Sixteen at once is slow for its size; accumulation was to be faster, and was not."""

    class Overhead(Machine):
        def seconds(self, micro_batch, accumulation):
            each = 0.1 * micro_batch * (2 if micro_batch > 8 else 1)
            return each * accumulation * (3 if accumulation > 1 else 1)

    curve = Sweep(Overhead(), largest=16).run()
    last = curve.points[-1]
    assert (last.batch_size, last.micro_batch, last.accumulation) == (16, 16, 1)
    assert curve.latest.accumulation > 1 and curve.latest.seconds > last.seconds
