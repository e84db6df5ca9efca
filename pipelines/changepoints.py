"""Declared aggregates -> Ibis expressions on clean events: the deltas, their running sums, and values at given instants.

In: an Ibis table of clean events and an `Aggregates`. Out: an unexecuted Ibis expression, the same for every backend but for
the two conversions between instants and microseconds. Declares no aggregate and runs nothing.

Every event adds its value at `enter` and takes it back at `exit` (see windows.py). The deltas of one key and instant are one
row; their running sum per key is the step function.
"""

from collections.abc import Iterable
from functools import reduce
from typing import Any

import ibis
import ibis.expr.datatypes as dt
from ibis import Table

from pipelines.windows import NOT_BEHAVIOUR, WINDOWS, Aggregates, Distinct, Sum, Window

UTC = dt.Timestamp(timezone="UTC")
LARGEST = 10**15  # what one event adds is held within this, so that one absurd price cannot carry a sum beyond 64 bits


@ibis.udf.scalar.builtin(signature=((UTC,), dt.int64))
def epoch_us(instant: Any) -> Any:
    """Microseconds since 1970."""


@ibis.udf.scalar.builtin(signature=((dt.int64,), UTC))
def make_timestamptz(microseconds: Any) -> Any:
    """The instant so many microseconds after 1970."""


def changelog(events: Table, aggregates: Aggregates) -> Table:
    """See `windows.changelog`."""
    running = _running(_deltas(timed(events, aggregates.key), aggregates), aggregates, order=["at"])
    return running.select(aggregates.key, event_timestamp=make_timestamptz(running["at"]), **{c: running[c] for c in aggregates.columns()})


def values_at(events: Table, probes: Table, aggregates: Aggregates) -> Table:
    """See `windows.values_at`."""
    deltas = _deltas(timed(events, aggregates.key), aggregates)
    deltas = deltas.mutate(is_change=ibis.literal(1, "int64"), probe=ibis.null("int64"))
    asked = probes.mutate(probe=ibis.row_number().cast("int64"))
    # 0 before 1: a probe comes before a change at its own instant, so it sees the state strictly before.
    rows = asked.select(aggregates.key, "probe", at=epoch_us(asked["event_timestamp"]), is_change=ibis.literal(0, "int64"))
    both = ibis.union(deltas, _widen(rows, deltas.schema()))
    found = _running(both, aggregates, order=["at", "is_change"])
    found = found.filter(found["probe"].notnull()).select("probe", *aggregates.columns())
    return asked.join(found, "probe").drop("probe")


def timed(events: Table, key: str) -> Table:
    """The events that count for `key`, with `ts` and `enter` in microseconds, and the `one` that each adds to a count."""
    rows = events.filter(events[key].notnull(), events["type"].notin(NOT_BEHAVIOUR))
    rows = rows.mutate(ts=epoch_us(rows["event_timestamp"]), known=epoch_us(rows["created_timestamp"]), one=ibis.literal(1, "int64"))
    return rows.mutate(enter=ibis.greatest(rows["ts"], ibis.coalesce(rows["known"], rows["ts"])))


def _exit(ts: Any, window: Window) -> Any:
    return ts - ts % window.hop_us + (window.size_us + window.hop_us)


def _deltas(rows: Table, aggregates: Aggregates) -> Table:
    """One row per key and instant `at` of change: the change of every count, and what newcomers bring to the rest."""
    parts = [_entering(rows, aggregates)]
    parts += [_exiting(rows, aggregates, window) for window in WINDOWS.values() if any(window.name in a.windows for a in aggregates.sums)]
    parts += [_changing(rows, aggregates, a, WINDOWS[name]) for a in aggregates.distincts for name in a.windows]
    parts += [_appearing(rows, aggregates, a) for a in aggregates.distincts if a.has_total]
    schema = {**parts[0].schema(), **dict.fromkeys(aggregates.counts(), dt.int64)}
    wide = reduce(ibis.union, [_widen(part, schema) for part in parts])
    values: dict[str, Any] = {name: wide[name].sum().cast("int64") for name in aggregates.counts()}
    values |= _extremes(wide, aggregates)
    return wide.group_by([aggregates.key, "at"]).agg(**values)


