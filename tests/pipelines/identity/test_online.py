"""Links one by one against the same links at once."""

import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pipelines import identity, tables
from pipelines.errors import StoreError
from pipelines.identity import files
from pipelines.identity.filling import AtOnce, Beside
from pipelines.identity.links import Linked, Links
from pipelines.identity.online import Online, forget
from pipelines.stream import consents
from pipelines.vault import open_vault

START = datetime(2024, 1, 1, tzinfo=UTC)
COLUMNS = ["identifier", "customer_id", "event_timestamp", "created_timestamp"]


@dataclass(frozen=True)
class Seen:
    """A sighting at an hour, known some hours later."""

    subjects: tuple[str, ...]
    hour: int
    known: int
    position: int = 1

    @property
    def event_us(self) -> int:
        return int((START + timedelta(hours=self.hour)).timestamp()) * 1_000_000

    @property
    def received_us(self) -> int:
        return int((START + timedelta(hours=self.known)).timestamp()) * 1_000_000


def seen(*subjects: str, hour: int = 0, known: int | None = None, position: int = 1) -> Seen:
    return Seen(subjects, hour, hour if known is None else known, position)


def drained(home: Path, positions: str) -> None:
    """What a drain notes down of the positions that it has applied."""
    run = dict.fromkeys(tables.INGESTS.schema.names) | {"source": "web", "files": "log", "positions": positions}  # type: ignore[union-attr]
    tables.append(home, tables.INGESTS, pa.Table.from_pylist([run], schema=tables.INGESTS.schema))


def bytes_of(home: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted((home / "identity").iterdir()))


def links(sightings: list[Seen]) -> pd.DataFrame:
    rows = []
    for sighting in sightings:
        row: dict[str, object] = dict.fromkeys(identity.LINK_COLUMNS)
        for name in sighting.subjects:
            kind, _, value = name.partition(":")
            row[kind] = name if kind in ("email", "phone") else value
        times = {"event_timestamp": sighting.event_us, "created_timestamp": sighting.received_us}
        rows.append(row | {name: pd.Timestamp(at, unit="us", tz="UTC") for name, at in times.items()})
    return pd.DataFrame(rows, columns=list(identity.LINK_COLUMNS))


def edges(*rows: tuple[str, str, str, int]) -> pd.DataFrame:
    made = [
        {
            "link_id": identity.link_id(one, other),
            "left": min(one, other),
            "right": max(one, other),
            "kind": "probabilistic",
            "state": state,
            "weight": 1.0,
            "evidence": "{}",
            "decided_by": None,
            "created_timestamp": pd.Timestamp(START + timedelta(hours=hour)),
        }
        for one, other, state, hour in rows
    ]
    return pd.DataFrame(made, columns=tables.IDENTITY_EDGES.schema.names)


def publish(home: Path, sightings: list[Seen], *, joined: pd.DataFrame | None = None, held: pd.DataFrame | None = None) -> pd.DataFrame:
    """What an ingest leaves behind."""
    resolved = identity.resolve(links(sightings), edges=joined, held=held)
    tables.write(home, tables.IDENTITY_LINKS, links(sightings))
    tables.write(home, tables.IDENTITIES, resolved)
    if joined is not None and len(joined):
        tables.write(home, tables.IDENTITY_EDGES, joined)
    return resolved


def frame(rows: list[Linked]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=COLUMNS).sort_values(["identifier", "event_timestamp"]).reset_index(drop=True)


