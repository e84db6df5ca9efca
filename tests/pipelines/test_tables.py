"""Tables are replaced and appended whole or not at all."""

from datetime import UTC, datetime

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import tables
from pipelines.errors import StoreError
from pipelines.tables import stored

NOW = pd.Timestamp(datetime(2026, 1, 1, tzinfo=UTC))


def items(*ids):
    return pd.DataFrame(
        {"item_id": list(ids), "category": None, "price_cents": 5, "in_stock": None, "event_timestamp": NOW, "created_timestamp": NOW}
    )


def rejected(days):
    return pd.DataFrame(
        {
            "quarantine_id": [str(n) for n in range(len(days))],
            "source": "s",
            "file": "f",
            "row": 1,
            "reason": "r",
            "detail": "",
            "subject": "nobody",
            "raw": b"x",
            "message_id": None,
            "origin": "{}",
            "created_timestamp": pd.DatetimeIndex([NOW + pd.Timedelta(days=d) for d in days], tz="UTC"),
        }
    )


@given(st.lists(st.lists(st.integers(0, 3), max_size=5), min_size=1, max_size=4))
@settings(max_examples=15)
def test_appends_keep_every_row_whatever_days_they_fall_on(tmp_path_factory, batches):
    home = tmp_path_factory.mktemp("home")
    for days in batches:
        tables.append(home, tables.QUARANTINE, rejected(days))
    assert tables.count(home, tables.QUARANTINE) == len(tables.read(home, tables.QUARANTINE)) == sum(map(len, batches))


def test_growing_table_is_partitioned_by_day_and_read_back_without_the_partition_column(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "SPAN_ROWS", 1)
    tables.write(tmp_path, tables.QUARANTINE, rejected([0, 1, 1]))
    assert [f.parent.name for f in tables.files(tmp_path, tables.QUARANTINE)] == ["day=2026-01-01", "day=2026-01-02"]
    assert list(tables.read(tmp_path, tables.QUARANTINE).columns) == tables.QUARANTINE.schema.names


def test_days_with_few_rows_share_a_file_that_says_which_days_it_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "SPAN_ROWS", 2)
    tables.write(tmp_path, tables.QUARANTINE, rejected([9, 0, 1, 1, 4, 4, 6]))
    found = {tables.days(f): pq.ParquetFile(f).metadata.num_rows for f in tables.files(tmp_path, tables.QUARANTINE)}
    assert found == {("2026-01-01", "2026-01-02"): 3, ("2026-01-05", "2026-01-05"): 2, ("2026-01-07", "2026-01-10"): 2}
    assert sorted(tables.read(tmp_path, tables.QUARANTINE)["quarantine_id"]) == [str(n) for n in range(7)]


def test_table_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    tables.write(tmp_path, tables.ITEMS, items("old"))
    real = tables.files

    def replaced(home, table):
        found = real(home, table)
        monkeypatch.setattr(stored, "files", real)
        tables.write(tmp_path, tables.ITEMS, items("new"))
        return found

    monkeypatch.setattr(stored, "files", replaced)
    assert tables.read(tmp_path, tables.ITEMS)["item_id"].tolist() == ["new"]


def test_times_are_stored_in_microseconds(tmp_path):
    tables.write(tmp_path, tables.ITEMS, items("a"))
    schema = pq.ParquetFile(tables.files(tmp_path, tables.ITEMS)[0]).schema_arrow
    assert schema.field("event_timestamp").type == pa.timestamp("us", tz="UTC")


def test_failed_write_leaves_the_old_table_whole_and_nothing_behind(tmp_path):
    tables.write(tmp_path, tables.ITEMS, items("old"))

    def breaks_half_way():
        yield pa.RecordBatch.from_pandas(items("new"), preserve_index=False)
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match=r"No space left.*previous version is untouched"):
        tables.write(tmp_path, tables.ITEMS, breaks_half_way())
    assert tables.read(tmp_path, tables.ITEMS)["item_id"].tolist() == ["old"]
    assert len(list((tmp_path / "tables").iterdir())) == 2  # the link and its one version


def test_reader_of_the_old_version_sees_it_or_the_new_one_never_a_mixture(tmp_path):
    tables.write(tmp_path, tables.ITEMS, items("a"))
    before = tables.folder(tmp_path, tables.ITEMS).resolve()
    tables.write(tmp_path, tables.ITEMS, items("b", "c"))
    assert tables.folder(tmp_path, tables.ITEMS).resolve() != before
    assert not before.exists()


