"""Training one model from its labels to its place in the registry, on the small shop of conftest.py."""

import json
import sqlite3
from contextlib import closing
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from models import evaluation, returns
from models.classifier import Classifier
from models.evaluation import Interval
from models.stages import Stages
from pipelines import feature_store, features, labels, registry, scoring, tables, tracking, training, verdicts
from pipelines.errors import InputError, RegistryError
from pipelines.settings import Settings
from pipelines.training import classifiers, publishing, recommenders
from pipelines.training.gate import Check, Verdict
from pipelines.training.rows import with_protected
from rapport import app

NAMES = ("churn", "intent", "recommender")


def runs(home, name):
    client = tracking.connect(home)
    experiment = client.get_experiment_by_name(name).experiment_id
    found = client.search_runs([experiment])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    return client, parents, [run for run in found if run not in parents]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_training_reports_registers_and_promotes(trained, name):
    home, reports = trained.home, trained.reports
    report = reports[name]
    assert report.trainable
    assert report.version == 1
    assert report.low <= report.value - report.rival_value <= report.high
    assert report.optimum is None  # nothing is known of the truth of a real shop
    champion = registry.load_champion(home, name)
    assert champion.version == 1
    assert champion.manifest["metrics"][report.metric.replace("@", "_at_")] == report.value
    json.dumps(asdict(report), allow_nan=False)


def test_report_of_a_classifier_holds_calibration_and_base_rate(trained):
    details = trained.reports["churn"].details
    assert 0 < details["base_rate"] < 1
    assert {"ece", "brier", "log_loss", "mean_probability", "params", "cutoffs", "rows"} <= set(details)


@pytest.mark.parametrize("name", ["churn", "intent"])
def test_a_version_tells_how_good_it_is_for_everybody_and_each_group_with_intervals(trained, name):
    manifest = registry.load_champion(trained.home, name).manifest
    slices, test = manifest["slices"], tables.read(trained.home, tables.OWN_ROWS[name][0]).query("split == 'test'")
    assert slices["all"]["value"] == trained.reports[name].value
    assert {"age_band 30-44", "gender f", "gender m", "region north", "region south"} < set(slices)
    south = test[test["region"] == "south"]
    assert slices["region south"]["rows"] == len(south)
    assert slices["region south"]["value"] == pytest.approx(evaluation.auc(south["label"], south["probability"]))
    assert slices["region south"]["base_rate"] == pytest.approx(south["label"].mean())
    for told in slices.values():
        assert told["low"] <= told["value"] <= told["high"]
    narrow, wide = (slices[group]["high"] - slices[group]["low"] for group in ("all", "gender m"))
    assert narrow < wide


def test_recommender_that_knows_tastes_beats_popularity(trained):
    assert trained.reports["recommender"].low > 0
    assert trained.reports["recommender"].details["own_history_ndcg@5"] > trained.reports["recommender"].rival_value


@pytest.mark.parametrize("name", NAMES)
def test_one_parent_run_holds_the_trials_and_names_data_and_code(trained, name):
    home, settings, reports = trained.home, trained.settings, trained.reports
    client, parents, trials = runs(home, name)
    assert len(parents) == 1
    assert len(trials) == settings.training.trials
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {parents[0].info.run_id}
    assert all("loss" in run.data.metrics and run.info.status == "FINISHED" for run in trials)
    assert {"data.sha256", "git.commit", "feature_service", "cutoffs"} <= set(parents[0].data.tags)
    version = client.get_model_version_by_alias(name, "champion")
    assert version.tags["rapport.version"] == "1"
    assert version.run_id == parents[0].info.run_id
    metric = reports[name].metric.replace("@", "_at_")
    assert parents[0].data.metrics[metric] == pytest.approx(reports[name].value)


def test_champion_of_mlflow_loads_without_pickle_and_gives_the_signed_scores(trained, monkeypatch):
    import mlflow

    home = trained.home
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    mlflow.set_tracking_uri(f"sqlite:///{home}/mlflow/mlflow.db")
    mlflow.set_registry_uri(f"sqlite:///{home}/mlflow/mlflow.db")
    try:
        booster = mlflow.lightgbm.load_model("models:/churn@champion")
        info = mlflow.models.get_model_info("models:/churn@champion")
    finally:
        mlflow.set_tracking_uri(before[0])
        mlflow.set_registry_uri(before[1])
    champion = registry.load_champion(home, "churn")
    learner = Classifier.load(champion.folder)
    assert booster.model_to_string() == learner.booster_.model_to_string()
    assert info.signature.inputs.input_names() == learner.feature_names_
    golden = champion.manifest["golden"]
    assert learner.predict_proba(pd.DataFrame(golden["features"]))[:, 1] == pytest.approx(golden["probability"], abs=0)