def assert_same(online: Online, batch: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(frame(online.identities()), batch, check_dtype=False)


@pytest.fixture
def online(tmp_path: Path) -> Iterator[Online]:
    with closing(Online(tmp_path)) as made:
        yield made


def owners(linked: list[Linked]) -> dict[str, str]:
    return {row.identifier: row.customer_id for row in linked}


def test_a_visitors_history_is_the_customers_the_moment_they_log_in(online: Online) -> None:
    visitor = owners(online.link([seen("anonymous_id:a", hour=0)]))["anonymous_id:a"]
    assert owners(online.link([seen("user_id:u", "anonymous_id:a", hour=2)])) == {"user_id:u": visitor}
    assert online.customer("user_id:u") == visitor
    assert online.customer("user_id:nobody") is None


def test_newcomers_whom_a_call_names_alone_are_answered_as_all_at_once_are(online: Online, tmp_path: Path) -> None:
    alone = [seen("anonymous_id:a", hour=3, known=5), seen("email:e", hour=1, known=9), seen("phone:1", hour=2)]
    told = [linked for one in alone for linked in online.link([one])]
    assert_same(online, frame(told))
    assert_same(online, publish(tmp_path, alone))
    with patch.object(Links, "_newcomer", return_value=None), closing(Online(tmp_path / "other")) as other:
        assert frame([linked for one in alone for linked in other.link([one])]).equals(frame(told))


def held(online: Online) -> dict[str, list[tuple[object, ...]]]:
    """What the file holds, whatever came in which order."""
    columns = {"sightings": "user_id, email, phone, anonymous_id, time, created, is_stored", "identities": "*", "edges": "*", "desks": "*"}
    return {table: sorted(online._db.execute(f"SELECT {names} FROM {table}"), key=repr) for table, names in columns.items()}


CALL = st.builds(
    seen,
    st.sampled_from(["user_id:u", "user_id:v", "anonymous_id:a"]),
    st.sampled_from(["email:e", "email:f", "anonymous_id:b", "phone:1"]),
    hour=st.integers(0, 9),
)


@settings(max_examples=25, phases=[Phase.generate])
@given(st.lists(CALL, max_size=5), st.lists(CALL, max_size=4), st.lists(CALL, max_size=5))
def test_a_file_that_follows_an_ingest_holds_what_a_new_one_would(
    tmp_path_factory: pytest.TempPathFactory, first: list[Seen], came: list[Seen], second: list[Seen]
) -> None:
    home = tmp_path_factory.mktemp("home")
    publish(home, first)
    with closing(Online(home)) as online:
        online.link(came)
        publish(home, second, joined=edges(("user_id:u", "user_id:v", "link", 3)) if len(second) % 2 else None)
        drained(home, "1-1")
        assert online.refresh()
        with closing(Online(home, worker=1)) as new:
            assert new.path != online.path
            assert held(online) == held(new)


def test_a_merge_tells_everybody_whose_customer_changed(online: Online) -> None:
    online.link([seen("user_id:u", "anonymous_id:a"), seen("user_id:v", "email:e", "anonymous_id:b", hour=1)])
    linked = owners(online.link([seen("user_id:u", "email:e", hour=3)]))
    assert set(linked) == {"user_id:v", "email:e", "anonymous_id:b"}
    assert set(linked.values()) == {online.customer("user_id:u")}


def test_what_is_known_already_links_nothing_and_is_not_kept(online: Online) -> None:
    online.link([seen("user_id:u", "anonymous_id:a", hour=0)])
    before = online._db.execute("SELECT count(*) FROM sightings").fetchone()
    assert online.link([seen("user_id:u", "anonymous_id:a", hour=hour) for hour in range(1, 9)]) == []
    assert online._db.execute("SELECT count(*) FROM sightings").fetchone() == before
    # The control: a login of somebody else in between makes the next one count.
    online.link([seen("user_id:v", "anonymous_id:a", hour=20), seen("user_id:u", "anonymous_id:a", hour=21)])
    assert online._db.execute("SELECT count(*) FROM sightings").fetchone() == (before[0] + 2,)


def test_a_shared_device_belongs_to_the_latest_login_and_each_time_to_its_own(online: Online) -> None:
    online.link([seen("anonymous_id:tv"), seen("user_id:ann", "anonymous_id:tv", hour=2)])
    told = online.link([seen("user_id:bob", "anonymous_id:tv", hour=5)])
    assert [row.customer_id for row in told if row.identifier == "anonymous_id:tv"][-1] == online.customer("user_id:bob")
    for hour, whose in ((0, "ann"), (4, "ann"), (5, "bob"), (9, "bob")):
        assert online.customer("anonymous_id:tv", at=START + timedelta(hours=hour)) == online.customer(f"user_id:{whose}")


NAMES = {
    "user_id": ["u", "v", "w", "x", "y", "z"],
    "email": ["1", "2"],
    "phone": ["5", "6"],
    "anonymous_id": ["a", "b", "c"],
}
SIGHTINGS = st.builds(
    lambda names, hour, late: Seen(tuple(name for name in names if name), hour, hour + late),
    st.tuples(*(st.sampled_from([None, *(f"{kind}:{name}" for name in names)]) for kind, names in NAMES.items())),
    st.integers(0, 20),
    st.sampled_from([0, 0, 3, 15]),
).filter(lambda sighting: sighting.subjects)
EVERYBODY = [f"{kind}:{name}" for kind, names in NAMES.items() for name in names]
EDGES = st.lists(
    st.tuples(st.sampled_from(EVERYBODY), st.sampled_from(EVERYBODY), st.sampled_from(["link", "cut"]), st.integers(0, 20)), max_size=3
)


@settings(max_examples=40, phases=[Phase.generate])
@given(st.lists(st.lists(SIGHTINGS, min_size=1, max_size=5), min_size=1, max_size=5), st.lists(SIGHTINGS, max_size=6), EDGES)
def test_links_one_by_one_are_those_of_the_batch_over_all(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[Seen]], stored: list[Seen], drawn: list[tuple[str, str, str, int]]
) -> None:
    """From what an ingest left, with what was held then; after every batch, and what is told is just what is different."""
    home = tmp_path_factory.mktemp("home")
    joined = edges(*((one, other, state, hour) for one, other, state, hour in drawn if one != other)).drop_duplicates(["left", "right"])
    held, so_far = publish(home, stored, joined=joined), list(stored)
    with closing(Online(home)) as online:
        for batch in batches:
            so_far += batch
            told = online.link(batch)
            batched = identity.resolve(links(so_far), edges=joined, held=held)
            assert_same(online, batched)
            now = batched.groupby("identifier")["customer_id"].agg(list)
            before = held.groupby("identifier")["customer_id"].agg(list)
            assert {name for name in now.index if name not in before or now[name] != before[name]} <= {row.identifier for row in told}
            theirs = batched[batched["identifier"].isin([row.identifier for row in told])].reset_index(drop=True)
            pd.testing.assert_frame_equal(frame(told), theirs, check_dtype=False)
            held = batched


