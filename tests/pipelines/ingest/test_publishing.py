"""A run's tables change as one: what interrupts it, the next run mends, and the ledger balances."""

import pandas as pd
import pyarrow.parquet as pq
import pytest

from pipelines import tables
from pipelines.errors import StoreError
from pipelines.tables import publication, stored


def failing_at(real, number: int):
    """`real`, but its call number `number` finds the disk full; and how often it was called."""
    calls = {"n": 0}

    def full(*args, **options):
        calls["n"] += 1
        if calls["n"] == number:
            raise OSError(28, "No space left on device")
        return real(*args, **options)

    return full, calls


def same_tables(one, other) -> None:
    for table in one.clean:
        pd.testing.assert_frame_equal(one.table(table), other.table(table), obj=table.name)


def test_a_refusing_disk_is_a_store_error_and_the_next_run_mends_it(shop, new_shop, monkeypatch) -> None:
    path = shop.file(shop.call("m1"), shop.order("m2", 1))
    full, _ = failing_at(pq.write_table, 5)
    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(StoreError, match="No space left"):
        shop.ingest(path)
    assert shop.events().empty
    monkeypatch.undo()
    assert shop.ingest(path).stored == 2
    other = new_shop(like=shop)
    other.ingest(path)
    same_tables(shop, other)


@pytest.mark.slow
def test_a_failure_at_any_write_changes_nothing_and_is_mended(shop, new_shop, monkeypatch) -> None:
    lines = [shop.call("m1"), shop.call("m2", 1, user=None, anonymousId="a", properties={}), shop.order("m3", 2), "not json"]
    shop.run(shop.call("m0"), shop.call("m3", 1, context=shop.refused) | {"timestamp": shop.at(500)})
    before = {table.name: tables.content_hash(shop.home, table) for table in tables.TABLES if tables.exists(shop.home, table)}
    path, number = shop.file(*lines, name="more.jsonl"), 0
    while True:
        number += 1
        full, calls = failing_at(stored._write_file, number)
        monkeypatch.setattr(stored, "_write_file", full)
        try:
            shop.ingest(path)
            break
        except StoreError:
            monkeypatch.undo()
            now = {table.name: tables.content_hash(shop.home, table) for table in tables.TABLES if tables.exists(shop.home, table)}
            assert now == before
            assert shop.is_balanced()
    monkeypatch.undo()
    assert number > 10  # every table but those that stay was in the way once
    assert calls["n"] == number - 1
    assert shop.is_balanced()
    other = new_shop(like=shop)
    other.run(shop.call("m0"), shop.call("m3", 1, context=shop.refused) | {"timestamp": shop.at(500)})
    other.ingest(other.file(*lines, name="more.jsonl"))
    same_tables(shop, other)


@pytest.mark.parametrize("number", [1, 2, 6])
def test_a_kill_while_the_tables_are_put_in_place_is_finished_by_whoever_looks_next(shop, monkeypatch, number) -> None:
    class KillError(BaseException):
        pass

    shop.run(shop.call("m1"))
    real, calls = stored.Draft.publish, {"n": 0}

    def publish(draft):
        calls["n"] += 1
        if calls["n"] == number:
            raise KillError
        real(draft)

    monkeypatch.setattr(publication.Draft, "publish", publish)
    with pytest.raises(KillError):
        shop.run(shop.call("m2", 1), "not json", name="two.jsonl")
    monkeypatch.undo()
    assert shop.is_balanced()
    assert list(shop.events()["event_id"]) == ["m1", "m2"]
    assert shop.run(shop.call("m2", 1), "not json", name="two.jsonl").duplicate == 2
    assert shop.is_balanced()


def test_days_of_which_nothing_changes_keep_their_files(shop, monkeypatch) -> None:
    monkeypatch.setattr(stored, "SPAN_ROWS", 1)
    day = 24 * 60
    shop.run(shop.call("m1"), shop.call("m2", day), shop.call("m3", 2 * day))
    before = {path.name: path.stat().st_ino for path in tables.files(shop.home, tables.EVENTS) for path in [path]}
    inodes = {path.parent.name: path.stat().st_ino for path in tables.files(shop.home, tables.EVENTS)}
    shop.run(shop.call("m4", day + 1), name="more.jsonl")
    now = {path.parent.name: path.stat().st_ino for path in tables.files(shop.home, tables.EVENTS)}
    assert before
    assert {name for name in now if now[name] != inodes[name]} == {"day=2024-03-02"}
    assert list(shop.events()["event_id"]) == ["m1", "m2", "m4", "m3"]


def test_files_of_several_days_are_written_anew_whole_whatever_days_come_in_between(shop, monkeypatch) -> None:
    monkeypatch.setattr(stored, "SPAN_ROWS", 3)
    day, made, kept = 24 * 60, 0, []
    for days in ([1, 9, 20, 21, 22], [5, 30], [9, 12, 25]):
        before = {path.stat().st_ino for path in tables.files(shop.home, tables.EVENTS)} if made else set()
        shop.run(*(shop.call(f"m{made + n}", at * day + made) for n, at in enumerate(days)), name=f"{made}.jsonl")
        made += len(days)
        kept.append(len(before & {path.stat().st_ino for path in tables.files(shop.home, tables.EVENTS)}))
        assert sorted(shop.events()["event_id"]) == sorted(f"m{n}" for n in range(made)), "each row once"
    assert any(kept), "and not all files anew"


def test_a_run_that_brings_nothing_new_writes_no_table_but_its_note(shop) -> None:
    calls = [shop.call("m1"), shop.call("m2", 1)]
    shop.run(*calls)
    versions = {table.name: tables.folder(shop.home, table).resolve() for table in tables.TABLES if tables.exists(shop.home, table)}
    shop.run(*calls, calls[0], name="again.jsonl")
    now = {table.name: tables.folder(shop.home, table).resolve() for table in tables.TABLES if tables.exists(shop.home, table)}
    assert {name for name in now if now[name] != versions[name]} == {"ingests"}
