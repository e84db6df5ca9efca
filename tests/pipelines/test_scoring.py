"""Champions scoring everybody as of now, on the small shop of conftest.py."""

import numpy as np
import pandas as pd
import pytest

from models.classifier import Classifier
from models.stages import Stages
from pipelines import labels, registry, scoring, tables
from pipelines.errors import RegistryError


@pytest.fixture
def scored(copied):
    copied.report = scoring.score(copied.home, settings=copied.settings, as_of=copied.as_of)
    return copied


def withdraw(home, customer, at):
    """One customer takes consent back."""
    consents = tables.read(home, tables.CONSENTS)
    row = consents[consents["customer_id"] == customer].assign(is_allowed=False, event_timestamp=at, created_timestamp=at)
    tables.write(home, tables.CONSENTS, pd.concat([consents, row.astype(consents.dtypes)]))


def test_everybody_who_allows_it_has_both_scores_of_the_champions(scored):
    scores = tables.read(scored.home, tables.CUSTOMER_SCORES)
    assert len(scores) == tables.read(scored.home, tables.EVENTS)["customer_id"].nunique() == scored.report.rows["customer_scores"]
    assert scores["customer_id"].is_unique
    assert scores[["churn_probability", "intent_probability"]].apply(lambda p: p.between(0, 1)).all(axis=None)
    assert set(scores["churn_version"]) == set(scores["intent_version"]) == {"1"}
    assert set(scores["event_timestamp"]) == {pd.Timestamp(scored.as_of)}


def test_scored_rows_have_the_columns_of_the_training_rows_without_the_answer(scored):
    for training, table in ((tables.TRAINING_CHURN, tables.SCORED_CHURN), (tables.TRAINING_INTENT, tables.SCORED_INTENT)):
        expected = [name for name in tables.read(scored.home, training).columns if name not in ("label", "split")]
        rows = tables.read(scored.home, table)
        assert sorted(rows.columns) == sorted(expected)
        assert len(rows) > 0


def test_churn_is_watched_on_its_population_and_agrees_with_the_scores(scored):
    rows = tables.read(scored.home, tables.SCORED_CHURN)
    population = labels.churn_population(tables.read(scored.home, tables.EVENTS), scored.as_of, settings=scored.settings)
    assert rows["customer_id"].tolist() == population["customer_id"].tolist()
    scores = tables.read(scored.home, tables.CUSTOMER_SCORES).set_index("customer_id")["churn_probability"]
    assert np.array_equal(rows["probability"], scores[rows["customer_id"]])
    champion = registry.load_champion(scored.home, "churn")
    learner = Classifier.load(champion.folder)
    assert np.array_equal(learner.predict_proba(rows[learner.feature_names_])[:, 1], rows["probability"])


def test_intent_is_watched_on_the_decision_points_of_the_last_week(scored):
    rows = tables.read(scored.home, tables.SCORED_INTENT)
    now = pd.Timestamp(scored.as_of)
    assert rows["event_timestamp"].between(now - pd.Timedelta(7, "D"), now).all()
    assert not rows.duplicated(["customer_id", "event_timestamp"]).any()
    points = labels.decision_points(tables.read(scored.home, tables.EVENTS), settings=scored.settings)
    recent = points[points["event_timestamp"] > now - pd.Timedelta(7, "D")]
    assert len(rows) == len(recent)
    assert recent["session_events"].nunique() > 1  # control: sessions were not cut at the week's edge


def test_recommendations_are_the_champions_lists_in_order(scored):
    rows = tables.read(scored.home, tables.RECOMMENDATIONS)
    champion = registry.load_champion(scored.home, "recommender")
    stages, at_us = Stages.load(champion.folder), int(pd.Timestamp(scored.as_of).timestamp() * 1e6)
    customers = np.load(champion.folder / "customer_ids.npy").tolist()
    items = np.load(champion.folder / "item_ids.npy")
    someone = rows["customer_id"].iloc[0]
    mine = rows[rows["customer_id"] == someone].sort_values("rank")
    best, _ = stages.recommend([customers.index(someone)], len(items), at_us=at_us)
    assert mine["item_id"].tolist() == items[best[0]].tolist()
    assert mine["rank"].tolist() == list(range(1, len(mine) + 1))
    assert mine["score"].is_monotonic_decreasing
    assert set(rows["customer_id"]) == set(customers)


def test_withdrawn_consent_removes_the_customer_from_every_scored_table(scored):
    someone = tables.read(scored.home, tables.SCORED_INTENT)["customer_id"].iloc[0]
    everything = (tables.CUSTOMER_SCORES, tables.SCORED_CHURN, tables.SCORED_INTENT, tables.RECOMMENDATIONS)
    before = {table.name: tables.count(scored.home, table) for table in everything}
    withdraw(scored.home, someone, pd.Timestamp(scored.as_of) - pd.Timedelta(1, "h"))
    scoring.score(scored.home, settings=scored.settings, as_of=scored.as_of)
    for table in everything:
        assert someone not in set(tables.read(scored.home, table)["customer_id"])
        assert 0 < tables.count(scored.home, table) < before[table.name] or table is tables.SCORED_CHURN


def test_damaged_champion_stops_the_run_and_leaves_the_last_scores(scored):
    before = tables.content_hash(scored.home, tables.CUSTOMER_SCORES)
    model = registry.load_champion(scored.home, "churn").folder / "model.lgb"
    model.write_bytes(model.read_bytes()[:-1] + b"!")
    with pytest.raises(RegistryError, match=r"model\.lgb"):
        scoring.score(scored.home, settings=scored.settings, as_of=scored.as_of)
    assert tables.content_hash(scored.home, tables.CUSTOMER_SCORES) == before


def test_scores_do_not_see_what_happens_after_now(copied):
    earlier = copied.as_of - pd.Timedelta(10, "D")
    scoring.score(copied.home, settings=copied.settings, as_of=earlier)
    full = tables.read(copied.home, tables.CUSTOMER_SCORES)
    events = tables.read(copied.home, tables.EVENTS)
    tables.write(copied.home, tables.EVENTS, events[events["event_timestamp"] <= earlier])
    scoring.score(copied.home, settings=copied.settings, as_of=earlier)
    pd.testing.assert_frame_equal(tables.read(copied.home, tables.CUSTOMER_SCORES), full)