def test_after_an_ingest_the_tables_hold_and_what_came_since_is_linked_on_top(tmp_path: Path) -> None:
    with closing(Online(tmp_path)) as online:
        online.link([seen("user_id:u", "anonymous_id:a"), seen("user_id:v", "anonymous_id:a", hour=1)])
        assert online.refresh() is False
        stored = [seen("user_id:u", "anonymous_id:a"), seen("user_id:w", hour=1)]
        publish(tmp_path, stored, joined=edges(("user_id:u", "user_id:w", "link", 4)))
        assert online.refresh() is True
        assert online.customer("user_id:u") == online.customer("user_id:w")
        assert online.customer("user_id:v") is not None  # was not in that ingest, and is not lost
        assert online.refresh() is False
        drained(tmp_path, "1-1 p0")  # an ingest of all: what it did not store may not be kept
        assert online.refresh() is True
        assert online.customer("user_id:v") is None
        assert online.refresh() is False
    with closing(Online(tmp_path)) as again:
        assert again.customer("user_id:u") == again.customer("user_id:w")


def test_a_cut_of_the_ingest_holds_online(tmp_path: Path) -> None:
    stored = [seen("user_id:u", "email:1"), seen("user_id:v", "email:1", hour=1)]
    publish(tmp_path, stored, joined=edges(("user_id:v", "email:1", "cut", 2)))
    with closing(Online(tmp_path)) as online:
        online.link([seen("user_id:v", "email:1", hour=hour) for hour in (3, 4)])
        assert online.customer("user_id:v") != online.customer("user_id:u")


