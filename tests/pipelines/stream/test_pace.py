"""Calls that come one after the other share a transaction; one that comes alone waits for nobody, and none for more than fit a slice."""

import math

from hypothesis import given
from hypothesis import strategies as st

from pipelines.stream import pace, worker
from pipelines.stream.pace import Pace


def test_a_call_that_comes_soon_after_others_waits_for_its_next_and_one_alone_does_not(world, monkeypatch) -> None:
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if seconds:
            world.say(2, user="u3")

    monkeypatch.setattr(worker, "SLICE_S", 3_600.0)
    world.say(0, user="u0")
    world.step()
    monkeypatch.setattr(worker.time, "sleep", sleep)
    world.stream._begun_s = 0.0  # long ago
    world.say(0, user="u1")
    assert (world.stream.step(wait_s=5.0).read, slept) == (1, [0.0])
    monkeypatch.setattr(worker, "PACE_S", 3_600.0)
    world.say(1, user="u2")
    assert world.stream.step(wait_s=5.0).read == 2
    assert 0 < slept[1] <= 3_600.0
    world.say(3, user="u4")
    assert (world.step().read, len(slept)) == (1, 2), "where nobody waits for calls, they are not waited for"


seconds = st.floats(0.0, 10.0)


@given(st.lists(st.tuples(st.integers(1, 500), seconds), min_size=1), st.integers(1, 500), seconds, seconds)
def test_what_is_done_next_takes_no_longer_than_a_slice_if_it_takes_as_long_as_the_last(took, most, slice_s, behind_s) -> None:
    held = Pace()
    assert held.fitting(most, slice_s=slice_s, behind_s=behind_s) == 1, "nothing is known"
    for n, spent_s in took:
        held.took(n, spent_s)
    each_s = took[-1][1] / took[-1][0]
    n = held.fitting(most, slice_s=slice_s, behind_s=behind_s)
    assert 1 <= n <= most
    assert n == 1 or n * each_s <= max(slice_s, pace.SHARE * behind_s) * (1 + 1e-9)


def test_more_are_done_at_a_time_where_they_are_cheap_and_where_they_wait_long_already() -> None:
    held = Pace()
    held.took(2, 0.02)
    assert (held.fitting(500, slice_s=0.01), held.fitting(500, slice_s=0.01, behind_s=5.0)) == (1, int(pace.SHARE * 5.0 / 0.01))
    for _ in range(20):
        held.took(10, 0.005)
    assert math.isclose(held.fitting(500, slice_s=0.01), 20, abs_tol=1)
    held.took(0, 5.0)
    assert held.fitting(500, slice_s=0.01) > 1, "nothing was done, so nothing is told"
