"""Calls of the log, with and without a word on their use: what becomes of them does not depend on how they were drained."""

import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from pipelines import tables
from pipelines.ingest import waiting
from pipelines.settings import ConsentSettings

# who: user, device; what; seconds after the one before; whether its person allows its use, None: says nothing
CALL = st.tuples(
    st.sampled_from([("u1", None), ("u2", None), ("u1", "d1"), ("u2", "d1"), (None, "d1"), (None, "d2"), ("u3", "d2")]),
    st.sampled_from(["view", "view", "order", "identify"]),
    st.sampled_from([0.5, 40, 1_000, 2_500]),
    st.sampled_from([None, None, True, False]),
)
SCHEDULE = st.tuples(st.lists(CALL, min_size=3, max_size=10), st.randoms(use_true_random=False))
QUICK = {"deadline": None, "derandomize": True, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck)}


def calls_of(shop, drawn: list[tuple], random) -> list[dict]:
    """The calls in the order in which they happened, received in any, within a day."""
    told, minute = [], 0.0
    for number, ((user, device), kind, seconds, word) in enumerate(drawn):
        minute += seconds / 60
        fields = {
            "context": {} if word is None else shop.allowed if word else shop.refused,
            "receivedAt": shop.at(random.randrange(600, 900)),
        }
        fields |= {"anonymousId": device} if device else {}
        if kind == "identify":
            told.append(shop.call(f"m{number}", minute, user=user, type="identify", traits={"region": f"r{number % 3}"}, **fields))
        elif kind == "view":
            told.append(shop.call(f"m{number}", minute, user=user, **fields))
        else:
            told.append(shop.order(f"m{number}", minute, user=user, **fields))
    return told


def check_cuts(new_shop, drawn: list[tuple], random) -> None:
    whole = new_shop()
    cut = new_shop(like=whole)
    calls = calls_of(whole, drawn, random)
    whole.send(*calls)
    whole.drain()
    random.shuffle(calls)
    while calls:
        some = [calls.pop() for _ in range(random.randint(1, len(calls)))]
        cut.send(*some)
        cut.drain()
        assert cut.is_balanced()
    pd.testing.assert_frame_equal(whole.comparable(), cut.comparable(), check_dtype=False)
    assert cut.ledger() == whole.ledger()


@settings(max_examples=4, **QUICK)
@given(SCHEDULE)
def test_any_order_and_any_cut_of_drains_gives_the_events_of_one_drain(new_shop, schedule) -> None:
    check_cuts(new_shop, *schedule)


@pytest.mark.slow
@settings(max_examples=15, **QUICK | {"derandomize": False})
@seed(20_261_121)
@given(SCHEDULE)
def test_any_order_and_any_cut_of_drains_gives_the_events_of_one_drain_in_many_schedules(new_shop, schedule) -> None:
    check_cuts(new_shop, *schedule)


def silent(shop, message: str, minutes: float, *, received: float | None = None, **fields: object) -> dict:
    return shop.call(message, minutes, context={}, receivedAt=shop.at(minutes if received is None else received), **fields)


def ids(shop) -> list[str]:
    return sorted(shop.events()["event_id"])


def test_an_event_without_a_word_is_let_in_by_one_that_comes_later_and_was_said_before(shop) -> None:
    shop.send(silent(shop, "m1", 10), silent(shop, "m2", 10, user="u2"))
    assert shop.drain().consent_dropped == 2
    assert shop.ledger() | {"consent_dropped": 2, "applied": 0} == shop.ledger()
    shop.send(shop.call("m3", 5, receivedAt=shop.at(30)))
    report = shop.drain()
    assert (report.read, report.accepted, report.duplicate, report.readmitted) == (1, 1, 0, 1)
    assert ids(shop) == ["m1", "m3"]
    assert shop.ledger() | {"consent_dropped": 1, "applied": 2} == shop.ledger()
    assert shop.is_balanced()


def test_a_word_of_after_the_event_does_not_let_it_in(shop) -> None:
    shop.send(silent(shop, "m1", 10))
    shop.drain()
    shop.send(shop.call("m2", 11))
    shop.drain()
    assert ids(shop) == ["m2"]


def test_after_its_hours_an_event_waits_no_longer_and_with_none_it_never_does(shop, new_shop) -> None:
    hurried = new_shop(like=shop, consent=ConsentSettings(wait_hours=0))
    for one, hours, kept in ((shop, 25, ["m2"]), (hurried, 1, ["m2"])):
        one.send(silent(one, "m1", 10))
        one.drain()
        one.send(one.call("m2", 5, receivedAt=one.at(10 + 60 * hours)))
        one.drain()
        assert ids(one) == kept
        assert one.is_balanced()
    assert not tables.count(hurried.home, tables.WAITING)
    assert tables.count(shop.home, tables.WAITING) == 0


def test_a_link_to_somebody_who_spoke_lets_in_what_was_done_on_the_device_before(shop) -> None:
    shop.send(shop.call("m1", 0))
    shop.send(silent(shop, "m2", 10, user=None, anonymousId="d1"), silent(shop, "m3", 11, user=None, anonymousId="d2"))
    shop.drain()
    assert ids(shop) == ["m1"]
    shop.send(silent(shop, "m4", 20, anonymousId="d1"))
    shop.drain()
    assert ids(shop) == ["m1", "m2", "m4"]


def test_who_said_no_in_the_event_itself_does_not_wait(shop) -> None:
    shop.send(shop.call("m1", 10, context=shop.refused), silent(shop, "m2", 11, user="u2"))
    shop.drain()
    waiting_now = shop.table(tables.WAITING)
    assert waiting_now["position"].tolist() == [2]
    assert set(waiting_now.columns) == set(tables.WAITING.schema.names)  # type: ignore[union-attr]


def test_an_erased_person_is_not_let_in(shop) -> None:
    shop.send(silent(shop, "m1", 10))
    shop.drain()
    with shop.vault() as vault:
        vault.entomb([vault.pseudonym("user_id", "u1")], erased_us=1, receipt="r")
    shop.send(shop.call("m2", 5, receivedAt=shop.at(20)), shop.call("m3", 5, user="u2"))
    shop.drain()
    assert ids(shop) == ["m3"]
    assert shop.is_balanced()


def test_control_without_waiting_the_cut_decides(shop, new_shop, monkeypatch) -> None:
    monkeypatch.setattr(waiting, "again", lambda *_: [])
    with pytest.raises(AssertionError):
        check_cuts(new_shop, [(("u1", None), "view", 40, True), (("u1", None), "view", 40, None)], _Backwards())


class _Backwards:
    """The last call first, one at a time."""

    def randrange(self, first: int, last: int) -> int:
        return first

    def randint(self, first: int, last: int) -> int:
        return 1

    def shuffle(self, some: list) -> None:
        """They are taken from the end already."""
