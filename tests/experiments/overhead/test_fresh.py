"""Jobs in processes of their own: forked before anything was computed, answers in their order."""

import pytest

from experiments.overhead import fresh
from tests.experiments.overhead.rows_by_hand import setting

SMALL = setting(name="small", shape="width-128", layers=1)


def test_attaching_to_a_model_without_storage_is_timed():
    found = fresh.startup(setting(), repeats=2)
    assert found["parameters"] == 28 and len(found["attach_s"]) == 2


def test_an_unknown_job_is_refused():
    with pytest.raises(ValueError, match="job 'rrs': known are rss, startup, alone, ranks"):
        fresh.do([("rrs", setting())])


def test_memory_is_measured_two_at_a_time_and_what_is_timed_alone():
    jobs = [(what, i) for i, what in enumerate(["rss", "alone", "rss", "rss", "rss", "ranks", "startup"])]
    assert [[i for _, i in several] for several in fresh.at_a_time(jobs)] == [[0], [1], [2, 3], [4], [5], [6]]


@pytest.fixture(scope="module")
def answers():
    """All in one go: starting Python with every library takes longer than the jobs."""
    jobs = [("rss", SMALL, name) for name in ("untouched", "no such arm", "monitor")]
    return list(fresh.run([*jobs, ("alone", SMALL, 2), ("ranks", SMALL, 2)], lean=True))


def test_answers_come_in_order_and_a_failure_is_one(answers):
    first, second, third, *_ = answers
    assert first["rss_peak"] >= first["rss_before"] > 0 and third["rss_peak"] > 0
    assert second["status"] == "failed" and "StopIteration" in second["error"]


def test_one_thread_and_two_ranks_make_the_same_loops(answers):
    *_, alone, ranks = answers
    assert [len(each["arm_s"]) for each in (alone, ranks)] == [2, 2], (alone, ranks)
    assert ranks["calls_a_step"] >= 1 and ranks["bytes_a_step"] > 0
    assert "calls_a_step" not in alone