@pytest.mark.parametrize("name", NAMES)
def test_version_records_under_which_policies_its_people_agreed(trained, name):
    agreed = registry.load_champion(trained.home, name).manifest["consent"]
    assert agreed["purpose"] == "personalization"
    assert sum(agreed["customers_by_policy"].values()) > 0
    assert "none" not in agreed["customers_by_policy"]  # nobody is in a training set who did not agree


def test_guessed_traits_are_nobodys_group(copied):
    rows = pd.DataFrame({"customer_id": tables.read(copied.home, tables.CUSTOMER_PROFILE)["customer_id"], "event_timestamp": copied.as_of})
    assert with_protected(copied.home, rows)["gender"].notna().all()
    guessed = tables.read(copied.home, tables.CUSTOMER_PROFILE).assign(is_gender_imputed=True)
    tables.write(copied.home, tables.CUSTOMER_PROFILE, guessed)
    told = with_protected(copied.home, rows)
    assert told["gender"].isna().all()
    assert told["region"].notna().all()


def test_database_of_runs_is_in_wal_mode(trained):
    with closing(sqlite3.connect(trained.home / "mlflow" / "mlflow.db")) as db:
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


@pytest.mark.parametrize("name", ["churn", "recommender"])
def test_training_again_makes_no_second_version_run_or_trial(copied, name):
    home, settings, reports = copied.home, copied.settings, copied.reports
    again = training.train(name, home, settings=settings, as_of=copied.as_of)
    assert again == reports[name]
    assert registry.versions(home, name) == (1,)
    client, parents, trials = runs(home, name)
    assert (len(parents), len(trials)) == (1, settings.training.trials)
    assert len(client.search_model_versions(f"name = '{name}'")) == 1
    assert len(client.get_metric_history(parents[0].info.run_id, reports[name].metric.replace("@", "_at_"))) == 1


