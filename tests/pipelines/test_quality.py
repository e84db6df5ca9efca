from datetime import UTC, datetime, timedelta

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipelines import quality, tables
from pipelines.settings import IngestSettings, Settings
from pipelines.tables import TIME

START = datetime(2026, 1, 5, tzinfo=UTC)
DAYS = 56
HOUR = timedelta(hours=1)


def flagged(sql: str, **relations: pd.DataFrame) -> pd.DataFrame:
    with duckdb.connect() as db:
        db.execute("SET TimeZone = 'UTC'")
        for name, frame in relations.items():
            db.register(name, frame)
        return db.sql(sql).df()


def rows_of(*rows: dict) -> pd.DataFrame:
    plain = {"source": "a", "customer_id": "c", "type": "view", "item_id": "i", "order_id": None, "revenue_cents": 0}
    told = [plain | {"event_id": f"e{n}", "event_timestamp": START + timedelta(seconds=n)} | row for n, row in enumerate(rows)]
    return pd.DataFrame(told).astype({"order_id": "object", "item_id": "object"})


# -- near-duplicates ---------------------------------------------------------------------------------------------------


def near_duplicates(within_s: float, *rows: dict) -> list[str]:
    found = flagged(f"FROM ({quality.near_duplicates_sql('rows', within_s=within_s)}) ORDER BY event_id", rows=rows_of(*rows))
    assert len(found) == len(rows)
    return found.loc[found["is_near_duplicate"], "event_id"].tolist()


def test_a_second_row_within_the_limit_is_flagged_and_one_just_beyond_it_is_not() -> None:
    limit = timedelta(seconds=1)
    times = [START, START + limit, START + 2 * limit + timedelta(microseconds=1), START + 2 * limit + timedelta(microseconds=1)]
    assert near_duplicates(1.0, *({"event_timestamp": at} for at in times)) == ["e1", "e3"]
    assert near_duplicates(0, *({"event_timestamp": at} for at in times)) == []


def test_another_customer_type_or_item_is_no_duplicate_and_nobody_has_none() -> None:
    others = [{}, {"customer_id": "d"}, {"type": "click"}, {"item_id": "j"}, {"item_id": None}]
    assert near_duplicates(60, *others) == []
    assert near_duplicates(60, *others, {"item_id": None}) == ["e5"]
    assert near_duplicates(60, {"customer_id": None}, {"customer_id": None}) == []


# -- outliers ----------------------------------------------------------------------------------------------------------


def outliers(revenues: dict[tuple[str, str], list[int]], *, z: float = 6.0, iqr: float = 6.0) -> list[tuple[str, str, int]]:
    rows = [{"source": source, "type": kind, "revenue_cents": cents} for (source, kind), each in revenues.items() for cents in each]
    found = flagged(quality.outliers_sql("rows", z=z, iqr=iqr), rows=rows_of(*rows))
    assert len(found) == len(rows)
    odd = found[found["is_outlier"]]
    return sorted(zip(odd["source"], odd["type"], odd["revenue_cents"], strict=True))


def test_an_amount_is_odd_within_its_source_and_type_alone() -> None:
    rng = np.random.default_rng(1)
    usual = np.exp(rng.normal(8, 0.7, 2_000)).astype(int).tolist()
    dear = [cents * 5_000 for cents in usual]
    found = outliers({("a", "purchase"): [*usual, 99_999_999], ("a", "return"): [-99_999_999] * 50, ("b", "purchase"): dear})
    assert found == [("a", "purchase", 99_999_999)]
    assert outliers({("a", "purchase"): [*usual, 99_999_999]}, z=100.0, iqr=100.0) == []


@pytest.mark.parametrize("measure", [{"z": 6.0, "iqr": 1e9}, {"z": 1e9, "iqr": 6.0}])
def test_either_measure_finds_it_alone_on_both_sides(measure: dict[str, float]) -> None:
    usual = (10_000 + 10 * np.arange(-100, 101)).tolist()
    assert outliers({("a", "purchase"): [1, *usual, 5_000_000]}, **measure) == [("a", "purchase", 1), ("a", "purchase", 5_000_000)]


def test_equal_amounts_and_rows_without_one_are_never_odd() -> None:
    assert outliers({("a", "purchase"): [995] * 100, ("a", "view"): [0] * 100, ("b", "purchase"): [7], ("c", "return"): [-1, -2]}) == []
    assert outliers({("a", "purchase"): [995] * 300 + [996] * 3 + [9_999_999]}) == [("a", "purchase", 9_999_999)]


# -- returns -----------------------------------------------------------------------------------------------------------


def unmatched(tolerance_days: int, *rows: dict) -> list[str]:
    frame = rows_of({"event_timestamp": START, "type": "purchase", "customer_id": "first", "item_id": "x", "order_id": "o0"}, *rows)
    sql = quality.unmatched_returns_sql("rows", "rows", tolerance_days=tolerance_days)
    found = flagged(f"FROM ({sql}) ORDER BY event_id", rows=frame)
    assert found.columns.tolist() == frame.columns.tolist()
    return found["event_id"].tolist()


