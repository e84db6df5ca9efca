from hypothesis import given
from hypothesis import strategies as st

from serving.remembered import Remembered

OLDEST_S = 60.0


class Time:
    now = 0.0

    def __call__(self):
        return self.now


def kept(*, most=100, oldest_s=OLDEST_S):
    time = Time()
    remembered = Remembered(most=most, oldest_s=oldest_s, clock=time)
    remembered.keep("c1", "their answer")
    return remembered, time


def test_answer_is_there_until_it_is_too_old():
    remembered, time = kept()
    time.now = OLDEST_S - 1
    assert remembered.of("c1") == "their answer"
    time.now = OLDEST_S
    assert remembered.of("c1") is None


def test_what_is_too_old_is_not_kept_in_memory():
    remembered, time = kept()
    time.now = OLDEST_S
    remembered.keep("c2", "another")
    assert list(remembered._found) == ["c2"]


def test_no_time_remembers_nothing():
    remembered, _ = kept(oldest_s=0)
    assert remembered.of("c1") is None
    assert not remembered._found


def test_who_is_forgotten_is_forgotten_and_nobody_else():
    remembered, _ = kept()
    remembered.keep("c2", "another")
    remembered.forget("c1", "c3")
    assert remembered.of("c1") is None
    assert remembered.of("c2") == "another"


@given(st.lists(st.integers(0, 20), max_size=60))
def test_no_more_than_so_many_customers_are_remembered_the_last_ones(asked):
    remembered = Remembered(most=5, oldest_s=OLDEST_S)
    for number in asked:
        remembered.keep(f"c{number}", number + 1)
    last = list(dict.fromkeys(reversed(asked)))
    assert [number for number in range(21) if remembered.of(f"c{number}")] == sorted(last[:5])
