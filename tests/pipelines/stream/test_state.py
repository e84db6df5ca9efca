"""What the state keeps: seeded from the tables, reconciled after each change of them, erased without a trace."""

import random
import sqlite3
import time
from contextlib import closing
from datetime import UTC, datetime

import pyarrow as pa
import pytest

from pipelines import erasure, feature_store, features, tables
from pipelines.errors import StoreError
from pipelines.identity.online import Online
from pipelines.online.writer import OnlineWriter
from pipelines.settings import StreamSettings
from pipelines.stream import activity
from pipelines.stream.state import State, path_of

ALLOW, DENY = {"personalization": True}, {"personalization": False}
DAY = 86_400.0


def events_of(world, user, view="customer_activity", name="events_total"):
    return world.row(view, world.customer("user_id", user)).get(name)


# -- the tables --------------------------------------------------------------------------------------------------------


def test_history_from_the_tables_counts_from_the_start(world, tmp_path) -> None:
    for n in range(6):
        world.say(n * 3_000, user=f"u{n % 3}", device=f"d{n % 2}", product_id=f"i{n}", session_id="s1" if n == 4 else None)
    world.drain()  # nothing was applied online by then
    world.say(20_000, user="u1", product_id="i9")
    world.step()
    assert world.is_exact(tmp_path / "truth")
    world.to(40 * DAY)
    assert world.is_exact(tmp_path / "truth")


def test_what_an_ingest_stored_is_taken_over_and_what_it_refused_goes(world, tmp_path, monkeypatch) -> None:
    world.say(0, user="ann", product_id="i1")
    world.say(1, user="ann", product_id="i2")
    world.step()
    assert events_of(world, "ann") == 2
    world.drain()
    world.follow()
    state = world.stream.activity.state.db
    assert state.execute("SELECT count(*), count(file), count(position) FROM rows").fetchone() == (2, 2, 0)
    world.say(2, user="ann", product_id="i3")
    monkeypatch.setattr("pipelines.stream.rows._is_good", lambda *args, **options: True)
    world.say(3, user="ann", product_id="", price=1)  # no item: only a worker that is mistaken takes it
    world.step()
    assert events_of(world, "ann") == 4
    world.drain()
    world.follow()
    assert events_of(world, "ann") == 3
    assert world.is_exact(tmp_path / "truth", was_taken_back=True)


def test_rows_that_left_the_tables_leave_the_state(world) -> None:
    for n in range(3):
        world.say(n * DAY, user="ann", product_id="i1")
    world.step()
    world.drain()
    world.follow()
    events = tables.read_arrow(world.home, tables.EVENTS)
    tables.write(world.home, tables.EVENTS, events.slice(1))
    world.follow()
    assert events_of(world, "ann") == 2
    assert world.stream.activity.state.db.execute("SELECT count(*) FROM rows").fetchone() == (2,)


def test_a_restart_without_the_state_gives_the_same(world, tmp_path) -> None:
    for n in range(5):
        world.say(n * 100, user="ann", product_id=f"i{n}")
    world.step()
    world.drain()
    world.stream.close()
    for path in (world.home / "stream").glob("state*"):
        path.unlink()
    world.start()
    world.step()
    assert events_of(world, "ann") == 5
    assert world.is_exact(tmp_path / "truth")


def test_a_repeated_message_counts_once(world, tmp_path) -> None:
    world.say(0, user="ann", message="m", product_id="i1")
    world.say(1, user="ann", message="m", product_id="i1")
    world.step()
    world.say(2, user="eve", message="m", product_id="i1")
    world.step()
    assert events_of(world, "ann") == 1
    assert world.customer("user_id", "eve") is None  # nor does it link
    assert world.is_exact(tmp_path / "truth")


# -- what may be kept --------------------------------------------------------------------------------------------------


def test_without_a_permission_nothing_is_kept(world) -> None:
    world.say(0, user="ann", consent=None, product_id="i1")
    world.say(1, user="ann", consent=DENY, product_id="i1")
    world.say(2, user="ann", consent={"marketing": True}, product_id="i1")
    world.step()
    assert world.stream.activity.state.db.execute("SELECT count(*) FROM rows").fetchone() == (0,)
    assert world.online("customer_activity") == {}


