"""Clean events -> what is odd about them: near-duplicates, outliers, returns of what nobody bought, and hours unlike their like.

In: relations of event rows, or a home. Out: SQL that adds flags to rows and drops none, and rows of the alerts table. Nothing here
refuses an event: what single rows must satisfy is in `contract`.
"""

from datetime import datetime, timedelta
from pathlib import Path

import pandas as pd
import pyarrow as pa

from pipelines import tables
from pipelines.engine import connect
from pipelines.events import ITEM_TYPES, ORDER_TYPES
from pipelines.settings import Settings

LOOK_BACK = timedelta(days=7)  # hours that ended longer ago are not judged any more: an alert is about now

# Columns whose nulls are watched -> the rows that are expected to have them. What an event must have cannot be null here.
WATCHED = {
    "user_id": "true",
    "anonymous_id": "true",
    "item_id": f"type IN {(*ITEM_TYPES, 'click', 'exposure', 'return')}",
    "price_cents": f"type IN {ITEM_TYPES}",
    "order_id": f"type IN {ORDER_TYPES}",
    "query": "type = 'search'",
    "decision_id": "type IN ('click', 'exposure')",
}

_MIN_WEEKS = 3  # of the same hour, so that one bad week is outvoted
_MIN_HOURS = 24  # whose surprise is known, to judge another's by
_MIN_RATIO, _MIN_SHARE = 1.25, 0.02  # smaller changes are nobody's emergency, however sure
_SIGMA = 1.4826  # of a normal distribution, in median absolute deviations


def near_duplicates_sql(rows: str, *, within_s: float) -> str:
    """SQL: `rows` with is_near_duplicate: the same customer, type and item no more than `within_s` seconds before.

    rows: customer_id, type, item_id, source, event_id, event_timestamp, any others untouched. 0 seconds: nothing is flagged. Of a
    run of such rows all but the first are; rows without a customer never.
    """
    if within_s <= 0:
        return f"SELECT *, false AS is_near_duplicate FROM {rows}"
    return f"""
        SELECT *, customer_id IS NOT NULL AND coalesce(event_timestamp - lag(event_timestamp) OVER (
            PARTITION BY customer_id, type, item_id ORDER BY event_timestamp, source, event_id)
            <= to_microseconds({round(within_s * 1_000_000)}), false) AS is_near_duplicate FROM {rows}"""


def outliers_sql(rows: str, *, z: float, iqr: float) -> str:
    """SQL: `rows` with is_outlier: revenue far from what its source and type usually bring, by either of two robust measures.

    rows: source, type, revenue_cents, any others untouched; rows without revenue are never flagged. Both measures are of log
    revenue, which spreads evenly: `z` robust standard deviations from the median (Iglewicz and Hoaglin 1993; 0.6745: the median
    absolute deviation of a standard normal, 1.2533: the inverse of its mean absolute deviation, for revenues that are mostly equal),
    or `iqr` interquartile ranges beyond a quartile (Tukey 1977; not where half of them are equal). All equal: none is odd.
    """
    size = "CASE WHEN revenue_cents <> 0 THEN ln(1 + abs(revenue_cents)) END"
    return f"""
        SELECT * EXCLUDE (size_, middle_, scale_, low_, high_),
            coalesce(abs(size_ - middle_) > {z} * scale_ OR (high_ > low_
                AND (size_ < low_ - {iqr} * (high_ - low_) OR size_ > high_ + {iqr} * (high_ - low_))), false) AS is_outlier
        FROM (SELECT *, {size} AS size_ FROM {rows}) LEFT JOIN (
            SELECT source, type, middle_, low_, high_, CASE WHEN mad(size_) > 0 THEN mad(size_) / 0.6745
                WHEN avg(abs(size_ - middle_)) > 1e-9 THEN 1.2533 * avg(abs(size_ - middle_)) END AS scale_
            FROM (SELECT source, type, {size} AS size_ FROM {rows} WHERE revenue_cents <> 0) JOIN (
                SELECT source, type, median({size}) AS middle_, quantile_cont({size}, 0.25) AS low_, quantile_cont({size}, 0.75) AS high_
                FROM {rows} WHERE revenue_cents <> 0 GROUP BY source, type) USING (source, type)
            GROUP BY ALL) USING (source, type)"""