def test_forgotten_people_leave_no_byte(tmp_path: Path) -> None:
    with closing(Online(tmp_path)) as online:
        online.link([seen("user_id:secretuser", "anonymous_id:a"), seen("user_id:v", "anonymous_id:b", hour=1)])
        assert b"secretuser" in bytes_of(tmp_path)
        assert forget(tmp_path, ["user_id:secretuser", "anonymous_id:a"]) > 0
        assert b"secretuser" not in bytes_of(tmp_path)
        assert online.customer("user_id:v") is not None


def test_of_what_a_drain_did_not_store_no_byte_stays_and_what_came_since_is_linked(tmp_path: Path) -> None:
    with closing(Online(tmp_path)) as online:
        online.link([seen(f"user_id:quiet{n}", f"anonymous_id:device{n}", position=n) for n in range(1, 80)])
        online.link([seen("user_id:quiet7", "anonymous_id:device7", hour=1, position=80)])  # says the same, after the drain
        assert b"quiet41" in bytes_of(tmp_path), "the control"
        drained(tmp_path, "2-79 p0")
        assert online.refresh() is True
        assert {row.identifier for row in online.identities()} == {
            f"{kind}{n}" for kind in ("user_id:quiet", "anonymous_id:device") for n in (1, 7)
        }
        assert b"quiet41" not in bytes_of(tmp_path)
        assert b"device41" not in bytes_of(tmp_path)


class Held(AtOnce):
    """A file that is made at once and said to be done when `is_let_go`."""

    is_let_go = False

    def is_done(self) -> bool:
        return self.is_let_go


class Failing(AtOnce):
    def is_done(self) -> bool:
        raise StoreError("its process ended with 1")


@pytest.fixture(autouse=True)
def nothing_is_let_go() -> Iterator[None]:
    yield
    Held.is_let_go = False


def let_go(online: Online) -> bool:
    Held.is_let_go = True
    found = online.refresh()
    Held.is_let_go = False
    return found


def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        time.sleep(0.02)


def by_name(rows: Iterable[Linked]) -> dict[str, list[tuple[object, ...]]]:
    """What the stream needs to know: not since when an identifier is its first owner's."""
    found: dict[str, list[tuple[object, ...]]] = {}
    for row in sorted(rows, key=lambda row: (row.identifier, row.event_timestamp)):
        states = found.setdefault(row.identifier, [])
        states.append((row.event_timestamp if states else None, row.customer_id, row.created_timestamp))
    return found


@settings(max_examples=40, phases=[Phase.generate])
@given(*[st.lists(CALL, max_size=size) for size in (5, 4, 4, 5)], st.sampled_from(["1-1", "1-2", "1-3", "2-2", "3-3"]))
def test_calls_that_come_while_tables_are_read_count_as_they_would_afterwards_and_all_that_changes_is_told(
    tmp_path_factory: pytest.TempPathFactory, first: list[Seen], came: list[Seen], late: list[Seen], second: list[Seen], positions: str
) -> None:
    home = tmp_path_factory.mktemp("home")
    first = list(dict.fromkeys(first))
    publish(home, first)
    late += [replace(call, hour=call.hour + 1, known=call.known + 1) for call in came[:2]]  # said again
    came, late = ([replace(call, position=position) for call in calls] for position, calls in ((2, came), (3, late)))
    with closing(Online(home, fill=Held)) as online:
        told = by_name(online.identities()) | by_name(online.link(came))
        publish(home, [*first, *(replace(call, hour=call.hour + 20, known=call.known + 20) for call in second)])  # no login between theirs
        drained(home, positions)
        assert not online.refresh()
        assert online.is_reading
        for call in late:
            told |= by_name(online.link([call]))
        assert let_go(online)
        assert not online.refresh()
        with closing(Online(home, worker=1)) as afterwards:
            for calls in (came, late):
                afterwards.link([call for call in calls if str(call.position) not in positions and positions != "1-3"])
            assert held(online) == held(afterwards)
        told |= by_name(online.changes())
        now = by_name(online.identities())
        assert {name: told[name] for name in now} == now


