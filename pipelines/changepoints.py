"""Declared aggregates -> Ibis expressions on clean events: the deltas, their running sums, and values at given instants.

In: an Ibis table of clean events and an `Aggregates`. Out: an unexecuted Ibis expression, the same for every backend but for
the two conversions between instants and microseconds. Declares no aggregate and runs nothing. This is the definition: the batch build
computes the same change points with `step_functions`, the stream with `tiles`, and tests hold both against it.

Every event adds its value at `enter` and takes it back at `exit` (see windows.py). The deltas of one key and instant are one
row; their running sum per key is the step function. What is no sum over a window, a count of different values or the best of them,
is first made a step function of its own, and then its differences are deltas like any other.
"""

from collections.abc import Iterable
from functools import reduce
from typing import Any

import ibis
import ibis.expr.datatypes as dt
from ibis import Table

from feature_repo.aggregates import (
    DISTINCT_LIMIT,
    LARGEST,
    NOT_BEHAVIOUR,
    WINDOWS,
    Aggregates,
    Distinct,
    Extreme,
    Latest,
    Sum,
    Window,
    spans_of,
)  # fmt: skip

UTC = dt.Timestamp(timezone="UTC")
_Best = Extreme | Latest


@ibis.udf.scalar.builtin(signature=((UTC,), dt.int64))
def epoch_us(instant: Any) -> Any:
    """Microseconds since 1970."""


@ibis.udf.scalar.builtin(signature=((dt.int64,), UTC))
def make_timestamptz(microseconds: Any) -> Any:
    """The instant so many microseconds after 1970."""


def changelog(events: Table, aggregates: Aggregates) -> Table:
    """See `windows.changelog`."""
    running = _running(_deltas(timed(events, *aggregates.key), aggregates), aggregates, order=["at"])
    return running.select(*aggregates.key, event_timestamp=make_timestamptz(running["at"]), **{c: running[c] for c in aggregates.columns()})


def values_at(events: Table, probes: Table, aggregates: Aggregates) -> Table:
    """See `windows.values_at`."""
    deltas = _deltas(timed(events, *aggregates.key), aggregates)
    deltas = deltas.mutate(is_change=ibis.literal(1, "int64"), probe=ibis.null("int64"))
    asked = probes.mutate(probe=ibis.row_number().cast("int64"))
    # 0 before 1: a probe comes before a change at its own instant, so it sees the state strictly before.
    rows = asked.select(*aggregates.key, "probe", at=epoch_us(asked["event_timestamp"]), is_change=ibis.literal(0, "int64"))
    both = ibis.union(deltas, _widen(rows, deltas.schema(), _summed(aggregates)))
    found = _running(both, aggregates, order=["at", "is_change"])
    found = found.filter(found["probe"].notnull()).select("probe", *aggregates.columns())
    return asked.join(found, "probe").drop("probe")


def timed(events: Table, *key: str) -> Table:
    """The events that count for `key`, with `ts` and `enter` in microseconds, and the `one` that each adds to a count."""
    rows = events.filter(*(events[name].notnull() for name in key), events["type"].notin(NOT_BEHAVIOUR))
    rows = rows.mutate(ts=epoch_us(rows["event_timestamp"]), known=epoch_us(rows["created_timestamp"]), one=ibis.literal(1, "int64"))
    return rows.mutate(enter=ibis.greatest(rows["ts"], ibis.coalesce(rows["known"], rows["ts"])))


def _exit(ts: Any, window: Window) -> Any:
    return ts - ts % window.hop_us + (window.size_us + window.hop_us)


def _deltas(rows: Table, aggregates: Aggregates) -> Table:
    """One row per key and instant `at` of change: the change of every sum, and what newcomers bring to the rest."""
    parts = [_entering(rows, aggregates)]
    for window in WINDOWS.values():
        if any(window.name in a.windows for a in aggregates.sums):
            parts.append(_exiting(rows, aggregates, window))
        if any(window.name == name for _, name in _moving(aggregates)):
            parts.append(_surpassing(rows, aggregates, window))
    parts += [_changing(rows, aggregates, a, WINDOWS[name]) for a in aggregates.distincts for name in a.windows]
    parts += [_appearing(rows, aggregates, a) for a in aggregates.distincts if a.has_total]
    summed = _summed(aggregates)
    schema = {**parts[0].schema(), **dict.fromkeys(summed, dt.int64)}
    wide = reduce(ibis.union, [_widen(part, schema, summed) for part in parts])
    values: dict[str, Any] = {name: wide[name].sum().cast("int64") for name in summed}
    return wide.group_by([*aggregates.key, "at"]).agg(**values, **_lasting(wide, aggregates))


