"""What is recorded in MLflow, and where: the same in the home's SQLite and on a real PostgreSQL."""

import shutil

import numpy as np
import optuna
import pandas as pd
import pytest
from pydantic import SecretStr, ValidationError

from models.classifier import Classifier
from pipelines import registry, tracking
from pipelines.errors import StoreError
from pipelines.settings import TrainingSettings

PLACES = ["home", pytest.param("postgresql", marks=pytest.mark.server)]


@pytest.fixture(params=PLACES)
def place(request, tmp_path):
    """A home, and the server that its runs are kept on, if any."""
    if request.param == "home":
        shutil.copytree(request.getfixturevalue("empty_tracking"), tmp_path / "mlflow")
        return tmp_path, None
    return tmp_path, SecretStr(request.getfixturevalue("postgresql_server").database())


def trial(number, value, losses):
    made = optuna.trial.create_trial(
        state=optuna.trial.TrialState.PRUNED if value is None else optuna.trial.TrialState.COMPLETE,
        value=value,
        params={},
        distributions={},
        user_attrs={"params": {"num_leaves": 7 + number, "learning_rate": 0.1}},
        intermediate_values=dict(enumerate(losses)),
    )
    made.number = number
    return made


TRIALS = [trial(0, 0.5, [0.6, 0.5]), trial(1, None, [0.9]), trial(2, None, [])]


def stored(home):
    """A registered version, and a few rows of what it takes and gives."""
    features = pd.DataFrame({"spend": np.linspace(-1, 1, 60), "visits": np.arange(60) % 7})
    learner = Classifier(n_rounds=2).fit(features, (features["spend"] > 0).astype(float))
    number = registry.register(home, "churn", learner=learner, manifest={"training_key": "k1", "learner": "classifier"})
    sample = features.head(3)
    return registry.load_version(home, "churn", number), sample, pd.DataFrame({"probability": learner.predict_proba(sample)[:, 1]})


def test_runs_trials_and_versions_are_recorded_once_where_the_settings_say(place, monkeypatch):
    home, server = place
    batches = []
    for _ in range(2):  # the second time everything is there
        run = tracking.open_run(home, "churn", study="s", tags={"cutoffs": "x"}, server=server)
        log_batch = run.client.log_batch
        monkeypatch.setattr(
            run.client, "log_batch", lambda run_id, log_batch=log_batch, **what: batches.append(what) or log_batch(run_id, **what)
        )
        for one in TRIALS:
            tracking.log_trial(run, one)
        version, features, output = stored(home)
        assert tracking.add_version(run, version, features=features, output=output) == "1"
        tracking.close_run(run, params={"num_leaves": 7}, metrics={"auc": 0.75})
        registry.promote(home, "churn", version.version)
        tracking.follow_champion(home, "churn", server)

    client = tracking.connect(home, server)
    found = client.search_runs([run.experiment_id])
    nested = sorted((one for one in found if "mlflow.parentRunId" in one.data.tags), key=lambda one: int(one.data.tags["trial"]))
    (parent,) = (one for one in found if one not in nested)
    assert len(batches) == len(TRIALS) + 1  # one for each trial, one for the run
    assert [one.data.tags["state"] for one in nested] == ["complete", "pruned", "failed"]
    assert [one.data.metrics for one in nested] == [{"loss": 0.5, "loss_so_far": 0.5}, {"loss_so_far": 0.9}, {}]
    assert [one.data.params["num_leaves"] for one in nested] == ["7", "8", "9"]
    assert {one.info.status for one in found} == {"FINISHED"}
    assert (parent.data.metrics, parent.data.params, parent.data.tags["cutoffs"]) == ({"auc": 0.75}, {"num_leaves": "7"}, "x")
    assert client.get_model_version_by_alias("churn", "champion").tags["rapport.version"] == str(version.version)
    assert [path.is_file() for path in home.glob("mlflow/artifacts/*/artifacts/model-1/MLmodel")] == [True]  # files stay in the home
    assert (home / "mlflow" / "mlflow.db").exists() == (server is None)


def test_champion_that_mlflow_cannot_be_told_of_is_a_warning_without_the_password(tmp_path, caplog):
    version, *_ = stored(tmp_path)
    registry.promote(tmp_path, "churn", version.version)
    tracking.follow_champion(tmp_path, "churn", SecretStr("postgresql+pg8000://rapport:hunter2@127.0.0.1:1/x"))
    assert "MLflow does not show it" in caplog.text
    assert "hunter2" not in caplog.text


@pytest.mark.parametrize("url", ["postgresql+nodriver://rapport:hunter2@127.0.0.1:1/x", "postgresql+pg8000://rapport:hunter2@127.0.0.1:1/x"],
                         ids=["driver", "place"])  # fmt: skip
def test_server_that_cannot_be_used_is_one_sentence_without_its_password(tmp_path, url):
    with pytest.raises(StoreError, match=r"training\.tracking_url") as refused:
        tracking.connect(tmp_path, SecretStr(url))
    assert "hunter2" not in str(refused.value)


@pytest.mark.server
def test_database_that_holds_the_trials_is_refused_for_the_runs(tmp_path, postgresql_server):
    from contextlib import closing

    from pipelines.training.study import Storage, open_study

    with closing(open_study("s", Storage(server=postgresql_server.url))):
        pass
    with pytest.raises(StoreError, match=r"another program's tables; name a database of MLflow's own"):
        tracking.connect(tmp_path, SecretStr(postgresql_server.url))
    with pytest.raises(ValidationError, match="two databases"):
        TrainingSettings(study_url=postgresql_server.url, tracking_url=postgresql_server.url)


def test_a_home_that_was_copied_or_moved_keeps_its_files_in_itself(tmp_path, empty_tracking):
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(empty_tracking, first / "mlflow")
    run = tracking.open_run(first, "churn", study="s", tags={})
    version, features, output = stored(first)
    tracking.add_version(run, version, features=features, output=output)
    before = {path.relative_to(first) for path in first.rglob("*")}
    shutil.copytree(first, second)
    again = tracking.open_run(second, "churn", study="another", tags={})
    again.client.log_dict(again.run_id, {"a": 1}, "told.json")
    assert "told.json" in {path.name for path in second.rglob("*.json")}
    assert {path.relative_to(first) for path in first.rglob("*")} == before
    here = (second / "mlflow" / "artifacts").resolve().as_uri()
    held = tracking.open_run(second, "churn", study="s", tags={})
    (source,) = {found.source for found in held.client.search_model_versions("name = 'churn'")}
    for place in (source, held.client.get_run(held.run_id).info.artifact_uri):  # a process keeps its first answer; so it is asked, not used
        assert place.startswith(f"{here}/{held.run_id}/artifacts")
    assert (second / source.removeprefix((second.resolve()).as_uri() + "/") / "MLmodel").exists()
