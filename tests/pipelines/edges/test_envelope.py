"""What a message says beside its body, and what stands for it where it says nothing."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.edges import envelope
from pipelines.log import Incoming, Logged

NAME = st.text(min_size=1, max_size=20)


@settings(max_examples=100)
@given(NAME, NAME, st.lists(st.from_regex(r"[a-z_]{1,9}:[0-9a-f]{4}", fullmatch=True), max_size=3), st.binary(), st.integers(0, 10**16 - 1))
def test_an_event_comes_back_from_its_message(source, message_id, subjects, payload, received_us):
    event = Incoming(source, message_id, tuple(subjects), payload, received_us)
    read = envelope.logged("1-0", payload, envelope.headers(event), edge="redis", known_as="x", received_us=10**16, tries=2)
    assert read == Logged("1-0", source, tuple(subjects), payload, received_us, 2, message_id)


def test_a_bare_message_is_of_its_edge_and_known_by_its_place():
    read = envelope.logged((0, 7), b"{}", {}, edge="kafka", known_as="kafka:t:0:7", received_us=5, tries=0)
    assert read == Logged((0, 7), "kafka", (), b"{}", 5, 0, "kafka:t:0:7")


def test_a_time_of_receipt_that_is_none_is_not_believed():
    for text in ("", "soon", "-1", "1e9", "٣", "9" * 40):
        assert envelope.logged(1, b"", {"received_us": text}, edge="e", known_as="k", received_us=5, tries=0).received_us == 5


def test_a_receipt_after_the_broker_s_own_is_not_believed():
    assert envelope.logged(1, b"", {"received_us": "6"}, edge="e", known_as="k", received_us=5, tries=0).received_us == 5
    assert envelope.logged(1, b"", {"received_us": "4"}, edge="e", known_as="k", received_us=5, tries=0).received_us == 4
