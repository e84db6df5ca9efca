"""Rows written to a real Redis, held against Feast: what it writes, what it reads, and what its own guard loses."""

import random
import shutil
import threading
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pandas as pd
import pyarrow as pa
import pytest
import redis

from pipelines import feature_store, tables
from pipelines.errors import InputError, StoreError
from pipelines.online import erasure as online_erasure
from pipelines.online import redis_server
from pipelines.online.feast_format import key_encoder
from pipelines.online.redis_writer import RedisWriter
from pipelines.online.writer import OnlineWriter, Row
from pipelines.settings import OnlineSettings, Settings

pytestmark = pytest.mark.server

NOW = datetime(2026, 3, 1, 12, 0, 0, 250_000, tzinfo=UTC)
NOW_US = int(NOW.timestamp() * 1e6)
SECOND = 1_000_000


@pytest.fixture
def url(redis_server):
    """An empty database of the server, of its own."""
    url = redis_server.url.rsplit("/", 1)[0] + "/7"
    with closing(redis.Redis.from_url(url)) as client:
        client.flushdb()
    return url


@pytest.fixture
def settings(applied, url, tmp_path):
    shutil.copytree(applied / "feature_store", tmp_path / "feature_store")
    made = Settings(home=tmp_path, online=OnlineSettings(redis_url=url))
    with closing(RedisWriter(url)) as online:
        online.migrate(feature_store.declared_schema())
    return made


@pytest.fixture
def online(settings, url):
    with closing(RedisWriter(url)) as writer:
        yield writer


def consent(key, allowed, at_us):
    return Row(key, {"is_personalization_allowed": allowed}, event_us=at_us)


def write(online, *rows, view="customer_consent"):
    with online.transaction():
        online.write(view, rows)


def write_one_by_one(online, rows):
    with online.transaction():
        for row in rows:
            online.write("customer_consent", [row])


def through_feast(settings, view, feature, **key):
    store = feature_store.store(settings.home, settings=settings)
    return store.get_online_features([f"{view}:{feature}"], [key]).to_dict()[feature][0]


def contents(url):
    with closing(redis.Redis.from_url(url)) as client:
        keys = sorted(key for key in client.scan_iter() if not key.startswith(b"rapport:"))
        return {key: client.hgetall(key) for key in keys}


def test_rows_are_byte_for_byte_what_feast_writes(settings, online, url):
    rows = [
        ("c1", {"churn_probability": 0.25, "churn_version": "7", "intent_probability": None, "intent_version": None}),
        ("zürich 🛒", {"churn_probability": 1.0, "churn_version": "", "intent_probability": 0.5, "intent_version": "x" * 200}),
    ]
    write(online, *(Row(key, values, event_us=NOW_US) for key, values in rows), view="customer_scores")
    mine = contents(url)
    assert online.remove("customer_scores", [key for key, _ in rows]) == 2 * 5
    assert contents(url) == {}
    frame = pd.DataFrame([{"customer_id": key, "event_timestamp": NOW} | values for key, values in rows])
    feature_store.store(settings.home, settings=settings).write_to_online_store("customer_scores", frame)
    assert contents(url) == mine


@pytest.mark.parametrize("apart_us", [3_600 * SECOND, SECOND, 1_000, 1, 0])
@pytest.mark.parametrize("is_late", [False, True])
def test_newer_wins_whatever_the_order_of_arrival_and_of_one_instant_the_later_call(settings, online, apart_us, is_late):
    rows = [consent("c1", True, NOW_US), consent("c1", False, NOW_US + apart_us)]
    for row in reversed(rows) if is_late else rows:
        assert online.write("customer_consent", [row]) in (0, 1)
    is_last_the_first = is_late and apart_us == 0
    assert through_feast(settings, "customer_consent", "is_personalization_allowed", customer_id="c1") is is_last_the_first