def test_a_return_is_matched_by_its_order_or_by_the_customers_own_purchase_of_the_item_before_it() -> None:
    late = START + timedelta(days=400)
    back = {"type": "return", "event_timestamp": late}
    bought = {"type": "purchase", "event_timestamp": late - HOUR, "order_id": "o1"}
    assert unmatched(90, bought, back) == []
    assert unmatched(90, bought, back | {"customer_id": "d", "item_id": None, "order_id": "o1"}) == []
    assert unmatched(90, bought, back | {"item_id": "j"}) == ["e2"]
    assert unmatched(90, bought, back | {"customer_id": "d"}) == ["e2"]
    assert unmatched(90, bought | {"event_timestamp": late + HOUR}, back) == ["e2"]
    assert unmatched(90, bought | {"source": "b"}, back) == ["e2"]


def test_a_return_soon_after_the_log_began_may_be_of_a_purchase_before_it() -> None:
    soon, later = ({"type": "return", "event_timestamp": START + timedelta(days=days)} for days in (30, 100))
    assert unmatched(90, soon, later) == ["e2"]
    assert unmatched(0, soon, later) == ["e1", "e2"]


# -- hours -------------------------------------------------------------------------------------------------------------


def world(rng: np.random.Generator, *, level: float, noise: float, days: int = DAYS, null_share: float = 0.3) -> pd.DataFrame:
    """Hours of a source with a daily and a weekly season, days that differ, and hours that differ more than chance alone has it."""
    hour = np.arange(days * 24)
    season = np.exp(0.9 * np.sin(2 * np.pi * (hour % 24 - 8) / 24) + 0.25 * np.sin(2 * np.pi * (hour % 168) / 168))
    swing = np.exp(noise * rng.normal(size=len(hour)) + 0.05 * rng.normal(size=days).repeat(24))
    rows = rng.poisson(level * season / season.mean() * swing)
    nulls = rng.binomial(rows, rng.beta(60 * null_share, 60 * (1 - null_share), len(hour)))
    at = pd.Timestamp(START) + pd.to_timedelta(hour, "h")
    total = pd.DataFrame({"source": "a", "hour": at, "column": "", "rows": rows, "nulls": 0})
    return pd.concat([total, total.assign(column="user_id", nulls=nulls)], ignore_index=True)


def alerts(hours: pd.DataFrame) -> pd.DataFrame:
    limits = IngestSettings()
    both = [sql("hours", z=limits.anomaly_z, weeks=limits.anomaly_weeks) for sql in (quality.volume_sql, quality.nulls_sql)]
    return flagged(f"FROM ({' UNION ALL '.join(both)}) ORDER BY event_timestamp, kind", hours=hours)


def test_a_clean_seasonal_source_alarms_at_most_once_in_a_hundred_days() -> None:
    rng = np.random.default_rng(4)
    worlds = [world(rng, level=level, noise=noise, days=140) for level in (1, 8, 60, 3_000) for noise in (0.0, 0.15, 0.3)]
    found = alerts(pd.concat([hours.assign(source=f"s{n}") for n, hours in enumerate(worlds)]))
    judged_days = len(worlds) * (140 - 28)
    assert len(found) <= judged_days / 100


PLANTED = 24 * 45 + 12  # an hour of a day of the seventh week


def planted(hours: pd.DataFrame, *, rows: float = 1.0, nulls: float | None = None) -> pd.DataFrame:
    """The same source, with `rows` times its usual events in one hour, or with that share of them null."""
    is_odd = hours["hour"] == pd.Timestamp(START) + PLANTED * HOUR
    odd = hours.assign(rows=(hours["rows"] * rows).astype(int), nulls=(hours["nulls"] * rows).astype(int))
    odd = odd if nulls is None else odd.assign(nulls=(odd["rows"] * nulls * (odd["column"] != "")).astype(int))
    return pd.concat([hours[~is_odd], odd[is_odd]], ignore_index=True)


