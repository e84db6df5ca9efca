from contextlib import closing
from datetime import timedelta

import pytest

from pipelines.online.writer import OnlineWriter, Row
from serving.fallbacks import Deadline
from serving.online_store import StoreFailure
from serving.profile import STRANGER, Person

SOON = Deadline.after_ms(3_600_000)


@pytest.fixture(scope="module")
def profiles(shop, opened):
    return opened(shop, max_age_hours=24 * 3650)


def test_person_is_found_by_customer_id_by_user_id_and_by_device(profiles, cast):
    known = Person(cast.customers[3], is_allowed=True)
    assert profiles.people([cast.customers[3], "user-3", "nobody"], at=cast.now, deadline=SOON) == [known, known, STRANGER]
    assert profiles.owners("anonymous_id", ["device-3", "user-3"], at=cast.now, deadline=SOON) == [known, STRANGER]


def test_without_consent_or_a_state_of_it_nothing_is_allowed(profiles, cast):
    people = profiles.people([cast.denied, cast.silent, cast.bare], at=cast.now, deadline=SOON)
    assert people == [Person(cast.denied, is_allowed=False), Person(cast.silent, is_allowed=False), Person(cast.bare, is_allowed=True)]


def test_one_look_tells_of_a_person_what_several_tell_or_leaves_it_to_them(profiles, cast):
    def looked(name):
        return profiles.permitted(name, "churn_v1", at=cast.now, deadline=SOON)

    for name in (*cast.customers, cast.bare):
        found, (person,) = looked(name), profiles.people([name], at=cast.now, deadline=SOON)
        if name == cast.silent:
            assert found is None  # known by what they did, which is not looked at here
        else:
            read = profiles.read("churn_v1", [name], at=cast.now, deadline=SOON)
            assert found == (person, read if person.is_allowed else None)
    assert [looked(name) for name in ("user-3", "nobody")] == [None, None]
    assert profiles.permitted(cast.customers[0], "of_another_shop", at=cast.now, deadline=SOON) is None


def test_one_person_is_who_people_say_it_is(profiles, cast):
    for name in (*cast.customers, cast.bare, cast.untrained, "user-3", "nobody"):
        assert profiles.person(name, at=cast.now, deadline=SOON) == profiles.people([name], at=cast.now, deadline=SOON)[0]
    assert not profiles.person(cast.denied, at=cast.now, deadline=SOON).is_allowed
    assert profiles.person(cast.customers[3], at=cast.now, deadline=SOON).is_allowed


def test_row_beyond_the_age_limit_counts_as_missing_but_consent_does_not_expire(shop, cast, opened):
    strict = opened(shop, max_age_hours=24 * 10)
    lenient = opened(shop, max_age_hours=24 * 25)
    for profiles, expected in ((strict, None), (lenient, "north")):
        rows = profiles.read("churn_v1", [cast.customers[2]], at=cast.now - timedelta(days=6), deadline=SOON)
        assert rows.columns["region"] == [expected]
        assert profiles.people([cast.customers[2]], at=cast.now, deadline=SOON)[0].is_allowed  # given 400 days ago
    rows = strict.read("churn_v1", [cast.customers[2]], at=cast.now + timedelta(days=40), deadline=SOON)
    assert rows.changed_at == [None]
    assert rows.columns["events_total"] == [None]


def test_home_where_nothing_was_applied_is_a_failure_and_stays_as_it_was(tmp_path, opened):
    with pytest.raises(StoreFailure, match="apply"):
        opened(tmp_path / "empty", max_age_hours=1)
    assert not list((tmp_path / "empty").rglob("online.db"))


def test_customer_merged_into_another_is_found_under_both_ids(home, cast, opened):
    old, new = cast.customers[3], cast.customers[4]
    with closing(OnlineWriter(home)) as online, online.transaction():
        online.remove_customers([old])
        row = Row(f"customer_id:{old}", {"customer_id": new}, event_us=1_800_000_000_000_000)
        online.write("identifier_customer", [row], join_key="identifier")
        assert old not in online.identifiers_of([new])[new]
    profiles = opened(home, max_age_hours=24 * 3650)
    known = Person(new, is_allowed=True)
    assert profiles.people([old, new, "nobody"], at=cast.now, deadline=SOON) == [known, known, STRANGER]
    assert profiles.person(old, at=cast.now, deadline=SOON) == known
    assert profiles.formers(new, deadline=SOON) == [old]
    assert profiles.formers(cast.customers[5], deadline=SOON) == []


def test_home_that_no_stream_has_worked_on_knows_of_no_merges(shop, profiles, cast):
    assert profiles.formers(cast.customers[3], deadline=SOON) == []


def test_home_that_older_definitions_were_applied_to_is_a_failure_that_says_what_to_do(shop, opened, monkeypatch):
    from feast import FeatureView, Field
    from feast.types import Int64

    from feature_repo import definitions

    view = definitions.customer_session
    fields = [Field(name=c.name, dtype=c.dtype) for c in (*view.entity_columns, *view.features)] + [
        Field(name="session_sighs", dtype=Int64)
    ]
    newer = FeatureView(name=view.name, entities=[definitions.customer], schema=fields, source=view.batch_source, ttl=view.ttl)
    monkeypatch.setattr(definitions, "customer_session", newer)
    with pytest.raises(StoreFailure, match=r"session_sighs.*rapport features apply"):
        opened(shop, max_age_hours=1)
