"""A shop of any size that can be served: tables, a filled online store, trained and signed champions. In: an empty folder. Out: a home.

Everything is drawn, so nothing is to be learned from what it answers: it is there to be asked. Models go through the real registry; churn
and intent have two versions each, so that the champion can be moved. Never measures.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from models import tasks
from models.classifier import Classifier
from models.recommender import Recommender
from models.stages import Stages
from pipelines import feature_store, registry, tables
from pipelines.bench.loading import AS_OF, fill_for_reads
from pipelines.settings import Settings
from pipelines.training.ranking import Moments

HALF_LIFE_DAYS = 90.0
CATEGORIES = 40
DAYS = 90  # that people bought in
EXAMPLES = 60  # rows of a manifest that a loaded model is held against


@dataclass(frozen=True)
class ShopSizes:
    """What is generated. `rounds`, `leaves`: of the classifiers' trees; `buys`: interactions of a customer; `stored`: the customers, the
    first ones, whose features the online store holds, none for all: what one read costs hangs little on how many there are.
    """

    customers: int
    items: int
    factors: int = 64
    rounds: int = 150
    leaves: int = 15
    buys: int = 8
    stored: int | None = None


SHOP_TINY = ShopSizes(customers=300, items=400, factors=8, rounds=30)
SHOP_QUICK = ShopSizes(customers=1_000, items=2_000)
SHOP_USUAL = ShopSizes(customers=100_000, items=50_000, stored=10_000)


def fill_shop(settings: Settings, *, sizes: ShopSizes, seed: int = 7) -> None:
    """Fill the settings' home: customers c0.., items i0.., everything as of `AS_OF`."""
    home, rng = settings.home, np.random.default_rng(seed)
    home.mkdir(parents=True, exist_ok=True)
    bought = _interactions(rng, sizes)
    items = _items(rng, sizes)
    _write(settings, tables.ITEMS, items)
    _write(settings, tables.INTERACTIONS, bought)
    fill_for_reads(settings, customers=sizes.stored or sizes.customers, items=sizes.items)
    (home / "clock.json").write_text(json.dumps({"as_of": AS_OF.isoformat(), "is_history": True}))
    for name, first in (("churn", 1), ("intent", 3)):
        for version in (first, first + 1):
            _register_classifier(settings, name, sizes=sizes, seed=version)
        registry.promote(home, name, 1)
    _register_recommender(settings, bought, items, sizes=sizes, seed=seed)
    registry.promote(home, "recommender", 1)


def _register_classifier(settings: Settings, name: str, *, sizes: ShopSizes, seed: int) -> None:
    """Trees over the features as they are served, for a label that hangs on two of them; with the task's history, where it has one."""
    rng = np.random.default_rng(seed)
    asked = pd.DataFrame(
        {"customer_id": [f"c{i}" for i in range(min(sizes.stored or sizes.customers, 4_000))], "event_timestamp": pd.Timestamp(AS_OF)}
    )
    service = f"{name}_v1"
    frame = feature_store.training_frame(settings.home, asked, service=service).drop(columns=list(asked))
    told = frame[["events_30d", "purchases_30d"]].rank(pct=True).sum(axis=1)
    label = (told + rng.normal(0, 0.5, len(frame)) > 1.0).astype(int)
    options: dict[str, Any] = {
        "n_rounds": sizes.rounds,
        "num_leaves": sizes.leaves,
        "early_stopping_rounds": sizes.rounds,
        "random_state": seed,
    }
    learner = Classifier(**options, history=tasks.declared()[name].history).fit(frame, label)
    some = frame.head(EXAMPLES)
    golden = {"features": {c: [None if pd.isna(v) else v for v in some[c].tolist()] for c in some}}
    golden["probability"] = learner.predict_proba(some)[:, 1].tolist()
    manifest = {"base_rate": float(label.mean()), "feature_service": service, "golden": golden, "seed": seed}
    registry.register(settings.home, name, learner=learner, manifest=manifest)


def _register_recommender(settings: Settings, bought: pd.DataFrame, items: pd.DataFrame, *, sizes: ShopSizes, seed: int) -> None:
    """Both stages, as training saves them, after one pass: an answer costs the same however good the factors are."""
    options = {"n_factors": sizes.factors, "n_epochs": 1}
    short = settings.model_copy(update={"training": settings.training.model_copy(update={"ranking_cutoffs": 1})})
    moments = Moments(bought, items, short, HALF_LIFE_DAYS, options)
    at = pd.Timestamp(AS_OF) + pd.Timedelta(1, "us")
    moment = moments.at(at)
    known, first = moment.ranking, Recommender(**options, random_state=seed).fit(moment.ranking.history)
    arrays = {"customer_ids": known.customers.astype(str), "item_ids": known.items.astype(str)}
    learner = Stages(first, moments.second_stage(at), moment.histories)
    manifest = {"seed": seed, "as_of": AS_OF.isoformat()}  # so that what a customer did since then is looked for
    registry.register(settings.home, "recommender", learner=learner, manifest=manifest, arrays=arrays)


def _items(rng: np.random.Generator, sizes: ShopSizes) -> pd.DataFrame:
    since = pd.Timestamp(AS_OF) - pd.to_timedelta(rng.integers(DAYS, 3 * DAYS, sizes.items), "D")
    return pd.DataFrame(
        {
            "item_id": [f"i{i}" for i in range(sizes.items)],
            "category": [f"category-{n:02d}" for n in rng.integers(0, CATEGORIES, sizes.items)],
            "price_cents": rng.integers(100, 20_000, sizes.items),
            "in_stock": True,
            "event_timestamp": since,
            "created_timestamp": since,
        }
    )


def _interactions(rng: np.random.Generator, sizes: ShopSizes) -> pd.DataFrame:
    """Everybody's purchases and views: popular items more often, and half of all within a taste of one's own."""
    n = sizes.customers * sizes.buys
    customer = np.repeat(np.arange(sizes.customers), sizes.buys)
    item = (rng.zipf(1.2, n) - 1) % sizes.items
    item = np.where(rng.random(n) < 0.5, item, (customer * 7 + rng.integers(0, 50, n)) % sizes.items)
    when = pd.Timestamp(AS_OF) - pd.to_timedelta(rng.uniform(1, DAYS * 86_400, n).astype(np.int64), "s")
    is_bought = rng.random(n) < 0.4
    frame = pd.DataFrame(
        {
            "customer_id": [f"c{i}" for i in customer],
            "item_id": [f"i{i}" for i in item],
            "type": np.where(is_bought, "purchase", "view"),
            "weight": np.where(is_bought, 1.0, 0.2),
            "event_timestamp": when,
            "created_timestamp": when,
        }
    )
    return frame.drop_duplicates(["customer_id", "item_id", "event_timestamp"], ignore_index=True)


def _write(settings: Settings, table: tables.Table, frame: pd.DataFrame) -> None:
    assert table.schema is not None
    tables.write(settings.home, table, pa.Table.from_pandas(frame[table.schema.names], table.schema, preserve_index=False))