def unmatched_returns_sql(rows: str, purchases: str, *, tolerance_days: int) -> str:
    """SQL: the returns among `rows` of which no purchase is known: events.REASONS' `return_unmatched`, to flag or to refuse.

    rows, purchases: source, customer_id, order_id, item_id, type, event_timestamp; `purchases` may be all events. A return is
    matched by an earlier purchase in its source of the same order, or by the same customer of the same item. Its purchase may lie
    before the log: within `tolerance_days` of the source's first purchase nothing is called unmatched.
    """
    bought = f"(SELECT * FROM {purchases} WHERE type = 'purchase')"
    return f"""
        SELECT returned.* FROM (SELECT * FROM {rows} WHERE type = 'return') returned
        LEFT JOIN (SELECT source, min(event_timestamp) AS first_ FROM {bought} GROUP BY source) USING (source)
        LEFT JOIN (SELECT source, order_id, min(event_timestamp) AS ordered_ FROM {bought} WHERE order_id IS NOT NULL GROUP BY ALL)
            USING (source, order_id)
        LEFT JOIN (
            SELECT source, customer_id, item_id, min(event_timestamp) AS bought_ FROM {bought} WHERE item_id IS NOT NULL GROUP BY ALL)
            USING (source, customer_id, item_id)
        WHERE NOT coalesce(ordered_ <= event_timestamp, false) AND NOT coalesce(bought_ <= event_timestamp, false)
            AND coalesce(event_timestamp > first_ + to_days({tolerance_days}), {"true" if tolerance_days == 0 else "false"})"""


def check_hours(home: Path, *, settings: Settings, as_of: datetime) -> pd.DataFrame:
    """Hold the hours of the last week against their like, and append what is odd to the alerts; returns the rows appended.

    Judged are hours that have ended, by the events known at `as_of`: their number, and the nulls of the columns WATCHED, per source.
    An hour is held against the same hour of the week in the `anomaly_weeks` before it, once three are known; none is alerted twice.
    """
    limits = settings.ingest
    if not tables.exists(home, tables.EVENTS):
        return _alerts(tables.ALERTS.schema.empty_table())  # type: ignore[union-attr]
    since = as_of - LOOK_BACK
    with connect(home) as db:
        db.execute(f"CREATE VIEW events AS {tables.rows_sql(home, tables.EVENTS)}")
        first, last = (f"TIMESTAMPTZ '{at.isoformat()}'" for at in (since - timedelta(weeks=2 * limits.anomaly_weeks), as_of))
        known = f"""(SELECT * FROM events WHERE event_timestamp >= {first} AND event_timestamp < date_trunc('hour', {last})
            AND created_timestamp <= {last})"""
        db.execute(f"CREATE TABLE hours AS {hours_sql(known, last)}")
        db.register("held", tables.read_arrow(home, tables.ALERTS, ["alert_id"]))
        odd = " UNION ALL ".join(sql("hours", z=limits.anomaly_z, weeks=limits.anomaly_weeks) for sql in (volume_sql, nulls_sql))
        rows = db.sql(
            f"""SELECT *, {last} AS created_timestamp FROM (
                SELECT md5(concat_ws(chr(31), kind, source, "column", epoch_us(event_timestamp))) AS alert_id, * FROM ({odd}))
            ANTI JOIN held USING (alert_id) WHERE event_timestamp >= TIMESTAMPTZ '{since.isoformat()}' ORDER BY event_timestamp, alert_id"""
        ).to_arrow_table()
    if len(rows):
        tables.append(home, tables.ALERTS, rows)
    return _alerts(rows)


def hours_sql(events: str, until: str) -> str:
    """SQL: source, hour, column, rows, nulls: every full hour of each source from its first event on, the empty ones too.

    events: columns of the events table; until: an instant, of which the running hour is left out. The column '' counts all rows;
    the others are WATCHED, and count the rows that should have them.
    """
    counts = {"": ("true", "false"), **{name: (scope, f"{name} IS NULL") for name, scope in WATCHED.items()}}
    counted = ", ".join(
        f"{{'column': '{name}', 'rows': count(*) FILTER (WHERE {scope}), 'nulls': count(*) FILTER (WHERE ({scope}) AND {empty})}}"
        for name, (scope, empty) in counts.items()
    )
    return f"""
        WITH filled AS (SELECT source, date_trunc('hour', event_timestamp) AS hour, [{counted}] AS found FROM {events} GROUP BY ALL),
        grid AS (
            SELECT source, unnest(generate_series(min(hour), date_trunc('hour', {until}) - INTERVAL 1 HOUR, INTERVAL 1 HOUR)) AS hour
            FROM filled GROUP BY source),
        named AS (SELECT unnest({list(counts)}) AS "column")
        SELECT source, hour, "column", coalesce(counted.rows, 0) AS rows, coalesce(counted.nulls, 0) AS nulls FROM grid CROSS JOIN named
        LEFT JOIN (SELECT source, hour, unnest(found, recursive := true) FROM filled) counted USING (source, hour, "column")"""