def test_a_declared_basis_covers_a_source_that_never_speaks(new_world, tmp_path) -> None:
    from pipelines.settings import ConsentSettings

    world = new_world(consent=ConsentSettings(legal_basis="contract"))
    world.say(0, user="ann", consent=None, product_id="i1")
    world.step()
    assert events_of(world, "ann") == 1
    assert world.is_exact(tmp_path / "truth")
    world.say(1, user="bob", product_id="i1")  # the source speaks
    world.say(2, user="cid", consent=None, product_id="i1")
    world.step()
    assert world.online("customer_activity").keys() == {world.customer("user_id", user) for user in ("ann", "bob")}
    assert world.is_exact(tmp_path / "later")


def test_a_source_that_spoke_earlier_than_was_known_loses_what_its_basis_covered_since(new_world, tmp_path) -> None:
    from pipelines.settings import ConsentSettings

    world = new_world(consent=ConsentSettings(legal_basis="contract"))
    for at_s, user in ((10, "ann"), (20, "ann"), (20, "bob"), (30, "cid")):
        world.say(at_s, user=user, consent=None, product_id="i1")
    world.step()
    assert len(world.online("customer_activity")) == 3
    world.say(40, user="cid", made_s=15, product_id="i2")  # of before, and he allows it
    world.step()
    assert events_of(world, "ann") == 1
    assert events_of(world, "cid") == 2
    assert world.online("customer_activity").keys() == {world.customer("user_id", user) for user in ("ann", "cid")}
    assert world.is_exact(tmp_path / "truth", was_taken_back=True)


