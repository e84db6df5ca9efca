"""Every feature that is counted from events, declared once: windows, the aggregates of each entity, and arithmetic on their values.

Plain data, imports nothing: definitions.py makes the fields of Feast's views of it, pipelines the columns of the tables, their values
in batch and online, and the frames of training and serving. A new feature is a new line here.
"""

from dataclasses import dataclass
from datetime import timedelta

DAY_US = 86_400_000_000
MINUTE_US = 60_000_000
LARGEST = 10**12  # what one event adds is held within this, so that no number of absurd prices carries a sum beyond 64 bits
DISTINCT_LIMIT = 10_000  # distinct counts are exact up to here, and this beyond: so much a state has to remember at most
# What the shop did or administered is not behaviour: an exposure counted as activity would feed our own actions back.
NOT_BEHAVIOUR = ("exposure", "identify", "consent")


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
    """The number of events of `types` (all where none is named), or the sum of their column `value`; `carrying`: only where not null."""

    name: str
    types: tuple[str, ...] = ()
    value: str | None = None
    carrying: str | None = None
    windows: tuple[str, ...] = ()
    has_total: bool = False


@dataclass(frozen=True)
class Distinct:
    """The number of different values of `column` among the events of `types`: exact up to DISTINCT_LIMIT, and no more than that."""

    name: str
    column: str
    types: tuple[str, ...] = ()
    windows: tuple[str, ...] = ()
    has_total: bool = False


@dataclass(frozen=True)
class Extreme:
    """The largest, or smallest, `column` among the events of `types`, held within LARGEST; null where none of them carries one."""

    name: str
    column: str
    types: tuple[str, ...] = ()
    is_min: bool = False
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
    """`column`, held within LARGEST, on the newest event of `types` that carries one, or on the oldest: of all time, or of one window.

    Of two at one instant the larger one, of two oldest the smaller; null where there is none.
    """

    name: str
    column: str
    types: tuple[str, ...] = ()
    is_first: bool = False
    window: str | None = None


Aggregate = Sum | Distinct | Extreme | Instant | Latest


@dataclass(frozen=True)
class Aggregates:
    """All aggregates of one entity. `key`: its join keys. `prefix` keeps their names apart from those of other entities."""

    key: tuple[str, ...]
    sums: tuple[Sum, ...]
    distincts: tuple[Distinct, ...] = ()
    extremes: tuple[Extreme, ...] = ()
    instants: tuple[Instant, ...] = ()
    latests: tuple[Latest, ...] = ()
    prefix: str = ""

    def column(self, aggregate: Aggregate, window: str | None = None) -> str:
        """The name of one value column; `window` is a window's name or "total", where the aggregate has any."""
        suffix = "_at" if isinstance(aggregate, Instant) else f"_{window}" if window else ""
        return f"{self.prefix}{aggregate.name}{suffix}"

    def counts(self) -> list[str]:
        """Columns that are running sums: 0, never null, where nothing happened."""
        counted: tuple[Sum | Distinct, ...] = (*self.sums, *self.distincts)
        return [self.column(a, w) for a in counted for w in spans_of(a)]

    def columns(self) -> list[str]:
        """All value columns."""
        extremes = [self.column(a, w) for a in self.extremes for w in spans_of(a)]
        return [*self.counts(), *extremes, *map(self.column, self.instants), *(self.column(a, a.window) for a in self.latests)]


def spans_of(aggregate: Sum | Distinct | Extreme) -> tuple[str, ...]:
    """The names of its windows, and "total" where it has one."""
    return (*aggregate.windows, *(("total",) if aggregate.has_total else ()))


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


# -- windows -----------------------------------------------------------------------------------------------------------

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
_CUSTOMER = ("1h", "24h", "7d", "30d", "90d")
_ITEM = ("24h", "7d", "30d")

# -- entities ----------------------------------------------------------------------------------------------------------

