"""Windowed aggregates, and the request-time arithmetic on their values.

In: clean events, or rows of feature values and the instant they are looked at. Out: change points and exact values at any
instant (`changelog`, `values_at`); ages and ratios (`derive`), the one code path of training and serving.
Opens no file, reads no clock. The declarations themselves are in feature_repo/aggregates.py.

A windowed aggregate is a step function of time. An event counts from `enter` = max(event_timestamp, created_timestamp), the
moment it had happened and was known, until `exit` = floor(event_timestamp / hop) * hop + size + hop; it never counts where
enter >= exit. The value at T is the state strictly before T. Counts and cents are integers, so equality is exact.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache, cached_property
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from feature_repo.aggregates import (
    CUSTOMER_ACTIVITY,
    CUSTOMER_CATEGORY,
    CUSTOMER_ITEM,
    DAY_US,
    ITEM_ACTIVITY,
    NOT_BEHAVIOUR,
    RATIOS,
    REQUEST,
    SESSION_COUNTS,
    SESSION_INSTANTS,
    SPANS,
    WINDOWS,
    Aggregates,
    Ratio,
    Span,
)

if TYPE_CHECKING:
    from ibis import Table

__all__ = [
    "COUNTS",
    "CUSTOMER_ACTIVITY",
    "CUSTOMER_CATEGORY",
    "CUSTOMER_ITEM",
    "ENTITIES",
    "ITEM_ACTIVITY",
    "NOT_BEHAVIOUR",
    "NUMBERS",
    "RATIOS",
    "REQUEST",
    "SESSION_COUNTS",
    "SPANS",
    "WINDOWS",
    "Aggregates",
    "Derived",
    "Ratio",
    "Span",
    "changelog",
    "derive",
    "derive_columns",
    "derived_names",
    "serving_plan",
    "values_at",
]

ENTITIES = (CUSTOMER_ACTIVITY, ITEM_ACTIVITY, CUSTOMER_ITEM, CUSTOMER_CATEGORY)
COUNTS = frozenset((*(name for entity in ENTITIES for name in entity.counts()), *SESSION_COUNTS))
# What is a number even where every row of it is null, and so tells its type no longer.
NUMBERS = frozenset((*(name for entity in ENTITIES for name in entity.columns()), *SESSION_COUNTS, *SESSION_INSTANTS, *REQUEST))


def changelog(events: "Table", aggregates: Aggregates) -> "Table":
    """Change points: key, `event_timestamp` (the change) and the values from then on. One row per key and instant, any order.

    events: columns of the events table. The batch build makes the same rows of arrays, much faster: see `step_functions`.
    """
    from pipelines import changepoints

    return changepoints.changelog(events, aggregates)


def values_at(events: "Table", probes: "Table", aggregates: Aggregates) -> "Table":
    """`probes` (key, `event_timestamp`, any others) with the values strictly before that instant; duplicates kept, any order.

    The same deltas as `changelog`: equal to its last change point before the probe; 0 and null where there is none.
    """
    from pipelines import changepoints

    return changepoints.values_at(events, probes, aggregates)


def derive(frame: pd.DataFrame, at: "pd.Series[pd.Timestamp] | datetime", *, request: pd.DataFrame | None = None) -> pd.DataFrame:
    """Rows of stored values as seen at `at`: a new frame with the columns `derived_names` lists and the frame's index.

    at: one instant for all rows, or one for each in row order; UTC where naive. request: what only a request tells, columns of REQUEST,
    in row order. Raises ValueError where their numbers differ, or where `request` has other columns.
    """
    instants = pd.DatetimeIndex([at] * len(frame) if isinstance(at, datetime) else at)
    instants = instants if instants.tz is None else instants.tz_convert("UTC").tz_localize(None)
    columns = {str(name): frame[name].to_numpy() for name in frame.columns}
    told = None if request is None else {str(name): request[name].to_numpy(dtype=np.float64, na_value=np.nan) for name in request.columns}
    micros = instants.to_numpy().astype("datetime64[us]").astype(np.int64)
    return pd.DataFrame(derive_columns(columns, micros, request=told), index=frame.index)


def derive_columns(
    columns: Mapping[str, np.ndarray], at: np.ndarray | int, *, request: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """The core of `derive`, for one row or many: arrays of length n by name, `at` in microseconds since 1970.

    Numbers come back as float64: counts 0 where missing, ages and ratios NaN where undefined. What is no number is passed on.
    """
    if request:
        if unknown := sorted(set(request) - set(REQUEST)):
            raise ValueError(f"a request may tell {REQUEST}, found {unknown}; declare them in feature_repo/aggregates.py")
        columns = {**columns, **request}
    plan = _plan(tuple(columns), tuple(name for name, column in columns.items() if column.dtype.kind not in "iuf" and name not in NUMBERS))
    n = next((len(column) for column in columns.values()), 0)
    values = plan.values(np.array([columns[name] for name in plan.numbers], dtype=np.float64).reshape(len(plan.numbers), n), at)
    return {name: columns[name] if row is None else values[row] for name, row in plan.rows.items()}


class Derived(Mapping[str, np.ndarray]):
    """What `derive_columns` gives for the same values, kept as one matrix: `numbers` takes columns of it at once.

    plan: of `serving_plan`. rows: n lists of values, numbers or None, in the order of the names that the plan was made for. What a request
    tells comes as numbers.
    """

    def __init__(self, plan: "Plan", rows: Sequence[Sequence[Any]], at: int, *, request: Mapping[str, float]) -> None:
        self.plan, self._rows = plan, rows
        self.n = n = len(rows)
        told = [request.get(name, math.nan) for name in REQUEST]
        self._row = plan.row([*plan.pick(rows[0]), *told], at) if n == 1 else None
        if n != 1:
            given = np.array([(*plan.pick(row), *told) for row in rows], dtype=np.float64)
            self._values = plan.values(np.ascontiguousarray(given.reshape(n, len(plan.numbers)).T), at)

    @cached_property
    def _values(self) -> np.ndarray:
        return np.array(self._row)[:, None]

    def __getitem__(self, name: str) -> np.ndarray:
        row = self.plan.rows[name]
        return np.array(self.texts(name), dtype=object) if row is None else self._values[row]

    def __iter__(self) -> Iterator[str]:
        return iter(self.plan.rows)

    def __len__(self) -> int:
        return len(self.plan.rows)

    def numbers(self, pick: Callable[[Any], Any]) -> np.ndarray:
        """Columns (n, d), a fresh array. pick: an itemgetter of their rows in the plan, of two or more."""
        if (row := self._row) is not None:
            return np.array([pick(row)])
        return np.array(pick(self._values)).T.copy()

    def texts(self, name: str) -> list[Any]:
        """A column (n,) that the plan passes on, as it was given."""
        place = self.plan.columns.index(name)
        return [row[place] for row in self._rows]

    def value(self, name: str, i: int) -> object:
        """One value of one row."""
        place = self.plan.rows[name]
        if place is None:
            return self._rows[i][self.plan.columns.index(name)]
        return self._values[place, i] if self._row is None else self._row[place]


def serving_plan(columns: tuple[str, ...], texts: Iterable[str]) -> "Plan":
    """How `Derived` makes its columns of values in this order, and of what a request tells; texts: those that are passed on as they are."""
    return _plan((*columns, *REQUEST), tuple(texts))


def derived_names(columns: Sequence[str]) -> list[str]:
    """The columns, in order, that `derive` makes of `columns`: training and serving agree on them through this."""
    names = [_age(name) if name.endswith("_at") else name for name in columns]
    names += [span.name for span in SPANS if span.start in columns and span.end in columns]
    for ratio in RATIOS:
        if ratio.numerator in names and ratio.denominator in names:
            names.append(ratio.name)
    return names


@dataclass(frozen=True)
class _Wave:
    """Ratios that hang on nothing but earlier rows of the matrix."""

    numerators: np.ndarray
    denominators: np.ndarray
    plus: np.ndarray
    over: np.ndarray


@dataclass(frozen=True)
class Plan:
    """Where everything stands in the matrix of `derive_columns`: the given numbers, then spans, then ratios wave by wave."""

    columns: tuple[str, ...]
    numbers: tuple[str, ...]
    counts: np.ndarray
    instants: np.ndarray
    span_starts: np.ndarray
    span_ends: np.ndarray
    span_units: np.ndarray
    waves: tuple[_Wave, ...]
    rows: dict[str, int | None]  # by name, in the order of `derived_names`; None: passed on as it is

    def values(self, given: np.ndarray, at: np.ndarray | int) -> np.ndarray:
        """The matrix (rows, n) from the given numbers, which are changed."""
        # One operation for all columns of a kind: a single row costs a few dozen array operations, not hundreds.
        spans = (given[self.span_ends] - given[self.span_starts]) / self.span_units
        counts = given[self.counts]
        given[self.counts] = np.where(np.isnan(counts), 0.0, counts)
        given[self.instants] = (at - given[self.instants]) / DAY_US
        values = np.concatenate([given, spans])
        for wave in self.waves:
            below = values[wave.denominators] + wave.over
            values = np.concatenate([values, (values[wave.numerators] + wave.plus) / np.where(below > 0, below, np.nan)])
        return values

    def row(self, given: Sequence[Any], at: int) -> list[float]:
        """The same of one row, None where a number is missing: the same operations one by one, the same bits, and a fifth of the price."""
        absent, instants, spans, ratios = self._one_by_one
        # only a missing number is not equal to itself
        values = [instead if value is None or value != value else float(value) for value, instead in zip(given, absent, strict=True)]
        made = [(values[end] - values[start]) / unit for start, end, unit in spans]
        for place in instants:
            values[place] = (at - values[place]) / DAY_US
        values += made
        for numerator, denominator, plus, over in ratios:
            below = values[denominator] + over
            values.append((values[numerator] + plus) / below if below > 0 else math.nan)
        return values

    @cached_property
    def pick(self) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
        """The numbers among a row of values, but for what a request tells."""
        places = [place for place, name in enumerate(self.columns) if name in self.numbers[: -len(REQUEST)]]
        return itemgetter(*places) if len(places) > 1 else lambda row: tuple(row[place] for place in places)

    @cached_property
    def _one_by_one(self) -> tuple[list[float], list[int], list[tuple[int, int, float]], list[tuple[int, int, float, float]]]:
        """What stands for a missing number in each place; instants, spans and ratios, each in their order."""
        counts = set(self.counts.tolist())
        absent = [0.0 if place in counts else math.nan for place in range(len(self.numbers))]
        spans = zip(self.span_starts.tolist(), self.span_ends.tolist(), self.span_units.ravel().tolist(), strict=True)
        ratios = [
            ratio
            for wave in self.waves
            for ratio in zip(
                wave.numerators.tolist(), wave.denominators.tolist(), wave.plus.ravel().tolist(), wave.over.ravel().tolist(), strict=True
            )
        ]
        return absent, self.instants.tolist(), list(spans), ratios


@cache
def _plan(columns: tuple[str, ...], others: tuple[str, ...]) -> Plan:
    numbers = tuple(name for name in columns if name not in others)
    at = {name: row for row, name in enumerate(numbers)}
    spans = [span for span in SPANS if span.start in at and span.end in at]
    rows = {_age(name) if name.endswith("_at") else name: row for name, row in at.items()}
    rows |= {span.name: len(numbers) + i for i, span in enumerate(spans)}
    waves, left = [], [ratio for ratio in RATIOS if ratio.name in derived_names(columns)]
    while left:
        ready = [ratio for ratio in left if ratio.numerator in rows and ratio.denominator in rows]
        waves.append(
            _Wave(
                numerators=_places(rows[ratio.numerator] for ratio in ready),
                denominators=_places(rows[ratio.denominator] for ratio in ready),
                plus=np.array([ratio.plus for ratio in ready]).reshape(-1, 1),
                over=np.array([ratio.over for ratio in ready]).reshape(-1, 1),
            )
        )
        rows |= {ratio.name: len(rows) + i for i, ratio in enumerate(ready)}
        left = [ratio for ratio in left if ratio not in ready]
    return Plan(
        columns=columns,
        numbers=numbers,
        counts=_places(row for name, row in at.items() if name in COUNTS),
        instants=_places(row for name, row in at.items() if name.endswith("_at")),
        span_starts=_places(at[span.start] for span in spans),
        span_ends=_places(at[span.end] for span in spans),
        span_units=np.array([span.unit_us for span in spans], dtype=np.float64).reshape(-1, 1),
        waves=tuple(waves),
        rows={name: rows.get(name) for name in derived_names(columns)},
    )


def _places(rows: Iterable[int]) -> np.ndarray:
    return np.array([*rows], dtype=np.intp)  # as an array once, not on every use


def _age(name: str) -> str:
    return f"{name.removesuffix('_at')}_age_days"
