"""Every stored table in path order: name, key, time columns, schema. Declares; reads and writes nothing."""

from dataclasses import dataclass

import pyarrow as pa

from feature_repo import aggregates
from feature_repo.aggregates import Aggregates

TIME = pa.timestamp("us", tz="UTC")  # DuckDB cannot materialise nanosecond Parquet
TEXT, WHOLE, REAL, FLAG, BYTES = pa.string(), pa.int64(), pa.float64(), pa.bool_(), pa.binary()
REALS = pa.list_(REAL)


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


def _features(name: str, declared: Aggregates) -> Table:
    """Change points of the aggregates of an entity."""
    keys = dict.fromkeys(declared.key, TEXT)
    return Table(name, declared.key, "event_timestamp", None, _schema(**keys, event_timestamp=TIME, **_whole(*declared.columns())))


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
        received_timestamp=TIME,  # when we received it; null where nobody noted it
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
WAITING = Table(
    "waiting",
    ("position",),
    None,
    None,
    _schema(
        position=WHOLE,  # of the log: an event without a word of its own, which a word of its person may still keep out or let in
        source=TEXT,
        message_high=WHOLE,  # as in messages
        message_low=WHOLE,
        received_timestamp=TIME,
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
    ("identifier", "purpose", "basis", "source", "event_timestamp"),
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
SPEAKING_SOURCES = Table(
    "speaking_sources",
    ("source",),
    "event_timestamp",
    None,
    # of the first event of a source that came with a word on its use: a basis that the settings declare covers what was before it
    _schema(source=TEXT, event_timestamp=TIME),
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
    _schema(
        item_id=TEXT, category=TEXT, price_cents=WHOLE, in_stock=FLAG, **_TIMES
    ),  # event_timestamp: available from; in_stock: as last told
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

CUSTOMER_ACTIVITY = _features("customer_activity", aggregates.CUSTOMER_ACTIVITY)
CUSTOMER_SESSION = Table(
    "customer_session",
    ("customer_id",),
    "event_timestamp",
    None,
    _schema(
        customer_id=TEXT,
        event_timestamp=TIME,
        **_whole(*aggregates.SESSION_COUNTS, *aggregates.SESSION_INSTANTS),
    ),
)
ITEM_ACTIVITY = _features("item_activity", aggregates.ITEM_ACTIVITY)
CUSTOMER_ITEM = _features("customer_item", aggregates.CUSTOMER_ITEM)
CUSTOMER_CATEGORY = _features("customer_category", aggregates.CUSTOMER_CATEGORY)
FEATURE_TABLES = (CUSTOMER_ACTIVITY, CUSTOMER_SESSION, ITEM_ACTIVITY, CUSTOMER_ITEM, CUSTOMER_CATEGORY)
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
# Both for the tasks that are no part of the loop: `model` says whose row it is, and a column that is no feature of its task is null.
TRAINING_TASKS = Table("training_tasks", ("customer_id", "event_timestamp", "model"), "event_timestamp", None, None)
SCORED_TASKS = Table("scored_tasks", ("customer_id", "event_timestamp", "model"), "event_timestamp", None, None)
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
CUSTOMER_SEGMENTS = Table(
    "customer_segments",
    ("customer_id",),
    "event_timestamp",
    None,
    _schema(
        customer_id=TEXT,
        event_timestamp=TIME,
        rfm_tier=TEXT,  # high, middle, low or never bought
        lifecycle=TEXT,  # new, frequent, sporadic or dormant
        segment=TEXT,  # null where customers do not fall into groups, or this one into none
        version=TEXT,
    ),
)
TASK_SCORES = Table(  # of the tasks that are no part of the loop: a file of models/ declared them
    "task_scores",
    ("customer_id", "model"),
    "event_timestamp",
    None,
    _schema(customer_id=TEXT, event_timestamp=TIME, model=TEXT, version=TEXT, probability=REAL),
)
NEXT_ORDERS = Table(  # where training.when_days asks for it: of who may churn, when the next order is to be expected
    "next_orders",
    ("customer_id",),
    "event_timestamp",
    None,
    _schema(
        customer_id=TEXT,
        event_timestamp=TIME,
        period_days=REAL,
        silence=REALS,  # the probability of no order by the end of each period; never rises
        expected_days=REAL,  # the mean wait, one beyond the last period counted as its end
        median_days=REAL,  # when the silence is as likely over as not; null beyond the last period
        version=TEXT,
    ),
)
CUSTOMER_VALUES = Table(  # where training.value_days asks for it: of who ever ordered, as far ahead as that
    "customer_values",
    ("customer_id",),
    "event_timestamp",
    None,
    _schema(
        customer_id=TEXT,
        event_timestamp=TIME,
        horizon_days=REAL,
        expected_orders=REAL,
        order_value_cents=REAL,  # expected of one order
        value_cents=REAL,  # of all of them, later ones discounted
        version=TEXT,
    ),
)
RECOMMENDATIONS = Table(
    "recommendations",
    ("customer_id", "rank"),
    "event_timestamp",
    None,
    _schema(customer_id=TEXT, event_timestamp=TIME, rank=WHOLE, item_id=TEXT, score=REAL, version=TEXT),
)
ACTIVATIONS = Table(
    "activations",
    ("customer_id", "event_timestamp", "destination"),
    "event_timestamp",
    None,
    _schema(
        customer_id=TEXT,
        event_timestamp=TIME,  # the instant as of which they granted it
        audience=TEXT,
        purpose=TEXT,
        identify=TEXT,  # under which kind of identifier they stand in the file
        destination=TEXT,  # the file's name
    ),
)

TABLES = (
    EVENTS, MESSAGES, QUARANTINE, INGESTS, WAITING, IDENTITIES, IDENTITY_LINKS, IDENTITY_EDGES, CONSENTS, SPEAKING_SOURCES, TRAITS, ITEMS,
    ALERTS, CUSTOMER_PROFILE, CUSTOMER_CONSENT, *FEATURE_TABLES,
    LABELS_CHURN, LABELS_INTENT, INTERACTIONS,
    TRAINING_CHURN, TRAINING_INTENT, TRAINING_TASKS, SCORED_CHURN, SCORED_INTENT, SCORED_TASKS,
    CUSTOMER_SCORES, CUSTOMER_SEGMENTS, TASK_SCORES, NEXT_ORDERS, CUSTOMER_VALUES, RECOMMENDATIONS, ACTIVATIONS,
)  # fmt: skip

# The rows that a model learned from, and those that it scored last: tables of its own, else its part (column `model`) of shared ones.
OWN_ROWS = {"churn": (TRAINING_CHURN, SCORED_CHURN), "intent": (TRAINING_INTENT, SCORED_INTENT)}
SHARED_ROWS = (TRAINING_TASKS, SCORED_TASKS)