def _entering(rows: Table, aggregates: Aggregates) -> Table:
    values: dict[str, Any] = {}
    for a in aggregates.sums:
        value = _value(rows, a)
        for name in a.windows:  # what arrives after its exit never counts
            values[aggregates.column(a, name)] = ibis.ifelse(rows["enter"] < _exit(rows["ts"], WINDOWS[name]), value, 0).sum()
        if a.has_total:
            values[aggregates.column(a, "total")] = value.sum()
    for instant in aggregates.instants:
        counted = rows["type"].isin(instant.types) if instant.types else None
        values[aggregates.column(instant)] = rows["ts"].min(where=counted) if instant.is_first else rows["ts"].max(where=counted)
    for latest in aggregates.latests:
        dated = ibis.struct({"ts": rows["ts"], "value": rows[latest.column]})
        values[aggregates.column(latest)] = dated.max(where=rows[latest.column].notnull())
    return rows.group_by([aggregates.key, rows["enter"].name("at")]).agg(**values)


def _exiting(rows: Table, aggregates: Aggregates, window: Window) -> Table:
    leaving = rows.mutate(at=_exit(rows["ts"], window))
    leaving = leaving.filter(leaving["enter"] < leaving["at"])
    values = {aggregates.column(a, window.name): -_value(leaving, a).sum() for a in aggregates.sums if window.name in a.windows}
    return leaving.group_by([aggregates.key, "at"]).agg(**values)


def _changing(rows: Table, aggregates: Aggregates, distinct: Distinct, window: Window) -> Table:
    """+1 where the first event of a (key, value) begins to count, -1 where the last ceases to: the union of their intervals."""
    pair = [aggregates.key, distinct.column]
    spans = _carrying(rows, distinct).mutate(exit=_exit(rows["ts"], window))
    # Intervals with one exit are one interval from the earliest enter: a day's events of a pair become one row.
    spans = spans.filter(spans["enter"] < spans["exit"]).group_by([*pair, "exit"]).agg(enter=lambda t: t["enter"].min())
    begins, ends = spans.select(*pair, at="enter", step=ibis.literal(1)), spans.select(*pair, at="exit", step=ibis.literal(-1))
    steps = ibis.union(begins, ends).group_by([*pair, "at"]).agg(step=lambda t: t["step"].sum())
    alive = steps.mutate(alive=steps["step"].sum().over(ibis.cumulative_window(group_by=pair, order_by="at")))
    change = (alive["alive"] > 0).cast("int64") - (alive["alive"] > alive["step"]).cast("int64")  # alive before = alive - step
    return alive.group_by([aggregates.key, "at"]).agg(**{aggregates.column(distinct, window.name): change.sum()})


def _appearing(rows: Table, aggregates: Aggregates, distinct: Distinct) -> Table:
    """+1 where a (key, value) is first known; it never leaves a total."""
    known = _carrying(rows, distinct)
    first = known.group_by([aggregates.key, distinct.column]).agg(at=known["enter"].min())
    return first.group_by([aggregates.key, "at"]).agg(**{aggregates.column(distinct, "total"): first.count()})


def _carrying(rows: Table, distinct: Distinct) -> Table:
    known = rows.filter(rows[distinct.column].notnull())
    return known.filter(known["type"].isin(distinct.types)) if distinct.types else known


def _value(rows: Table, a: Sum) -> Any:
    value = rows[a.value].fill_null(0).clip(-LARGEST, LARGEST) if a.value else rows["one"]
    return ibis.ifelse(rows["type"].isin(a.types), value, 0) if a.types else value


def _extremes(deltas: Table, aggregates: Aggregates) -> dict[str, Any]:
    """The aggregates that only grow or only shrink: instants by min or max, the latest value by the newest (ts, value)."""
    values = {}
    for instant in aggregates.instants:
        column = deltas[aggregates.column(instant)]
        values[aggregates.column(instant)] = column.min() if instant.is_first else column.max()
    return values | {aggregates.column(latest): deltas[aggregates.column(latest)].max() for latest in aggregates.latests}


def _widen(part: Table, schema: Any) -> Table:
    """`part` with all columns of `schema`: 0 for a missing count, null for what is not counted."""
    filled = {}
    for name, kind in schema.items():
        if name in part.columns:
            filled[name] = part[name].cast(kind)
        else:
            filled[name] = ibis.null(kind) if name.endswith("_at") or not kind.is_integer() else ibis.literal(0, "int64")
    return part.select(**filled)


def _running(deltas: Table, aggregates: Aggregates, *, order: Iterable[str]) -> Table:
    until_now = ibis.cumulative_window(group_by=aggregates.key, order_by=list(order))
    values = {name: deltas[name].sum().over(until_now).cast("int64") for name in aggregates.counts()}
    values |= {name: value.over(until_now) for name, value in _extremes(deltas, aggregates).items()}
    values |= {name: values[name]["value"] for name in map(aggregates.column, aggregates.latests)}
    return deltas.mutate(**values)
