"""What is older than it may be kept is gone, whole days as whole files; the rest is untouched and the ledger still balances."""

import json
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pandas as pd
import pytest

from pipelines import retention, tables
from pipelines.log import Incoming, open_log
from pipelines.settings import CollectSettings, PrivacySettings, Settings
from pipelines.tables import stored
from pipelines.vault import open_vault

AS_OF = datetime(2026, 3, 1, 12, tzinfo=UTC)


def settings_of(home, log_days=30, **days):
    kept = {("*" if name == "every" else name): value for name, value in days.items()}
    return Settings(
        home=home, privacy=PrivacySettings(retention_days=kept, log_retention_days=log_days), collect=CollectSettings(segment_hours=1)
    )


def write_events(home, *rows):
    """rows: type and age in days."""
    frame = pd.DataFrame(rows, columns=["type", "age"])
    at = pd.Timestamp(AS_OF) - pd.to_timedelta(frame["age"], "D")
    times = dict.fromkeys(("event_timestamp", "created_timestamp", "received_timestamp"), at)
    frame = frame.assign(source="s", event_id=[f"e{n}" for n in range(len(rows))], **times)
    tables.write(home, tables.EVENTS, frame.reindex(columns=tables.EVENTS.schema.names))
    messages = pd.DataFrame(
        {"source": "s", "message_high": range(len(rows)), "message_low": 0, "outcome": "applied", "created_timestamp": at}
    )
    tables.write(home, tables.MESSAGES, messages)


def left(home):
    rows = tables.read(home, tables.EVENTS, ["type", "event_timestamp"])
    return sorted(zip(rows["type"], (pd.Timestamp(AS_OF) - rows["event_timestamp"]).dt.days, strict=True))


ROWS = [("view", 1), ("view", 9), ("view", 40), ("purchase", 9), ("purchase", 40), ("purchase", 400), ("search", 1), ("search", 400)]


@pytest.mark.parametrize(
    ("days", "kept"),
    [
        ({}, ROWS),
        ({"view": 5}, [row for row in ROWS if row[0] != "view" or row[1] <= 5]),
        ({"every": 30}, [row for row in ROWS if row[1] <= 30]),
        ({"every": 5, "purchase": 100}, [row for row in ROWS if row[1] <= (100 if row[0] == "purchase" else 5)]),
        ({"every": 500, "view": 1_000}, ROWS),
    ],
)
def test_events_older_than_their_type_may_be_are_removed_and_no_others(tmp_path, days, kept):
    write_events(tmp_path, *ROWS)
    report = retention.apply(tmp_path, settings=settings_of(tmp_path, **days), as_of=AS_OF)
    assert left(tmp_path) == sorted(kept)
    gone = [row[0] for row in ROWS if row not in kept]
    assert report.events == {name: gone.count(name) for name in sorted(set(gone))}
    assert retention.apply(tmp_path, settings=settings_of(tmp_path, **days), as_of=AS_OF).events == {}


def test_event_as_old_as_it_may_be_stays(tmp_path):
    write_events(tmp_path, ("view", 5), ("view", 5.001))
    retention.apply(tmp_path, settings=settings_of(tmp_path, view=5), as_of=AS_OF)
    assert len(left(tmp_path)) == 1


def test_whole_days_go_as_files_and_younger_days_are_not_written_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "SPAN_ROWS", 1)
    write_events(tmp_path, *ROWS)
    inodes = {path.parent.name: path.stat().st_ino for path in tables.files(tmp_path, tables.EVENTS)}
    retention.apply(tmp_path, settings=settings_of(tmp_path, every=20), as_of=AS_OF)
    after = {path.parent.name: path.stat().st_ino for path in tables.files(tmp_path, tables.EVENTS)}
    assert set(after) == {"day=2026-02-20", "day=2026-02-28"}
    assert after == {day: inodes[day] for day in after}


def test_messages_of_removed_events_stay_known_so_that_an_old_file_does_not_bring_them_back(tmp_path):
    write_events(tmp_path, *ROWS)
    before = tables.read(tmp_path, tables.MESSAGES)
    retention.apply(tmp_path, settings=settings_of(tmp_path, every=5), as_of=AS_OF)
    pd.testing.assert_frame_equal(tables.read(tmp_path, tables.MESSAGES), before)


def test_quarantined_rows_go_with_the_rule_for_everything(tmp_path):
    made = [AS_OF - timedelta(days=age) for age in (1, 40)]
    rows = pd.DataFrame({"quarantine_id": ["young", "old"], "raw": [b"", b""], "created_timestamp": made})
    tables.write(tmp_path, tables.QUARANTINE, rows.reindex(columns=tables.QUARANTINE.schema.names))
    assert retention.apply(tmp_path, settings=settings_of(tmp_path, view=1), as_of=AS_OF).quarantined == 0
    assert retention.apply(tmp_path, settings=settings_of(tmp_path, every=30), as_of=AS_OF).quarantined == 1
    assert tables.read(tmp_path, tables.QUARANTINE)["quarantine_id"].tolist() == ["young"]


def test_log_forgets_what_is_applied_and_old(tmp_path):
    settings = settings_of(tmp_path, log_days=10)
    with closing(open_vault(tmp_path)) as vault, closing(open_log(tmp_path, settings=settings, vault=vault)) as log:
        received_us = int((AS_OF - timedelta(days=20)).timestamp() * 1e6)
        log.append([Incoming("s", f"m{n}", (), json.dumps({"n": n}).encode(), received_us) for n in range(5)])
        assert retention.apply(tmp_path, settings=settings, as_of=AS_OF).logged == 0  # nobody has applied it
        log.commit("ingest", [event.position for event in log.read("ingest", max_events=10)])
        assert retention.apply(tmp_path, settings=settings, as_of=AS_OF - timedelta(days=15)).logged == 0
        assert retention.apply(tmp_path, settings=settings, as_of=AS_OF).logged == 5


def test_empty_home_has_nothing_to_forget(tmp_path):
    report = retention.apply(tmp_path, settings=settings_of(tmp_path, every=1), as_of=AS_OF)
    assert report == retention.RetentionReport({}, 0, 0)
