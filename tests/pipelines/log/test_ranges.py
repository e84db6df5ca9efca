"""Ranges of positions: what is written is read back, and holds just what was put in."""

from hypothesis import given
from hypothesis import strategies as st

from pipelines.log.ranges import Ranges

POSITIONS = st.sets(st.integers(1, 60))


@given(st.lists(POSITIONS, max_size=4))
def test_ranges_of_several_runs_hold_just_their_positions(runs: list[set[int]]) -> None:
    texts = [f"{Ranges.of(run)} p{number}" for number, run in enumerate(runs)]
    ranges = Ranges.read(texts)
    assert {position for position in range(100) if position in ranges} == set().union(*runs)
    assert str(Ranges.read([str(ranges)])) == str(ranges)


def test_ranges_are_as_few_as_can_be_and_hold_no_position_of_another_log() -> None:
    assert str(Ranges([(5, 9), (1, 2), (3, 3), (7, 12)])) == "1-3,5-12"
    assert (0, 5) not in Ranges([(1, 9)])
    assert "5" not in Ranges([(1, 9)])
    assert str(Ranges()) == ""
