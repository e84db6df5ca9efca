"""Windowed aggregates, declared once, and the request-time arithmetic on their values.

In: clean events, or rows of feature values and the instant they are looked at. Out: change points and exact values at any
instant (`changelog`, `values_at`); ages and ratios (`derive`), the one code path of training and serving.
Opens no file, reads no clock.

A windowed aggregate is a step function of time. An event counts from `enter` = max(event_timestamp, created_timestamp), the
moment it had happened and was known, until `exit` = floor(event_timestamp / hop) * hop + size + hop; it never counts where
enter >= exit. The value at T is the state strictly before T. Counts and cents are integers, so equality is exact.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pipelines import tables

if TYPE_CHECKING:
    from ibis import Table

# What the shop did or administered is not behaviour: an exposure counted as activity would feed our own actions back.
NOT_BEHAVIOUR = ("exposure", "identify", "consent")
DAY_US = 86_400_000_000


@dataclass(frozen=True)
class Window:
    """The last `size`, moving in steps of `hop`: an event counts for more than `size` and at most `size + hop`."""

    name: str
    size: timedelta
    hop: timedelta

    @property
    def size_us(self) -> int:
        """Microseconds."""
        return self.size // timedelta(microseconds=1)

    @property
    def hop_us(self) -> int:
        """Microseconds."""
        return self.hop // timedelta(microseconds=1)


@dataclass(frozen=True)
class Sum:
    """The number of events of `types` (all where none is named), or the sum of their column `value`."""

    name: str
    types: tuple[str, ...] = ()
    value: str | None = None
    windows: tuple[str, ...] = ()
    has_total: bool = False


@dataclass(frozen=True)
class Distinct:
    """The number of different values of `column` among the events of `types` (all where none is named)."""

    name: str
    column: str
    types: tuple[str, ...] = ()
    windows: tuple[str, ...] = ()
    has_total: bool = False


@dataclass(frozen=True)
class Instant:
    """When the first or last event of `types` (all where none is named) happened: microseconds since 1970, null before."""

    name: str
    types: tuple[str, ...] = ()
    is_first: bool = False


@dataclass(frozen=True)
class Latest:
    """The value of `column` on the newest event that carries one, the larger of two at one instant; null before."""

    name: str
    column: str


@dataclass(frozen=True)
class Aggregates:
    """All aggregates of one entity. `prefix` keeps their names apart from those of other entities."""

    key: str
    sums: tuple[Sum, ...]
    distincts: tuple[Distinct, ...] = ()
    instants: tuple[Instant, ...] = ()
    latests: tuple[Latest, ...] = ()
    prefix: str = ""

    def column(self, aggregate: Sum | Distinct | Instant | Latest, window: str | None = None) -> str:
        """The name of one value column; `window` is a window's name or "total", for sums and distinct counts."""
        suffix = "_at" if isinstance(aggregate, Instant) else f"_{window}" if window else ""
        return f"{self.prefix}{aggregate.name}{suffix}"

    def counts(self) -> list[str]:
        """Columns that are running sums: 0, never null, where nothing happened."""
        counted: tuple[Sum | Distinct, ...] = (*self.sums, *self.distincts)
        return [self.column(a, w) for a in counted for w in (*a.windows, *(("total",) if a.has_total else ()))]

    def columns(self) -> list[str]:
        """All value columns."""
        rest: tuple[Instant | Latest, ...] = (*self.instants, *self.latests)
        return self.counts() + [self.column(a) for a in rest]


@dataclass(frozen=True)
class Span:
    """Time between two instants in `unit_us` microseconds; null where either never happened."""

    name: str
    start: str
    end: str
    unit_us: int = DAY_US


@dataclass(frozen=True)
class Ratio:
    """(numerator + plus) / (denominator + over); null where the denominator is not positive, unless smoothed by `over`."""

    name: str
    numerator: str
    denominator: str
    plus: float = 0.0
    over: float = 0.0