def _entering(rows: Table, aggregates: Aggregates) -> Table:
    values: dict[str, Any] = {}
    for a in aggregates.sums:
        value = _value(rows, a)
        for name in a.windows:  # what arrives after its exit never counts
            values[aggregates.column(a, name)] = ibis.ifelse(rows["enter"] < _exit(rows["ts"], WINDOWS[name]), value, 0).sum()
        if a.has_total:
            values[aggregates.column(a, "total")] = value.sum()
    for instant in aggregates.instants:
        counted = _is_of(rows, instant.types)
        values[aggregates.column(instant)] = rows["ts"].min(where=counted) if instant.is_first else rows["ts"].max(where=counted)
    for name, best in _total(aggregates).items():
        values[name] = _best_of(_candidate(rows, best), best)
    return rows.group_by([*aggregates.key, rows["enter"].name("at")]).agg(**values)


def _exiting(rows: Table, aggregates: Aggregates, window: Window) -> Table:
    leaving = rows.mutate(at=_exit(rows["ts"], window))
    leaving = leaving.filter(leaving["enter"] < leaving["at"])
    values = {aggregates.column(a, window.name): -_value(leaving, a).sum() for a in aggregates.sums if window.name in a.windows}
    return leaving.group_by([*aggregates.key, "at"]).agg(**values)


def _changing(rows: Table, aggregates: Aggregates, distinct: Distinct, window: Window) -> Table:
    """+1 where the first event of a (key, value) begins to count, -1 where the last ceases to: the union of their intervals."""
    pair = [*aggregates.key, distinct.column]
    spans = _carrying(rows, distinct).mutate(exit=_exit(rows["ts"], window))
    # Intervals with one exit are one interval from the earliest enter: a day's events of a pair become one row.
    spans = spans.filter(spans["enter"] < spans["exit"]).group_by([*pair, "exit"]).agg(enter=lambda t: t["enter"].min())
    begins, ends = spans.select(*pair, at="enter", step=ibis.literal(1)), spans.select(*pair, at="exit", step=ibis.literal(-1))
    steps = ibis.union(begins, ends).group_by([*pair, "at"]).agg(step=lambda t: t["step"].sum())
    alive = steps.mutate(alive=steps["step"].sum().over(ibis.cumulative_window(group_by=pair, order_by="at")))
    change = (alive["alive"] > 0).cast("int64") - (alive["alive"] > alive["step"]).cast("int64")  # alive before = alive - step
    return alive.group_by([*aggregates.key, "at"]).agg(**{aggregates.column(distinct, window.name): change.sum()})


def _appearing(rows: Table, aggregates: Aggregates, distinct: Distinct) -> Table:
    """+1 where a (key, value) is first known; it never leaves a total."""
    known = _carrying(rows, distinct)
    first = known.group_by([*aggregates.key, distinct.column]).agg(at=known["enter"].min())
    return first.group_by([*aggregates.key, "at"]).agg(**{aggregates.column(distinct, "total"): first.count()})


def _surpassing(rows: Table, aggregates: Aggregates, window: Window) -> Table:
    """The change of every best value over the window, and of whether there is one, where it changes.

    Time is cut into cells of a hop. Whatever counts at the start of a cell counts to its end, since exits are at starts of cells; so
    the best in a cell is that at its start, or the best of what enters during it. No event meets another: cells are what is joined.
    """
    key = list(aggregates.key)
    wanted = {aggregates.column(a, of): a for a, of in _moving(aggregates) if of == window.name}
    known = rows.mutate(exit=_exit(rows["ts"], window), **{name: _candidate(rows, best) for name, best in wanted.items()})
    known = known.filter(known["enter"] < known["exit"], reduce(lambda a, b: a | b, (known[name].notnull() for name in wanted)))

    def bests(t: Table) -> dict[str, Any]:
        return {name: _best_of(t[name], best) for name, best in wanted.items()}

    start = known["enter"] + (window.hop_us - known["enter"] % window.hop_us) % window.hop_us
    bodies = known.group_by([*key, "exit", start.name("start")]).agg(**bests(known))
    cells = bodies.mutate(at=ibis.range(bodies["start"], bodies["exit"], window.hop_us)).unnest("at").select(*key, "at", *wanted)
    heads = known.select(*key, at="enter", **{name: known[name] for name in wanted})
    ends = bodies.select(*key, at="exit", **{name: ibis.null(known[name].type()) for name in wanted})
    points = ibis.union(ibis.union(heads, cells), ends)
    points = points.group_by([*key, "at"]).agg(**bests(points)).mutate(cell=lambda t: t["at"] - t["at"] % window.hop_us)
    in_cell = ibis.cumulative_window(group_by=[*key, "cell"], order_by="at")
    held = points.mutate(**{name: _plain(_best_of(points[name], best).over(in_cell), best) for name, best in wanted.items()})
    return _differences(held, key, list(wanted))


