import pandas as pd

from pipelines import consent, tables
from pipelines.settings import ConsentSettings, Settings


def test_a_source_with_neither_consent_nor_basis_is_not_used_and_the_report_says_why(shop) -> None:
    report = shop.run(shop.call("m1", context={}), shop.call("m2", 1, context={}))
    assert shop.adds_up(report)
    assert (report.accepted, report.consent_dropped, report.has_consent, report.last_event) == (2, 2, False, None)
    assert len(report.notes) == 1
    assert "no legal basis" in report.notes[0]
    for table in shop.clean:
        assert shop.table(table).empty, table.name


def test_a_declared_basis_makes_a_source_usable_and_is_written_down(shop) -> None:
    settings_ = Settings(home=shop.home, consent=ConsentSettings(legal_basis="contract"))
    report = shop.run(shop.call("m1", context={}), settings=settings_)
    assert (report.consent_dropped, report.has_consent) == (0, True)
    assert list(shop.table(tables.CONSENTS)["basis"]) == ["declared: contract"]


def test_a_basis_for_another_purpose_is_none(shop) -> None:
    report = shop.mapped([(0, "u1", "look", "i1", 1, "x")], basis='[consent]\nlegal_basis = "contract"\npurposes = ["billing"]')
    assert report.consent_dropped == 1
    assert "covers billing, not personalization" in report.notes[0]


def test_what_one_source_declares_is_not_for_another(shop) -> None:
    shop.mapped([(0, "u1", "look", "i1", 1, "x")])
    assert shop.run(shop.call("m1", 5, user="u1", context={})).consent_dropped == 1


def test_events_are_kept_while_allowed_and_the_refusal_itself_is_kept(shop) -> None:
    report = shop.run(
        shop.call("m0", 0, context={}), shop.call("m1", 1), shop.call("m2", 2, context=shop.refused),
        shop.call("m3", 3, context={}), shop.call("m4", 4), shop.order("m5", 5, n=3),
        shop.call("m6", 6, user="stranger", context=shop.refused), shop.call("m7", 7, user="silent", context={}),
    )  # fmt: skip
    assert shop.adds_up(report)
    assert list(shop.events()["event_id"]) == ["m1", "m4", "m5:0", "m5:1", "m5:2"]
    consents = shop.table(tables.CONSENTS)
    personal = consents[consents["purpose"] == "personalization"].groupby("customer_id")["is_allowed"].apply(list)
    assert sorted(personal, key=len) == [[False], [True, False, True]]
    # Who refused has to be recognised; who said nothing is not kept at all.
    assert set(shop.table(tables.IDENTITIES)["identifier"]) == {shop.name("user_id", "u1"), shop.name("user_id", "stranger")}


def test_a_refusal_beats_a_declared_basis_and_a_late_one_takes_events_out(shop) -> None:
    shop.mapped([(0, "u1", "look", "i1", 1, "x"), (10, "u1", "look", "i1", 1, "x"), (20, "u2", "look", "i1", 1, "x")])
    report = shop.run(shop.call("m1", 5, context=shop.refused, receivedAt=shop.at(60)), shop.call("m2", 6, user="u2"))
    assert report.withdrawn == 1
    assert sorted(shop.events()["event_timestamp"]) == [pd.Timestamp(shop.at(minute)) for minute in (0, 6, 20)]
    assert shop.mapped([(30, "u1", "look", "i1", 1, "x"), (31, "u2", "look", "i1", 1, "x")]).consent_dropped == 1


def test_the_stored_events_are_exactly_those_that_the_consents_allow(shop) -> None:
    contexts = [{}, shop.allowed, shop.refused]
    shop.run(*(shop.call(f"m{i}", i, user=f"u{i % 5}", context=contexts[i * i % 7 % 3]) for i in range(60)))
    events, consents = shop.events(), shop.table(tables.CONSENTS)
    assert 0 < len(events) < 60
    assert consent.state_at(consents, events, purpose="personalization").all()
    dropped = shop.table(tables.IDENTITIES)["customer_id"].nunique()
    assert dropped == 5