def race(rounds, write_one):
    """Rounds in which four writers race for one key; returns the keys."""
    for n in range(rounds):
        rows = [(f"c{n}", NOW_US + i, i) for i in range(12)]
        random.Random(n).shuffle(rows)
        barrier = threading.Barrier(4)

        def work(part, barrier=barrier):
            barrier.wait()
            for row in part:
                write_one(*row)

        threads = [threading.Thread(target=work, args=(rows[start::4],)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return [f"c{n}" for n in range(rounds)]


def newest_lost(online, keys):
    return sum(online.read("customer_session", "session_events", [key])[key] != ("11", NOW_US + 11) for key in keys)


def test_writers_that_race_leave_the_newest_of_each_key(settings, online, url):
    local = threading.local()

    def write_one(key, at_us, value):
        mine = local.__dict__.setdefault("writer", RedisWriter(url))
        mine.write("customer_session", [Row(key, {"session_events": value}, event_us=at_us)])

    assert newest_lost(online, race(40, write_one)) == 0


def test_writers_that_read_and_then_write_lose_the_newest(settings, online, url):
    """The control: the same as Feast's own writer would do it, in two steps, between which another comes."""

    def write_one(key, at_us, value, meanwhile=lambda: None):
        with closing(RedisWriter(url)) as mine:
            held = mine.read("customer_session", "session_events", [key]).get(key, ("", 0))[1]
            meanwhile()
            if held <= at_us:
                batch = pa.table({"customer_id": [key], "session_events": [value], "event_us": [at_us], "created_us": [None]})
                mine.load("customer_session", batch, join_key="customer_id", is_guarded=False)

    write_one("c0", NOW_US + 10, 10, meanwhile=lambda: write_one("c0", NOW_US + 11, 11))
    assert newest_lost(online, ["c0"]) == 1


def test_transaction_that_fails_leaves_nothing_and_one_that_ends_is_seen_at_once(settings, online, url):
    with pytest.raises(TypeError):
        write_one_by_one(online, [consent("c1", True, NOW_US), Row("c2", {"is_personalization_allowed": True}, event_us="never")])
    assert contents(url) == {}
    with online.transaction():
        online.write("customer_consent", [consent(f"c{n}", True, NOW_US) for n in range(1_500)])
        assert contents(url) == {}
    assert len(contents(url)) == 1_500


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"session_events": 2**63}, InputError),
        ({"session_events": 1.5}, InputError),
        ({"session_events": True}, InputError),
        ({"session_events": "3"}, InputError),
        ({"no_such_feature": 3}, StoreError),
    ],
)
@pytest.mark.parametrize("kind", ["redis", "sqlite"])
def test_value_that_is_not_of_its_type_is_refused_in_words(settings, online, kind, values, error):
    with closing(OnlineWriter(settings.home)) as file:
        writer = online if kind == "redis" else file
        with pytest.raises(error, match="customer_session"), writer.transaction():
            writer.write("customer_session", [Row("c1", values, event_us=NOW_US)])
        with pytest.raises(StoreError, match="made without the view ghost"), writer.transaction():
            writer.write("ghost", [])
        batch = pa.table({"customer_id": ["c1"], "session_events": [1.5], "event_us": [1], "created_us": pa.nulls(1)})
        with pytest.raises(InputError, match="double"), writer.transaction():
            writer.load("customer_session", batch, join_key="customer_id", is_guarded=True)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), float("-inf"), -0.0, 5e-324, 3, 2**53 + 1])
@pytest.mark.parametrize("way", ["write", "load"])
def test_odd_numbers_are_the_same_from_redis_from_sqlite_and_through_feast(settings, online, value, way):
    found = []
    with closing(OnlineWriter(settings.home)) as file:
        for writer in (online, file):
            with writer.transaction():
                if way == "write":
                    writer.write("customer_scores", [Row("c1", {"churn_probability": value}, event_us=NOW_US)])
                else:
                    cells = pa.array([None if value is None else float(value)], pa.float64())
                    columns = {
                        "customer_id": ["c1"],
                        "churn_probability": cells,
                        "event_us": [NOW_US],
                        "created_us": pa.nulls(1, pa.int64()),
                    }
                    writer.load("customer_scores", pa.table(columns), join_key="customer_id", is_guarded=True)
            found.append(writer.read("customer_scores", "churn_probability", ["c1"])["c1"])
        with file.transaction():
            file.remove("customer_scores", ["c1"])
    wanted = None if value is None or value != value else float(value)
    assert found == [(None if wanted is None else repr(wanted), NOW_US)] * 2
    assert repr(through_feast(settings, "customer_scores", "churn_probability", customer_id="c1")) == repr(wanted)