def _differences(steps: Table, key: list[str], names: list[str]) -> Table:
    """Step functions given by their values, null where there is none -> their deltas, 0 for null, and those of not being null."""
    values: dict[str, Any] = {}
    for name in names:
        before = steps[name].lag().over(ibis.window(group_by=key, order_by="at"))
        values[name] = steps[name].fill_null(0) - before.fill_null(0)
        values[_known(name)] = steps[name].notnull().cast("int64") - before.notnull().cast("int64")
    deltas = steps.select(*key, "at", **values)
    return deltas.filter(reduce(lambda a, b: a | b, (deltas[name] != 0 for name in values)))


def _moving(aggregates: Aggregates) -> list[tuple[_Best, str]]:
    """Best values over windows, each with the window's name."""
    extremes: list[tuple[_Best, str]] = [(a, name) for a in aggregates.extremes for name in a.windows]
    return extremes + [(a, a.window) for a in aggregates.latests if a.window]


def _total(aggregates: Aggregates) -> dict[str, _Best]:
    """Best values of all time by column."""
    extremes: dict[str, _Best] = {aggregates.column(a, "total"): a for a in aggregates.extremes if a.has_total}
    return extremes | {aggregates.column(a): a for a in aggregates.latests if not a.window}


def _summed(aggregates: Aggregates) -> list[str]:
    """The columns of the deltas that are summed up."""
    moving = [aggregates.column(a, of) for a, of in _moving(aggregates)]
    return [*aggregates.counts(), *moving, *map(_known, moving)]


def _known(name: str) -> str:
    return f"{name}_known"


def _is_of(rows: Table, types: tuple[str, ...]) -> Any:
    return rows["type"].isin(types) if types else None


def _carrying(rows: Table, distinct: Distinct) -> Table:
    known = rows.filter(rows[distinct.column].notnull())
    return known.filter(known["type"].isin(distinct.types)) if distinct.types else known


def _value(rows: Table, a: Sum) -> Any:
    value = rows[a.value].fill_null(0).clip(-LARGEST, LARGEST) if a.value else rows["one"]
    if a.carrying:
        value = ibis.ifelse(rows[a.carrying].notnull(), value, 0)
    return ibis.ifelse(rows["type"].isin(a.types), value, 0) if a.types else value


def _candidate(rows: Table, best: _Best) -> Any:
    """What an event brings to a best value, null where nothing: the value, or with its time, which decides first."""
    value = rows[best.column].cast("int64").clip(-LARGEST, LARGEST)
    found = ibis.struct({"ts": rows["ts"], "value": value}) if isinstance(best, Latest) else value
    counts = rows[best.column].notnull() & rows["type"].isin(best.types) if best.types else rows[best.column].notnull()
    return ibis.ifelse(counts, found, ibis.null(found.type()))


def _best_of(values: Any, best: _Best) -> Any:
    return values.min() if (best.is_first if isinstance(best, Latest) else best.is_min) else values.max()


def _plain(values: Any, best: _Best) -> Any:
    return values["value"] if isinstance(best, Latest) else values


def _lasting(deltas: Table, aggregates: Aggregates) -> dict[str, Any]:
    """The aggregates that only grow or only shrink: instants, and the best values of all time."""
    values = {}
    for instant in aggregates.instants:
        column = deltas[aggregates.column(instant)]
        values[aggregates.column(instant)] = column.min() if instant.is_first else column.max()
    return values | {name: _best_of(deltas[name], best) for name, best in _total(aggregates).items()}


def _widen(part: Table, schema: Any, summed: Iterable[str]) -> Table:
    """`part` with all columns of `schema`: 0 for what is summed and missing, null for the rest."""
    zero = set(summed)
    filled = {}
    for name, kind in schema.items():
        if name in part.columns:
            filled[name] = part[name].cast(kind)
        else:
            filled[name] = ibis.literal(0, "int64") if name in zero else ibis.null(kind)
    return part.select(**filled)


def _running(deltas: Table, aggregates: Aggregates, *, order: Iterable[str]) -> Table:
    until_now = ibis.cumulative_window(group_by=list(aggregates.key), order_by=list(order))
    values = {name: deltas[name].sum().over(until_now).cast("int64") for name in _summed(aggregates)}
    for distinct in aggregates.distincts:
        for name in (aggregates.column(distinct, of) for of in spans_of(distinct)):
            values[name] = ibis.least(values[name], DISTINCT_LIMIT)
    for a, of in _moving(aggregates):
        name = aggregates.column(a, of)
        values[name] = ibis.ifelse(values.pop(_known(name)) > 0, values[name], ibis.null("int64"))
    values |= {name: value.over(until_now) for name, value in _lasting(deltas, aggregates).items()}
    values |= {name: _plain(values[name], best) for name, best in _total(aggregates).items()}
    return deltas.mutate(**values)
