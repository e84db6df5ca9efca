"""Rows written directly, held against Feast: what it writes, and what it reads."""

import random
import shutil
import sqlite3
import threading
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest

from pipelines import feature_store, tables
from pipelines.errors import StoreError
from pipelines.online import schema
from pipelines.online.erasure import erase
from pipelines.online.feast_format import table_of
from pipelines.online.writer import OnlineWriter, Row

NOW = datetime(2026, 3, 1, 12, 0, 0, 250_000, tzinfo=UTC)
NOW_US = int(NOW.timestamp() * 1e6)
SECOND = 1_000_000


@pytest.fixture
def home(applied, tmp_path):
    shutil.copytree(applied / "feature_store", tmp_path / "feature_store")
    return tmp_path


@pytest.fixture
def online(home):
    with closing(OnlineWriter(home)) as writer:
        yield writer


def write(online, *rows, view="customer_consent"):
    with online.transaction():
        return online.write(view, rows)


def write_one_by_one(online, rows):
    with online.transaction():
        for row in rows:
            online.write("customer_consent", [row])


def consent(key, allowed, at_us, known_us=None):
    return Row(key, {"is_personalization_allowed": allowed}, event_us=at_us, created_us=known_us)


def stored(home, view):
    with closing(sqlite3.connect(home / "feature_store" / "online.db")) as db:
        columns = "entity_key, feature_name, value, value_text, vector_value, event_ts"
        return db.execute(f'SELECT {columns} FROM "{table_of(view)}" ORDER BY 1, 2').fetchall()


def through_feast(home, view, feature, key, join_key="customer_id"):
    answer = feature_store.store(home).get_online_features([f"{view}:{feature}"], [{join_key: key}])
    return answer.to_dict()[feature][0]


ROWS = {
    "customer_scores": [
        ("c1", {"churn_probability": 0.25, "churn_version": "7", "intent_probability": None, "intent_version": None}),
        ("zürich 🛒", {"churn_probability": 1.0, "churn_version": "", "intent_probability": 0.5, "intent_version": "x" * 200}),
    ],
    "customer_consent": [("c1", {"is_personalization_allowed": True}), ("c2", {"is_personalization_allowed": False})],
    "customer_session": [("c1", {"session_events": 3, "session_cart_cents": -5, "session_started_at": NOW_US})],
}


@pytest.mark.parametrize("view", ROWS)
def test_rows_are_byte_for_byte_what_feast_writes(home, tmp_path, online, view):
    import pandas as pd

    write(online, *(Row(key, values, event_us=NOW_US) for key, values in ROWS[view]), view=view)
    mine = stored(home, view)
    with online.transaction():
        online.remove(view, [key for key, _ in ROWS[view]])
    assert stored(home, view) == []
    store = feature_store.store(home)
    names = [field.name for field in store.get_feature_view(view).features]
    kinds = {field.name: str(field.dtype) for field in store.get_feature_view(view).features}
    pandas = {"Int64": "Int64", "Float64": "float64", "String": "object", "Bool": "bool"}
    frame = pd.DataFrame([{"customer_id": key, "event_timestamp": NOW} | values for key, values in ROWS[view]])
    frame = frame.reindex(columns=["customer_id", "event_timestamp", *names]).astype({n: pandas[kinds[n]] for n in names})
    store.write_to_online_store(view, frame)
    given_names = set(ROWS[view][0][1])
    theirs = [row for row in stored(home, view) if row[1] in given_names]
    assert [row[:3] + row[4:] for row in mine] == [row[:3] + row[4:] for row in theirs]
    assert [row[3] for row in mine] == [row[3] for row in theirs]


def test_row_is_read_back_by_feast(home, online):
    write(online, consent("c1", True, NOW_US), consent("c2", False, NOW_US))
    found = [through_feast(home, "customer_consent", "is_personalization_allowed", key) for key in ("c1", "c2", "c3")]
    assert found == [True, False, None]


@pytest.mark.parametrize("apart_us", [3_600 * SECOND, SECOND, 1_000, 1])  # Feast itself keeps whole seconds
@pytest.mark.parametrize("is_late", [False, True])
def test_newer_wins_whatever_the_order_of_arrival(home, online, apart_us, is_late):
    rows = [consent("c1", True, NOW_US), consent("c1", False, NOW_US + apart_us)]
    for row in reversed(rows) if is_late else rows:
        write(online, row)
    assert through_feast(home, "customer_consent", "is_personalization_allowed", "c1") is False


