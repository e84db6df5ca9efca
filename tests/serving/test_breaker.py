"""The breaker against a model of it: what was allowed, what had ended before, and what the clock said."""

import threading

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serving.breaker import CLOSED, OPEN, Breaker


class Machine(RuleBasedStateMachine):
    """Permits end in any order and at any time, late ones too."""

    @initialize(limit=st.integers(1, 4), pause_s=st.sampled_from([0.5, 1.0]), probe_s=st.sampled_from([0.25, 1.0, 3.0]))
    def begin(self, limit, pause_s, probe_s):
        self.now, self.told = 0.0, []
        self.limit, self.pause_s, self.probe_s = limit, pause_s, probe_s
        self.breaker = Breaker(limit=limit, pause_s=pause_s, probe_s=probe_s, clock=lambda: self.now, tell=self.told.append)
        self.out = []  # (permit, the breaker's turn when it was given, when)
        self.turn, self.row, self.quiet_until, self.is_open = 0, 0, 0.0, False
        self.probe = None  # the one that counts

    @rule(seconds=st.sampled_from([0.1, 0.25, 0.5, 1.0, 3.0]))
    def time_passes(self, seconds):
        self.now += seconds

    @rule()
    def enters(self):
        permit = self.breaker.enter()
        if not self.is_open:
            assert permit is not None
            assert not permit.is_probe
        elif self.now < self.quiet_until:
            assert permit is None
        else:  # never longer than the pause, or a probe's own time: the breaker cannot hang
            assert permit is not None
            assert permit.is_probe
            self.probe = permit
            self.quiet_until = self.now + max(self.pause_s, self.probe_s)
        if permit is not None:
            self.out.append((permit, self.turn, self.now))

    @precondition(lambda self: self.out)
    @rule(data=st.data(), is_success=st.booleans())
    def ends(self, data, is_success):
        permit, turn, since = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        (self.breaker.succeeded if is_success else self.breaker.failed)(permit)
        if turn != self.turn or (permit.is_probe and permit is not self.probe):
            return  # late: nothing it says counts
        if permit.is_probe:
            if not is_success:
                self.probe, self.quiet_until = None, self.now + self.pause_s
            elif self.now < since + self.probe_s:
                self.turn, self.row, self.is_open = self.turn + 1, 0, False
        else:
            self.row = 0 if is_success else self.row + 1
            if self.row == self.limit:
                self.turn, self.is_open, self.quiet_until = self.turn + 1, True, self.now + self.pause_s

    @invariant()
    def state_is_the_models_and_was_told(self):
        if not hasattr(self, "told"):
            return
        assert self.breaker.is_open == self.is_open
        assert self.told == [OPEN, CLOSED] * (self.turn // 2) + [OPEN] * (self.turn % 2)


TestBreaker = Machine.TestCase
TestBreaker.settings = settings(max_examples=60, stateful_step_count=40)


def test_success_that_began_before_the_breaker_opened_does_not_close_it():
    now = [0.0]
    breaker = Breaker(limit=1, pause_s=1.0, clock=lambda: now[0])
    slow, quick = breaker.enter(), breaker.enter()
    breaker.failed(quick)
    assert breaker.is_open
    now[0] = 1.0
    probe = breaker.enter()
    breaker.succeeded(slow)
    assert breaker.is_open
    breaker.succeeded(probe)
    assert not breaker.is_open


def test_probe_that_never_returns_does_not_keep_the_breaker_open():
    now = [0.0]
    breaker = Breaker(limit=1, pause_s=1.0, probe_s=2.0, clock=lambda: now[0])
    breaker.failed(breaker.enter())
    now[0] = 1.0
    lost = breaker.enter()
    assert [breaker.enter() for _ in range(3)] == [None] * 3
    now[0] = 3.0
    breaker.succeeded(lost)
    assert breaker.is_open  # it was too late
    breaker.succeeded(breaker.enter())
    assert not breaker.is_open


def test_many_threads_at_an_open_breaker_send_one_probe():
    now = [0.0]
    breaker = Breaker(limit=1, pause_s=1.0, clock=lambda: now[0])
    breaker.failed(breaker.enter())
    now[0] = 1.0
    gate, given = threading.Barrier(8), []

    def knock():
        gate.wait()
        given.append(breaker.enter())

    threads = [threading.Thread(target=knock) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(permit is not None for permit in given) == 1
