import shutil
import sqlite3
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from pipelines.online.writer import OnlineWriter, Row
from pipelines.vault import open_vault
from serving.fallbacks import DEADLINE, Deadline, Unavailable
from serving.online_store import NO_ROW, Decoder, EncodingChanged, FeastSource, SqliteSource, StoreFailure, View, difference
from serving.profile import _resolve, feature_store, self_check

SOON = Deadline.after_ms(3_600_000)


@pytest.fixture(scope="module")
def feast(shop):
    return feature_store(shop)


@pytest.fixture(scope="module")
def views(feast):
    return {view.name: view for group in _resolve(feast, float("inf")).values() for view in group}


@pytest.fixture
def online(home):
    return home / "feature_store" / "online.db"


def direct(home):
    return SqliteSource((home / "feature_store" / "online.db").resolve())


def test_direct_read_equals_feast_for_every_view_and_key(shop, feast, views, cast):
    with closing(open_vault(shop)) as vault:
        identifiers = [vault.pseudonym("user_id", f"user-{i}") for i in range(3)]
    names = [*cast.customers, "nobody", "", *identifiers]
    assert set(views) == {
        "customer_profile",
        "customer_activity",
        "customer_session",
        "identifier_customer",
        "customer_consent",
        "customer_item",
        "customer_scores",
        "customer_segments",
        "task_scores",
    }
    for view in views.values():
        keys = names if isinstance(view.join_key, str) else [(name, "return_risk") for name in names]
        assert difference(direct(shop), FeastSource(feast), view, keys) is None
    profile = views["customer_profile"]
    assert {profile.value(row, "region") for row in direct(shop).fetch(profile, cast.customers, SOON)} == {None, "north", "süd 🛒"}


def test_one_key_over_several_views_reads_as_each_view_alone(shop, views, cast):
    """One statement for all of them; of a key that is nowhere, nothing."""
    source = direct(shop)
    group = [views[name] for name in ("customer_consent", "customer_profile", "customer_activity", "customer_session")]
    for key in (*cast.customers, "nobody"):
        assert source.fetch_views(group, [key], SOON) == [source.fetch(view, [key], SOON) for view in group]
    assert any(row for ((_, row),) in source.fetch_views(group, cast.customers[:1], SOON))


def test_a_cell_that_is_missing_is_null_and_one_that_is_further_changes_nothing(home, online, views, cast):
    source, view, key = direct(home), views["customer_activity"], cast.customers[0]
    ((then, before),) = source.fetch(view, [key], SOON)
    place = next(place for place, value in enumerate(before) if value)
    with closing(sqlite3.connect(online)) as writer, writer:
        writer.execute(
            f'UPDATE "{view.table}" SET feature_name = ? WHERE feature_name = ?', ('a "further" \\ feature', view.columns[place])
        )
    expected = (then, [None if i == place else value for i, value in enumerate(before)])
    assert source.fetch(view, [key], SOON) == [expected]
    assert source.fetch_views([view], [key], SOON) == [[expected]]


def test_features_come_with_the_consent_and_only_where_it_is_given(home, online, views, cast):
    source, consent = direct(home), views["customer_consent"]
    group = [views[name] for name in ("customer_profile", "customer_activity", "customer_session")]

    def permitted(key):
        first, *rows = source.fetch_permitted(consent, "is_personalization_allowed", group, key, SOON)
        assert first == source.fetch(consent, [key], SOON)[0]
        return rows

    behaviour = {key: [source.fetch(view, [key], SOON)[0] for view in group] for key in (*cast.customers, cast.denied, cast.silent)}
    nothing = [NO_ROW] * len(group)
    assert any(row for _, row in behaviour[cast.denied]), "the control: there is something that must not be read"
    assert any(row for _, row in behaviour[cast.silent])
    for key in cast.customers:
        assert permitted(key) == (nothing if key in (cast.denied, cast.silent) else behaviour[key])
    assert permitted("nobody") == nothing
    some = cast.customers[0]
    assert permitted(some) != nothing
    for value in (b"\x38\x00", b"", b"\x20\x01", b"\x12\x04true"):  # a no, a null, a number, a text
        with closing(sqlite3.connect(online)) as writer, writer:
            writer.execute(f'UPDATE "{consent.table}" SET value = ?', (value,))
        assert permitted(some) == nothing


def test_self_check_passes_on_a_sound_store_and_names_a_changed_encoding(shop, feast):
    groups = _resolve(feast, float("inf"))
    assert self_check(direct(shop), FeastSource(feast), groups) is None
    shifted = SqliteSource(direct(shop).path, decode=lambda value: Decoder()[value[:-1] + f"{int(value[-1], 16) ^ 1:x}"] if value else None)
    found = self_check(shifted, FeastSource(feast), groups)
    assert found
    assert "is not what Feast reads" in found or "no value of Feast's" in found


def test_store_whose_encoding_changed_is_read_through_feast(home, monkeypatch, caplog, cast, opened):
    monkeypatch.setattr("serving.online_store.Decoder.__missing__", lambda self, value: 0)
    profiles = opened(home, max_age_hours=1e6)
    assert isinstance(profiles.source, FeastSource)
    assert "reading through Feast instead" in caplog.text
    assert profiles.read("customer_consent", cast.customers[:1], at=cast.now, deadline=SOON).columns["is_personalization_allowed"] == [True]