@pytest.mark.parametrize(
    ("change", "kind", "column"),
    [
        ({"rows": 0.1}, "volume_low", None),
        ({"rows": 0.0}, "volume_low", None),
        ({"rows": 6.0}, "volume_high", None),
        ({"nulls": 0.95}, "nulls", "user_id"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_an_outage_a_spike_and_a_burst_of_nulls_are_found_in_their_hour_and_nowhere_else(change, kind, column, seed: int) -> None:
    hours = world(np.random.default_rng(seed), level=120, noise=0.15)
    assert alerts(hours).empty
    (found,) = alerts(planted(hours, **change)).to_dict("records")
    assert (found["kind"], found["column"], found["source"]) == (kind, column, "a")
    assert found["event_timestamp"] == pd.Timestamp(START) + PLANTED * HOUR
    assert (found["z"] < 0) == (kind == "volume_low")
    assert (found["found"] < found["expected"]) == (kind == "volume_low")


def test_small_counts_do_not_alarm_and_a_week_too_few_is_not_judged() -> None:
    quiet = world(np.random.default_rng(0), level=0.5, noise=0.0)
    assert alerts(planted(quiet, rows=0.0)).empty
    young = world(np.random.default_rng(0), level=500, noise=0.0, days=21)
    assert alerts(young.assign(rows=young["rows"].where(young["hour"] < young["hour"].max(), 0))).empty


def events_of(hours: pd.DataFrame) -> pd.DataFrame:
    counted = hours[hours["column"] == ""]
    at = counted["hour"].repeat(counted["rows"]).reset_index(drop=True)
    at += pd.to_timedelta(np.random.default_rng(9).uniform(0, 3_599, len(at)), "s").floor("ms")
    times = dict.fromkeys(("event_timestamp", "created_timestamp", "received_timestamp"), at)
    frame = pd.DataFrame(times | {"source": "a", "type": "view", "item_id": "i", "user_id": "u"})
    frame = frame.assign(event_id=[f"e{n}" for n in range(len(frame))], revenue_cents=0, is_outlier=False, is_near_duplicate=False)
    return frame.reindex(columns=tables.EVENTS.schema.names)  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> tuple[Settings, pd.DataFrame]:
    home = tmp_path_factory.mktemp("quality")
    hours = world(np.random.default_rng(3), level=30, noise=0.1)
    events = events_of(planted(hours, rows=0.0))
    tables.write(home, tables.EVENTS, events)
    return Settings(home=home), events


def test_an_hour_is_judged_once_it_has_ended_and_alerted_once(shop) -> None:
    settings, _ = shop
    ended = START + (PLANTED + 1) * HOUR
    assert quality.check_hours(settings.home, settings=settings, as_of=ended - timedelta(seconds=1)).empty
    first = quality.check_hours(settings.home, settings=settings, as_of=ended)
    assert first["kind"].tolist() == ["volume_low"]
    assert first["event_timestamp"].tolist() == [pd.Timestamp(ended - HOUR)]
    assert (first["found"][0], first["created_timestamp"][0]) == (0.0, pd.Timestamp(ended))
    again = quality.check_hours(settings.home, settings=settings, as_of=ended + 24 * HOUR)
    assert again.empty
    stored = tables.read(settings.home, tables.ALERTS)
    pd.testing.assert_frame_equal(stored, first)
    late = quality.check_hours(settings.home, settings=settings, as_of=ended + timedelta(days=9))
    assert late.empty  # an hour of more than a week ago is no news
    assert stored["alert_id"].is_unique


def test_what_was_not_known_yet_is_not_counted(shop, tmp_path) -> None:
    settings, events = shop
    ended = START + (PLANTED - 5) * HOUR
    is_late = (events["event_timestamp"] >= pd.Timestamp(ended - HOUR)) & (events["event_timestamp"] < pd.Timestamp(ended))
    assert is_late.sum() > 20
    tables.write(
        tmp_path, tables.EVENTS, events.assign(created_timestamp=events["created_timestamp"].mask(is_late, pd.Timestamp(ended + 3 * HOUR)))
    )
    assert quality.check_hours(tmp_path, settings=settings, as_of=ended)["kind"].tolist() == ["volume_low"]
    assert quality.check_hours(settings.home, settings=settings, as_of=ended).empty


def test_a_home_without_events_has_no_alerts(tmp_path) -> None:
    assert quality.check_hours(tmp_path, settings=Settings(home=tmp_path), as_of=START).empty


def test_hours_are_counted_by_source_from_its_first_event_on_the_empty_ones_too() -> None:
    at = [START + 0.5 * HOUR, START + 2.5 * HOUR, START + 3.2 * HOUR]
    events = pa.table({"source": ["a", "a", "b"], "event_timestamp": pa.array(at, TIME), "type": ["view", "search", "click"]})
    for name in quality.WATCHED:
        events = events.append_column(name, pa.array(["x" if name == "user_id" else None] * 3, pa.string()))
    until = f"TIMESTAMPTZ '{START + 4.5 * HOUR}'"
    found = flagged(f"FROM ({quality.hours_sql('events', until)})", events=events.to_pandas())
    total = found[found["column"] == ""].sort_values(["source", "hour"])
    assert total["rows"].tolist() == [1, 0, 1, 0, 1]
    by_column = found.groupby(["source", "column"])[["rows", "nulls"]].sum()
    assert by_column.loc[("a", "user_id")].tolist() == [2, 0]
    assert by_column.loc[("a", "item_id")].tolist() == [1, 1]
    assert by_column.loc[("b", "decision_id")].tolist() == [1, 1]
    assert by_column.loc[("a", "query")].tolist() == [1, 1]
