"""Segments from features to the table, on the small shop of conftest.py."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_rand_score

from models.segments import Segmenter, behaviour, structure
from models.segments.naming import Names
from pipelines import feature_store, features, registry, tables, tracking, training
from pipelines.training import segments
from pipelines.windows import NOT_BEHAVIOUR

pytestmark = pytest.mark.slow


@pytest.fixture
def spoilt(segmented, tmp_path):
    """A copy that a test may spoil: home, settings, now."""
    home = tmp_path / "home"
    shutil.copytree(segmented[0], home, symlinks=True)
    return home, segmented[1].model_copy(update={"home": home}), segmented[3]


def members(home):
    return tables.read(home, tables.CUSTOMER_SEGMENTS).set_index("customer_id")


def withdraw(home, customers, at):
    """These customers take consent back."""
    consents = tables.read(home, tables.CONSENTS)
    rows = consents[consents["customer_id"].isin(customers)].assign(is_allowed=False, event_timestamp=at, created_timestamp=at)
    tables.write(home, tables.CONSENTS, pd.concat([consents, rows.astype(consents.dtypes)]))


def test_training_reports_registers_and_promotes(segmented):
    home, _, report, _ = segmented
    assert report.trainable
    assert (report.metric, report.rival, report.version) == ("silhouette", "RFM tiers", 1)
    assert report.low <= report.value - report.rival_value <= report.high
    champion = registry.load_champion(home, "segments")
    learner, golden = Segmenter.load(champion.folder), champion.manifest["golden"]
    assert learner.predict(pd.DataFrame(golden["features"])).tolist() == golden["segment"]
    assert sum(champion.manifest["consent"]["customers_by_policy"].values()) == champion.manifest["rows"]["fit"]
    json.dumps(report.details, allow_nan=False)


def test_segments_are_told_in_words_and_name_nobody(segmented):
    home, _, report, _ = segmented
    told = report.details["segments"]
    assert sum(row["customers"] for row in told) == len(members(home))
    assert all(row["description"].endswith("% of customers") and row["stability"] >= structure.UNSTABLE for row in told)
    stored = "".join(path.read_text() for path in registry.load_champion(home, "segments").folder.glob("*.json"))
    everybody = set(members(home).index)
    assert not everybody & set(re.findall(r"[\w-]+", stored))  # whole words: a hash may hold "c068" by chance
    assert len(everybody) == 120  # control: there was somebody to name


def test_planted_kinds_of_customers_are_found(segmented):
    """Of the shop in conftest.py: every fifth never buys, every second of the others leaves."""
    home, *_ = segmented
    found = members(home)["segment"]
    number = found.index.str[1:].astype(int)
    kind = np.select([number % 5 == 0, number % 2 == 0], ["looks only", "leaves"], "stays")
    assert adjusted_rand_score(kind, found) > 0.5  # who leaves in the last days looks as if they stayed
    never = found[kind == "looks only"]
    assert never.nunique() == 1
    assert not set(never) & set(found[kind != "looks only"])


def test_everybody_who_allows_it_has_one_row(segmented):
    home, _, _, as_of = segmented
    rows = tables.read(home, tables.CUSTOMER_SEGMENTS)
    assert rows["customer_id"].tolist() == sorted(tables.read(home, tables.EVENTS)["customer_id"].unique())
    assert set(rows["event_timestamp"]) == {pd.Timestamp(as_of)}
    assert set(rows["version"]) == {"1"}
    assert rows[["rfm_tier", "lifecycle"]].notna().all(axis=None)


def test_lifecycle_agrees_with_the_events(segmented):
    home, _, _, as_of = segmented
    events, now, state = tables.read(home, tables.EVENTS), pd.Timestamp(as_of), members(home)["lifecycle"]
    events = events[~events["type"].isin(NOT_BEHAVIOUR) & (events["event_timestamp"] < now)]
    seen = events.groupby("customer_id")["event_timestamp"].agg(["min", "max"])
    assert set(seen.index[seen["max"] < now - pd.Timedelta(60, "D")]) == set(state.index[state == "dormant"])
    assert set(seen.index[seen["min"] >= now - pd.Timedelta(30, "D")]) == set(state.index[state == "new"])
    for days, compare in ((30, "ge"), (32, "le")):  # a window empties by whole steps: at least 30 days of visits, at most 32
        visits = events[events["event_timestamp"] >= now - pd.Timedelta(days, "D")].groupby("customer_id")["session_id"].nunique()
        often = set(visits.index[visits >= 2]) - set(state.index[state.isin(["new", "dormant"])])
        assert getattr(often, f"__{'le' if compare == 'ge' else 'ge'}__")(set(state.index[state == "frequent"]))
    assert state.nunique() >= 3  # control: more than one rule was met


def test_tiers_agree_with_the_purchases(segmented):
    home, *_ = segmented
    events, tier = tables.read(home, tables.EVENTS), members(home)["rfm_tier"]
    bought = events[events["type"] == "purchase"].groupby("customer_id")["revenue_cents"].agg(["sum", "size"])
    assert set(tier.index[tier == "never bought"]) == set(tier.index) - set(bought.index)
    means = bought.groupby(tier.reindex(bought.index))["sum"].mean()
    assert means["high"] > means["middle"] > means["low"]


def test_training_again_makes_no_second_version_and_moves_nobody(spoilt, segmented):
    home, settings, as_of = spoilt
    again = training.train("segments", home, settings=settings, as_of=as_of)
    assert again.version == 1
    assert registry.versions(home, "segments") == (1,)
    assert again.details["segments"] == segmented[2].details["segments"]
    assert again.details["moved"]["share_moved"] == 0
    assert not again.details["moved"]["is_material"]


def test_a_later_training_keeps_the_names(spoilt):
    home, settings, as_of = spoilt
    before = members(home)["segment"]
    withdraw(home, [f"c{n:03d}" for n in range(20)], as_of)
    report = training.train("segments", home, settings=settings, as_of=as_of)
    assert report.version == 2
    after = members(home)["segment"]
    assert set(after) <= set(before)
    assert (after == before[after.index]).mean() > 0.9
    assert report.details["moved"]["n_after"] == 100
    assert [check["name"] for check in report.details["gate"]] == ["better", "stable", "the same names"]
    assert report.details["is_champion"] == all(check["holds"] for check in report.details["gate"])


def test_segments_that_mean_other_customers_are_refused_by_the_gate(spoilt, monkeypatch):
    home, settings, as_of = spoilt
    withdraw(home, [f"c{n:03d}" for n in range(20)], as_of)
    later = as_of + pd.Timedelta(1, "D")
    monkeypatch.setattr(Segmenter, "_inherited", lambda self, before, features, first: Names.fresh(len(self.names_), start=first))
    report = training.train("segments", home, settings=settings, as_of=later)
    assert not report.details["is_champion"]
    assert "not the same names: 0.0% of customers" in report.details["why"]
    assert registry.champions(home)["segments"]["version"] == 1


def test_who_takes_consent_back_is_in_no_segment_and_taught_none(spoilt):
    home, settings, as_of = spoilt
    withdraw(home, ["c001"], as_of)
    report = training.train("segments", home, settings=settings, as_of=as_of)
    assert "c001" not in members(home).index
    assert "c002" in members(home).index
    assert report.details["rows"]["fit"] == 119


def test_customers_who_do_not_fall_into_groups_have_tiers_and_no_segment(spoilt, monkeypatch):
    home, settings, as_of = spoilt
    registry_before = registry.champions(home)
    (home / "models" / "champions.json").write_text(json.dumps({k: v for k, v in registry_before.items() if k != "segments"}))
    monkeypatch.setattr(structure, "WEAK_SILHOUETTE", 1.0)
    report = training.train("segments", home, settings=settings, as_of=as_of)
    assert not report.trainable
    assert "do not fall into groups" in report.why
    rows = members(home)
    assert rows["segment"].isna().all()
    assert rows["version"].isna().all()
    assert rows[["rfm_tier", "lifecycle"]].notna().all(axis=None)
    assert sum(report.details["lifecycle"].values()) == sum(report.details["rfm_tier"].values()) == len(rows)
    assert registry.champions(home)["segments"]["version"] is None


def test_too_few_customers_are_told_so_and_the_champion_stays(spoilt):
    home, settings, as_of = spoilt
    withdraw(home, [f"c{n:03d}" for n in range(20, 120)], as_of)
    report = training.train("segments", home, settings=settings, as_of=as_of)
    assert not report.trainable
    assert "takes 100 customers who allow it" in report.why
    assert report.why.endswith("found 20")
    assert registry.champions(home)["segments"]["version"] == 1
    assert members(home)["segment"].notna().all()  # the earlier champion is better than none


def test_somebody_of_whom_nothing_is_known_yet_has_no_state_and_does_no_harm(spoilt):
    home, settings, as_of = spoilt
    activity = tables.read(home, tables.CUSTOMER_ACTIVITY)
    tables.write(home, tables.CUSTOMER_ACTIVITY, activity[activity["customer_id"] != "c000"])
    report = training.train("segments", home, settings=settings, as_of=as_of)
    assert report.version == 2
    golden = registry.load_version(home, "segments", 2).manifest["golden"]["features"]
    assert golden["last_seen_days"][0] is None  # c000 is the first of the examples
    assert members(home)["lifecycle"].isna().sum() == 1
    assert members(home).loc["c000", "rfm_tier"] == "never bought"


def test_the_run_shows_how_the_number_was_chosen(segmented):
    home, _, report, _ = segmented
    client = tracking.connect(home)
    (run,) = client.search_runs([client.get_experiment_by_name("segments").experiment_id])
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"segments.json", "number_of_segments.png", "structure.png", "model-1"} <= names
    told = json.loads((home / "mlflow" / "artifacts" / run.info.run_id / "artifacts" / "segments.json").read_text())
    by_number = [row for row in told["curves"] if row["method"] == "kmeans"]
    assert [row["n_clusters"] for row in by_number] == list(range(2, 11))
    assert {row["k"] for row in told["gap"]} == set(range(1, 11))
    assert run.data.metrics["silhouette"] == pytest.approx(report.value)


def test_the_segment_is_served_from_the_online_store(segmented):
    home, settings, _, as_of = segmented
    feature_store.apply(home)
    assert feature_store.materialize(home, as_of=as_of + pd.Timedelta(1, "us"), views=["customer_segments"], settings=settings) == 120
    found = feature_store.store(home).get_online_features(
        features=["customer_segments:segment", "customer_segments:lifecycle"], entity_rows=[{"customer_id": "c001"}]
    )
    assert found.to_dict()["segment"] == [members(home).loc["c001", "segment"]]


def test_an_erasure_reaches_the_table():
    assert tables.CUSTOMER_SEGMENTS in tables.TABLES
    assert "customer_id" in tables.CUSTOMER_SEGMENTS.schema.names


def test_segments_of_an_earlier_moment_are_those_that_would_have_been_found_then(spoilt):
    home, settings, as_of = spoilt
    at = as_of - pd.Timedelta(14, "D")
    withdraw(home, ["c001", "c003"], at + pd.Timedelta(1, "D"))  # they allowed it then, and no more
    found = segments.found_at(home, settings=settings, at=at, as_of=as_of).set_index("customer_id")
    events = tables.read(home, tables.EVENTS)
    tables.write(home, tables.EVENTS, events[(events["event_timestamp"] <= at) & ~events["customer_id"].isin(["c001", "c003"])])
    features.build(home)
    feature_store.apply(home)
    rows = segments.read_rows(home, settings=settings, as_of=at)
    assert found.index.tolist() == rows["customer_id"].tolist()
    assert found["lifecycle"].tolist() == segments.lifecycle(rows).tolist()
    assert (
        found["segment"].tolist() == Segmenter(random_state=settings.training.seed).fit(behaviour(rows)).predict(behaviour(rows)).tolist()
    )
    assert found["segment"].nunique() > 1
    assert found["lifecycle"].tolist() != members(home).reindex(found.index)["lifecycle"].tolist()  # control: today's are others