def test_undeclared_column_is_refused_by_name(tmp_path):
    with pytest.raises(StoreError, match=r"missing \['category'\], not declared \['colour'\]"):
        tables.write(tmp_path, tables.ITEMS, items("a").rename(columns={"category": "colour"}))
    assert not tables.exists(tmp_path, tables.ITEMS)


def test_value_of_the_wrong_type_is_refused(tmp_path):
    with pytest.raises(StoreError, match="declared types"):
        tables.write(tmp_path, tables.ITEMS, items("a").assign(price_cents="dear"))


def test_table_never_written_reads_as_empty_with_its_columns(tmp_path):
    assert list(tables.read(tmp_path, tables.EVENTS, ["customer_id", "type"]).columns) == ["customer_id", "type"]
    assert tables.count(tmp_path, tables.EVENTS) == 0
    with pytest.raises(StoreError, match="training_churn"):
        tables.read(tmp_path, tables.TRAINING_CHURN)


def test_equal_rows_hash_equal_and_a_changed_one_does_not(tmp_path):
    hashes = []
    for home, row in ((tmp_path / "1", "a"), (tmp_path / "2", "a"), (tmp_path / "3", "b")):
        tables.write(home, tables.ITEMS, items(row))
        hashes.append(tables.content_hash(home, tables.ITEMS))
    assert hashes[0] == hashes[1] != hashes[2]


def test_every_declaration_names_columns_that_it_has():
    for table in tables.TABLES:
        if table.schema is not None:
            named = {*table.key, table.event_time, table.created_time} - {None}
            assert named <= set(table.schema.names), table.name


days = st.lists(st.integers(0, 3), max_size=8)


@given(batches=st.lists(days, min_size=1, max_size=3), gone=st.sets(st.sampled_from("abcd")))
@settings(max_examples=25)
def test_removed_rows_are_gone_and_all_others_as_they_were(tmp_path_factory, batches, gone):
    home = tmp_path_factory.mktemp("home")
    for number, some in enumerate(batches):
        rows = rejected(some)
        tables.append(home, tables.QUARANTINE, rows.assign(reason=["abcd"[(number + n) % 4] for n in range(len(rows))]))
    before = tables.read(home, tables.QUARANTINE)
    hit = before["reason"].isin(gone)
    assert tables.remove(home, tables.QUARANTINE, pc.field("reason").isin(pa.array(sorted(gone), pa.string()))) == hit.sum()
    left = tables.read(home, tables.QUARANTINE)
    assert list(left.columns) == list(before.columns)
    assert sorted(map(repr, left.to_numpy().tolist())) == sorted(map(repr, before[~hit].to_numpy().tolist()))
    assert tables.count(home, tables.QUARANTINE) == len(left)


def test_removal_writes_only_the_files_that_held_such_rows_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "SPAN_ROWS", 1)
    tables.write(tmp_path, tables.QUARANTINE, rejected([0, 1, 2, 2]).assign(reason=["a", "b", "b", "c"]))
    old = tables.folder(tmp_path, tables.QUARANTINE).resolve()
    inodes = {f.parent.name: f.stat().st_ino for f in tables.files(tmp_path, tables.QUARANTINE)}
    assert tables.remove(tmp_path, tables.QUARANTINE, pc.field("reason") == "b") == 2
    assert not old.exists()
    after = {f.parent.name: f.stat().st_ino for f in tables.files(tmp_path, tables.QUARANTINE)}
    assert set(after) == {"day=2026-01-01", "day=2026-01-03"}  # the second day is unlinked, the third has one row left
    assert after["day=2026-01-01"] == inodes["day=2026-01-01"]
    assert after["day=2026-01-03"] != inodes["day=2026-01-03"]
    assert tables.remove(tmp_path, tables.QUARANTINE, pc.field("reason") == "b") == 0
    assert {f.parent.name: f.stat().st_ino for f in tables.files(tmp_path, tables.QUARANTINE)} == after


def test_row_whose_column_is_null_does_not_match_and_stays(tmp_path):
    tables.write(tmp_path, tables.ITEMS, items("a", "b", None))
    assert tables.remove(tmp_path, tables.ITEMS, pc.field("item_id") == "a") == 1
    assert tables.read(tmp_path, tables.ITEMS)["item_id"].tolist() == ["b", None]


@pytest.mark.parametrize("table", [tables.ITEMS, tables.SCORED_CHURN])
def test_table_that_lost_all_rows_keeps_its_columns(tmp_path, table):
    tables.write(tmp_path, table, items("a"))
    assert tables.remove(tmp_path, table, pc.field("item_id") == "a") == 1
    assert list(tables.read(tmp_path, table).columns) == list(items().columns)
    assert tables.remove(tmp_path, table, pc.field("item_id") == "a") == 0


