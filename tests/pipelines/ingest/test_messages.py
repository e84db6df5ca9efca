"""A message is known for ever by its source and id, whatever became of it."""

import pandas as pd

from pipelines import tables
from pipelines.ingest.messages import halves_sql, message_sql, whole_sql
from pipelines.settings import ConsentSettings, Settings
from pipelines.sources import connect


def outcomes(shop) -> dict[str, int]:
    return shop.table(tables.MESSAGES)["outcome"].value_counts().to_dict()


def test_a_retry_is_a_duplicate_and_the_first_arrival_stays(shop) -> None:
    report = shop.run(
        shop.call("m1", receivedAt=shop.at(5)), shop.call("m1", receivedAt=shop.at(2)), shop.call("m1", receivedAt=shop.at(9))
    )
    assert (report.accepted, report.duplicate) == (1, 2)
    assert shop.events()["created_timestamp"][0] == pd.Timestamp(shop.at(2))


def test_the_same_id_from_two_sources_is_two_events(shop) -> None:
    shop.mapped([(0, "u1", "look", "i1", 1, "x")], name="a")
    shop.mapped([(0, "u1", "look", "i1", 1, "x")], name="b")
    events = shop.events()
    assert list(events["source"]) == ["a", "b"]
    assert events["event_id"].nunique() == events["customer_id"].nunique() == 1


def test_a_row_that_consent_kept_out_is_a_duplicate_when_it_comes_again(shop) -> None:
    calls = [shop.call("m1", context={}), shop.call("m2", 1)]
    first = shop.run(*calls)
    assert (first.accepted, first.consent_dropped) == (2, 1)
    second = shop.run(*calls, shop.call("m3", 2), name="more.jsonl")
    assert (second.accepted, second.duplicate, second.consent_dropped) == (1, 2, 0)
    assert outcomes(shop) == {"applied": 2, "consent_dropped": 1}
    assert shop.is_balanced()


def test_a_basis_declared_since_lets_the_rows_in_and_counts_them_once(shop) -> None:
    path = shop.file(shop.call("m1", context={}), shop.call("m2", 1, context={}))
    assert shop.ingest(path).consent_dropped == 2
    report = shop.ingest(path, settings=Settings(home=shop.home, consent=ConsentSettings(legal_basis="contract")))
    assert (report.accepted, report.duplicate, report.readmitted, report.lines) == (0, 2, 2, 2)
    assert outcomes(shop) == {"applied": 2}
    assert shop.ledger() | {"accepted": 2, "applied": 2, "consent_dropped": 0} == shop.ledger()
    assert shop.is_balanced()


def test_a_late_refusal_takes_events_out_and_their_outcome_with_them(shop) -> None:
    shop.run(shop.call("m1", 0), shop.call("m2", 1, context={}), shop.order("m3", 20, context={}), shop.call("m4", 30))
    assert outcomes(shop) == {"applied": 4}
    report = shop.run(shop.call("late", 10, context=shop.refused, receivedAt=shop.at(60)))
    # m4 carried a permission of its own
    assert list(shop.events()["event_id"]) == ["m1", "m2", "m4"]
    assert (report.withdrawn, report.consent_dropped) == (2, 1)
    assert outcomes(shop) == {"applied": 3, "consent_dropped": 2}
    assert shop.is_balanced()


def test_many_runs_leave_few_files_of_messages(shop, monkeypatch) -> None:
    from pipelines.ingest import publishing

    monkeypatch.setattr(publishing, "_SMALL_FILES", 3)
    for n in range(7):
        shop.run(shop.call(f"m{n}", n), name=f"{n}.jsonl")
    assert len(tables.files(shop.home, tables.MESSAGES)) <= 4
    assert outcomes(shop) == {"applied": 7}
    assert shop.is_balanced()


def test_the_rows_of_an_erased_person_are_remembered_and_not_stored(shop) -> None:
    with shop.vault() as vault:
        vault.entomb([vault.pseudonym("email", "gone@x.org")], erased_us=1, receipt="r")
    calls = [
        shop.call("m1", traits={"email": "Gone@x.org"}), shop.call("m2", 1), shop.call("m3", 2, user="gone@x.org", properties={}),
        shop.call("m4", 3, user=None, anonymousId="gone@x.org"),
    ]  # fmt: skip
    report = shop.run(*calls)
    assert shop.adds_up(report)
    assert (report.accepted, report.erased, report.stored, report.quarantined) == (4, 3, 1, 0)
    assert outcomes(shop) == {"applied": 1, "erased": 3}
    assert shop.quarantine().empty
    assert shop.name("email", "gone@x.org") not in set(shop.table(tables.IDENTITIES)["identifier"])
    assert shop.run(*calls, shop.call("m5", 4), name="again.jsonl").duplicate == 4
    assert shop.is_balanced()


def test_the_two_halves_of_a_message_make_it_whole_again() -> None:
    with connect() as db:
        ids = "SELECT 'm' || range AS id FROM range(500)"
        same = f"SELECT {message_sql('id')} AS message, {halves_sql(message_sql('id'))} FROM ({ids})"
        assert db.sql(f"SELECT bool_and(message = {whole_sql()}) FROM ({same})").fetchall() == [(True,)]