def test_sound_store_is_read_directly(shop, opened):
    assert isinstance(opened(shop, max_age_hours=1e6).source, SqliteSource)


def test_decoder_refuses_what_feast_cannot_have_written():
    with pytest.raises(EncodingChanged):
        Decoder()[b"\x29\x00\x00"]


def test_new_rows_of_a_writer_are_seen_while_it_has_the_file_open(home, online, views, cast):
    source, view = direct(home), views["customer_consent"]
    assert source.fetch(view, [cast.bare], SOON)[0][1] == [True]
    with sqlite3.connect(online) as writer:
        writer.execute(f'UPDATE "{view.table}" SET value = ?', (b"\x38\x00",))
        assert source.fetch(view, [cast.bare], SOON)[0][1] == [True]  # not committed yet
        writer.commit()
        assert source.fetch(view, [cast.bare], SOON)[0][1] == [False]


def test_file_that_was_replaced_is_followed(home, online, views, tmp_path, cast):
    source, view = direct(home), views["customer_consent"]
    source.fetch(view, [cast.bare], SOON)
    other = tmp_path / "other.db"
    shutil.copy(online, other)
    with sqlite3.connect(other) as writer:
        writer.execute(f'DELETE FROM "{view.table}"')
    writer.close()
    for leftover in ("-wal", "-shm"):
        Path(f"{online}{leftover}").unlink(missing_ok=True)
    other.replace(online)
    assert source.fetch(view, [cast.bare], SOON) == [NO_ROW]


def test_missing_store_is_a_failure_until_it_is_back(home, online, views, cast):
    source, view = direct(home), views["customer_consent"]
    before = source.fetch(view, [cast.bare], SOON)
    hidden = online.rename(online.with_suffix(".hidden"))
    with pytest.raises(StoreFailure):
        source.fetch(view, [cast.bare], SOON)
    assert not online.exists()  # asking must not make one
    hidden.rename(online)
    assert source.fetch(view, [cast.bare], SOON) == before


def test_store_of_nonsense_is_a_failure(home, online, views, cast):
    for suffix in ("-wal", "-shm"):  # a log of newer pages beside the file would still answer
        online.with_name(online.name + suffix).unlink(missing_ok=True)
    online.write_bytes(b"nonsense" * 1_250)
    with pytest.raises(StoreFailure):
        direct(home).fetch(views["customer_consent"], [cast.bare], SOON)


def test_slow_read_ends_at_the_deadline(home, views, cast):
    source = direct(home)
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
    with pytest.raises(Unavailable, match=DEADLINE):
        source._execute(endless, (), Deadline.after_ms(50))
    assert source.fetch(views["customer_consent"], [cast.bare], SOON)


def test_many_keys_come_back_in_order_with_repeats_and_strangers(shop, views, cast):
    keys = [f"nobody-{i}" for i in range(990)] + cast.customers[:5] * 2
    found = direct(shop).fetch(views["customer_consent"], keys, SOON)
    assert [then is not None for then, _ in found] == [False] * 990 + [True] * 10
    assert direct(shop).present(views["customer_consent"], keys, SOON) == [False] * 990 + [True] * 10


def test_time_of_a_row_is_its_change(shop, views, cast):
    then, _ = direct(shop).fetch(views["customer_profile"], cast.customers[:1], SOON)[0]
    assert then == (cast.now - timedelta(days=30)).timestamp()


def test_view_of_a_table_that_is_not_there_is_a_failure(shop):
    with pytest.raises(StoreFailure):
        direct(shop).fetch(View("ghost", "rapport_ghost", "customer_id", ("x",), 1.0), ["c1"], SOON)


def write_items(online, at_us, pairs):
    """Rows of customer_item: customer, item, seconds later, whether it was bought."""
    for customer, item, seconds, is_bought in pairs:
        then_us = at_us + seconds * 1_000_000
        values = {"customer_item_views_total": 1, "customer_item_last_seen_at": then_us}
        values["customer_item_last_bought_at"] = then_us if is_bought else None
        online.write("customer_item", [Row((customer, item), values, event_us=then_us)], join_key=("customer_id", "item_id"))


def test_keys_under_a_customer_are_theirs_alone_the_newest_first(home, views, cast):
    at_us, start_s = 1_700_000_000_000_000, 1_700_000_000
    pairs = [("c1", "a", 5, True), ("c1", "b", 9, False), ("c1", "", 7, True)]
    pairs += [("c10", "a", 8, True), ("c", "1a", 6, True), ("c2", "\xff", 3, True)]
    with closing(OnlineWriter(home)) as online, online.transaction():
        write_items(online, at_us, pairs)
    source, view = direct(home), views["customer_item"]

    def found(customer, column="last_seen_at", since_s=0.0, limit=10):
        return source.keys_under(view, customer, f"customer_item_{column}", SOON, since_s=since_s, limit=limit)

    assert found("c1") == [("c1", "b"), ("c1", ""), ("c1", "a")]
    assert found("c1", limit=1) == [("c1", "b")]
    assert found("c1", column="last_bought_at") == [("c1", ""), ("c1", "a")]
    assert found("c1", since_s=start_s + 7.0) == [("c1", "b"), ("c1", "")]
    assert found("c2") == [("c2", "\xff")]
    assert found("nobody") == []