def volume_sql(hours: str, *, z: float, weeks: int) -> str:
    """SQL: the hours with far fewer or more events than the same hour of the week brought before, as rows of alerts.

    hours: as `hours_sql`. An hour is odd if it is so in both of two ways: as a count, by twice the difference of square roots, which
    has unit variance if counts are Poisson (Anscombe 1948), so that small ones do not alarm; and as a ratio, in units of how far
    the ratios of the source's earlier hours were off, so that large ones do not alarm for being restless.
    """
    expected = f"median(rows) OVER (PARTITION BY source, {_OF_WEEK} ORDER BY hour ROWS BETWEEN {weeks} PRECEDING AND 1 PRECEDING)"
    off, swing = "2 * (sqrt(rows + 0.375) - sqrt(expected + 0.375))", "ln((rows + 0.5) / (expected + 0.5))"
    told = "CASE WHEN z < 0 THEN 'volume_low' ELSE 'volume_high' END AS kind, CAST(NULL AS VARCHAR) AS \"column\""
    judged = _judged_sql(f"(SELECT * FROM {hours} WHERE \"column\" = '')", expected, off, swing, weeks=weeks)
    return f"""SELECT {told}, source, expected, CAST(rows AS DOUBLE) AS found, z, hour AS event_timestamp
        FROM ({judged}) WHERE abs(z) > {z} AND abs(swing) > ln({_MIN_RATIO})"""


def nulls_sql(hours: str, *, z: float, weeks: int) -> str:
    """SQL: the hours in which a column is null far more often than in the same hour of the week before, as rows of alerts.

    hours: as `hours_sql`. Shares are compared as twice their arcsines' roots, which have a variance of one over the rows (Freeman
    and Tukey 1950); and in units of how far the source's earlier hours were off, if that is more.
    """
    before = f'OVER (PARTITION BY source, "column", {_OF_WEEK} ORDER BY hour ROWS BETWEEN {weeks} PRECEDING AND 1 PRECEDING)'
    expected = f"(sum(nulls) {before} + 0.375) / nullif(sum(rows) {before} + 0.75, 0.75)"
    off = """CASE WHEN rows > 0 THEN 2 * sqrt(rows / (1 + rows / base))
        * (asin(sqrt((nulls + 0.375) / (rows + 0.75))) - asin(sqrt(expected))) END"""
    judged = _judged_sql(f"(SELECT *, sum(rows) {before} AS base FROM {hours} WHERE \"column\" <> '')", expected, off, off, weeks=weeks)
    return f"""SELECT 'nulls' AS kind, "column", source, expected, nulls / rows AS found, z, hour AS event_timestamp
        FROM ({judged}) WHERE z > {z} AND found > expected + {_MIN_SHARE}"""


_OF_WEEK = "epoch(hour) // 3600 % 168"


def _judged_sql(hours: str, expected: str, off: str, swing: str, *, weeks: int) -> str:
    """`hours` with expected and z: the lesser of `off`, of unit variance by chance alone, and `swing` in units of its usual size.

    Usual is what it was at this hour of the day, and at least half of what it was at any.
    """
    series, before = 'PARTITION BY source, "column"', "PRECEDING AND 1 PRECEDING)"
    same_time = f"({series}, hour(hour) ORDER BY hour ROWS BETWEEN {7 * weeks} {before}"
    any_time = f"({series} ORDER BY hour ROWS BETWEEN {168 * weeks} {before}"
    usual = f"{_SIGMA} * greatest(mad(swing) OVER {same_time}, mad(swing) OVER {any_time} / 2)"
    known = f"count(*) OVER ({series}, {_OF_WEEK} ORDER BY hour ROWS BETWEEN {weeks} {before}"
    return f"""
        SELECT *, sign(off) * least(abs(off), abs(swing) / nullif(usual, 0)) AS z FROM (
            SELECT *, {usual} AS usual FROM (SELECT *, {off} AS off, {swing} AS swing FROM (
                SELECT *, CASE WHEN {known} >= {min(_MIN_WEEKS, weeks)} THEN {expected} END AS expected FROM {hours}))
            QUALIFY count(off) OVER {any_time} >= {_MIN_HOURS})"""


def _alerts(rows: pa.Table) -> pd.DataFrame:
    frame: pd.DataFrame = rows.select(tables.ALERTS.schema.names).to_pandas()  # type: ignore[union-attr]
    return frame