def test_feasts_own_writer_lets_the_older_win(home):
    """The control: without the guard the same rows end the other way."""
    import pandas as pd

    store = feature_store.store(home)
    for allowed, at in ((False, NOW + timedelta(hours=1)), (True, NOW)):
        frame = pd.DataFrame({"customer_id": ["c1"], "event_timestamp": [at], "is_personalization_allowed": [allowed]})
        store.write_to_online_store("customer_consent", frame)
    assert through_feast(home, "customer_consent", "is_personalization_allowed", "c1") is True


def test_of_two_rows_of_one_instant_the_one_known_later_wins_and_the_same_row_again_changes_nothing(home, online):
    later, sooner = consent("c1", False, NOW_US, NOW_US + 10), consent("c1", True, NOW_US, NOW_US + 5)
    assert write(online, later) == 1
    assert write(online, sooner) == 0
    before = stored(home, "customer_consent")
    assert write(online, later) == 1
    assert stored(home, "customer_consent") == before


def test_threads_that_race_leave_the_newest_of_each_key(home):
    rows = [consent(f"c{n % 5}", n % 2 == 0, NOW_US + n) for n in range(200)]
    random.Random(3).shuffle(rows)

    def write_some(part):
        with closing(OnlineWriter(home)) as mine:
            for row in part:
                write(mine, row)

    threads = [threading.Thread(target=write_some, args=(rows[start::4],)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key in range(5):
        newest = max(n for n in range(200) if n % 5 == key)
        assert through_feast(home, "customer_consent", "is_personalization_allowed", f"c{key}") is (newest % 2 == 0)


def test_view_is_known_to_be_streamed_though_the_first_rows_of_it_were_rolled_back(online):
    row = Row("c1", {"is_personalization_allowed": True}, event_us=NOW_US)
    with pytest.raises(ZeroDivisionError), online.transaction():  # noqa: PT012
        online.write("customer_consent", [row])
        raise ZeroDivisionError
    assert not online.is_streamed("customer_consent")
    with online.transaction():
        online.write("customer_consent", [row])
    assert online.is_streamed("customer_consent")


def test_view_is_streamed_from_a_row_on_that_stands_there_already_as_it_was_loaded(online):
    loaded = pa.table(
        {"customer_id": ["c1"], "is_personalization_allowed": [True], "event_us": [NOW_US], "created_us": pa.nulls(1, pa.int64())}
    )
    with online.transaction():
        online.load("customer_consent", loaded, join_key="customer_id", is_guarded=False)
    assert not online.is_streamed("customer_consent")
    with online.transaction():
        online.renew("customer_consent", [Row("c1", {"is_personalization_allowed": True}, event_us=NOW_US)])
    assert online.is_streamed("customer_consent")


def test_transaction_that_fails_leaves_nothing(home, online):
    half = [consent("c1", True, NOW_US), Row("c2", {"is_personalization_allowed": True}, event_us="never")]
    with pytest.raises(TypeError):
        write_one_by_one(online, half)
    assert stored(home, "customer_consent") == []
    assert write(online, consent("c1", True, NOW_US)) == 1


def test_missing_store_is_not_made_and_a_replaced_one_is_followed(home, online, tmp_path):
    write(online, consent("c1", True, NOW_US))
    path = home / "feature_store" / "online.db"
    (home / "feature_store").rename(tmp_path / "aside")
    with pytest.raises(StoreError, match="features apply"), online.transaction():
        pass
    assert not path.exists()
    shutil.copytree(tmp_path / "aside", home / "feature_store")
    write(online, consent("c2", True, NOW_US))
    assert len(stored(home, "customer_consent")) == 2


def test_identifiers_of_a_customer_are_found_from_the_view(online):
    with online.transaction():
        rows = [Row(f"user_id:{n}", {"customer_id": f"c{n % 2}"}, event_us=NOW_US) for n in range(4)]
        online.write("identifier_customer", rows, join_key="identifier")
        found = online.identifiers_of(["c0", "c1", "nobody"])
    assert {customer: sorted(names) for customer, names in found.items()} == {
        "c0": ["user_id:0", "user_id:2"],
        "c1": ["user_id:1", "user_id:3"],
        "nobody": [],
    }


def test_erased_person_leaves_no_byte(home, online):
    with online.transaction():
        online.write("identifier_customer", [Row("user_id:feed", {"customer_id": "c0badc0de"}, event_us=NOW_US)], join_key="identifier")
        online.write("customer_consent", [consent("c0badc0de", True, NOW_US), consent("c1", True, NOW_US)])
    files = list((home / "feature_store").glob("online.db*"))
    assert any(b"c0badc0de" in path.read_bytes() for path in files)
    assert erase(home, identifiers=["user_id:feed"], customers=["c0badc0de"]) == 2
    for path in (home / "feature_store").glob("online.db*"):
        assert b"c0badc0de" not in path.read_bytes()
        assert b"user_id:feed" not in path.read_bytes()
    assert len(stored(home, "customer_consent")) == 1


@pytest.mark.parametrize("is_swept", [True, False], ids=["swept", "control"])
def test_erased_people_leave_no_byte_where_pages_were_split(home, online, monkeypatch, is_swept) -> None:
    if not is_swept:
        monkeypatch.setattr(OnlineWriter, "sweep", lambda self: self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())
    rng, names = random.Random(3), sorted(online.schema["customer_activity"].features)
    people = [f"c{rng.getrandbits(64):016x}" for _ in range(600)]
    for start in range(0, len(people), 20):
        with online.transaction():
            online.renew(
                "customer_activity",
                [Row(customer, dict.fromkeys(names, 10**12), event_us=NOW_US) for customer in people[start : start + 20]],
            )
    gone = people[::4]
    assert erase(home, identifiers=[], customers=gone) == len(names) * len(gone)
    left = (home / "feature_store" / "online.db").read_bytes()
    assert any(customer.encode() in left for customer in gone) is not is_swept
    assert all(customer.encode() in left for customer in people if customer not in gone)


# -- the batch load ----------------------------------------------------------------------------------------------------


def table(home, declared, rows):
    tables.write(home, declared, pa.Table.from_pylist([dict.fromkeys(declared.schema.names) | row for row in rows], declared.schema))


def test_load_never_puts_an_older_consent_over_what_the_stream_wrote(home, online):
    table(home, tables.CUSTOMER_CONSENT, [{"customer_id": "c1", "event_timestamp": NOW, "is_personalization_allowed": True}])
    write(online, consent("c1", False, NOW_US + 1), consent("c2", True, NOW_US))
    feature_store.materialize(home, as_of=NOW + timedelta(days=1), views=["customer_consent"])
    assert through_feast(home, "customer_consent", "is_personalization_allowed", "c1") is False  # withdrawn since
    assert through_feast(home, "customer_consent", "is_personalization_allowed", "c2") is True  # no table knows them yet
    table(
        home,
        tables.CUSTOMER_CONSENT,
        [{"customer_id": "c1", "event_timestamp": NOW + timedelta(hours=1), "is_personalization_allowed": True}],
    )
    feature_store.materialize(home, as_of=NOW + timedelta(days=1), views=["customer_consent"])
    assert through_feast(home, "customer_consent", "is_personalization_allowed", "c1") is True


def test_scores_count_from_the_instant_as_of_which_they_were_computed_and_not_before(home):
    table(home, tables.CUSTOMER_SCORES, [{"customer_id": "c0", "event_timestamp": NOW, "churn_probability": 0.5}])
    assert feature_store.materialize(home, as_of=NOW - timedelta(microseconds=1), views=["customer_scores"]) == 0
    assert feature_store.materialize(home, as_of=NOW, views=["customer_scores"]) == 1
    assert through_feast(home, "customer_scores", "churn_probability", "c0") == 0.5


def test_load_of_any_other_view_is_what_its_table_says(home):
    scores = [{"customer_id": f"c{n}", "event_timestamp": NOW, "churn_probability": 0.5} for n in range(2)]
    table(home, tables.CUSTOMER_SCORES, scores)
    assert feature_store.materialize(home, as_of=NOW + timedelta(days=1), views=["customer_scores"]) == 2
    before = NOW - timedelta(days=1)  # recomputed: earlier, and one customer less
    table(home, tables.CUSTOMER_SCORES, [{"customer_id": "c0", "event_timestamp": before, "churn_probability": 0.75}])
    assert feature_store.materialize(home, as_of=NOW + timedelta(days=1), views=["customer_scores"]) == 1
    assert through_feast(home, "customer_scores", "churn_probability", "c0") == 0.75
    assert through_feast(home, "customer_scores", "churn_probability", "c1") is None


def identities(home, *rows):
    table(
        home,
        tables.IDENTITIES,
        [dict(zip(("identifier", "customer_id", "event_timestamp", "created_timestamp"), row, strict=True)) for row in rows],
    )


def test_consent_of_a_customer_merged_away_is_taken_out(home):
    identities(home, ("user_id:a", "c1", NOW, NOW), ("anonymous_id:b", "c1", NOW, NOW))
    allowed = {"event_timestamp": NOW, "is_personalization_allowed": True}
    table(home, tables.CUSTOMER_CONSENT, [{"customer_id": c} | allowed for c in ("c1", "c2")])
    feature_store.materialize(home, as_of=NOW + timedelta(days=1))
    assert through_feast(home, "customer_consent", "is_personalization_allowed", "c1") is True
    assert through_feast(home, "customer_consent", "is_personalization_allowed", "c2") is None


def test_people_told_apart_by_a_decision_are_apart_online_though_their_rows_are_older(home):
    later = NOW + timedelta(hours=2)
    identities(home, ("user_id:a", "c1", NOW, NOW), ("user_id:b", "c1", NOW, NOW + timedelta(hours=1)))
    feature_store.materialize(home, as_of=NOW + timedelta(days=1), views=["identifier_customer"])
    identities(home, ("user_id:a", "c1", NOW, NOW), ("user_id:b", "c2", NOW, NOW))
    feature_store.materialize(home, as_of=NOW + timedelta(days=1), views=["identifier_customer"])
    assert through_feast(home, "identifier_customer", "customer_id", "user_id:b", "identifier") == "c1"  # the control: just older
    cut = {"link_id": "x", "left": "user_id:a", "right": "user_id:b", "kind": "manual", "state": "cut", "created_timestamp": later}
    table(home, tables.IDENTITY_EDGES, [cut])
    feature_store.materialize(home, as_of=NOW + timedelta(days=1), views=["identifier_customer"])
    assert through_feast(home, "identifier_customer", "customer_id", "user_id:b", "identifier") == "c2"


def test_tables_are_kept_by_their_keys_with_no_index_beside(applied) -> None:
    with closing(sqlite3.connect(applied / "feature_store" / "online.db")) as db:
        assert db.execute("SELECT name FROM sqlite_master WHERE type = 'index' AND name GLOB 'rapport_*_ek'").fetchall() == []
        plan = db.execute(f'EXPLAIN QUERY PLAN SELECT value FROM "{table_of("customer_session")}" WHERE entity_key = ?', (b"",)).fetchall()
    assert "USING PRIMARY KEY" in plan[0][3]


def test_a_store_whose_cells_are_numbered_is_kept_by_its_keys_from_now_on_and_who_has_it_open_goes_on(home, online) -> None:
    view, name = "customer_consent", table_of("customer_consent")
    write(online, consent("c1", True, NOW_US))
    clustered = "SELECT sql LIKE '%WITHOUT ROWID' FROM sqlite_master WHERE name = ?"
    with closing(sqlite3.connect(home / "feature_store" / "online.db", isolation_level=None)) as db:
        (made,) = db.execute("SELECT sql FROM sqlite_master WHERE name = ?", (name,)).fetchone()
        db.execute(f'ALTER TABLE "{name}" RENAME TO other')  # as Feast made it, and an older version left it
        db.execute(made.removesuffix("WITHOUT ROWID"))
        db.execute(f'INSERT INTO "{name}" SELECT * FROM other')
        db.execute("DROP TABLE other")
        db.execute(f'CREATE INDEX of_the_stream ON "{name}" (event_ts)')
        assert db.execute(clustered, (name,)).fetchone() == (0,)
        write(online, consent("c2", False, NOW_US))
        before = stored(home, view)
        for _ in range(2):
            schema.cluster(db, view)
            assert db.execute(clustered, (name,)).fetchone() == (1,)
            assert stored(home, view) == before
            assert db.execute("SELECT tbl_name FROM sqlite_master WHERE name = 'of_the_stream'").fetchone() == (name,)
    write(online, consent("c1", False, NOW_US + SECOND))
    assert [through_feast(home, view, "is_personalization_allowed", key) for key in ("c1", "c2")] == [False, False]
