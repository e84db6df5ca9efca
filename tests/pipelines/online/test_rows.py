"""Rows that stand there already are written by what changed alone: the file is as if each had been written whole, whoever else writes."""

import sqlite3
from contextlib import closing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.errors import StoreError
from pipelines.online import schema as online_schema
from pipelines.online.feast_format import key_encoder, table_of
from pipelines.online.rows import Standing, StandingRows
from pipelines.online.schema import ViewSchema
from pipelines.online.writer import OnlineWriter, Row

VIEW, SECOND = "customer_session", 1_000_000
QUICK = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
NAMES = (
    "session_events", "session_views", "session_cart_adds", "session_searches", "session_purchases", "session_distinct_items",
    "session_cart_cents", "session_started_at", "session_last_event_at",
)  # fmt: skip

VALUES = st.lists(st.sampled_from([0, 1, 1, None, 5_000, -3]), min_size=len(NAMES), max_size=len(NAMES))
ROW = st.tuples(st.sampled_from("abc"), VALUES, st.integers(0, 6))
BATCH = st.tuples(
    st.sampled_from(["renew"] * 6 + ["remove", "write", "other", "other less", "fail"]), st.lists(ROW, min_size=1, max_size=4)
)


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """Two stores of one view, as Feast makes its table: importing Feast would cost more than all that is tested here."""
    made = [tmp_path_factory.mktemp(name) for name in ("fast", "plain")]
    for home in made:
        (home / "feature_store").mkdir()
        with closing(sqlite3.connect(home / "feature_store" / "online.db")) as db, db:
            db.execute(
                f"""CREATE TABLE "{table_of(VIEW)}" (entity_key BLOB, feature_name TEXT, value BLOB, value_text TEXT, vector_value BLOB,
                event_ts timestamp, created_ts timestamp, PRIMARY KEY(entity_key, feature_name))"""
            )
            online_schema.put(db, {VIEW: ViewSchema("customer_id", dict.fromkeys(NAMES, "Int64"))})
    return made


class Plain(OnlineWriter):
    """Writes every cell: the definition."""

    def renew(self, view, rows, *, join_key="customer_id"):
        for row in rows:
            there = self.read(view, next(iter(row.values)), [row.key], join_key=join_key)
            at_us = max([row.event_us, *(known for _, known in there.values())])
            self.write(view, [Row(row.key, row.values, event_us=at_us)], join_key=join_key)
        return sum(len(row.values) for row in rows)


def rows_of(told):
    return [Row(key, dict(zip(NAMES, values, strict=True)), event_us=at * SECOND // 4) for key, values, at in told]


def cells(home):
    with closing(sqlite3.connect(home / "feature_store" / "online.db")) as db:
        columns = "entity_key, feature_name, value, value_text, event_ts, created_ts"
        return db.execute(f'SELECT {columns} FROM "{table_of(VIEW)}" ORDER BY 1, 2').fetchall()


def empty(home):
    with closing(sqlite3.connect(home / "feature_store" / "online.db")) as db, db:
        db.execute(f'DELETE FROM "{table_of(VIEW)}"')


def apply(online, home, what, told):
    rows = rows_of(told)
    if what.startswith("other"):
        with closing(OnlineWriter(home)) as other, other.transaction():
            one = rows[0]
            values = dict(list(one.values.items())[:4]) if what == "other less" else one.values
            other.write(VIEW, [Row(one.key, values, event_us=one.event_us)])
        return
    try:
        with online.transaction():
            if what == "remove":
                online.remove(VIEW, [row.key for row in rows])
            else:
                (online.write if what == "write" else online.renew)(VIEW, rows)
            if what == "fail":
                raise KeyError(what)
    except KeyError:
        pass


def play(homes, batches) -> None:
    for home in homes:
        empty(home)
    with closing(OnlineWriter(homes[0])) as fast, closing(Plain(homes[1])) as plain:
        for batch in batches:
            apply(fast, homes[0], *batch)
            apply(plain, homes[1], *batch)
            assert cells(homes[0]) == cells(homes[1])


@settings(max_examples=40, **QUICK)
@given(st.lists(BATCH, max_size=8))
def test_the_file_is_what_it_is_where_every_cell_is_written(homes, batches) -> None:
    play(homes, batches)


ALL_1, ALL_2 = [1] * len(NAMES), [5_000] * len(NAMES)


def test_control_a_writer_that_does_not_see_others_leaves_what_they_wrote(homes, monkeypatch) -> None:
    batches = [("renew", [("a", ALL_1, 1)]), ("other", [("a", ALL_2, 2)]), ("renew", [("a", ALL_1, 3)])]
    play(homes, batches)
    monkeypatch.setattr(StandingRows, "follow", lambda *_: None)
    with pytest.raises(AssertionError):
        play(homes, batches)


def test_control_a_writer_that_remembers_what_was_rolled_back_leaves_it_out(homes, monkeypatch) -> None:
    batches = [("renew", [("a", ALL_1, 1)]), ("fail", [("a", ALL_2, 2)]), ("renew", [("a", ALL_2, 3)])]
    play(homes, batches)
    monkeypatch.setattr(StandingRows, "clear", lambda *_: None)
    with pytest.raises(AssertionError):
        play(homes, batches)


def test_a_row_that_is_not_as_it_was_left_is_refused_and_then_written_whole(homes) -> None:
    """What stands there is counted with every change, so that nothing rests on memory alone."""
    home = homes[0]
    empty(home)
    with closing(OnlineWriter(home)) as online:
        apply(online, home, "renew", [("a", ALL_1, 1)])
        with online.transaction():
            online.db.execute(f'DELETE FROM "{table_of(VIEW)}" WHERE feature_name = ?', (NAMES[0],))
        with pytest.raises(StoreError, match=r"expected 9 cells of customer_session.*found 8"):
            apply(online, home, "renew", [("a", ALL_1, 2)])
        apply(online, home, "renew", [("a", ALL_1, 2)])
        assert [cell[2:4] for cell in cells(home)] == [(b"\x20\x01", "1")] * len(NAMES)


def test_only_what_changed_is_written(homes, monkeypatch) -> None:
    home = homes[0]
    empty(home)
    told = []
    with closing(OnlineWriter(home)) as online:
        apply(online, home, "renew", [("a", ALL_1, 1)])
        changed = OnlineWriter._changed
        monkeypatch.setattr(OnlineWriter, "_changed", lambda *args, **named: (told.append(args[2][3:]), changed(*args, **named))[1])
        apply(online, home, "renew", [("a", [2, *ALL_1[1:]], 2)])
        apply(online, home, "renew", [("a", [2, *ALL_1[1:]], 2)])
        apply(online, home, "renew", [("a", [2, *ALL_1[1:]], 3)])
    assert told == [(NAMES[0], b"\x20\x02", "2"), ()]  # one value, nothing, the time


def test_no_more_rows_are_remembered_than_the_bound() -> None:
    rows, encode = StandingRows(2), key_encoder("customer_id")
    for name in "abc":
        rows.put(VIEW, encode(name), Standing((), (), 0, 0.0))
        rows.get(VIEW, encode("a"))
    assert [rows.get(VIEW, encode(name)) is not None for name in "abc"] == [True, False, True]