CUSTOMER_ACTIVITY = Aggregates(
    key=("customer_id",),
    sums=(
        Sum("events", windows=_CUSTOMER, has_total=True),
        Sum("views", types=("view",), windows=_CUSTOMER, has_total=True),
        Sum("cart_adds", types=("cart_add",), windows=_CUSTOMER, has_total=True),
        Sum("purchases", types=("purchase",), windows=_CUSTOMER, has_total=True),
        Sum("revenue_cents", value="revenue_cents", windows=_CUSTOMER, has_total=True),
        Sum("returns", types=("return",), has_total=True),
        Sum("priced_views", types=("view",), carrying="price_cents", windows=("30d",)),
        Sum("viewed_cents", types=("view",), value="price_cents", windows=("30d",)),
    ),
    distincts=(
        Distinct("sessions", "session_id", windows=("7d", "30d", "90d"), has_total=True),
        Distinct("distinct_items", "item_id", windows=("30d",), has_total=True),
        Distinct("orders", "order_id", types=("purchase",), windows=("90d",), has_total=True),
    ),
    extremes=(
        Extreme("max_viewed_cents", "price_cents", types=("view",), windows=("30d",)),
        Extreme("min_viewed_cents", "price_cents", types=("view",), is_min=True, windows=("30d",)),
        Extreme("max_bought_cents", "price_cents", types=("purchase",), has_total=True),
    ),
    instants=(
        Instant("first_event", is_first=True),
        Instant("last_event"),
        Instant("first_purchase", types=("purchase",), is_first=True),
        Instant("last_purchase", types=("purchase",)),
    ),
    latests=(
        Latest("first_bought_cents", "price_cents", types=("purchase",), is_first=True),
        Latest("last_viewed_cents", "price_cents", types=("view",), window="7d"),
    ),
)
ITEM_ACTIVITY = Aggregates(
    key=("item_id",),
    prefix="item_",
    sums=(
        Sum("views", types=("view",), windows=_ITEM, has_total=True),
        Sum("cart_adds", types=("cart_add",), windows=_ITEM, has_total=True),
        Sum("purchases", types=("purchase",), windows=_ITEM, has_total=True),
        Sum("revenue_cents", value="revenue_cents", windows=_ITEM),
    ),
    extremes=(Extreme("max_price_cents", "price_cents", windows=("30d",)),),
    instants=(Instant("first_seen", is_first=True),),
    latests=(Latest("price_cents", "price_cents"),),
)
CUSTOMER_ITEM = Aggregates(
    key=("customer_id", "item_id"),
    prefix="customer_item_",
    sums=(
        Sum("views", types=("view",), windows=("30d",), has_total=True),
        Sum("cart_adds", types=("cart_add",), windows=("30d",), has_total=True),
        Sum("purchases", types=("purchase",), windows=("30d",), has_total=True),
    ),
    instants=(Instant("last_seen", types=("view", "cart_add", "purchase")), Instant("last_bought", types=("purchase",))),
)
CUSTOMER_CATEGORY = Aggregates(
    key=("customer_id", "category"),
    prefix="customer_category_",
    sums=CUSTOMER_ITEM.sums,
    instants=CUSTOMER_ITEM.instants,
)
SESSION_COUNTS = (
    "session_events", "session_views", "session_cart_adds", "session_searches",
    "session_purchases", "session_distinct_items", "session_cart_cents",
)  # fmt: skip
SESSION_INSTANTS = ("session_started_at", "session_last_event_at")

# -- what is known at the moment of a request alone, and arithmetic ----------------------------------------------------

# Given with a row of labels, or with a request. A name of its own: no stored feature may take its place in silence.
REQUEST = (
    "request_price_cents",  # of the item that is looked at
    "request_cart_cents",  # what the cart holds
)

# No hour or weekday: a batch scores everybody at one instant, where such a column is constant and would only look like drift.
SPANS = (
    Span("activity_span_minutes", "first_event_at", "last_event_at", MINUTE_US),
    Span("purchase_span_days", "first_purchase_at", "last_purchase_at"),
    Span("session_minutes", "session_started_at", "session_last_event_at", MINUTE_US),
)
RATIOS = (
    Ratio("average_order_cents", "revenue_cents_total", "orders_total"),
    Ratio("average_order_cents_90d", "revenue_cents_90d", "orders_90d"),
    Ratio("average_viewed_cents_30d", "viewed_cents_30d", "priced_views_30d"),
    Ratio("cart_to_view", "cart_adds_total", "views_total"),
    Ratio("purchase_to_cart", "purchases_total", "cart_adds_total"),
    Ratio("purchase_to_view", "purchases_total", "views_total", plus=1, over=20),
    Ratio("events_share_7d", "events_7d", "events_30d"),
    Ratio("events_share_30d", "events_30d", "events_90d"),
    Ratio("revenue_share_30d", "revenue_cents_30d", "revenue_cents_90d"),
    Ratio("order_gap_days", "purchase_span_days", "orders_total", over=-1),  # mean time between orders
    Ratio("session_gap_minutes", "activity_span_minutes", "sessions_total", over=-1),  # and between sessions
    Ratio("recency_to_gap", "last_purchase_age_days", "order_gap_days"),  # silence in units of the customer's own rhythm
    # Visits that did not come although the customer's rhythm foretold them, and the orders that it foretells: what a model of lifetimes
    # forms. Two weeks are added to the time since the first visit, so that newcomers do not look like the most faithful.
    Ratio("visit_gap_days", "first_event_age_days", "sessions_total", plus=14),
    Ratio("silence_to_visit_gap", "last_event_age_days", "visit_gap_days"),
    Ratio("orders_per_session", "orders_total", "sessions_total", plus=1, over=6),
    Ratio("order_pace", "orders_per_session", "visit_gap_days"),
    Ratio("order_wait_days", "first_event_age_days", "orders_total", plus=14),
    Ratio("silence_to_order_wait", "last_purchase_age_days", "order_wait_days"),
    Ratio("session_cart_to_view", "session_cart_adds", "session_views"),
    Ratio("item_conversion", "item_purchases_30d", "item_views_30d", plus=1, over=20),
    Ratio("item_cart_rate", "item_cart_adds_30d", "item_views_30d", plus=1, over=20),
    Ratio("item_views_share_7d", "item_views_7d", "item_views_30d"),
    Ratio("item_price_to_max", "item_price_cents", "item_max_price_cents_30d"),  # below 1: cheaper than it was
    Ratio("item_price_to_viewed", "item_price_cents", "average_viewed_cents_30d"),  # in a service of both, for one pair
    Ratio("customer_item_conversion", "customer_item_purchases_total", "customer_item_views_total", plus=1, over=20),
    Ratio("customer_category_share", "customer_category_views_30d", "views_30d"),
    Ratio("request_price_to_viewed", "request_price_cents", "average_viewed_cents_30d"),
    Ratio("request_price_to_bought", "request_price_cents", "max_bought_cents_total"),
    Ratio("request_cart_to_order", "request_cart_cents", "average_order_cents"),
)
