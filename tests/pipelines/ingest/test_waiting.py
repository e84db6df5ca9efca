"""Calls of the log, with and without a word on their use: what becomes of them does not depend on how they were drained."""

import os
from contextlib import suppress

import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipelines import tables
from pipelines.errors import InputError
from pipelines.identity import link_id
from pipelines.ingest import drain, permission, reassign, waiting
from pipelines.settings import ConsentSettings, IngestSettings

# who: user, device; what; seconds after the one before; whether its person allows its use, None: says nothing
CALL = st.tuples(
    st.sampled_from([("u1", None), ("u2", None), ("u1", "d1"), ("u2", "d1"), (None, "d1"), (None, "d2"), ("u3", "d2")]),
    st.sampled_from(["view", "view", "order", "identify"]),
    st.sampled_from([0.5, 40, 1_000, 2_500]),
    st.sampled_from([None, None, True, False]),
)
SCHEDULE = st.tuples(st.lists(CALL, min_size=3, max_size=10), st.randoms(use_true_random=False))
SHORT = st.tuples(st.lists(CALL, min_size=4, max_size=6), st.randoms(use_true_random=False))
SCHEDULES = int(os.environ.get("RAPPORT_SCHEDULES", "4"))
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


def check_cuts(new_shop, drawn: list[tuple], random, *, legal_basis: str | None = None) -> None:
    """legal_basis: what the settings declare; half of the calls are then of another source."""
    whole = new_shop(consent=ConsentSettings(legal_basis=legal_basis))
    cut = new_shop(like=whole, consent=whole.settings.consent)
    calls = [(call, "app" if legal_basis and random.random() < 0.5 else "segment") for call in calls_of(whole, drawn, random)]
    for call, source in calls:
        whole.send(call, source=source)
    whole.drain()
    random.shuffle(calls)
    while calls:
        for call, source in [calls.pop() for _ in range(random.randint(1, len(calls)))]:
            cut.send(call, source=source)
        cut.drain()
        assert cut.is_balanced()
    pd.testing.assert_frame_equal(whole.comparable(), cut.comparable(), check_dtype=False)
    pd.testing.assert_frame_equal(declared(whole), declared(cut), check_dtype=False)
    assert cut.ledger() == whole.ledger()


def declared(shop) -> pd.DataFrame:
    """What stands of declarations."""
    consents = shop.table(tables.CONSENTS).query("basis != 'consent'")
    return consents[["identifier", "source", "event_timestamp"]].sort_values(["identifier", "source"]).reset_index(drop=True)


@pytest.mark.slow
@settings(max_examples=SCHEDULES, **QUICK)
@given(SCHEDULE)
def test_any_order_and_any_cut_of_drains_gives_the_events_of_one_drain(new_shop, schedule) -> None:
    check_cuts(new_shop, *schedule)


# -- whichever way a word comes


def check_channels(new_shop, drawn: list[tuple], random) -> None:
    """Words by the log, by file or out of the quarantine, in any order, and what says nothing by the log: as one drain of all."""
    tolerant = IngestSettings(max_future_minutes=100_000)
    whole = new_shop(ingest=tolerant)
    parted = new_shop(like=whole)
    calls = calls_of(whole, drawn, random)
    for call in calls:
        if random.random() < 0.4:  # set aside at first: from the future
            call["receivedAt"] = (pd.Timestamp(call["timestamp"]) - pd.Timedelta(minutes=100)).isoformat()
    whole.send(*calls)
    whole.drain()
    random.shuffle(calls)
    for call in calls:
        if call["context"] and random.random() < 0.6:
            with suppress(InputError):  # set aside as well
                parted.run(call, name=f"{call['messageId']}.jsonl")
        else:
            parted.send(call)
            parted.drain()
        if random.random() < 0.2:  # the rule is mended
            parted.settings = parted.settings.model_copy(update={"ingest": tolerant})
            parted.replay()
        assert parted.is_balanced()
    parted.settings = parted.settings.model_copy(update={"ingest": tolerant})
    parted.replay()
    pd.testing.assert_frame_equal(whole.comparable(), parted.comparable(), check_dtype=False)
    assert parted.is_balanced()
    assert parted.ledger()["applied"] == whole.ledger()["applied"]


@pytest.mark.slow
@settings(max_examples=SCHEDULES, **QUICK)
@given(SHORT)
def test_any_channel_of_a_word_gives_the_events_of_one_drain(new_shop, schedule) -> None:
    check_channels(new_shop, *schedule)


def test_a_word_by_file_lets_in_what_waits_in_the_log_and_is_counted_alone(shop, monkeypatch) -> None:
    shop.send(silent(shop, "m1", 10), silent(shop, "m2", 10, user="u2"), silent(shop, "m3", 11, user=None, anonymousId="d1"))
    shop.drain()
    with monkeypatch.context() as patch:  # the control
        patch.setattr(waiting, "_kept_out", lambda *_: [])
        shop.run(shop.call("m4", 5))
    assert ids(shop) == ["m4"]
    report = shop.run(shop.call("m5", 6, anonymousId="d1"), name="more.jsonl")
    assert (report.read, report.accepted, report.stored, report.readmitted) == (1, 1, 1, 2)
    assert ids(shop) == ["m1", "m3", "m4", "m5"]
    assert shop.ledger() | {"applied": 4, "consent_dropped": 1} == shop.ledger()
    assert shop.is_balanced()


