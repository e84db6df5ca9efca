from hypothesis import given
from hypothesis import strategies as st

from serving.remembered import OLDEST_S, Remembered


class Time:
    now = 0.0

    def __call__(self):
        return self.now


def kept(*, most=100):
    time = Time()
    remembered = Remembered(most=most, clock=time)
    remembered.keep("c1", ["a", "b"], [2.0, 1.0], "7")
    return remembered, time


def test_answer_is_there_until_it_is_too_old():
    remembered, time = kept()
    time.now = OLDEST_S
    assert (remembered.of("c1").item_ids, remembered.of("c1").version) == (["a", "b"], "7")
    time.now = OLDEST_S + 1
    assert remembered.of("c1") is None


def test_what_is_too_old_is_not_kept_in_memory():
    remembered, time = kept()
    time.now = OLDEST_S + 1
    remembered.keep("c2", ["a"], [1.0], "7")
    assert list(remembered._answers) == ["c2"]


def test_who_is_forgotten_is_forgotten_and_nobody_else():
    remembered, _ = kept()
    remembered.keep("c2", ["a"], [1.0], "7")
    remembered.forget("c1")
    assert remembered.of("c1") is None
    assert remembered.of("c2") is not None


@given(st.lists(st.integers(0, 20), max_size=60))
def test_no_more_than_so_many_customers_are_remembered_the_last_ones(asked):
    remembered = Remembered(most=5)
    for number in asked:
        remembered.keep(f"c{number}", [], [], "1")
    last = list(dict.fromkeys(reversed(asked)))
    assert [number for number in range(21) if remembered.of(f"c{number}")] == sorted(last[:5])
