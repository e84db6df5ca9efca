"""What the stream writes to the file is in Redis as well, whatever dies in between."""

import sqlite3
from contextlib import closing

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines import feature_store
from pipelines.errors import StoreError
from pipelines.online.erasure import erase
from pipelines.online.outbox import MirroredWriter
from pipelines.online.redis_writer import RedisWriter
from pipelines.online.writer import Row
from pipelines.settings import OnlineSettings, Settings

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    feature_store.apply(home)
    return home


@pytest.fixture
def url(redis_server):
    return redis_server.url.rsplit("/", 1)[0] + "/9"


@pytest.fixture
def fresh(home, url):
    """fresh(): both stores empty, and a writer of both."""
    writers = []

    def make():
        with closing(redis.Redis.from_url(url)) as client:
            client.flushdb()
        with closing(RedisWriter(url)) as online:
            online.migrate(feature_store.declared_schema())
        with closing(sqlite3.connect(home / "feature_store" / "online.db")) as db, db:
            for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name GLOB 'rapport_*'").fetchall():
                db.execute(f'DELETE FROM "{name}"')
        writers.append(MirroredWriter(home, url=url))
        return writers[-1]

    yield make
    for writer in writers:
        writer.close()


def write(online, *rows):
    with online.transaction():
        online.write("customer_session", rows)


def write_and_fail(online, row):
    with online.transaction():
        online.write("customer_session", [row])
        raise KeyError(row.key)


def shown(online, keys):
    return {key: text for key, (text, _) in online.read("customer_session", "session_events", keys).items()}


KEYS = ["c1", "c2", "c3"]
STEP = st.tuples(st.sampled_from(["write", "renew", "remove", "forget"]), st.sampled_from(KEYS), st.integers(0, 5), st.integers(0, 9))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(STEP, min_size=1, max_size=5), max_size=5))
def test_both_stores_hold_the_same_after_any_transactions(fresh, batches):
    online = fresh()
    for batch in batches:
        with online.transaction():
            for what, key, at, value in batch:
                if what == "write":
                    online.write("customer_session", [Row(key, {"session_events": value}, event_us=1_000_000 + at)])
                elif what == "renew":
                    online.renew("customer_session", [Row(key, {"session_events": value}, event_us=1_000_000 + at)])
                elif what == "remove":
                    online.remove("customer_session", [key])
                else:
                    online.remove_customers([key])
    assert shown(online.mirror, KEYS) == shown(online, KEYS)


def test_what_redis_did_not_take_is_sent_by_the_next_worker(fresh, home, url, brokers):
    online = fresh()
    write(online, Row("c1", {"session_events": 1}, event_us=1))
    online.mirror.close()
    online.mirror = RedisWriter(f"redis://127.0.0.1:{brokers.free_port()}/0")
    with pytest.raises(StoreError, match="start or mend it"):
        write(online, Row("c1", {"session_events": 2}, event_us=2))
    assert shown(online, ["c1"]) == {"c1": "2"}
    with closing(RedisWriter(url)) as there, closing(MirroredWriter(home, url=url)) as other:
        assert shown(there, ["c1"]) == {"c1": "1"}
        write(other, Row("c2", {"session_events": 3}, event_us=1))
        assert shown(there, ["c1", "c2"]) == {"c1": "2", "c2": "3"}
        assert other.db.execute("SELECT count(*) FROM outbox").fetchone() == (0,)


def test_person_erased_while_redis_was_away_does_not_come_back(fresh, home, url, brokers):
    online = fresh()
    online.mirror = RedisWriter(f"redis://127.0.0.1:{brokers.free_port()}/0")
    with pytest.raises(StoreError):
        write(online, Row("c1", {"session_events": 2}, event_us=2), Row("c2", {"session_events": 2}, event_us=2))
    here = Settings(home=home, online=OnlineSettings(redis_url=url))
    assert erase(home, identifiers=["user_id:x"], customers=["c1"], settings=here) == 1
    with closing(MirroredWriter(home, url=url)) as other:
        other.deliver()
        assert shown(other.mirror, KEYS) == {"c2": "2"}


def test_transaction_that_is_rolled_back_owes_nothing(fresh):
    online = fresh()
    with pytest.raises(KeyError):
        write_and_fail(online, Row("c1", {"session_events": 1}, event_us=1))
    write(online, Row("c2", {"session_events": 1}, event_us=1))
    assert shown(online.mirror, KEYS) == {"c2": "1"}
