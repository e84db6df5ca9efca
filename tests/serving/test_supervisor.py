"""Workers that cannot live are not started for ever; a service that is none is said at once."""

import itertools

import pytest

from serving import supervisor


def test_workers_that_end_as_soon_as_they_are_started_are_given_up():
    now, pids = [0.0], itertools.count(100)
    slept = lambda seconds: now.__setitem__(0, now[0] + seconds)  # noqa: E731
    assert supervisor.die_young(lambda: {1, next(pids)}, 2, clock=lambda: now[0], sleep=slept)
    assert now[0] < supervisor.YOUNG_S


def test_workers_that_live_are_watched_for_a_while_only_and_one_may_end():
    now = [0.0]
    slept = lambda seconds: now.__setitem__(0, now[0] + seconds)  # noqa: E731
    assert not supervisor.die_young(lambda: {1, 2 if now[0] < 10 else 3}, 2, clock=lambda: now[0], sleep=slept)
    assert now[0] >= supervisor.YOUNG_S


def test_service_that_is_nowhere_is_a_failure_before_anything_is_started():
    with pytest.raises(SystemExit, match=r"serving\.nothing"):
        supervisor.main(["serving.nothing:There", "--host", "127.0.0.1", "--port", "0"])
