"""Entities, sources, feature views and feature services: what the feature store holds and who asks for what.

Feast objects only. Paths are relative to the home folder. Request-time arithmetic is not here: an on-demand view is stored as a
pickled function, so it lives in pipelines/windows.py, where training and serving import the same code.
"""

from datetime import timedelta

from feast import Entity, FeatureService, FeatureView, Field, FileSource, ValueType
from feast.data_format import ParquetFormat
from feast.types import Bool, FeastType, Float64, Int64, String

# No expiry. The activity tables hold change points of a step function: a row is right until the next one, however old it is,
# and what decays by itself (a window that empties) has a change point of its own. An age limit would turn right values to null.
FOREVER = timedelta(0)

# -- entities ----------------------------------------------------------------------------------------------------------

customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING, description="A resolved person.")
item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.STRING, description="A product of the shop.")
identifier = Entity(
    name="identifier",
    join_keys=["identifier"],
    value_type=ValueType.STRING,
    description='An identifier as received, "<kind>:<value>": anonymous_id, user_id or email.',
)

# -- sources -----------------------------------------------------------------------------------------------------------


def _source(table: str, *, created: str = "") -> FileSource:
    return FileSource(
        name=table,
        path=f"tables/{table}",
        file_format=ParquetFormat(),
        timestamp_field="event_timestamp",
        created_timestamp_column=created,
    )


identities_source = _source("identities", created="created_timestamp")
customer_profile_source = _source("customer_profile")
customer_consent_source = _source("customer_consent")
customer_activity_source = _source("customer_activity")
customer_session_source = _source("customer_session")
item_activity_source = _source("item_activity")
customer_scores_source = _source("customer_scores")

# -- views -------------------------------------------------------------------------------------------------------------


def _view(source: FileSource, entity: Entity, fields: dict[str, FeastType], description: str, *, name: str = "") -> FeatureView:
    key = Field(name=entity.join_key, dtype=String)
    return FeatureView(
        name=name or source.name,
        entities=[entity],
        schema=[key, *(Field(name=field, dtype=kind) for field, kind in fields.items())],
        source=source,
        ttl=FOREVER,
        description=description,
    )


def _whole(*names: str) -> dict[str, FeastType]:
    return dict.fromkeys(names, Int64)


_WINDOWS = ("1h", "24h", "7d", "30d", "90d")

identifier_customer = _view(
    identities_source,
    identifier,
    {"customer_id": String},
    "Whose identifier this is.",
    name="identifier_customer",
)
customer_profile = _view(
    customer_profile_source,
    customer,
    {
        **{"age_band": String, "gender": String, "region": String},
        **{"is_age_band_imputed": Bool, "is_gender_imputed": Bool, "is_region_imputed": Bool},
    },
    "What customers said about themselves, and which of it is a guess.",
)
customer_consent = _view(
    customer_consent_source,
    customer,
    {"is_personalization_allowed": Bool},
    "Whether personal data may be used for personal answers.",
)
customer_activity = _view(
    customer_activity_source,
    customer,
    {
        **_whole(*(f"{what}_{w}" for what in ("events", "views", "cart_adds", "purchases", "revenue_cents") for w in _WINDOWS)),
        **_whole(*(f"sessions_{w}" for w in ("7d", "30d", "90d"))),
        **_whole("distinct_items_30d", "distinct_items_total"),
        **_whole("events_total", "views_total", "cart_adds_total", "purchases_total", "returns_total"),
        **_whole("orders_total", "sessions_total", "revenue_cents_total"),
        **_whole("first_event_at", "last_event_at", "first_purchase_at", "last_purchase_at"),
    },
    "Counts and cents over moving windows and over all time; instants in microseconds since 1970.",
)
customer_session = _view(
    customer_session_source,
    customer,
    {
        **_whole("session_events", "session_views", "session_cart_adds", "session_searches", "session_purchases"),
        **_whole("session_distinct_items", "session_cart_cents", "session_started_at", "session_last_event_at"),
    },
    "What the running session holds; zeros once it has fallen silent.",
)
item_activity = _view(
    item_activity_source,
    item,
    {
        **_whole(*(f"item_{what}_{w}" for what in ("views", "cart_adds", "purchases", "revenue_cents") for w in ("24h", "7d", "30d"))),
        **_whole("item_views_total", "item_cart_adds_total", "item_purchases_total"),
        **_whole("item_price_cents", "item_first_seen_at"),
    },
    "Demand for an item over moving windows, its last price seen and when it was first seen.",
)
customer_scores = _view(
    customer_scores_source,
    customer,
    {"churn_probability": Float64, "churn_version": String, "intent_probability": Float64, "intent_version": String},
    "The champions' latest scores.",
)

# -- services ----------------------------------------------------------------------------------------------------------

# Age band and gender are protected: monitoring forms groups by them, no model is fed with them.
churn_v1 = FeatureService(name="churn_v1", features=[customer_profile[["region"]], customer_activity])
intent_v1 = FeatureService(name="intent_v1", features=[customer_profile[["region"]], customer_activity, customer_session])
recommender_v1 = FeatureService(name="recommender_v1", features=[item_activity])
serving_v1 = FeatureService(name="serving_v1", features=[customer_consent, customer_scores])