# -- people ------------------------------------------------------------------------------------------------------------


def write_person(online, customer, other):
    with online.transaction():
        for name in (customer, other):
            online.write("customer_consent", [consent(name, True, NOW_US)])
            online.write("customer_activity", [Row(name, {"events_total": 3}, event_us=NOW_US)])
            online.write(
                "customer_item",
                [Row((name, f"i{n}"), {one(online, "customer_item"): n}, event_us=NOW_US) for n in range(3)],
                join_key=("customer_id", "item_id"),
            )
            online.write("identifier_customer", [Row(f"user_id:{name}", {"customer_id": name}, event_us=NOW_US)], join_key="identifier")


def one(online, view):
    return next(name for name, kind in online.schema[view].features.items() if kind == "Int64")


def test_erased_customer_leaves_nothing_and_others_stay(settings, online, url):
    write_person(online, "c0badc0de", "c0feed")
    before = len(contents(url))
    assert online.identifiers_of(["c0badc0de", "x"]) == {"c0badc0de": ["user_id:c0badc0de"], "x": []}
    assert online_erasure.erase(settings.home, identifiers=["user_id:c0badc0de"], customers=["c0badc0de"], settings=settings) > 0
    with closing(redis.Redis.from_url(url)) as client:
        for key in client.scan_iter():
            kind = client.type(key)
            held = client.hgetall(key).items() if kind == b"hash" else client.smembers(key) if kind == b"set" else [client.get(key)]
            assert b"c0badc0de" not in key
            assert b"c0badc0de" not in repr(list(held)).encode()
    assert len(contents(url)) == before / 2
    assert through_feast(settings, "customer_activity", "events_total", customer_id="c0feed") == 3


def test_names_that_begin_alike_are_not_erased_together(online, url):
    write_person(online, "c1", "c10")
    join_key = ("customer_id", "item_id")
    assert set(online.keys_of("customer_item", ["c1", "nobody"])) == {key_encoder(join_key)(("c1", f"i{n}")) for n in range(3)}
    assert online.keys_of("customer_category", ["c1"]) == []
    online.remove_customers(["c1"])
    assert online.read("customer_item", one(online, "customer_item"), [("c1", "i1"), ("c10", "i1")], join_key=join_key).keys() == {
        ("c10", "i1")
    }


def test_identifier_that_moved_to_another_customer_is_of_that_one(online):
    for at, owner in ((0, "c1"), (1, "c2")):
        online.write("identifier_customer", [Row("user_id:a", {"customer_id": owner}, event_us=NOW_US + at)], join_key="identifier")
    assert online.identifiers_of(["c1", "c2"]) == {"c1": [], "c2": ["user_id:a"]}


# -- the batch load ----------------------------------------------------------------------------------------------------


def table(home, declared, rows):
    tables.write(home, declared, pa.Table.from_pylist([dict.fromkeys(declared.schema.names) | row for row in rows], declared.schema))