_HOUR, _DAY = timedelta(hours=1), timedelta(days=1)
WINDOWS = {
    window.name: window
    for window in (
        Window("1h", _HOUR, timedelta(minutes=5)),
        Window("24h", _DAY, _HOUR),
        Window("7d", 7 * _DAY, _DAY),
        Window("30d", 30 * _DAY, _DAY),
        Window("90d", 90 * _DAY, _DAY),
    )
}
CUSTOMER_ACTIVITY = Aggregates(
    key="customer_id",
    sums=(
        Sum("events", windows=tables.CUSTOMER_WINDOWS, has_total=True),
        Sum("views", types=("view",), windows=tables.CUSTOMER_WINDOWS, has_total=True),
        Sum("cart_adds", types=("cart_add",), windows=tables.CUSTOMER_WINDOWS, has_total=True),
        Sum("purchases", types=("purchase",), windows=tables.CUSTOMER_WINDOWS, has_total=True),
        Sum("revenue_cents", value="revenue_cents", windows=tables.CUSTOMER_WINDOWS, has_total=True),
        Sum("returns", types=("return",), has_total=True),
    ),
    distincts=(
        Distinct("sessions", "session_id", windows=tables.SESSION_WINDOWS, has_total=True),
        Distinct("distinct_items", "item_id", windows=("30d",), has_total=True),
        Distinct("orders", "order_id", types=("purchase",), has_total=True),
    ),
    instants=(
        Instant("first_event", is_first=True),
        Instant("last_event"),
        Instant("first_purchase", types=("purchase",), is_first=True),
        Instant("last_purchase", types=("purchase",)),
    ),
)
ITEM_ACTIVITY = Aggregates(
    key="item_id",
    prefix="item_",
    sums=(
        Sum("views", types=("view",), windows=tables.ITEM_WINDOWS, has_total=True),
        Sum("cart_adds", types=("cart_add",), windows=tables.ITEM_WINDOWS, has_total=True),
        Sum("purchases", types=("purchase",), windows=tables.ITEM_WINDOWS, has_total=True),
        Sum("revenue_cents", value="revenue_cents", windows=tables.ITEM_WINDOWS),
    ),
    instants=(Instant("first_seen", is_first=True),),
    latests=(Latest("price_cents", "price_cents"),),
)
SESSION_COUNTS = (
    "session_events", "session_views", "session_cart_adds", "session_searches",
    "session_purchases", "session_distinct_items", "session_cart_cents",
)  # fmt: skip
COUNTS = frozenset((*CUSTOMER_ACTIVITY.counts(), *ITEM_ACTIVITY.counts(), *SESSION_COUNTS))

# No hour or weekday: a batch scores everybody at one instant, where such a column is constant and would only look like drift.
SPANS = (
    Span("purchase_span_days", "first_purchase_at", "last_purchase_at"),
    Span("session_minutes", "session_started_at", "session_last_event_at", 60_000_000),
)
RATIOS = (
    Ratio("average_order_cents", "revenue_cents_total", "orders_total"),
    Ratio("cart_to_view", "cart_adds_total", "views_total"),
    Ratio("purchase_to_cart", "purchases_total", "cart_adds_total"),
    Ratio("purchase_to_view", "purchases_total", "views_total", plus=1, over=20),
    Ratio("events_share_7d", "events_7d", "events_30d"),
    Ratio("events_share_30d", "events_30d", "events_90d"),
    Ratio("revenue_share_30d", "revenue_cents_30d", "revenue_cents_90d"),
    Ratio("order_gap_days", "purchase_span_days", "orders_total", over=-1),  # mean time between orders
    Ratio("recency_to_gap", "last_purchase_age_days", "order_gap_days"),  # silence in units of the customer's own rhythm
    Ratio("session_cart_to_view", "session_cart_adds", "session_views"),
    Ratio("item_conversion", "item_purchases_30d", "item_views_30d", plus=1, over=20),
    Ratio("item_cart_rate", "item_cart_adds_30d", "item_views_30d", plus=1, over=20),
    Ratio("item_views_share_7d", "item_views_7d", "item_views_30d"),
)


def changelog(events: "Table", aggregates: Aggregates) -> "Table":
    """Change points: key, `event_timestamp` (the change) and the values from then on. One row per key and instant, any order.

    events: columns of the events table.
    """
    from pipelines import changepoints

    return changepoints.changelog(events, aggregates)


def values_at(events: "Table", probes: "Table", aggregates: Aggregates) -> "Table":
    """`probes` (key, `event_timestamp`, any others) with the values strictly before that instant; duplicates kept, any order.

    The same deltas as `changelog`: equal to its last change point before the probe; 0 and null where there is none.
    """
    from pipelines import changepoints

    return changepoints.values_at(events, probes, aggregates)


