"""Reached, missed, or not resolved: what rows allow to be said, and no more."""

import pytest

from experiments.overhead import verdicts
from experiments.overhead.measure import AA
from experiments.overhead.presets import NARROW, SHARED_NAME, WIDE
from experiments.overhead.ratios import Ratio
from tests.experiments.overhead.rows_by_hand import ABOUT, row, setting


def known(middle, half):
    return Ratio(middle, middle - 2 * half, middle + 2 * half, middle - half, middle + half, 20)


@pytest.mark.parametrize(
    ("middle", "half", "itself", "said"),
    [
        (1.02, 0.01, 0.01, "reached"),
        (1.05, 0.0, 0.0, "reached"),  # at most what was wanted
        (1.09, 0.01, 0.01, "missed"),
        (1.04, 0.02, 0.005, "not resolved: median below, the interval holds 1.05"),
        (1.06, 0.02, 0.005, "not resolved: median above, the interval holds 1.05"),
        (1.02, 0.01, 0.04, "not resolved: median below, by less than the 0.040 of untouched beside itself"),
        (1.08, 0.01, 0.04, "not resolved: median above, by less than the 0.040 of untouched beside itself"),
    ],
)
def test_the_verdict_on_a_time(middle, half, itself, said):
    assert verdicts.time_verdict(known(middle, half), 1.05, known(1.0, itself)) == said


def test_the_untouched_step_is_off_by_its_median_too():
    assert verdicts.time_verdict(known(1.02, 0.001), 1.05, known(1.035, 0.001)).startswith("not resolved")


@pytest.mark.parametrize(
    ("found", "spread", "said"),
    [
        (1.0, 0.0, "reached"),
        (1.02, 0.0, "reached"),
        (1.03, 0.0, "missed"),
        (1.01, 0.011, "not resolved: below"),
    ],
)
def test_the_verdict_on_a_size(found, spread, said):
    assert verdicts.size_verdict(found, 1.02, spread).startswith(said)


def test_peers_that_are_ahead_are_named_and_those_that_overlap_are_not_resolved():
    ours = known(1.10, 0.02)
    assert verdicts.ahead(ours, {"a": known(1.3, 0.1), "b": known(1.2, 0.05)}) == "yes, of 2"
    peers = {"a": known(1.05, 0.01), "b": known(1.13, 0.02), "c": known(1.5, 0.1)}
    assert verdicts.ahead(ours, peers) == "no, ahead of it: a; not resolved: b"
    assert verdicts.ahead(ours, {}) == "no peer ran"


def rss(arm, peak, repeat=0, status="ok"):
    about = {"setting": setting(name=NARROW).row(), "arm": arm, "machine": ABOUT}
    return about | {"what": "rss", "rss_peak": peak * 2**20, "repeat": repeat, "status": status}


ROWS = [
    row(AA, [0.999, 1.0, 1.001] * 2, NARROW),
    row("monitor", [1.03] * 6, NARROW, arm_saved_bytes=3 * 2**20, untouched_saved_bytes=3 * 2**20),
    row("opacus, ghost norms", [1.2] * 6, NARROW),
    rss("untouched", 100),
    rss("untouched", 101, repeat=1),
    rss("monitor", 102),
    rss("opacus, ghost norms", 130),
    rss("torch.func vmap(grad)", 120),
]


def test_the_table_of_times_holds_a_verdict_a_setting():
    lines = verdicts.times(ROWS).splitlines()
    head = "| setting | untouched beside itself | wanted | monitor | verdict | ahead of every peer |"
    assert lines[0] == head
    assert lines[2].endswith("| 1.05 | 1.030 (1.030 … 1.030) | reached | yes, of 1 |")
    assert f"| {WIDE} | not yet measured | 1.03 | not yet measured |  |  |" in lines


def test_an_arm_that_shares_the_weight_gradient_gets_columns_when_it_has_rows():
    assert SHARED_NAME not in verdicts.times(ROWS)
    table = verdicts.times([*ROWS, row(SHARED_NAME, [1.3] * 6, NARROW)])
    assert f"| {SHARED_NAME} | verdict | ahead of every peer |" in table.splitlines()[0]
    assert table.splitlines()[2].endswith(
        "| 1.300 (1.300 … 1.300) | missed | no, ahead of it: opacus, ghost norms |"
    )


def test_the_table_of_sizes_holds_bytes_and_resident_sizes():
    (line,) = [each for each in verdicts.sizes(ROWS).splitlines() if each.startswith(f"| {NARROW}")]
    assert "| 1.000 of 3 MiB | reached |" in line
    assert "| 1.015 of 100 MiB (untouched: ± 0.010) | not resolved: below, by less than the 0.010" in line
    assert line.endswith("| torch.func vmap(grad), 1.194 |")
    assert "not measured |  | not measured |  | not measured |" in verdicts.sizes(ROWS).splitlines()[-1]


@pytest.mark.parametrize(
    ("attach", "operations", "found"), [(0.1, {}, "reached"), (0.6, {"add": 1}, "missed")]
)
def test_start_up_and_idle_steps_are_judged(attach, operations, found):
    startup = {"what": "startup", "status": "ok", "attach_s": [attach], "parameters": 448}
    idle = {"what": "idle", "status": "ok", "extra_operations": operations, "extra_saved": [0, 0]}
    lines = verdicts.others([each | {"setting": setting().row()} for each in (startup, idle)]).splitlines()
    assert [line.rsplit(" | ", 1)[1] for line in lines[2:]] == [f"{found} |"] * 2


def test_the_brief_table_names_the_fastest_peer_and_the_bare_verdict():
    def made(arm, ratios):
        return row(arm, ratios, NARROW)

    rows = [made(AA, [1.0] * 8), made("monitor", [1.2] * 8), made("torch.func vmap(grad)", [1.1] * 8)]
    line = next(line for line in verdicts.brief(rows).splitlines() if NARROW in line)
    assert "| 1.200 (1.200 … 1.200): missed | 1.100 (1.100 … 1.100), torch.func vmap(grad) | 1.05 |" in line
    empty = verdicts.brief(rows).splitlines()[-1]
    assert "not yet measured | none ran" in empty
