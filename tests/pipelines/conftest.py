"""A small shop in a home of its own, trained once through the real feature store, Optuna and MLflow."""

import json
import shutil
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from pipelines import tables
from pipelines.settings import LabelSettings, Settings, TrainingSettings

START = datetime(2026, 1, 1, tzinfo=UTC)
DAYS = 84
AS_OF = START + timedelta(days=DAYS)
NAMES = ("churn", "intent", "recommender")
REPORTS = "reports.json"  # what their training told
LABELS = LabelSettings(
    churn_horizon_days=14,
    churn_active_days=28,
    churn_cutoffs=2,
    ranking_horizon_days=14,
    intent_points=(1, 3),
    min_rows=20,
    min_class_rows=5,
)


def settings_of(home, **training_settings):
    return Settings(home=home, labels=LABELS, training=TrainingSettings(trials=2, k=5, bootstrap_draws=100, **training_settings))


def write_shop(home, customers=120):
    """Half the customers are steady, half leave; each has a taste for three of twelve items; long visits end in purchases."""
    rng = np.random.default_rng(5)
    rows = []
    for c in range(customers):
        until = DAYS if c % 2 else rng.uniform(20, DAYS)
        taste = [(3 * (c % 4) + j) % 12 for j in range(3)]
        for s, day in enumerate(np.sort(rng.uniform(0, until, int(until / 6) + 1))):
            views = int(rng.integers(1, 6))
            kinds = ["view"] * views + (["cart_add", "purchase"] if c % 5 and rng.random() < views / 7 else [])
            item = f"i{rng.choice(taste) if rng.random() < 0.8 else rng.integers(12)}"
            rows += [(f"c{c:03d}", day + n / 1440, kind, item, f"c{c:03d}-{s}") for n, kind in enumerate(kinds)]
    events = pd.DataFrame(rows, columns=["customer_id", "day", "type", "item_id", "session_id"])
    at = (pd.Timestamp(START) + pd.to_timedelta(events.pop("day"), "D")).dt.floor("ms")
    is_purchase = events["type"] == "purchase"
    events = events.assign(
        source="shop",
        event_id=[f"e{n}" for n in range(len(events))],
        name=events["type"],
        event_timestamp=at,
        created_timestamp=at,
        received_timestamp=at,
        user_id=events["customer_id"],
        quantity=1,
        price_cents=1_000,
        revenue_cents=np.where(is_purchase, 1_000, 0),
        order_id=np.where(is_purchase, events["session_id"], None),
        is_outlier=False,
    )
    tables.write(home, tables.EVENTS, events.reindex(columns=tables.EVENTS.schema.names))
    people = pd.DataFrame({"customer_id": sorted(events["customer_id"].unique()), "event_timestamp": pd.Timestamp(START)})
    consents = people.assign(created_timestamp=people["event_timestamp"], purpose="personalization", is_allowed=True, basis="consent")
    consents = consents.assign(identifier=consents["customer_id"], source="web", policy_version="1", evidence="m1")
    tables.write(home, tables.CONSENTS, consents)
    tables.write(home, tables.CUSTOMER_CONSENT, people.assign(is_personalization_allowed=True))
    traits = {"age_band": "30-44", "gender": np.where(people.index % 3, "f", "m"), "region": np.where(people.index % 2, "north", "south")}
    traits |= {f"is_{name}_imputed": False for name in traits}
    tables.write(home, tables.CUSTOMER_PROFILE, people.assign(**traits))
    links = people.assign(identifier="user_id:" + people["customer_id"], created_timestamp=people["event_timestamp"])
    tables.write(home, tables.IDENTITIES, links)
    items = pd.DataFrame(
        {
            "item_id": [f"i{n}" for n in range(12)],
            "category": "all",
            "price_cents": 1_000,
            "in_stock": True,
            "event_timestamp": pd.Timestamp(START),
        }
    )
    tables.write(home, tables.ITEMS, items.assign(created_timestamp=items["event_timestamp"]))


@pytest.fixture(scope="session")
def empty_tracking(once):
    """A migrated MLflow database, made once: the migration costs more than the tests."""
    from pipelines import tracking

    return once("tracking", tracking.connect) / "mlflow"


@pytest.fixture(scope="session")
def applied(once):
    """A home whose features are declared, and that holds nothing. To be copied, not changed."""
    from pipelines import feature_store

    return once("applied", feature_store.apply)


@pytest.fixture(scope="session")
def trained(once, empty_tracking):
    """The home after one training of all models, its settings and its reports."""
    from pipelines import feature_store, features, flow, labels, training
    from pipelines.training.publishing import ModelReport

    def make(home):
        write_shop(home)
        shutil.copytree(empty_tracking, home / "mlflow")
        features.build(home)
        feature_store.apply(home)
        settings = settings_of(home)
        labels.build(home, settings=settings, as_of=AS_OF)
        reports = {name: flow.plain(training.train(name, home, settings=settings, as_of=AS_OF)) for name in NAMES}
        (home / REPORTS).write_text(json.dumps(reports))

    home = once("trained", make)
    reports = {name: ModelReport(**report) for name, report in json.loads((home / REPORTS).read_text()).items()}
    return SimpleNamespace(home=home, settings=settings_of(home), reports=reports, as_of=AS_OF)


@pytest.fixture
def copied(trained, tmp_path):
    """A copy that a test may spoil."""
    home = tmp_path / "home"
    shutil.copytree(trained.home, home, symlinks=True)
    return SimpleNamespace(home=home, settings=settings_of(home), reports=trained.reports, as_of=AS_OF)


@pytest.fixture(scope="session")
def rabbitmq_server(brokers, tmp_path_factory):
    with brokers.rabbitmq(tmp_path_factory.mktemp("rabbitmq")) as server:
        yield server


@pytest.fixture(scope="session")
def kafka_server(brokers, tmp_path_factory):
    with brokers.kafka(tmp_path_factory.mktemp("kafka")) as server:
        yield server


@pytest.fixture(scope="session")
def postgresql_server(brokers):
    with brokers.postgresql() as server:
        yield server


@pytest.fixture
def place_of(brokers, request, tmp_path):
    """place_of(kind, **edges): a new stream, topic or queue of a running server, or for "sqlite" a new log."""

    def place(kind, **edges):
        url = request.getfixturevalue(f"{kind}_server").url if kind in brokers.ADDRESSES else ""
        return brokers.place(kind, tmp_path, url, **edges)

    return place