@pytest.mark.parametrize("stops_at", ["tracking.add_version", "tracking.close_run", "registry.promote", "tracking.follow_champion"])
def test_training_killed_while_publishing_is_finished_by_the_next_run(copied, monkeypatch, stops_at):
    home = copied.home
    options = copied.settings.training.model_copy(update={"seed": 8})  # another search, so another version
    settings = copied.settings.model_copy(update={"training": options})
    module, function = stops_at.split(".")

    def die(*arguments, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(getattr(publishing, module), function, die)
        patch.setattr(publishing, "decide", lambda home, fitted, version, **words: publishing.Decision(True, version, "for the test"))
        with pytest.raises(KeyboardInterrupt):
            training.train("churn", home, settings=settings, as_of=copied.as_of)
    assert registry.load_champion(home, "churn").version == (2 if stops_at == "tracking.follow_champion" else 1)
    report = training.train("churn", home, settings=settings, as_of=copied.as_of)
    assert report.version == 2
    assert registry.versions(home, "churn") == (1, 2)
    client, parents, trials = runs(home, "churn")
    assert (len(parents), len(trials)) == (2, 4)
    assert len(client.search_model_versions("name = 'churn'")) == 2
    assert client.get_model_version_by_alias("churn", "champion").tags["rapport.version"] == str(report.details["champion"])


def unlike(fitted, verdict):
    """The same challenger, judged so."""
    return replace(fitted, judge=lambda champion, is_newer: verdict)


def held(*names, value=0.5, passes=True):
    return Verdict(value, tuple(Check(name, passes, "as found", Interval(0.1, 0.05, 0.2)) for name in names))


@pytest.mark.parametrize("name", ["churn", "recommender"])
def test_version_as_good_as_the_champion_leads_only_where_it_is_of_newer_data(copied, name):
    home, settings = copied.home, copied.settings
    fit = recommenders.fit if name == "recommender" else partial(classifiers.fit, name)
    fitted, _ = fit(home, settings=settings, as_of=copied.as_of, progress=lambda done, total: None)
    same = publishing.decide(home, fitted, 2, settings=settings, as_of=copied.as_of)
    assert (same.is_champion, same.champion) == (False, 1)
    assert "not better" in same.why
    newer = publishing.decide(home, fitted, 2, settings=settings, as_of=copied.as_of + timedelta(days=1))
    assert (newer.is_champion, newer.champion, newer.against["version"]) == (True, 2, 1)
    assert newer.against["value"] == pytest.approx(copied.reports[name].value)
    asked = {
        "churn": ["not worse", "no group worse", "calibrated", "fast"],
        "recommender": ["not worse", "as varied", "no group worse", "fast"],
    }
    assert [check.name for check in newer.checks] == asked[name]


def test_refusal_names_every_check_that_failed_and_a_champion_that_cannot_be_used_holds_no_place(copied, monkeypatch):
    home, settings = copied.home, copied.settings
    fitted, _ = recommenders.fit(home, settings=settings, as_of=copied.as_of, progress=lambda done, total: None)

    def decided(verdict):
        return publishing.decide(home, unlike(fitted, verdict), 2, settings=settings, as_of=copied.as_of)

    assert decided(held("better", "as varied")).is_champion
    mixed = Verdict(0.5, (*held("better").checks, *held("as varied", "fast", passes=False).checks))
    refused = decided(mixed)
    assert (refused.is_champion, refused.champion) == (False, 1)
    assert refused.why.endswith("not as varied: as found; not fast: as found")
    assert "cannot be compared" in decided(None).why
    with monkeypatch.context() as patch:  # a champion of older code
        patch.setattr(Stages, "load", classmethod(lambda cls, folder: (_ for _ in ()).throw(ValueError("train it again"))))
        assert decided(mixed).is_champion
        assert decided(mixed).why == "version 1 can be loaded no more: train it again"
        with pytest.raises(RegistryError, match=r"recommender can be loaded no more: train it again"):
            scoring.score(home, settings=settings, as_of=copied.as_of)
    next(registry.load_champion(home, "recommender").folder.glob("*.npy")).write_bytes(b"")
    assert decided(mixed).is_champion  # a champion that cannot be verified is none


def test_what_the_gate_found_is_kept_beside_the_version(copied):
    home, settings = copied.home, copied.settings
    known = verdicts.read(home, "churn")
    assert list(known) == [1]
    assert known[1]["why"] == "there was no champion"
    options = settings.training.model_copy(update={"seed": 8})
    report = training.train("churn", home, settings=settings.model_copy(update={"training": options}), as_of=copied.as_of)
    told = verdicts.read(home, "churn")[2]
    assert told == {"is_champion": report.details["is_champion"], "why": report.details["why"], "checks": report.details["gate"]}
    assert [check["name"] for check in told["checks"]] == ["better", "no group worse", "calibrated", "fast"]
    shown = [row for row in verdicts.overview(home) if row["model"] == "churn"]
    assert [row["version"] for row in shown] == [1, 2]
    assert {row["role"] for row in shown} <= {"champion", "former champion", "challenger"}
    assert shown[0]["value"] == copied.reports["churn"].value
    assert shown[1]["gate"].startswith("passed: " if told["is_champion"] else "refused: ")
    assert verdicts.said(home, "intent", 7) == "never asked"


def test_every_report_of_a_classifier_names_its_baselines_with_intervals(trained):
    found = {name: [one["name"] for one in trained.reports[name].baselines] for name in ("churn", "intent")}
    assert found == {
        "churn": ["recency rule", "logistic regression", "Pareto/NBD", "BG/NBD", "discrete-time hazard"],
        "intent": ["cart rule", "logistic regression"],
    }
    for name in found:
        report = trained.reports[name]
        for one in report.baselines:
            assert one["low"] <= one["lead"] <= one["high"]
            assert one["lead"] == pytest.approx(report.value - one["value"])
        assert report.baselines[0]["value"] == report.rival_value


def test_run_holds_what_the_model_goes_by_and_no_customer(trained):
    client, parents, _ = runs(trained.home, "churn")
    listed = {item.path for item in client.list_artifacts(parents[0].info.run_id, "explanations")}
    wanted = ("contributions.csv", "contributions_by_row.csv", "partial_dependence.csv", "calibration.csv", "gain.csv", "search.csv")
    pictures = (
        "contributions.png",
        "contributions_by_row.png",
        "partial_dependence.png",
        "calibration.png",
        "gain.png",
        "search.png",
        "search_importance.json",
    )
    assert {f"explanations/{name}" for name in (*wanted, *pictures)} <= listed
    people = set(tables.read(trained.home, tables.LABELS_CHURN)["customer_id"])
    for name in wanted:
        told = Path(client.download_artifacts(parents[0].info.run_id, f"explanations/{name}")).read_text()
        assert not any(person in told for person in people)


def test_run_of_the_recommender_holds_its_search(trained):
    client, parents, _ = runs(trained.home, "recommender")
    listed = {item.path for item in client.list_artifacts(parents[0].info.run_id, "explanations")}
    assert {f"explanations/{name}" for name in ("search.csv", "search.png", "search_importance.json")} <= listed


def test_model_of_one_file_is_trained_tracked_and_kept_like_any_other(copied, monkeypatch):
    home, settings = copied.home, copied.settings
    monkeypatch.setattr(returns, "HORIZON", pd.Timedelta(7, "D"))  # the log is short
    events = tables.read(home, tables.EVENTS)
    orders = events[(events["type"] == "purchase") & (events["customer_id"].str[-1].isin(["1", "3"]))]
    back = orders.assign(
        type="return", name="return", event_id=orders["event_id"] + "r", revenue_cents=-orders["revenue_cents"],
        event_timestamp=orders["event_timestamp"] + timedelta(days=2), created_timestamp=orders["created_timestamp"] + timedelta(days=2),
    )  # fmt: skip
    tables.write(home, tables.EVENTS, pd.concat([events, back[back["event_timestamp"] < pd.Timestamp(copied.as_of)]], ignore_index=True))
    features.build(home)
    report = training.train("return_risk", home, settings=settings, as_of=copied.as_of)
    assert report.trainable, report.why
    assert (report.version, report.metric, report.rival) == (1, "auc", "returns per order")
    assert report.value > 0.7  # half of them return all, and the others nothing
    assert registry.load_champion(home, "return_risk").manifest["feature_service"] == "churn_v1"
    client, parents, trials = runs(home, "return_risk")
    assert (len(parents), len(trials)) == (1, settings.training.trials)
    assert client.get_model_version_by_alias("return_risk", "champion").tags["rapport.version"] == "1"
    scored = scoring.score(home, settings=settings, as_of=copied.as_of)
    told = tables.read(home, tables.TASK_SCORES)
    assert scored.versions["return_risk"] == 1
    assert told["model"].unique().tolist() == ["return_risk"]
    assert told["customer_id"].is_unique
    assert len(told) == scored.rows["task_scores"] == tables.count(home, tables.CUSTOMER_SCORES)
    assert told["probability"].between(0, 1).all()
    learned, watched = (tables.read(home, table) for table in (tables.TRAINING_TASKS, tables.SCORED_TASKS))
    assert set(learned["model"]) == set(watched["model"]) == {"return_risk"}
    assert len(watched) == scored.rows["scored_tasks"] > 0
    assert learned["event_timestamp"].max() < watched["event_timestamp"].min()  # asked like those, and too young to be among them
    assert watched["event_timestamp"].max() <= pd.Timestamp(copied.as_of)
    assert set(learned) - set(watched) == {"label", "split"}


def test_intent_of_a_day_and_a_week_are_trained_by_their_names(copied):
    report = training.train("intent_24h", copied.home, settings=copied.settings, as_of=copied.as_of)
    assert report.trainable, report.why
    assert report.value > 0.5


def test_version_rolled_back_by_a_person_is_not_promoted_by_training_again(copied):
    home, settings = copied.home, copied.settings
    worse = registry.register(home, "churn", learner=Classifier.load(registry.load_champion(home, "churn").folder), manifest={})
    registry.promote(home, "churn", worse)
    registry.promote(home, "churn", 1)
    registry.rollback(home, "churn")
    report = training.train("churn", home, settings=settings, as_of=copied.as_of)
    assert report.details["champion"] == worse
    assert "rolled back" in report.details["why"]
    assert registry.load_champion(home, "churn").version == worse


def test_alias_of_mlflow_follows_promotion_and_rollback(copied):
    home = copied.home
    options = copied.settings.training.model_copy(update={"seed": 8})
    report = training.train("churn", home, settings=copied.settings.model_copy(update={"training": options}), as_of=copied.as_of)
    assert report.version == 2

    def alias():
        return tracking.connect(home).get_model_version_by_alias("churn", "champion").tags["rapport.version"]

    def by_command(*words):
        assert CliRunner().invoke(app, ["models", *words], env={"RAPPORT_HOME": str(home)}).exit_code == 0

    by_command("promote", "churn", "1")
    by_command("promote", "churn", "2")
    assert alias() == "2"
    by_command("rollback", "churn")
    assert alias() == "1"
    registry.register(home, "churn", learner=Classifier.load(registry.load_champion(home, "churn").folder), manifest={})
    by_command("promote", "churn", "3")  # MLflow does not have it: the alias stays, the registry decides
    assert alias() == "1"


def test_rows_kept_for_those_who_watch_hold_protected_traits_that_no_model_reads(trained):
    home = trained.home
    for name, table in (("churn", tables.TRAINING_CHURN), ("intent", tables.TRAINING_INTENT)):
        frame = tables.read(home, table)
        assert {"age_band", "gender", "region", "label", "split", "probability"} <= set(frame)
        assert set(frame["split"]) == {"train", "validation", "test"}
        assert frame["probability"].between(0, 1).all()
        assert not {"age_band", "gender", "label", "split"} & set(registry.load_champion(home, name).manifest["features"])
        test = frame[frame["split"] == "test"]
        assert evaluation.auc(test["label"], test["probability"]) == pytest.approx(trained.reports[name].value)


def test_features_of_a_label_row_do_not_move_when_the_future_is_cut_off(copied):
    home = copied.home
    wanted = tables.read(home, tables.LABELS_CHURN, ["customer_id", "event_timestamp"]).iloc[::7].reset_index(drop=True)
    cut = wanted["event_timestamp"].max()
    full = feature_store.training_frame(home, wanted, service="churn_v1")
    events = tables.read(home, tables.EVENTS)
    tables.write(home, tables.EVENTS, events[events["event_timestamp"] < cut])
    features.build(home)
    pd.testing.assert_frame_equal(feature_store.training_frame(home, wanted, service="churn_v1"), full)


def test_data_that_cannot_carry_labels_are_reported_and_recorded(copied):
    home, settings = copied.home, copied.settings
    events = tables.read(home, tables.EVENTS)
    tables.write(home, tables.EVENTS, events[events["type"] == "purchase"])
    (home / "models" / "champions.json").unlink()
    labels.build(home, settings=settings, as_of=copied.as_of)
    report = training.train("intent", home, settings=settings, as_of=copied.as_of)
    assert (report.trainable, report.version) == (False, None)
    assert "no view" in report.why
    assert registry.champions(home)["intent"]["why"] == report.why
    with pytest.raises(RegistryError, match="no view"):
        registry.load_champion(home, "intent")
    scored = scoring.score(home, settings=settings, as_of=copied.as_of)
    assert scored.versions == {"churn": None, "intent": None, "recommender": None}
    assert tables.read(home, tables.CUSTOMER_SCORES)[["churn_probability", "intent_version"]].isna().all(axis=None)
    assert {name: rows for name, rows in scored.rows.items() if name != "customer_scores"} == dict.fromkeys(
        ("scored_churn", "scored_intent", "recommendations"), 0
    )
    assert all(tables.exists(home, table) for table in (tables.SCORED_CHURN, tables.SCORED_INTENT, tables.RECOMMENDATIONS))


def test_unknown_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"churn, intent, intent_24h, intent_7d, recommender.*'weather'"):
        training.train("weather", tmp_path, settings=Settings(), as_of=datetime(2026, 1, 1, tzinfo=UTC))


def test_recommender_served_knows_everybody_of_today(trained):
    home = trained.home
    champion = registry.load_champion(home, "recommender")
    stages = Stages.load(champion.folder)
    customers = np.load(champion.folder / "customer_ids.npy", allow_pickle=False)
    assert len(stages.first.customer_factors_) == len(customers) == tables.read(home, tables.INTERACTIONS)["customer_id"].nunique()
    golden = champion.manifest["golden"]
    items, _ = stages.recommend(golden["customers"], golden["k"], at_us=golden["at_us"])
    assert items.tolist() == golden["items"]