def test_load_is_what_the_table_says_and_keeps_what_was_streamed_since(settings, online, tmp_path):
    home = tmp_path / "home"
    later = NOW + timedelta(days=1)
    feature_store.apply(home, settings=settings)
    scores = [{"customer_id": f"c{n}", "event_timestamp": NOW, "churn_probability": n / 8} for n in range(5)]
    table(home, tables.CUSTOMER_SCORES, scores)
    assert feature_store.materialize(home, as_of=later, views=["customer_scores"], settings=settings) == 5
    table(home, tables.CUSTOMER_SCORES, [scores[0] | {"event_timestamp": NOW - timedelta(days=1)}])
    assert feature_store.materialize(home, as_of=later, views=["customer_scores"], settings=settings) == 1
    table(home, tables.CUSTOMER_CONSENT, [{"customer_id": "c1", "event_timestamp": NOW, "is_personalization_allowed": True}])
    online.write("customer_consent", [consent("c1", False, NOW_US + 1), consent("c2", True, NOW_US)])
    feature_store.materialize(home, as_of=later, views=["customer_consent"], settings=settings)
    found = online.read("customer_consent", "is_personalization_allowed", ["c1", "c2"])
    assert {key: text for key, (text, _) in found.items()} == {"c1": "False", "c2": "True"}
    names = {"identifier": "user_id:a", "customer_id": "c1", "event_timestamp": NOW, "created_timestamp": NOW}
    table(home, tables.IDENTITIES, [names])
    feature_store.materialize(home, as_of=later, views=["customer_consent", "identifier_customer"], settings=settings)
    assert online.read("customer_consent", "is_personalization_allowed", ["c1", "c2"]).keys() == {"c1"}  # nobody is c2 any more


def test_store_of_older_definitions_is_refused_and_mended(settings, online, tmp_path):
    schema = dict(feature_store.declared_schema())
    old = {name: online_view for name, online_view in schema.items() if name != "customer_scores"}
    write(online, consent("c1", True, NOW_US))
    online.migrate(old)
    home = tmp_path / "home"
    feature_store.apply(home)
    table(home, tables.CUSTOMER_CONSENT, [{"customer_id": "c1", "event_timestamp": NOW, "is_personalization_allowed": True}])
    with pytest.raises(StoreError, match="rapport features apply"):
        feature_store.materialize(home, as_of=NOW, settings=settings)
    with pytest.raises(StoreError, match="rapport features apply"):
        online.write("customer_scores", [Row("c1", {"churn_probability": 0.5}, event_us=1)])
    feature_store.apply(home, settings=settings)
    assert online.read("customer_consent", "is_personalization_allowed", ["c1"])["c1"][0] == "True"
    online.migrate({name: view for name, view in schema.items() if name != "customer_consent"})
    assert online.server.client.dbsize() == 2  # what it is made for, and what was streamed


# -- the server --------------------------------------------------------------------------------------------------------


def test_server_that_is_not_there_says_where_and_hides_the_password(free_address):
    with closing(RedisWriter(f"redis://:s3cret@{free_address}/0")) as writer, pytest.raises(StoreError, match=free_address) as told:
        writer.read("customer_consent", "is_personalization_allowed", ["c1"])
    assert "s3cret" not in str(told.value)


@pytest.fixture
def free_address(brokers):
    return f"127.0.0.1:{brokers.free_port()}"


@pytest.mark.slow
def test_writer_goes_on_after_the_server_was_killed_and_started_again(brokers, tmp_path):
    with brokers.redis(tmp_path) as server, closing(RedisWriter(server.url)) as online:
        online.migrate(feature_store.declared_schema())
        write(online, consent("c1", True, NOW_US))
        server.kill()
        with pytest.raises(StoreError, match="start or mend it"):
            write(online, consent("c1", False, NOW_US + 1))
        server.start()  # it has forgotten the scripts
        write(online, consent("c1", False, NOW_US + 1), consent("c2", True, NOW_US))
        found = online.read("customer_consent", "is_personalization_allowed", ["c1", "c2"])
        assert {key: text for key, (text, _) in found.items()} == {"c1": "False", "c2": "True"}


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("redis://h", "h:6379,db=0"),
        ("redis://u:p%40ss@h:1/3", "h:1,db=3,username=u,password=p@ss"),
        ("rediss://h:2/0", "h:2,db=0,ssl=true"),
    ],
)
def test_address_is_told_to_feast_in_its_own_words(url, wanted):
    assert redis_server.feast_connection(url) == wanted


@pytest.mark.parametrize("url", ["http://h", "redis://", "redis://:a,b@h"])
def test_address_that_feast_cannot_be_told_is_refused(url):
    with pytest.raises(InputError, match="redis_url"):
        redis_server.feast_connection(url)