def test_whom_a_call_moves_by_what_the_tables_say_alone_is_told(tmp_path: Path) -> None:
    first = [seen("user_id:u"), seen("user_id:v", hour=2), seen("email:e", hour=3)]
    publish(tmp_path, first)
    with closing(Online(tmp_path, fill=Held)) as online:
        publish(tmp_path, [*first, seen("user_id:v", "email:e", hour=5)])
        online.refresh()
        assert set(owners(online.link([seen("user_id:u", "email:e", hour=4, position=3)]))) == {"email:e"}
        assert let_go(online)
        assert owners(online.changes())["user_id:v"] == online.customer("user_id:u")


def test_a_person_erased_while_tables_are_read_leaves_no_byte_and_does_not_come_back(tmp_path: Path) -> None:
    others = [seen("user_id:v", "anonymous_id:b", hour=1)]
    with closing(open_vault(tmp_path)) as vault, closing(Online(tmp_path, vault=vault, fill=Held)) as online:
        ann, device = vault.pseudonym("user_id", "ann"), vault.pseudonym("anonymous_id", "d")
        publish(tmp_path, [seen(ann, device), *others])
        assert not online.refresh()
        online.link([seen(ann, "email:e", position=7)])
        assert ann.encode() in files.unfinished(tmp_path, 0).read_bytes(), "the control"
        vault.entomb([ann, device, "email:e"], erased_us=1, receipt="r")
        publish(tmp_path, others)
        forget(tmp_path, [ann, device, "email:e"])
        gone = [name.split(":", 1)[1].encode() for name in (ann, device)]
        assert not any(name in bytes_of(tmp_path) for name in gone)
        assert not let_go(online), "what was being made is thrown away"
        assert not online.refresh()
        assert let_go(online)
        assert {row.identifier for row in online.identities()} == {"user_id:v", "anonymous_id:b"}
        assert not any(name in bytes_of(tmp_path) for name in gone)


WORDS = st.lists(
    st.tuples(
        st.sampled_from(["user_id:u", "email:e"]), st.sampled_from(["personalization", "marketing"]),
        st.sampled_from(["consent", "declared: published"]), st.booleans(), st.integers(0, 3),
    ), max_size=12,
)  # fmt: skip


@settings(max_examples=20, phases=[Phase.generate])
@given(WORDS)
def test_the_words_it_holds_are_the_newest_of_the_table(
    tmp_path_factory: pytest.TempPathFactory, said: list[tuple[str, str, str, bool, int]]
) -> None:
    home = tmp_path_factory.mktemp("home")
    schema, columns = tables.CONSENTS.schema, ("identifier", "purpose", "basis", "is_allowed", "event_timestamp")
    rows = [dict.fromkeys(schema.names) | dict(zip(columns, row, strict=True)) for row in said]
    rows = [row | {"customer_id": "c", "event_timestamp": START + timedelta(hours=row["event_timestamp"])} for row in rows]
    tables.write(home, tables.CONSENTS, pa.Table.from_pylist(rows, schema=schema))
    names = ["user_id:u", "email:e", "user_id:nobody"]
    expected = {}
    for name, purpose, basis, is_allowed, hour in sorted(said, key=lambda row: (row[4], not row[3])):  # of one instant the refusal is last
        made_us = seen("user_id:u", hour=hour).event_us
        expected[name, purpose, basis == "consent"] = (is_allowed, made_us)
    with closing(Online(home)) as online:
        found = {(name, purpose, stated): word for name, purpose, stated, *word in map(tuple, online.words(names))}
        assert {key: tuple(word) for key, word in found.items()} == expected
        assert sorted(online.words(names)) == sorted(consents.Table(home).words(names))
        forget(home, ["email:e"])
        assert {name for name, *_ in online.words(names)} <= {"user_id:u"}
        assert b"email:e" not in bytes_of(home)


