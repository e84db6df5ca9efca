"""Load shedding on a simulated loop: rounds of requests, answered one after the other, on a clock that only work moves."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving import access
from serving.crowd import AT_ONCE, SHARE, Crowd, Priority, priority_of
from serving.redis_source import SILENCE_S

DEADLINE_S = 0.25
# of processor time: an answer of a recommender, a refusal when its turn comes, one when it is read, and reading one that is let in
ANSWER_S, REFUSAL_S, TURNED_AWAY_S, READ_S = 0.001, 0.00006, 0.000015, 0.00003


class Loop:
    """A worker that is offered `rate` requests a second, evenly, on as many connections as it takes. `is_open`: nobody is turned away.

    What came while it worked is read in one go, then worked on in one go. `answer`: seconds that an answer takes, by when it begins.
    """

    def __init__(self, rate, *, is_open=False, has_gate=True, answer=lambda now: ANSWER_S, seed=3):
        self.now, self.calls = 0.0, []
        self.crowd = Crowd(DEADLINE_S, clock=lambda: self.now, loop=lambda: self)
        self.rate, self.is_open, self.has_gate, self.answer, self.random = rate, is_open, has_gate, answer, random.Random(seed)
        self.in_time, self.refused, self.asked, self.took = Counter(), Counter(), Counter(), []

    def call_soon(self, call):
        self.calls.append(call)

    def run(self, seconds):
        read, sent = [], 0
        while self.now < seconds:
            calls, self.calls = self.calls, []
            for call in calls:
                call()
            for since, priority in read:
                self.serve(since, priority)
            read = []
            if not self.calls:
                self.now = max(self.now, sent / self.rate)  # it waits for the next one
            began = self.now
            while sent / self.rate <= began:
                read += self.reads(sent / self.rate, self.random.choice(list(Priority)))
                sent += 1
        return self

    def reads(self, since, priority):
        self.asked[priority] += 1
        if self.has_gate and not self.is_open and self.crowd.is_long and not self.crowd.lets_in(priority):
            self.now += TURNED_AWAY_S
            self.refused[priority] += 1
            return []
        self.now += READ_S
        self.crowd.stand_in_line()
        return [(since, priority)]

    def serve(self, since, priority):
        if self.crowd.refuses(priority, self.crowd.arrive()) and not self.is_open:
            self.now += REFUSAL_S
            self.refused[priority] += 1
        else:
            self.now += self.answer(self.now)
            self.took.append(self.now - since)
            self.in_time[priority] += self.took[-1] <= DEADLINE_S
        self.crowd.leave()


PEAK = 1 / (ANSWER_S + READ_S)  # requests a second


@pytest.mark.parametrize("share", [0.1, 0.95])
def test_load_that_can_be_answered_in_time_is(share):
    loop = Loop(share * PEAK).run(5.0)
    assert not loop.refused
    assert sum(loop.in_time.values()) == pytest.approx(5.0 * share * PEAK, rel=0.02)


@pytest.mark.parametrize("times", [2, 10])
def test_ten_times_the_load_leaves_most_of_the_peak_in_time(times):
    loop = Loop(times * PEAK).run(5.0)
    assert sum(loop.in_time.values()) >= 0.8 * 5.0 * PEAK
    late = sorted(loop.took)[int(len(loop.took) * 0.99)]
    assert late <= DEADLINE_S


@pytest.mark.parametrize("control", ["is_open", "has_gate"])
def test_without_refusals_or_where_each_was_made_a_task_first_little_is_left_of_the_peak(control):
    loop = Loop(10 * PEAK, **{control: control == "is_open"}).run(3.0)
    assert sum(loop.in_time.values()) < 0.6 * 3.0 * PEAK


@pytest.mark.parametrize("answer_s", [0.0002, 0.004])
def test_how_many_are_let_in_follows_what_an_answer_takes(answer_s):
    loop = Loop(3 / answer_s, answer=lambda now: answer_s).run(4.0)
    assert loop.crowd.answer_s == pytest.approx(answer_s, rel=0.1)
    known = sorted(loop.took[len(loop.took) // 4 :])  # once it was measured
    assert known[int(len(known) * 0.99)] <= DEADLINE_S
    assert sum(loop.in_time.values()) >= 0.75 * 4.0 / (answer_s + READ_S)


@pytest.mark.parametrize(("in_a_row", "is_anybody_refused"), [(1, False), (6, True)])
def test_one_who_waits_for_a_silent_store_is_no_reason_to_turn_others_away(in_a_row, is_anybody_refused):
    """At 200 requests a second. The control is what the guard of the store prevents: that those behind wait for it too."""
    stalls = []

    def answer(now):
        if len(stalls) < in_a_row * (int(now) + 1):
            stalls.append(now)
            return SILENCE_S
        return ANSWER_S

    loop = Loop(200, answer=answer).run(5.0)
    assert len(stalls) == 5 * in_a_row
    assert bool(loop.refused) == is_anybody_refused
    assert is_anybody_refused or max(loop.took) <= DEADLINE_S


@pytest.mark.parametrize("rate", [100, 200])
def test_whoever_came_while_the_machine_stood_still_is_answered(rate):
    """For longer than the deadline, once a second; half as long beside the answers of others, which must not be taken for dearer."""
    still = {0.0: 1.1 * DEADLINE_S, 0.5: 0.5 * DEADLINE_S}
    met = set()

    def answer(now):
        part = now // 0.5 * 0.5
        if part in met:
            return 1.5 * ANSWER_S
        met.add(part)
        return still[part % 1.0]

    loop = Loop(rate, answer=answer).run(6.0)
    assert len(met) == 12
    assert not loop.refused


def test_the_less_urgent_is_refused_first():
    loop = Loop(5 * PEAK).run(5.0)
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


@settings(max_examples=100)
@given(waited=st.floats(0, 1), more=st.floats(0, 1), under_way=st.integers(0, 200), is_crowded=st.booleans())
def test_who_waited_longer_or_is_less_urgent_is_never_preferred(waited, more, under_way, is_crowded):
    crowd = Crowd(DEADLINE_S)
    crowd.under_way, crowd.is_crowded = under_way, is_crowded
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
