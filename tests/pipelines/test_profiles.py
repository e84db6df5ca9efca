"""What a profile tells from the tables; who somebody is, and what they allow, is tested with the stream."""

from datetime import UTC, datetime, timedelta

import pandas as pd
import pyarrow as pa

from pipelines import profiles, tables

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def write(home, table, rows):
    frame = pd.DataFrame(rows).reindex(columns=table.schema.names)
    tables.write(home, table, pa.Table.from_pandas(frame, table.schema, preserve_index=False))


def event(n, customer, **columns):
    at = NOW - timedelta(hours=n)
    return {"source": "web", "event_id": f"e{n}", "type": "view", "name": "Product Viewed", "event_timestamp": at, "created_timestamp": at,
            "received_timestamp": at, "customer_id": customer} | columns  # fmt: skip


def test_timeline_is_the_newest_of_ones_own_events_without_their_free_text(tmp_path):
    mine = [event(n, "c1", item_id=f"i{n}", query="my name is ann", user_id="pseudonym") for n in range(profiles.TIMELINE + 9)]
    write(tmp_path, tables.EVENTS, [*mine[::-1], event(500, "c2")])
    told = profiles._timeline(tmp_path, "c1")
    assert [row["item_id"] for row in told] == [f"i{n}" for n in range(profiles.TIMELINE)]
    assert set(told[0]) == {"event_timestamp", "type", "name", "item_id", "source"}  # what is null is left out
    assert [row["source"] for row in profiles._timeline(tmp_path, "c2")] == ["web"]
    assert profiles._timeline(tmp_path, "nobody") == []


def test_segment_is_the_newest_and_none_without_one(tmp_path):
    assert profiles._segment(tmp_path, "c1") is None
    rows = [
        {"customer_id": "c1", "event_timestamp": NOW - timedelta(days=n), "segment": name, "version": "1"}
        for n, name in ((1, "new"), (9, "old"))
    ]
    write(tmp_path, tables.CUSTOMER_SEGMENTS, rows)
    assert profiles._segment(tmp_path, "c1")["segment"] == "new"
    assert profiles._segment(tmp_path, "c2") is None
