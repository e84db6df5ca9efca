"""Tables are replaced and appended whole or not at all."""

from datetime import UTC, datetime

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import tables
from pipelines.errors import StoreError

NOW = pd.Timestamp(datetime(2026, 1, 1, tzinfo=UTC))


def items(*ids):
    return pd.DataFrame({"item_id": list(ids), "category": None, "price_cents": 5, "event_timestamp": NOW, "created_timestamp": NOW})


def rejected(days):
    return pd.DataFrame(
        {
            "quarantine_id": [str(n) for n in range(len(days))],
            "source": "s",
            "file": "f",
            "row": 1,
            "reason": "r",
            "detail": "",
            "raw": "x",
            "created_timestamp": pd.DatetimeIndex([NOW + pd.Timedelta(days=d) for d in days], tz="UTC"),
        }
    )


@given(st.lists(st.lists(st.integers(0, 3), max_size=5), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_appends_keep_every_row_whatever_days_they_fall_on(tmp_path_factory, batches):
    home = tmp_path_factory.mktemp("home")
    for days in batches:
        tables.append(home, tables.QUARANTINE, rejected(days))
    assert tables.count(home, tables.QUARANTINE) == len(tables.read(home, tables.QUARANTINE)) == sum(map(len, batches))


def test_growing_table_is_partitioned_by_day_and_read_back_without_the_partition_column(tmp_path):
    tables.write(tmp_path, tables.QUARANTINE, rejected([0, 1, 1]))
    assert [f.parent.name for f in tables.files(tmp_path, tables.QUARANTINE)] == ["day=2026-01-01", "day=2026-01-02"]
    assert list(tables.read(tmp_path, tables.QUARANTINE).columns) == tables.QUARANTINE.schema.names


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
