"""What Kafka keeps for a group: any reader that comes after knows what is done and how often the rest was given."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.edges.progress import MAX_TEXT, Progress

STEPS = st.lists(st.tuples(st.sampled_from(["give", "again", "commit", "restart"]), st.integers(0, 40)), max_size=60)


@settings(max_examples=200)
@given(STEPS, st.integers(0, 10**6))
def test_a_successor_knows_exactly_what_its_predecessor_knew(steps, start):
    progress, tries, done, following = Progress(start), {}, set(), start
    for step, n in steps:
        if step == "give":
            for offset in progress.see(range(following, following + n)):
                assert progress.give(offset) == 0
                tries[offset] = 1
            following += n
        elif step == "again" and tries:
            offset = sorted(tries)[n % len(tries)]
            assert progress.give(offset) == tries[offset]
            tries[offset] += 1
        elif step == "commit" and tries:
            offset = sorted(tries)[n % len(tries)]
            progress.commit(offset)
            del tries[offset]
            done.add(offset)
        else:
            progress = Progress(progress.offset, progress.text)
            assert progress.see(range(progress.offset, following)) == set(tries)
        assert (progress.tries, progress.next) == (tries, following)
        assert progress.offset == min(tries, default=following)


def test_a_text_that_would_be_too_long_makes_the_later_events_come_again_and_loses_none():
    progress = Progress(0)
    for offset in progress.see(range(10_000)):
        progress.give(offset)
    for offset in range(1, 10_000, 2):
        progress.commit(offset)
    assert len(progress.text) <= MAX_TEXT + 40
    successor = Progress(progress.offset, progress.text)
    open_ones = successor.see(range(10_000))
    assert set(range(0, 10_000, 2)) <= open_ones, "none is lost"
    assert 1 not in open_ones, "what fits in is remembered"
    assert 9_999 in open_ones, "the rest comes again"


def test_what_the_broker_skips_holds_nothing_up():
    progress = Progress(100, "1 110 0+10x2")
    assert progress.offset == 100
    assert progress.see([105, 106, 120]) == {105, 106, 120}, "100 to 104 were deleted, 107 to 109 compacted away"
    assert progress.tries == {105: 2, 106: 2}
    for offset in (105, 106):
        progress.commit(offset)
    assert progress.offset == 110


def test_the_text_of_somebody_else_counts_as_none():
    for text in ("", "hello", "9 50 0+1x1", "1", "1 x", "1 ٣٤", "1 -5 0+1x1"):
        assert (Progress(7, text).offset, Progress(7, text).next, Progress(7, text).tries) == (7, 7, {}), text
