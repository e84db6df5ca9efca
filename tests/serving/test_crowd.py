"""Load shedding on a simulated loop: rounds of requests, answered one after the other, on a clock that only work moves."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving import access
from serving.crowd import AT_ONCE, SHARE, Crowd, Priority, priority_of

DEADLINE_S = 0.25
ANSWER_S, REFUSAL_S = 0.001, 0.00004  # of processor time: an answer of a recommender, and a refusal


class Loop:
    """A worker with `callers` who ask again as soon as they have their answer. `is_open`: nobody is turned away."""

    def __init__(self, callers, *, is_open=False, seed=3):
        self.now, self.calls = 0.0, []
        self.crowd = Crowd(DEADLINE_S, clock=lambda: self.now, loop=lambda: self)
        self.callers, self.is_open, self.random = callers, is_open, random.Random(seed)
        self.in_time, self.refused, self.asked, self.took = Counter(), Counter(), Counter(), []

    def call_soon(self, call):
        self.calls.append(call)

    def run(self, seconds):
        waiting = [(self.now, self.priority()) for _ in range(self.callers)]
        while self.now < seconds:
            for call in self.calls:
                call()
            self.calls.clear()
            again = []
            for since, priority in waiting:
                again.append((self.serve(since, priority), self.priority()))
            waiting = again
        return self

    def priority(self):
        return self.random.choice(list(Priority))

    def serve(self, since, priority):
        self.asked[priority] += 1
        if self.crowd.refuses(priority, self.crowd.arrive()) and not self.is_open:
            self.now += REFUSAL_S
            self.refused[priority] += 1
            return self.now
        self.now += ANSWER_S
        self.took.append(self.now - since)
        self.in_time[priority] += self.took[-1] <= DEADLINE_S
        return self.now


@pytest.mark.parametrize("callers", [8, 50])
def test_load_that_can_be_answered_in_time_is(callers):
    loop = Loop(callers).run(5.0)
    assert not loop.refused
    assert sum(loop.in_time.values()) == pytest.approx(5.0 / ANSWER_S, rel=0.02)


@pytest.mark.parametrize("callers", [250, 500])
def test_ten_times_the_load_leaves_most_of_the_peak_in_time(callers):
    loop = Loop(callers).run(5.0)
    assert sum(loop.in_time.values()) >= 0.8 * 5.0 / ANSWER_S
    late = sorted(loop.took)[int(len(loop.took) * 0.99)]
    assert late <= DEADLINE_S
    assert sum(Loop(callers, is_open=True).run(5.0).in_time.values()) < 0.8 * 5.0 / ANSWER_S  # what it would be without


def test_the_less_urgent_is_refused_first():
    loop = Loop(500).run(5.0)
    answered = [1 - loop.refused[priority] / loop.asked[priority] for priority in Priority]
    assert answered == sorted(answered)
    assert answered[-1] > 2 * answered[0]


def test_one_long_round_of_a_busy_machine_turns_nobody_away():
    loop = Loop(1)
    loop.crowd.arrive()
    loop.now += 0.5 * DEADLINE_S  # the processor was somebody else's
    assert not any(loop.crowd.refuses(priority, loop.crowd.arrive()) for priority in Priority)


def test_loop_that_ended_in_the_middle_of_a_round_leaves_nothing_behind():
    loops, now = [Loop(1), Loop(1)], [0.0]
    crowd = Crowd(DEADLINE_S, clock=lambda: now[0], loop=lambda: loops[0])
    crowd.arrive()
    now[0] += 100 * DEADLINE_S
    loops.pop(0)
    assert crowd.arrive() == 0.0


@settings(max_examples=100, deadline=None)
@given(waited=st.floats(0, 1), more=st.floats(0, 1), under_way=st.integers(0, 200), is_crowded=st.booleans())
def test_who_waited_longer_or_is_less_urgent_is_never_preferred(waited, more, under_way, is_crowded):
    crowd = Crowd(DEADLINE_S)
    crowd.under_way, crowd._is_crowded = under_way, is_crowded
    refused = [crowd.refuses(priority, waited) for priority in Priority]
    assert refused == sorted(refused, reverse=True)
    later = [crowd.refuses(priority, waited + more) for priority in Priority]
    assert all(b or not a for a, b in zip(refused, later, strict=True))


def test_work_that_waits_for_others_is_bounded_in_number():
    crowd = Crowd(DEADLINE_S)
    for _ in range(AT_ONCE[Priority.DECISION]):
        assert not crowd.refuses(Priority.DECISION, 0.0)
        crowd.__enter__()
    assert crowd.refuses(Priority.DECISION, 0.0)
    crowd.__exit__()
    assert not crowd.refuses(Priority.DECISION, 0.0)


def test_every_route_is_of_a_known_urgency_and_events_and_health_are_never_refused():
    never = {*access.COLLECTION, access.PIXEL, "/healthz", "/readyz", "/livez", "/metrics"}
    for path in access.ROUTES:
        asked = path.replace("{customer_id}", "c1").replace("{model}", "churn")
        assert (priority_of(asked) is None) == (path in never)
    assert priority_of("/score/return_risk") is priority_of("/churn") is Priority.SCORES
    assert list(SHARE) == list(AT_ONCE) == list(Priority)
