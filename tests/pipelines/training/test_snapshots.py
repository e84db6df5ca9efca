"""What a training reads is of one moment, whatever an ingest publishes meanwhile."""

import contextlib
from datetime import UTC, datetime, timedelta

import pandas as pd
import pytest

from pipelines import tables
from pipelines.settings import Settings
from pipelines.training import recommenders, tasks

AT = pd.Timestamp("2026-01-01", tz="UTC")
AS_OF = datetime(2026, 2, 1, tzinfo=UTC)
N = 6


def rows(table: tables.Table, n: int, **columns: object) -> pd.DataFrame:
    """Rows of the table that hold what is named, and the instant `AT` in both time columns."""
    frame = pd.DataFrame({"event_timestamp": [AT] * n, "created_timestamp": AT, **columns})
    return frame.reindex(columns=table.schema.names)


@pytest.fixture(params=[True, False], ids=["held", "control"])
def is_held(request, tmp_path, monkeypatch):
    """Whatever of the home is read first, an ingest then publishes other tables. Control: without a snapshot."""
    names = [f"n{number}" for number in range(N)]
    first = {
        tables.EVENTS: rows(tables.EVENTS, N, event_id=names, source="shop", type="view", customer_id="c1", received_timestamp=AT),
        tables.CONSENTS: rows(tables.CONSENTS, N, customer_id=names, purpose="personalization", granted=True),
        tables.INTERACTIONS: rows(tables.INTERACTIONS, N, customer_id="c1", item_id=names, type="view", weight=0.15),
        tables.ITEMS: rows(tables.ITEMS, N, item_id=names),
    }
    for table, frame in first.items():
        tables.write(tmp_path, table, frame)
    real, published = tables.read, []

    def read(home, table, *columns):
        found = real(home, table, *columns)
        if table in (tables.EVENTS, tables.INTERACTIONS) and not published:
            published.append(table)
            for other, frame in first.items():
                tables.write(tmp_path, other, frame.head(2))
        return found

    monkeypatch.setattr(tables, "read", read)
    if not request.param:
        monkeypatch.setattr(tables, "snapshot", lambda home, some: contextlib.nullcontext(home))
    yield request.param
    assert published


def test_labels_are_made_of_events_and_consents_of_one_moment(tmp_path, monkeypatch, is_held):
    seen = []

    def made(events, consents, *, settings, as_of):
        seen.append((len(events), len(consents)))
        return pd.DataFrame(
            {
                "customer_id": ["c1"],
                "event_timestamp": [AT],
                "label": [1],
                "split": ["test"],
                "matured_timestamp": [AT + timedelta(days=1)],
            }
        )

    monkeypatch.setitem(tasks._MADE, "churn", (tables.LABELS_CHURN, made))
    tasks.label_rows(tmp_path, tasks.discover()["churn"], settings=Settings(home=tmp_path), as_of=AS_OF)
    assert (seen == [(N, N)]) == is_held


def test_interactions_and_items_are_of_one_moment(tmp_path, is_held):
    frame, items = recommenders.read_interactions(tmp_path, settings=Settings(home=tmp_path), as_of=AS_OF)
    assert ((len(frame), len(items)) == (N, N)) == is_held
    assert not list((tmp_path / "tables").glob(".snapshot*"))