def derive(frame: pd.DataFrame, at: "pd.Series[pd.Timestamp] | datetime") -> pd.DataFrame:
    """Rows of stored values as seen at `at`: a new frame with the columns `derived_names` lists and the frame's index.

    at: one instant for all rows, or one for each in row order; UTC where naive. Raises ValueError where their number differs.
    """
    instants = pd.DatetimeIndex([at] * len(frame) if isinstance(at, datetime) else at)
    instants = instants if instants.tz is None else instants.tz_convert("UTC").tz_localize(None)
    columns = {str(name): frame[name].to_numpy() for name in frame.columns}
    micros = instants.to_numpy().astype("datetime64[us]").astype(np.int64)
    return pd.DataFrame(derive_columns(columns, micros), index=frame.index)


def derive_columns(columns: Mapping[str, np.ndarray], at: np.ndarray | int) -> dict[str, np.ndarray]:
    """The core of `derive`, for one row or many: arrays of length n by name, `at` in microseconds since 1970.

    Numbers come back as float64: counts 0 where missing, ages and ratios NaN where undefined. What is no number is passed on.
    """
    plan = _plan(tuple(columns), tuple(column.dtype.kind for column in columns.values()))
    # One matrix, one operation for all columns of a kind: a single row costs a few dozen array operations, not hundreds.
    n = next((len(column) for column in columns.values()), 0)
    given = np.array([columns[name] for name in plan.numbers], dtype=np.float64).reshape(len(plan.numbers), n)
    spans = (given[plan.span_ends] - given[plan.span_starts]) / plan.span_units
    counts = given[plan.counts]
    given[plan.counts] = np.where(np.isnan(counts), 0.0, counts)
    given[plan.instants] = (at - given[plan.instants]) / DAY_US
    values = np.concatenate([given, spans])
    for wave in plan.waves:
        below = values[wave.denominators] + wave.over
        values = np.concatenate([values, (values[wave.numerators] + wave.plus) / np.where(below > 0, below, np.nan)])
    return {name: columns[name] if row is None else values[row] for name, row in plan.rows.items()}


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

    numerators: list[int]
    denominators: list[int]
    plus: np.ndarray
    over: np.ndarray


@dataclass(frozen=True)
class _Plan:
    """Where everything stands in the matrix of `derive_columns`: the given numbers, then spans, then ratios wave by wave."""

    numbers: tuple[str, ...]
    counts: list[int]
    instants: list[int]
    span_starts: list[int]
    span_ends: list[int]
    span_units: np.ndarray
    waves: tuple[_Wave, ...]
    rows: dict[str, int | None]  # by name, in the order of `derived_names`; None: passed on as it is


@cache
def _plan(columns: tuple[str, ...], kinds: tuple[str, ...]) -> _Plan:
    numbers = tuple(n for n, kind in zip(columns, kinds, strict=True) if kind in "iuf" or n in COUNTS or n.endswith("_at"))
    at = {name: row for row, name in enumerate(numbers)}
    spans = [span for span in SPANS if span.start in at and span.end in at]
    rows = {_age(name) if name.endswith("_at") else name: row for name, row in at.items()}
    rows |= {span.name: len(numbers) + i for i, span in enumerate(spans)}
    waves, left = [], [ratio for ratio in RATIOS if ratio.name in derived_names(columns)]
    while left:
        ready = [ratio for ratio in left if ratio.numerator in rows and ratio.denominator in rows]
        waves.append(
            _Wave(
                numerators=[rows[ratio.numerator] for ratio in ready],
                denominators=[rows[ratio.denominator] for ratio in ready],
                plus=np.array([ratio.plus for ratio in ready]).reshape(-1, 1),
                over=np.array([ratio.over for ratio in ready]).reshape(-1, 1),
            )
        )
        rows |= {ratio.name: len(rows) + i for i, ratio in enumerate(ready)}
        left = [ratio for ratio in left if ratio not in ready]
    return _Plan(
        numbers=numbers,
        counts=[row for name, row in at.items() if name in COUNTS],
        instants=[row for name, row in at.items() if name.endswith("_at")],
        span_starts=[at[span.start] for span in spans],
        span_ends=[at[span.end] for span in spans],
        span_units=np.array([span.unit_us for span in spans], dtype=np.float64).reshape(-1, 1),
        waves=tuple(waves),
        rows={name: rows.get(name) for name in derived_names(columns)},
    )


def _age(name: str) -> str:
    return f"{name.removesuffix('_at')}_age_days"