def test_what_was_made_of_tables_that_are_others_by_now_is_not_taken(tmp_path: Path) -> None:
    with closing(Online(tmp_path, fill=Held)) as online:
        publish(tmp_path, [seen("user_id:u")])
        online.refresh()
        publish(tmp_path, [seen("user_id:v")])
        assert not let_go(online)
        assert online.identities() == []
        online.refresh()
        assert let_go(online)
        assert [row.identifier for row in online.identities()] == ["user_id:v"]


def test_while_somebody_is_at_the_files_none_takes_the_others_place(tmp_path: Path) -> None:
    publish(tmp_path, [seen("user_id:u")])
    with closing(Online(tmp_path)) as online:
        publish(tmp_path, [seen("user_id:v")])
        with files.alone(tmp_path):
            assert not online.refresh()
            assert online.is_reading
        assert online.refresh()
        assert not online.is_reading


@pytest.mark.parametrize("where", ["made", "placed"])
def test_a_worker_that_ends_while_files_change_leaves_the_old_or_the_new(tmp_path: Path, where: str) -> None:
    publish(tmp_path, [seen("user_id:u", "anonymous_id:a")])
    online = Online(tmp_path, fill=Held if where == "made" else AtOnce)
    online.link([seen("user_id:u", "email:1", position=5)])
    publish(tmp_path, [seen("user_id:u", "anonymous_id:a"), seen("user_id:w", hour=1)])
    if where == "made":
        online.refresh()
        assert files.unfinished(tmp_path, 0).exists()
    else:
        with patch.object(files, "tidy", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            online.refresh()
        assert len(list((tmp_path / "identity").glob("online*.db"))) == 2
    with closing(Online(tmp_path)) as again:
        assert {row.identifier for row in again.identities()} == {"user_id:u", "anonymous_id:a", "user_id:w", "email:1"}
        assert {path.name for path in (tmp_path / "identity").iterdir()} == {
            "online.lock", *(again.path.name + suffix for suffix in ("", "-wal", "-shm"))
        }  # fmt: skip
    online._db.close()


def test_a_file_that_cannot_be_made_costs_no_link_and_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Online(tmp_path, fill=Failing)) as online:
        online.link([seen("user_id:u", position=5)])
        publish(tmp_path, [seen("user_id:w", hour=1)])
        with pytest.raises(StoreError, match="ended with 1"):
            online.refresh()
        assert not files.unfinished(tmp_path, 0).exists()
        assert [row.identifier for row in online.identities()] == ["user_id:u"]
        assert not online.refresh(), "not at once: it costs a processor"
        monkeypatch.setattr(online, "_fill", AtOnce)
        monkeypatch.setattr(online, "_again_s", 0.0)
        assert online.refresh()
        assert {row.identifier for row in online.identities()} == {"user_id:u", "user_id:w"}


def test_whoever_fails_time_and_again_is_tried_ever_more_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Online(tmp_path, fill=Held)) as online:
        publish(tmp_path, [seen("user_id:u")])
        waits, now_s = [], 1_000.0
        monkeypatch.setattr("pipelines.identity.online.time", SimpleNamespace(monotonic=lambda: now_s))
        for _ in range(3):
            monkeypatch.setattr(online, "_again_s", 0.0)
            assert not online.refresh(), "it is being made"
            with patch.object(Held, "is_done", side_effect=StoreError("its process ended with 1")), pytest.raises(StoreError):
                online.refresh()
            waits.append(online._again_s - now_s)
        assert waits[0] < waits[1] < waits[2]
        monkeypatch.setattr(online, "_again_s", 0.0)
        online.refresh()
        assert let_go(online)


