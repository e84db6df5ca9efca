"""Every stored table in path order: name, key, time columns, schema. Declares; reads and writes nothing."""

from dataclasses import dataclass

import pyarrow as pa

TIME = pa.timestamp("us", tz="UTC")  # DuckDB cannot materialise nanosecond Parquet
TEXT, WHOLE, REAL, FLAG = pa.string(), pa.int64(), pa.float64(), pa.bool_()

CUSTOMER_WINDOWS = ("1h", "24h", "7d", "30d", "90d")
SESSION_WINDOWS = ("7d", "30d", "90d")
ITEM_WINDOWS = ("24h", "7d", "30d")


@dataclass(frozen=True)
class Table:
    """A declared table. `schema` is None where the columns are those of a feature service."""

    name: str
    key: tuple[str, ...]
    event_time: str | None
    created_time: str | None
    schema: pa.Schema | None
    by_day: bool = False  # partitioned by day of `event_time`: for tables that grow


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind) for name, kind in columns.items()])


def _whole(*names: str) -> dict[str, pa.DataType]:
    return dict.fromkeys(names, WHOLE)


_TIMES = {"event_timestamp": TIME, "created_timestamp": TIME}

EVENTS = Table(
    "events",
    ("source", "event_id"),
    "event_timestamp",
    "created_timestamp",
    _schema(
        source=TEXT,
        event_id=TEXT,  # Segment's messageId: the idempotency key within a source
        type=TEXT,  # a name of events.TYPES
        name=TEXT,  # the event's name as received
        **_TIMES,  # created: when we knew both the event and whose it is
        customer_id=TEXT,
        anonymous_id=TEXT,
        user_id=TEXT,
        item_id=TEXT,
        order_id=TEXT,
        session_id=TEXT,
        decision_id=TEXT,
        query=TEXT,
        quantity=WHOLE,
        price_cents=WHOLE,  # of one unit
        revenue_cents=WHOLE,  # quantity x price of a purchase, negative for a return, else 0
        is_outlier=FLAG,
    ),
    by_day=True,
)
QUARANTINE = Table(
    "quarantine",
    ("quarantine_id",),
    "created_timestamp",
    "created_timestamp",
    _schema(
        quarantine_id=TEXT,
        source=TEXT,
        file=TEXT,
        row=WHOLE,  # 1-based line or row of the file
        reason=TEXT,  # a code of events.REASONS
        detail=TEXT,
        raw=TEXT,  # the row as received
        created_timestamp=TIME,
    ),
    by_day=True,
)
INGESTS = Table(
    "ingests",
    ("files", "last_event"),
    "last_event",
    None,
    _schema(
        source=TEXT,
        files=TEXT,  # names, in the order they were read
        sha256=TEXT,  # of their content
        last_event=TIME,  # of the events table, then
        **_whole("read", "accepted", "duplicate", "quarantined", "consent_dropped", "stored"),  # rows as read
    ),
)
IDENTITIES = Table(
    "identities",
    ("identifier",),
    "event_timestamp",
    "created_timestamp",
    _schema(identifier=TEXT, customer_id=TEXT, **_TIMES),  # identifier: "anonymous_id:...", "user_id:...", "email:..."
)
IDENTITY_LINKS = Table(
    "identity_links",
    ("anonymous_id", "user_id", "email", "event_timestamp"),
    "event_timestamp",
    "created_timestamp",
    _schema(anonymous_id=TEXT, user_id=TEXT, email=TEXT, **_TIMES),  # identifiers seen together, any of them null; e-mails as hashes
)
CONSENTS = Table(
    "consents",
    ("customer_id", "purpose", "event_timestamp"),
    "event_timestamp",
    "created_timestamp",
    _schema(customer_id=TEXT, purpose=TEXT, is_allowed=FLAG, basis=TEXT, **_TIMES),
)
ITEMS = Table(
    "items",
    ("item_id",),
    "event_timestamp",
    "created_timestamp",
    _schema(item_id=TEXT, category=TEXT, price_cents=WHOLE, **_TIMES),  # event_timestamp: available from
)
CUSTOMER_PROFILE = Table(
    "customer_profile",
    ("customer_id",),
    "event_timestamp",
    None,
    _schema(customer_id=TEXT, event_timestamp=TIME, age_band=TEXT, gender=TEXT, region=TEXT),
)
CUSTOMER_CONSENT = Table(
    "customer_consent",
    ("customer_id",),
    "event_timestamp",
    None,
    _schema(customer_id=TEXT, event_timestamp=TIME, is_personalization_allowed=FLAG),
)
CUSTOMER_ACTIVITY = Table(
    "customer_activity",
    ("customer_id",),
    "event_timestamp",
    None,
    _schema(
        customer_id=TEXT,
        event_timestamp=TIME,
        **_whole(*(f"{what}_{w}" for what in ("events", "views", "cart_adds", "purchases", "revenue_cents") for w in CUSTOMER_WINDOWS)),
        **_whole(*(f"sessions_{w}" for w in SESSION_WINDOWS)),
        **_whole("distinct_items_30d", "distinct_items_total"),
        **_whole("events_total", "views_total", "cart_adds_total", "purchases_total", "returns_total"),
        **_whole("orders_total", "sessions_total", "revenue_cents_total"),
        **_whole("first_event_at", "last_event_at", "first_purchase_at", "last_purchase_at"),  # microseconds since 1970, UTC
    ),
)
CUSTOMER_SESSION = Table(
    "customer_session",
    ("customer_id",),
    "event_timestamp",
    None,
    _schema(
        customer_id=TEXT,
        event_timestamp=TIME,
        **_whole("session_events", "session_views", "session_cart_adds", "session_searches", "session_purchases"),
        **_whole("session_distinct_items", "session_cart_cents", "session_started_at", "session_last_event_at"),
    ),
)
ITEM_ACTIVITY = Table(
    "item_activity",
    ("item_id",),
    "event_timestamp",
    None,
    _schema(
        item_id=TEXT,
        event_timestamp=TIME,
        **_whole(*(f"item_{what}_{w}" for what in ("views", "cart_adds", "purchases", "revenue_cents") for w in ITEM_WINDOWS)),
        **_whole("item_views_total", "item_cart_adds_total", "item_purchases_total"),
        **_whole("item_price_cents", "item_first_seen_at"),
    ),
)
LABELS_CHURN = Table(
    "labels_churn",
    ("customer_id", "event_timestamp"),
    "event_timestamp",
    None,
    _schema(customer_id=TEXT, event_timestamp=TIME, label=WHOLE, split=TEXT, matured_timestamp=TIME),
)
LABELS_INTENT = Table(
    "labels_intent",
    ("customer_id", "event_timestamp"),
    "event_timestamp",
    None,
    _schema(
        customer_id=TEXT,
        event_timestamp=TIME,
        label=WHOLE,
        split=TEXT,
        matured_timestamp=TIME,
        session_id=TEXT,
        session_events=WHOLE,
    ),
)
INTERACTIONS = Table(
    "interactions",
    ("customer_id", "item_id", "event_timestamp"),
    "event_timestamp",
    "created_timestamp",
    _schema(customer_id=TEXT, item_id=TEXT, type=TEXT, weight=REAL, **_TIMES),
)
# Feature service columns + label, split, probability: the reference of drift and the evidence of bias.
TRAINING_CHURN = Table("training_churn", ("customer_id", "event_timestamp"), "event_timestamp", None, None)
TRAINING_INTENT = Table("training_intent", ("customer_id", "event_timestamp"), "event_timestamp", None, None)
# The same columns without labels, for the population as of now.
SCORED_CHURN = Table("scored_churn", ("customer_id", "event_timestamp"), "event_timestamp", None, None)
SCORED_INTENT = Table("scored_intent", ("customer_id", "event_timestamp"), "event_timestamp", None, None)
CUSTOMER_SCORES = Table(
    "customer_scores",
    ("customer_id",),
    "event_timestamp",
    None,
    _schema(
        customer_id=TEXT,
        event_timestamp=TIME,
        churn_probability=REAL,
        churn_version=TEXT,
        intent_probability=REAL,
        intent_version=TEXT,
    ),
)
RECOMMENDATIONS = Table(
    "recommendations",
    ("customer_id", "rank"),
    "event_timestamp",
    None,
    _schema(customer_id=TEXT, event_timestamp=TIME, rank=WHOLE, item_id=TEXT, score=REAL, version=TEXT),
)

TABLES = (
    EVENTS, QUARANTINE, INGESTS, IDENTITIES, IDENTITY_LINKS, CONSENTS, ITEMS,
    CUSTOMER_PROFILE, CUSTOMER_CONSENT, CUSTOMER_ACTIVITY, CUSTOMER_SESSION, ITEM_ACTIVITY,
    LABELS_CHURN, LABELS_INTENT, INTERACTIONS,
    TRAINING_CHURN, TRAINING_INTENT, SCORED_CHURN, SCORED_INTENT, CUSTOMER_SCORES, RECOMMENDATIONS,
)  # fmt: skip