def test_control_where_the_source_is_not_looked_at_again_that_stays(new_world, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(activity.Activity, "_uncover", lambda *_, **__: [])
    with pytest.raises(AssertionError):
        test_a_source_that_spoke_earlier_than_was_known_loses_what_its_basis_covered_since(new_world, tmp_path)


def test_an_ingest_that_knows_of_an_earlier_word_takes_out_what_the_log_brought_since(new_world) -> None:
    from pipelines.settings import ConsentSettings

    world = new_world(consent=ConsentSettings(legal_basis="contract"))
    world.say(10, user="ann", consent=None, product_id="i1")
    world.step()
    world.drain()
    world.say(20, user="bob", consent=None, product_id="i1")
    world.step()
    assert len(world.online("customer_activity")) == 2
    told = [{"source": "web", "event_timestamp": datetime(2020, 1, 1, tzinfo=UTC)}]
    tables.write(world.home, tables.SPEAKING_SOURCES, pa.Table.from_pylist(told, schema=tables.SPEAKING_SOURCES.schema))
    tables.write(world.home, tables.INGESTS, tables.read_arrow(world.home, tables.INGESTS))  # as every ingest does
    world.follow()
    assert world.online("customer_activity").keys() == {world.customer("user_id", "ann")}  # of whom that ingest had said nothing


# -- time --------------------------------------------------------------------------------------------------------------


def test_a_worker_that_pushes_at_events_alone_is_found_out(world, tmp_path, monkeypatch) -> None:
    """The control."""
    monkeypatch.setattr(activity.Activity, "patience_s", lambda self: float("inf"))
    world.say(0, user="ann", product_id="i1")
    world.step()
    world.to(2 * 3_600)
    with pytest.raises(AssertionError):
        world.is_exact(tmp_path / "truth")


def test_what_expired_while_the_worker_was_away_is_caught_up_in_slices(world, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(activity, "SLICE_CUSTOMERS", 4)
    for n in range(30):
        world.say(n, user=f"u{n}", product_id="i1")
    world.step()
    world.stream.close()
    world.linker.close()
    world.log.release("online")
    world.now += int(20 * DAY * 1e6)
    world.start()
    world.say(21 * DAY, user="u3", product_id="i2")
    first = world.stream.step()
    assert (first.read, first.expired <= 5) == (1, True)  # the fresh one did not wait for the others
    assert events_of(world, "u3") == 2
    world.step()
    world.step()
    assert world.is_exact(tmp_path / "truth")


def test_a_sender_whose_clock_jumps_changes_nothing_but_its_own_times(world, tmp_path) -> None:
    for n, made_s in enumerate((0, 3_000, -9 * DAY, 5, 2_900, -400 * DAY)):
        world.say(10 * n, user="ann", made_s=made_s, product_id=f"i{n}")
        world.step()
    assert events_of(world, "ann") == 4  # two lie ahead still
    assert world.is_exact(tmp_path / "truth")
    world.to(4_000)
    assert events_of(world, "ann") == 6
    assert world.is_exact(tmp_path / "truth")


def test_a_home_of_history_moves_with_its_events(new_world) -> None:
    """Its clock stands still: an event brings its customer to its own time, and nobody else."""
    world = new_world()
    world.say(0, user="ann", product_id="i1")
    world.say(0, user="bob", product_id="i1")
    world.step()
    before = world.now
    world.say(30 * DAY, user="ann", product_id="i1")
    world.now = before
    world.step()
    assert (events_of(world, "ann", name="events_7d"), events_of(world, "bob", name="events_7d")) == (1, 1)
    assert events_of(world, "ann") == 2


# -- who writes at the same time ---------------------------------------------------------------------------------------


def test_two_workers_write_what_one_would(new_world) -> None:
    alone = new_world()
    shared = new_world(like=alone, stream=StreamSettings(workers=2))
    shared.stream.close()
    first = shared.made(share=(0, 2))
    with closing(Online(shared.home, vault=shared.vault, worker=1)) as linker:
        kept, shared.linker = shared.linker, linker
        second = shared.made(share=(1, 2))
        shared.linker = kept
        rng = random.Random(3)
        at_s = 0.0
        for n in range(60):
            at_s += rng.choice([0.5, 30, 4_000])
            user, device = rng.choice([("u1", None), ("u2", "d2"), (None, "d1"), (None, "d2"), ("u1", "d1"), *[(f"u{n}", None)] * 4])
            said = rng.choice([ALLOW] * 8 + [DENY])
            for world in (alone, shared):
                world.say(at_s, user=user, device=device, consent=said, product_id=f"i{n % 4}")
            for stream in (alone.stream, first, second)[: rng.randrange(4)]:
                stream.step()
        done = 1
        while done:
            done = sum(one.read + one.expired for one in [stream.step() for stream in (alone.stream, first, second)])
        for view in ("customer_activity", "customer_session", "customer_item"):
            assert shared.online(view) == alone.online(view)
        assert len(alone.online("customer_activity")) > 3
        counts = [stream.activity.state.db.execute("SELECT count(*) FROM due").fetchone()[0] for stream in (first, second)]
        assert min(counts) > 0  # each has its share
        counted = [{customer for customer, live in stream.activity._lives.items() if live.n_rows} for stream in (first, second)]
        assert all(counted)
        assert counted[0].isdisjoint(counted[1])  # what another one writes, a worker does not count
        second.close()
    shared.stream = first


def test_a_materialisation_meanwhile_takes_nothing_back(world, tmp_path) -> None:
    for n in range(4):
        world.say(n * 1_000, user=f"u{n % 2}", product_id="i1")
    world.step()
    world.drain()
    world.follow()
    features.build(world.home)
    world.say(5_000, user="u1", product_id="i2")
    world.step()
    expected = world.online("customer_activity")
    feature_store.materialize(world.home, as_of=datetime.fromtimestamp(world.now / 1e6, UTC))
    assert world.online("customer_activity") == expected
    world.to(9_000)
    assert world.is_exact(tmp_path / "truth")


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_full_disk_costs_nothing_once_there_is_room(world, tmp_path, monkeypatch) -> None:
    world.say(0, user="ann", product_id="i1")
    world.step()
    world.say(1, user="ann", product_id="i2")
    real, where = State.keep, OnlineWriter.renew
    monkeypatch.setattr(State, "keep", lambda *args, **options: (_ for _ in ()).throw(sqlite3.OperationalError("database or disk is full")))
    for _ in range(6):
        with pytest.raises(StoreError, match="free space"):
            world.stream.step()
    monkeypatch.setattr(State, "keep", real)
    monkeypatch.setattr(OnlineWriter, "renew", lambda *args, **options: (_ for _ in ()).throw(sqlite3.OperationalError("disk is full")))
    with pytest.raises(StoreError):
        world.stream.step()
    monkeypatch.setattr(OnlineWriter, "renew", where)
    world.step()
    assert events_of(world, "ann") == 2
    assert world.log.counts().parked == 0
    assert world.is_exact(tmp_path / "truth")


def test_a_store_of_older_definitions_is_refused_and_goes_on_after_apply(world, applied, tmp_path) -> None:
    from pipelines.online import schema as online_schema

    with closing(sqlite3.connect(world.home / "feature_store" / "online.db", isolation_level=None)) as db:
        wanted = online_schema.get(db)
        less = {
            name: made
            if name != "customer_activity"
            else type(made)(made.join_key, {k: v for k, v in made.features.items() if k != "views_1h"})
            for name, made in wanted.items()
        }
        online_schema.put(db, less)
    world.stream.close()
    world.start()
    world.say(0, user="ann", product_id="i1")
    for _ in range(6):
        with pytest.raises(StoreError, match="rapport features apply"):
            world.stream.step()
    feature_store.apply(world.home)
    world.step()
    world.step()
    assert events_of(world, "ann") == 1
    assert world.log.counts().parked == 0


@pytest.mark.slow
def test_a_customer_of_a_hundred_thousand_events_holds_nobody_up(world) -> None:
    for n in range(20):
        world.say(n * 60, user="bot", product_id=f"i{n}")
    world.step()
    state = world.stream.activity.state
    with state.transaction() as db:
        db.db.execute(
            """WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 100000)
            INSERT INTO rows SELECT source, event_id || '-' || i, who, type, event_us - i * 1000000, known_us, received_us, item_id,
                order_id, session_id, quantity, price_cents, revenue_cents,
                allows, category, file, position FROM n JOIN (SELECT * FROM rows LIMIT 1)"""
        )
    world.stream.activity.look_again()
    world.say(2_000, user="bot", product_id="i1")
    started = time.process_time()
    world.step()
    anew = time.process_time() - started
    assert events_of(world, "bot") == 100_022
    started = time.process_time()
    for n in range(50):
        world.say(2_001 + n, user="bot", product_id="i1")
        world.step()
    assert (time.process_time() - started) / 50 < anew / 10  # held ready, it costs what any other costs


# -- erased people -----------------------------------------------------------------------------------------------------


def test_erased_person_is_in_no_byte_of_the_state(world) -> None:
    for n in range(400):
        world.say(n, user=f"u{n % 40}", product_id=f"i{n}", consent=ALLOW if n % 5 else DENY)
    world.step()
    name, customer = world.vault.pseudonym("user_id", "u7"), world.customer("user_id", "u7")
    other = world.vault.pseudonym("user_id", "u8")

    def found(text):
        files = list((world.home / "stream").glob("state*"))
        return any(text.encode() in path.read_bytes() for path in files)

    assert found(name.split(":")[1])  # the control: the search sees them
    world.drain()
    erasure.erase(world.home, "u7", settings=world.settings, by="admin", as_of=datetime(2026, 4, 1, tzinfo=UTC))
    for _ in range(2):
        assert not found(name.split(":")[1])
        assert not found(customer)
        assert found(other.split(":")[1])
        world.say(1_000, user="u7", product_id="i1")
        world.follow()
        world.to(3 * DAY)
    assert world.row("customer_activity", customer) == {}
    with closing(State(path_of(world.home))) as state:
        assert state.spells_of(customer) == {}


def test_file_of_another_version_is_refused_with_what_to_do(tmp_path) -> None:
    path = path_of(tmp_path)
    State(path).close()
    State(path).close()  # its own
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match=r"of shape 99, expected 2.*rapport ingest.*delete state.db\*"):
        State(path)