def test_a_process_of_its_own_makes_the_same_file(tmp_path: Path) -> None:
    with closing(open_vault(tmp_path)) as vault, closing(Online(tmp_path, vault=vault, fill=Beside)) as online:
        ann = vault.pseudonym("user_id", "ann")
        online.link([seen("user_id:u", "email:1", position=5), seen(ann, position=6)])
        vault.entomb([ann], erased_us=1, receipt="r")
        publish(tmp_path, [seen("user_id:u", "anonymous_id:a"), seen("user_id:w", hour=1)])
        assert not online.refresh()
        until(online.refresh)
        assert {row.identifier for row in online.identities()} == {"user_id:u", "anonymous_id:a", "user_id:w", "email:1"}
        assert online.customer("email:1") == online.customer("anonymous_id:a")


def test_a_process_that_fails_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with closing(Online(tmp_path, fill=Beside)) as online:
        publish(tmp_path, [seen("user_id:u")])
        with patch.object(Path, "touch", lambda path, mode: path.write_bytes(b"no database" * 100)):
            online.refresh()
        with pytest.raises(StoreError, match="was not made"):
            until(online.refresh)
        assert "could not be made" in capfd.readouterr().err


def test_what_an_erasure_throws_away_is_made_anew_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with closing(Online(tmp_path, fill=Beside)) as online:
        publish(tmp_path, [seen("user_id:u")])
        with patch.object(Path, "touch"):  # as if it were thrown away before the process looks
            assert not online.refresh()
        until(lambda: not online.refresh() and not online.is_reading)
        assert online.identities() == []
        until(online.refresh)
        assert [row.identifier for row in online.identities()] == ["user_id:u"]
        assert capfd.readouterr().err == ""


def switching(home: Path, monkeypatch: pytest.MonkeyPatch, n: int, *, is_all: bool = False) -> int:
    """Steps of SQLite's machine that a worker of n people makes when the tables say something else of two, or of all."""
    stored = [seen(f"user_id:u{person}", f"anonymous_id:d{person}") for person in range(n)]
    publish(home, stored)
    with closing(Online(home, fill=Held)) as online:
        joined = [seen(f"user_id:u{person}", f"email:e{person}", hour=1) for person in range(n if is_all else 2)]
        publish(home, [*stored, *joined])
        online.refresh()
        online.link([seen("user_id:u0", "phone:1", hour=2)])
        steps, connect = [0], sqlite3.connect

        def count() -> None:
            steps[0] += 1

        def counted(*args: Any, **options: Any) -> sqlite3.Connection:
            db = connect(*args, **options)
            db.set_progress_handler(count, 1)
            return db

        with monkeypatch.context() as patched:
            patched.setattr(sqlite3, "connect", counted)
            assert let_go(online)
        assert len(online.changes()) == (n if is_all else 2) + 1
        return steps[0]


def test_what_calls_wait_for_does_not_grow_with_how_many_people_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (switching(tmp_path / str(n), monkeypatch, n) for n in (10, 200))
    assert 0 < many < 1.2 * few
    assert switching(tmp_path / "all", monkeypatch, 200, is_all=True) > 1.2 * few, "the control: it grows with how many change"


def test_a_file_of_an_older_home_is_taken_over(tmp_path: Path) -> None:
    publish(tmp_path, [seen("user_id:u", "anonymous_id:a")])
    Online(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / "identity" / "online.1.db")) as db, db:
        db.execute("ALTER TABLE sightings DROP COLUMN position")
    with closing(Online(tmp_path)) as online:
        online.link([seen("user_id:u", "anonymous_id:b")])
        assert online.customer("anonymous_id:b") == online.customer("anonymous_id:a")


def test_an_erased_person_is_not_taken_in_again(tmp_path: Path) -> None:
    with closing(open_vault(tmp_path)) as vault, closing(Online(tmp_path, vault=vault)) as online:
        ann, device = vault.pseudonym("user_id", "ann"), vault.pseudonym("anonymous_id", "d")
        vault.entomb([ann], erased_us=1, receipt="r")
        assert {row.identifier for row in online.link([seen(ann, device), seen(device, hour=1)])} == {device}
        assert online.customer(ann) is None