def test_what_a_mapped_file_declares_lets_in_nothing_of_another_source_that_waits(shop) -> None:
    shop.send(silent(shop, "m1", 10))
    shop.drain()
    shop.mapped([(0, "u1", "look", "i1", 1, "x")])
    assert len(shop.events()) == 1
    assert shop.is_balanced()


def test_what_comes_out_of_the_quarantine_brings_its_word_and_waits_for_one(shop) -> None:
    tolerant = shop.settings.model_copy(update={"ingest": IngestSettings(max_future_minutes=1_000)})
    shop.send(silent(shop, "m1", 300, received=10), silent(shop, "m2", 20), shop.call("m3", 200, receivedAt=shop.at(25), user="u2"))
    shop.send(silent(shop, "m4", 210, user="u2", received=211))
    assert shop.drain().quarantined == 2
    report = shop.replay(settings=tolerant)
    assert (report.read, report.applied, report.consent_dropped, report.duplicate, report.remaining) == (2, 1, 1, 0, 0)
    assert ids(shop) == ["m3", "m4"]
    shop.send(shop.call("m5", 5, receivedAt=shop.at(400)))
    drain(shop.home, settings=tolerant)
    assert ids(shop) == ["m1", "m2", "m3", "m4", "m5"]
    assert shop.is_balanced()


def test_a_link_that_is_decided_lets_in_what_the_other_name_did(shop) -> None:
    shop.run(shop.call("m1", 0))
    shop.send(silent(shop, "m2", 10, user="u2"), silent(shop, "m3", 10, user="u3"))
    shop.drain()
    left, right = sorted(shop.name("user_id", user) for user in ("u1", "u2"))
    edge = {"link_id": link_id(left, right), "left": left, "right": right, "kind": "manual", "state": "link", "weight": 1.0}
    rows = pd.DataFrame([edge | {"evidence": "{}", "decided_by": "tests", "created_timestamp": pd.Timestamp(shop.at(30))}])
    tables.write(shop.home, tables.IDENTITY_EDGES, rows)
    reassign(shop.home, settings=shop.settings)
    assert ids(shop) == ["m1", "m2"]
    assert shop.events()["customer_id"].nunique() == 1
    assert shop.is_balanced()


# -- with a declared basis, which ends when a source begins to speak


@pytest.mark.slow
@settings(max_examples=SCHEDULES, **QUICK)
@given(SHORT)
def test_with_a_declared_basis_any_order_and_any_cut_gives_the_events_of_one_drain(new_shop, schedule) -> None:
    check_cuts(new_shop, *schedule, legal_basis="contract")


def test_control_where_a_source_that_speaks_now_never_had_a_basis_the_cut_decides(new_shop, monkeypatch) -> None:
    """As it was."""

    def from_the_beginning(db) -> frozenset[int]:
        found = find_speaking(db)
        db.execute("UPDATE speaking SET since = TIMESTAMPTZ '1970-01-01', is_earlier = false").fetchall()
        return found

    find_speaking = permission.find_speaking
    monkeypatch.setattr(permission, "find_speaking", from_the_beginning)
    with pytest.raises(AssertionError):
        check_cuts(new_shop, [(("u2", None), "view", 40, True), (("u1", None), "view", 40, None)], _Backwards(), legal_basis="contract")


def test_a_source_that_spoke_earlier_than_was_known_loses_what_its_basis_covered_since_but_for_the_own_words(shop) -> None:
    shop.settings = shop.settings.model_copy(update={"consent": ConsentSettings(legal_basis="contract")})
    shop.send(silent(shop, "m1", 10), silent(shop, "m2", 20, user="u2"), silent(shop, "m3", 20, user="u3"), source="app")
    shop.send(silent(shop, "m4", 20, user="u4"))
    shop.drain()
    assert ids(shop) == ["m1", "m2", "m3", "m4"]
    shop.send(shop.call("m5", 15, user="u3", receivedAt=shop.at(40)), source="app")
    report = shop.drain()
    assert report.withdrawn == 1
    assert ids(shop) == ["m1", "m3", "m4", "m5"]
    assert set(declared(shop)["identifier"]) == {shop.name("user_id", "u1"), shop.name("user_id", "u4")}
    assert shop.table(tables.SPEAKING_SOURCES).values.tolist() == [["app", pd.Timestamp(shop.at(15))]]
    shop.send(shop.call("m6", 18, user="u2", receivedAt=shop.at(50)), silent(shop, "m7", 30), silent(shop, "m8", 5), source="app")
    shop.drain()
    assert ids(shop) == ["m1", "m2", "m3", "m4", "m5", "m6", "m8"]
    assert shop.is_balanced()


# -- one by one


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
    monkeypatch.setattr(waiting, "_kept_out", lambda *_: [])
    with pytest.raises(AssertionError):
        check_cuts(new_shop, [(("u1", None), "view", 40, True), (("u1", None), "view", 40, None)], _Backwards())


class _Backwards:
    """The last call first, one at a time."""

    def randrange(self, first: int, last: int) -> int:
        return first

    def randint(self, first: int, last: int) -> int:
        return 1

    def random(self) -> float:
        """All of one source."""
        return 1.0

    def shuffle(self, some: list) -> None:
        """They are taken from the end already."""
