"""Every stored table in path order: name, key, time columns, schema. Declares; reads and writes nothing."""

from dataclasses import dataclass

import pyarrow as pa

TIME = pa.timestamp("us", tz="UTC")  # DuckDB cannot materialise nanosecond Parquet
TEXT, WHOLE, REAL, FLAG, BYTES = pa.string(), pa.int64(), pa.float64(), pa.bool_(), pa.binary()

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
        anonymous_id=TEXT,  # this and user_id: keyed pseudonyms without their kind (see vault); an address as user id: "email:..."
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
        is_near_duplicate=FLAG,  # the same customer, type and item a moment before
        is_unmatched=FLAG,  # a return of which no purchase is known
        consent=TEXT,  # JSON: the purposes that its person allowed in it; no late word from before overrules them
    ),
    by_day=True,
)
MESSAGES = Table(
    "messages",
    ("source", "message_high", "message_low"),
    None,
    "created_timestamp",
    _schema(
        source=TEXT,
        message_high=WHOLE,  # 128 bits of the message id's hash: duplicates are known for ever, whatever became of the event
        message_low=WHOLE,
        outcome=TEXT,  # applied, consent_dropped or erased
        created_timestamp=TIME,  # first received
    ),
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
        subject=TEXT,  # the pseudonym whose key seals `raw`; vault.NOBODY where the row names no person
        raw=BYTES,  # the row as received, sealed
        message_id=TEXT,  # null where none could be read
        origin=TEXT,  # JSON: how the row was read, for `replay`: format, columns, mapping, unit of its times, time of receipt
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
        files=TEXT,  # the file's name; `log`, `quarantine` for what came from there
        sha256=TEXT,  # of the file's content
        plan=TEXT,  # hash of the mapping and the legal basis that it was read with
        positions=TEXT,  # of the log, as ranges: what was drained; null for a file
        last_event=TIME,  # of the events table, then
        # rows as read; all but `read` and `duplicate` count those that were never received before
        **_whole("read", "accepted", "duplicate", "quarantined", "consent_dropped", "erased", "stored"),
    ),
)
IDENTITIES = Table(
    "identities",
    ("identifier",),
    "event_timestamp",
    "created_timestamp",
    _schema(identifier=TEXT, customer_id=TEXT, **_TIMES),  # identifier: a pseudonym, "user_id:..." and so on
)
IDENTITY_LINKS = Table(
    "identity_links",
    ("anonymous_id", "user_id", "email", "phone", "event_timestamp"),
    "event_timestamp",
    "created_timestamp",
    _schema(anonymous_id=TEXT, user_id=TEXT, email=TEXT, phone=TEXT, **_TIMES),  # seen together, any of them null; pseudonyms
)
IDENTITY_EDGES = Table(
    "identity_edges",
    ("left", "right", "kind"),
    None,
    "created_timestamp",
    _schema(
        link_id=TEXT,  # what `rapport identity unmerge` takes
        left=TEXT,  # identifiers, left < right
        right=TEXT,
        kind=TEXT,  # probabilistic or manual; deterministic edges are the rows of identity_links
        state=TEXT,  # link, review, reject or cut
        weight=REAL,  # probability that the two are one person
        evidence=TEXT,  # JSON: field -> agreement level and its weight in bits; never a value
        decided_by=TEXT,
        created_timestamp=TIME,
    ),
)
CONSENTS = Table(
    "consents",
    ("identifier", "purpose", "basis", "event_timestamp"),
    "event_timestamp",
    "created_timestamp",
    _schema(
        customer_id=TEXT,
        identifier=TEXT,  # under which it was said: a statement follows its identifier when people are merged or split
        purpose=TEXT,
        is_allowed=FLAG,
        basis=TEXT,
        source=TEXT,
        policy_version=TEXT,
        evidence=TEXT,  # the message id that carried it
        **_TIMES,
    ),
)
TRAITS = Table(
    "traits",
    ("identifier", "trait", "value", "source", "event_timestamp"),
    "event_timestamp",
    "created_timestamp",
    # every word on a trait that is no direct identifier, the losing ones too; direct ones are in the vault
    _schema(identifier=TEXT, trait=TEXT, value=TEXT, source=TEXT, **_TIMES),
)
ITEMS = Table(
    "items",
    ("item_id",),
    "event_timestamp",
    "created_timestamp",
    _schema(item_id=TEXT, category=TEXT, price_cents=WHOLE, **_TIMES),  # event_timestamp: available from
)
ALERTS = Table(
    "alerts",
    ("alert_id",),
    "event_timestamp",
    "created_timestamp",
    _schema(
        alert_id=TEXT,
        kind=TEXT,  # volume_low, volume_high, nulls
        source=TEXT,
        column=TEXT,  # of nulls
        expected=REAL,
        found=REAL,
        z=REAL,
        **_TIMES,  # event: the hour it is about
    ),
)
CUSTOMER_PROFILE = Table(
    "customer_profile",
    ("customer_id",),
    "event_timestamp",
    None,
    _schema(
        customer_id=TEXT,
        event_timestamp=TIME,
        **dict.fromkeys(("age_band", "gender", "region"), TEXT),
        **dict.fromkeys(("is_age_band_imputed", "is_gender_imputed", "is_region_imputed"), FLAG),
    ),
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
    EVENTS, MESSAGES, QUARANTINE, INGESTS, IDENTITIES, IDENTITY_LINKS, IDENTITY_EDGES, CONSENTS, TRAITS, ITEMS,
    ALERTS, CUSTOMER_PROFILE, CUSTOMER_CONSENT, CUSTOMER_ACTIVITY, CUSTOMER_SESSION, ITEM_ACTIVITY,
    LABELS_CHURN, LABELS_INTENT, INTERACTIONS,
    TRAINING_CHURN, TRAINING_INTENT, SCORED_CHURN, SCORED_INTENT, CUSTOMER_SCORES, RECOMMENDATIONS,
)  # fmt: skip