def test_files_in_which_a_column_is_null_throughout_lose_no_row_of_another(tmp_path):
    for ids in (["a", "b"], [None, None], ["a"]):
        tables.append(tmp_path, tables.SCORED_CHURN, pa.table({"customer_id": ids, "views": [1.0] * len(ids)}))
    assert tables.schema_of(tmp_path, tables.SCORED_CHURN).field("customer_id").type == pa.string()
    assert tables.remove(tmp_path, tables.SCORED_CHURN, pc.field("customer_id") == "a") == 2
    left = [pq.read_table(path)["customer_id"].to_pylist() for path in tables.files(tmp_path, tables.SCORED_CHURN)]
    assert sorted(left, key=str) == [["b"], [None, None]]


def test_removal_from_a_table_never_written_removes_nothing(tmp_path):
    assert tables.remove(tmp_path, tables.ITEMS, pc.field("item_id") == "a") == 0
    assert not tables.exists(tmp_path, tables.ITEMS)


def test_updated_rows_have_the_new_values_in_their_place_and_all_others_are_as_they_were(tmp_path):
    tables.write(tmp_path, tables.ITEMS, items("a", "b", "c").assign(price_cents=[1, 2, 3]))
    assert tables.update(tmp_path, tables.ITEMS, pc.field("price_cents") >= 2, {"category": "dear", "price_cents": 9}) == 2
    left = tables.read(tmp_path, tables.ITEMS)
    assert left[["item_id", "category", "price_cents"]].to_numpy().tolist() == [["a", None, 1], ["b", "dear", 9], ["c", "dear", 9]]


def test_matching_rows_are_read_and_the_table_stays(tmp_path):
    assert tables.matching(tmp_path, tables.ITEMS, pc.field("item_id") == "a", ["item_id"]).num_rows == 0
    tables.write(tmp_path, tables.ITEMS, items("a", "b"))
    assert tables.matching(tmp_path, tables.ITEMS, pc.field("item_id") == "a", ["item_id"]).to_pylist() == [{"item_id": "a"}]
    assert tables.count(tmp_path, tables.ITEMS) == 2


def test_sweep_removes_what_a_killed_write_left_and_no_table(tmp_path):
    tables.write(tmp_path, tables.ITEMS, items("a"))
    left = tmp_path / "tables" / ".items-0123456789ab"
    left.mkdir()
    (left / "part-00000.parquet").write_bytes(b"half")
    assert tables.sweep(tmp_path) == 1
    assert not left.exists()
    assert tables.count(tmp_path, tables.ITEMS) == 1
    assert tables.sweep(tmp_path / "another") == 0


def without(home, table, column):
    """Make the table's first file one of a home from before the column was declared."""
    path = tables.files(home, table)[0]
    pq.write_table(pq.read_table(path, partitioning=None).drop_columns([column]), path)


def test_file_from_before_a_column_was_declared_reads_it_as_null_and_the_others_keep_it(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "SPAN_ROWS", 1)
    tables.write(tmp_path, tables.QUARANTINE, rejected([0, 1]).assign(detail="told"))
    without(tmp_path, tables.QUARANTINE, "detail")
    assert tables.read(tmp_path, tables.QUARANTINE)["detail"].tolist() == [None, "told"]
    asked = duckdb.sql(f"SELECT detail FROM ({tables.rows_sql(tmp_path, tables.QUARANTINE)}) ORDER BY created_timestamp").fetchall()
    assert asked == [(None,), ("told",)]
    assert tables.matching(tmp_path, tables.QUARANTINE, pc.field("row") >= 0, ["detail"])["detail"].to_pylist() == [None, "told"]
    without(tmp_path, tables.QUARANTINE, "reason")
    with pytest.raises(duckdb.BinderException):  # the control: the bare files do not say it
        duckdb.sql(f"SELECT reason FROM read_parquet('{tables.files(tmp_path, tables.QUARANTINE)[0]}')")


@pytest.mark.parametrize("table", [table for table in tables.TABLES if table.schema is not None], ids=lambda table: table.name)
def test_rows_as_sql_have_the_declared_names_and_types(tmp_path, table):
    empty = duckdb.sql(tables.rows_sql(tmp_path, table)).to_arrow_table()
    tables.write(tmp_path, table, table.schema.empty_table())
    for found in (empty, duckdb.sql(tables.rows_sql(tmp_path, table)).to_arrow_table()):
        assert len(found) == 0
        assert tables.conform(table, found).schema == table.schema
        assert found.schema.names == table.schema.names
