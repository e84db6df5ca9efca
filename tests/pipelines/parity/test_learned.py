"""The rows of every declared task, held against today's tables: a skew that is planted shows, what was changed since is told apart."""

from contextlib import closing
from datetime import timedelta

import numpy as np
import pandas as pd
import pytest

from pipelines import feature_store, features, ingest, tables
from pipelines.log import open_log
from pipelines.parity import auditing, learned
from pipelines.training import evidence

TASK = "return_risk"  # of a file of models/, with no table of its own
PARTS = {"training_churn", "scored_intent", f"training_tasks/{TASK}", f"scored_tasks/{TASK}"}


@pytest.fixture(scope="module")
def shop(new_town):
    """A home with features of two people, and rows of three models."""
    town = new_town()
    feature_store.apply(town.home)
    tell(
        town,
        *(town.call(f"{who}{n}", 3.0 * n, user=who, item=f"i{n}", kind="order" if n == 3 else "view") for who in "ab" for n in range(5)),
    )
    ids = sorted(tables.read(town.home, tables.IDENTITIES)["customer_id"].unique())
    asked = pd.DataFrame({"customer_id": ids * 2, "event_timestamp": pd.to_datetime([town.at(50), town.at(9)] * 2)})
    frames = {name: feature_store.training_frame(town.home, asked, service=f"{name}_v1") for name in ("churn", "intent")}
    evidence.keep(town.home, "churn", frames["churn"].assign(label=0, split="train", age_band=None))
    evidence.keep(town.home, "intent_24h", frames["intent"].assign(label=0))
    evidence.keep(town.home, TASK, frames["churn"].assign(label=1))
    tables.write(town.home, tables.SCORED_INTENT, frames["intent"].assign(probability=0.5))
    tables.write(town.home, tables.SCORED_TASKS, frames["churn"].assign(model=TASK, probability=0.5))
    return town


def tell(town, *told):
    with closing(open_log(town.home, settings=town.settings)) as log:
        log.append(town.logged(told))
    ingest.drain(town.home, settings=town.settings)
    features.build(town.home)


def look(town):
    return learned.look(town.home, customers=10, rng=np.random.default_rng(1), settings=town.settings)


def test_rows_of_every_declared_task_are_looked_at_and_are_what_the_tables_say(shop):
    found = look(shop)
    assert set(found.parts) == {*PARTS, "training_tasks/intent_24h"}
    assert (found.compared.mismatches, dict(found.explained)) == (0, {})
    assert found.compared.checked > 4 * 5 * 60
    assert {part["rows"] for part in found.parts.values()} == {4}


@pytest.mark.parametrize("part", sorted(PARTS))
def test_control_a_value_that_a_model_saw_otherwise_turns_it_red(shop, part):
    name, _, model = part.partition("/")
    table = next(each for each in tables.TABLES if each.name == name)
    kept = tables.read_arrow(shop.home, table)
    frame = kept.to_pandas()
    at = 0 if not model else int(np.flatnonzero(frame["model"] == model)[0])
    frame.loc[at, "views_total"] += 1  # a repair of late data since
    tables.write(shop.home, table, frame)
    try:
        found = look(shop)
    finally:
        tables.write(shop.home, table, kept)
    assert dict(found.compared.by_feature) == {f"{part}:views_total": 1}
    assert (found.parts[part]["differing_rows"], found.parts[part]["by_feature"]) == (1, {"views_total": 1})
    assert frame.loc[at, "customer_id"] not in repr(found.compared.examples)


def test_customers_whose_history_was_changed_since_are_told_apart(shop):
    kept = {table: tables.read_arrow(shop.home, table) for table in (tables.TRAINING_TASKS, tables.CONSENTS)}
    ids = tables.read(shop.home, tables.IDENTITIES)["customer_id"].unique()
    frame = kept[tables.TRAINING_TASKS].to_pandas()
    frame.loc[frame["customer_id"] == ids[0], "views_total"] += 1
    frame.loc[frame["customer_id"] == ids[1], "customer_id"] = "c_gone"
    said = kept[tables.CONSENTS].to_pandas()
    refused = said[said["customer_id"] == ids[0]].head(1)
    later = refused["created_timestamp"] + timedelta(days=2)
    try:
        tables.write(shop.home, tables.TRAINING_TASKS, frame)
        tables.write(shop.home, tables.CONSENTS, pd.concat([said, refused.assign(is_allowed=False, created_timestamp=later)]))
        found = look(shop)
    finally:
        for table, rows in kept.items():
            tables.write(shop.home, table, rows)
    assert (found.compared.mismatches, dict(found.explained)) == (0, {auditing.REFUSED: 4, auditing.GONE: 4})
