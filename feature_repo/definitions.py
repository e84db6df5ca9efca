"""Entities, sources, feature views and feature services: what the feature store holds and who asks for what.

Feast objects only. Paths are relative to the home folder. Request-time arithmetic is not here: an on-demand view is stored as a
pickled function, so it lives in pipelines/windows.py, where training and serving import the same code. What is counted from events
is declared in aggregates.py.
"""

from datetime import timedelta

from feast import Entity, FeatureService, FeatureView, Field, FileSource, ValueType
from feast.data_format import ParquetFormat
from feast.types import Bool, FeastType, Float64, Int64, String

from feature_repo.aggregates import CUSTOMER_ACTIVITY, CUSTOMER_CATEGORY, CUSTOMER_ITEM, ITEM_ACTIVITY, SESSION_COUNTS, SESSION_INSTANTS

# No expiry. The activity tables hold change points of a step function: a row is right until the next one, however old it is,
# and what decays by itself (a window that empties) has a change point of its own. An age limit would turn right values to null.
FOREVER = timedelta(0)

# -- entities ----------------------------------------------------------------------------------------------------------

customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING, description="A resolved person.")
item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.STRING, description="A product of the shop.")
category = Entity(
    name="category", join_keys=["category"], value_type=ValueType.STRING, description="A group of items, as the catalogue has it."
)
model = Entity(name="model", join_keys=["model"], value_type=ValueType.STRING, description="What foretells something, by its task.")
identifier = Entity(
    name="identifier",
    join_keys=["identifier"],
    value_type=ValueType.STRING,
    description='An identifier as received, "<kind>:<value>": anonymous_id, user_id or email.',
)

# -- sources -----------------------------------------------------------------------------------------------------------

# None is a PushSource: what Feast pushes takes milliseconds a row, replaces a newer row by an older one in SQLite, and races in Redis.
# pipelines/online/writer.py writes rows as they come, in Feast's encoding; the newer one wins.


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
customer_item_source = _source("customer_item")
customer_category_source = _source("customer_category")
customer_scores_source = _source("customer_scores")
task_scores_source = _source("task_scores")
customer_segments_source = _source("customer_segments")

# -- views -------------------------------------------------------------------------------------------------------------


def _view(
    source: FileSource, entities: Entity | list[Entity], fields: dict[str, FeastType], description: str, *, name: str = ""
) -> FeatureView:
    of = [entities] if isinstance(entities, Entity) else entities
    keys = [Field(name=entity.join_key, dtype=String) for entity in of]
    return FeatureView(
        name=name or source.name,
        entities=of,
        schema=[*keys, *(Field(name=field, dtype=kind) for field, kind in fields.items())],
        source=source,
        ttl=FOREVER,
        description=description,
    )


def _whole(*names: str) -> dict[str, FeastType]:
    return dict.fromkeys(names, Int64)


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
    _whole(*CUSTOMER_ACTIVITY.columns()),
    "Counts and cents over moving windows and over all time; instants in microseconds since 1970.",
)
customer_session = _view(
    customer_session_source,
    customer,
    _whole(*SESSION_COUNTS, *SESSION_INSTANTS),
    "What the running session holds; zeros once it has fallen silent.",
)
item_activity = _view(
    item_activity_source,
    item,
    _whole(*ITEM_ACTIVITY.columns()),
    "Demand for an item over moving windows, its last price seen and when it was first seen.",
)
customer_item = _view(
    customer_item_source,
    [customer, item],
    _whole(*CUSTOMER_ITEM.columns()),
    "What a customer did with one item.",
)
customer_category = _view(
    customer_category_source,
    [customer, category],
    _whole(*CUSTOMER_CATEGORY.columns()),
    "What a customer did with the items of one category; an item is of the category that the catalogue has when features are built.",
)
customer_scores = _view(
    customer_scores_source,
    customer,
    {"churn_probability": Float64, "churn_version": String, "intent_probability": Float64, "intent_version": String},
    "The champions' latest scores.",
)
task_scores = _view(
    task_scores_source,
    [customer, model],
    {"probability": Float64, "version": String},
    "The latest score of a champion whose task has no columns in customer_scores.",
)
customer_segments = _view(
    customer_segments_source,
    customer,
    {"rfm_tier": String, "lifecycle": String, "segment": String, "version": String},
    "Tier of recency, frequency and money, state of the life cycle, and segment; the version that named it.",
)

# -- services ----------------------------------------------------------------------------------------------------------

# Age band and gender are protected: monitoring forms groups by them, no model is fed with them.
churn_v1 = FeatureService(name="churn_v1", features=[customer_profile[["region"]], customer_activity])
intent_v1 = FeatureService(name="intent_v1", features=[customer_profile[["region"]], customer_activity, customer_session])
recommender_v1 = FeatureService(name="recommender_v1", features=[item_activity])
# For a model that ranks items for one customer: one row is a customer, an item and the item's category.
ranker_v1 = FeatureService(name="ranker_v1", features=[customer_activity, item_activity, customer_item, customer_category])
serving_v1 = FeatureService(name="serving_v1", features=[customer_consent, customer_scores])
