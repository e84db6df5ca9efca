"""What was tried and what came of it, kept in MLflow: in SQLite under the home, or on a PostgreSQL server. Files stay under the home.

One parent run per search, one nested run per trial, one registered version per stored model version. Everything is looked up
before it is written, so a run that was killed and started again is counted once. Nothing that decides or serves reads MLflow.
"""

import logging
import shutil
import sqlite3
import subprocess
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from pydantic import SecretStr

from pipelines.errors import StoreError
from pipelines.registry import MANIFEST, Champion, champions
from pipelines.settings import silence_telemetry

if TYPE_CHECKING:
    import optuna
    from mlflow import MlflowClient

BOOSTER = "model.lgb"  # LightGBM's own text format
FLAVOR = "rapport"

# Where MLflow's tables say that files lie.
_PLACES = (
    ("experiments", "artifact_location"), ("runs", "artifact_uri"), ("model_versions", "source"), ("model_versions", "storage_location"),
)  # fmt: skip
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Run:
    """An open parent run."""

    client: "MlflowClient"
    name: str
    experiment_id: str
    run_id: str
    trials: set[int]  # numbers that already have a nested run


def open_run(home: Path, name: str, *, study: str, tags: Mapping[str, str], server: SecretStr | None = None) -> Run:
    """The parent run of `study`, found or created, with its tags set anew. Raises StoreError where a server cannot be used."""
    client = connect(home, server)
    experiment = client.get_experiment_by_name(name)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(name, artifact_location=_artifacts(home))
    found = client.search_runs([experiment_id], f"tags.study = '{study}'", max_results=1)
    run = found[0] if found else client.create_run(experiment_id, run_name=study, tags={"study": study})
    for key, value in tags.items():
        client.set_tag(run.info.run_id, key, value)
    return Run(client, name, experiment_id, run.info.run_id, _logged_trials(client, experiment_id, run.info.run_id))


def log_trial(run: Run, trial: "optuna.trial.FrozenTrial") -> None:
    """One nested run with the trial's parameters and losses, in three calls; nothing if it has one already.

    Its tag `state` says whether the trial is complete, pruned, or failed for want of a finite loss.
    """
    from mlflow.entities import Metric, Param

    if trial.number in run.trials:
        return
    now = int(time.time() * 1000)
    tags = {"mlflow.parentRunId": run.run_id, "trial": str(trial.number), "state": state(trial)}
    nested = run.client.create_run(run.experiment_id, run_name=f"trial-{trial.number}", tags=tags)
    params = [Param(key, str(value)) for key, value in trial.user_attrs.get("params", trial.params).items()]
    metrics = [] if trial.value is None else [Metric("loss", trial.value, now, trial.number)]
    metrics += [Metric("loss_so_far", value, now, step) for step, value in trial.intermediate_values.items()]
    run.client.log_batch(nested.info.run_id, metrics=metrics, params=params)
    run.client.set_terminated(nested.info.run_id)
    run.trials.add(trial.number)


def state(trial: "optuna.trial.FrozenTrial") -> str:
    """What became of a trial: complete; pruned, being behind at an origin; failed, its loss not being a number."""
    if trial.value is not None:
        return "complete"
    return "pruned" if trial.intermediate_values else "failed"


def tell_search(run: Run, trials: Sequence["optuna.trial.FrozenTrial"]) -> str:
    """What became of a search's trials, as a tag of its run: "12 trials: 8 complete, 4 pruned"."""
    states = Counter(state(trial) for trial in trials)
    told = f"{len(trials)} trials: {', '.join(f'{states[name]} {name}' for name in ('complete', 'pruned', 'failed') if states[name])}"
    run.client.set_tag(run.run_id, "search", told)
    return told


def close_run(run: Run, *, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    """The winner's parameters and the metrics of its test on the parent run, which ends. Once: a finished run stays as it is."""
    from mlflow.entities import Metric, Param

    if run.client.get_run(run.run_id).info.status == "FINISHED":
        return
    now = int(time.time() * 1000)
    run.client.log_batch(
        run.run_id,
        metrics=[Metric(key, float(value), now, 0) for key, value in metrics.items()],
        params=[Param(key, str(value)) for key, value in params.items()],
    )
    run.client.set_terminated(run.run_id)


def add_version(run: Run, stored: Champion, *, features: pd.DataFrame, output: pd.DataFrame) -> str:
    """Register the stored version under the same name, with a signature; returns MLflow's number for it.

    features, output: a few rows of what the model takes and gives. A version with the same `training_key` is that version.
    """
    key = str(stored.manifest.get("training_key", f"version-{stored.version}"))
    found = _version(run.client, stored.name, "training_key", key)
    if found is not None:
        return found
    _create_model(run.client, stored.name)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        _write_model(folder, stored, features=features, output=output, run_id=run.run_id)
        run.client.log_artifacts(run.run_id, str(folder), f"model-{stored.version}")
    source = f"{run.client.get_run(run.run_id).info.artifact_uri}/model-{stored.version}"
    tags = {"training_key": key, "rapport.version": str(stored.version)}
    version = run.client.create_model_version(stored.name, source, run_id=run.run_id, tags=tags)
    return str(version.version)


def follow_champion(home: Path, name: str, server: SecretStr | None = None) -> None:
    """Let MLflow's alias point at the champion, where MLflow has that version. The registry decides, MLflow shows.

    Where the server cannot be used a warning says so: who serves does not depend on it.
    """
    version = champions(home).get(name, {}).get("version")
    if version is None or (server is None and not _database(home).exists()):
        return
    try:
        client = connect(home, server)
    except StoreError as error:
        logging.getLogger("rapport.tracking").warning("%s is served in version %s, but MLflow does not show it: %s", name, version, error)
        return
    found = _version(client, name, "rapport.version", str(version))
    if found is not None:
        client.set_registered_model_alias(name, "champion", found)


def connect(home: Path, server: SecretStr | None = None) -> "MlflowClient":
    """A client of the server, else of the home's database, which is created on first use; no global MLflow state is touched.

    Raises StoreError where the server cannot be used.
    """
    silence_telemetry()
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # stderr belongs to the command line
    if server is not None:
        return _on_server(server)
    path = _database(home)
    is_new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    client = _client(f"sqlite:///{path.resolve()}")
    with closing(sqlite3.connect(path)) as db:
        if is_new:
            db.execute("PRAGMA journal_mode=WAL")  # stays with the file; writers then wait less for each other
        _follow_home(db, _artifacts(home))
    return client


def commit() -> dict[str, str]:
    """Tags that name the code: the commit of this product's own repository, "unknown" where it is installed without one."""
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != _ROOT:
        return {"git.commit": "unknown"}
    return {"git.commit": _git("rev-parse", "HEAD") or "unknown", "code.dirty": str(bool(_git("status", "--porcelain"))).lower()}


# -- private -----------------------------------------------------------------------------------------------------------


def _client(uri: str) -> "MlflowClient":
    from mlflow import MlflowClient

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*noload", category=DeprecationWarning)  # of MLflow's own mapping
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)  # the first call makes the tables where there are none
    return client


def _database(home: Path) -> Path:
    return home / "mlflow" / "mlflow.db"


def _artifacts(home: Path) -> str:
    return (home / "mlflow" / "artifacts").resolve().as_uri()


def _follow_home(db: sqlite3.Connection, here: str) -> None:
    """Let a home that was moved or copied keep its files in itself: MLflow wrote down where it lay, and has no call to change that."""
    moved = db.execute("SELECT DISTINCT artifact_location FROM experiments WHERE artifact_location LIKE 'file:%/mlflow/artifacts'")
    for (there,) in [row for row in moved if row[0] != here]:
        for table, column in _PLACES:
            db.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                (here, len(there) + 1, there, len(there) + 1, f"{there}/"),
            )
        db.commit()


def _on_server(server: SecretStr) -> "MlflowClient":
    import sqlalchemy
    from alembic.util.exc import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        engine = sqlalchemy.create_engine(server.get_secret_value())
        engine.connect().close()  # MLflow would try for an hour
        engine.dispose()
        return _client(server.get_secret_value())
    except ImportError as error:
        raise StoreError(f"tracking: training.tracking_url needs a driver that is not installed ({error}); install it") from error
    except CommandError:
        wanted = "a database of MLflow's own, another than that of training.study_url"
        raise StoreError(f"tracking: the database of training.tracking_url holds another program's tables; name {wanted}") from None
    except (SQLAlchemyError, MlflowException) as error:  # their words may hold the password
        raise StoreError(f"tracking: the server of training.tracking_url could not be used ({type(error).__name__}); see its log") from None


def _logged_trials(client: "MlflowClient", experiment_id: str, parent: str) -> set[int]:
    """Trials with a whole nested run; a half-written one is removed, to be written again."""
    numbers: set[int] = set()
    token: str | None = None
    while True:
        page = client.search_runs([experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'", max_results=1_000, page_token=token)
        for run in page:
            if run.info.status == "FINISHED":
                numbers.add(int(run.data.tags["trial"]))
            else:
                client.delete_run(run.info.run_id)
        token = page.token
        if not token:
            return numbers


def _version(client: "MlflowClient", name: str, tag: str, value: str) -> str | None:
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.tags.get(tag) == value:
            return str(version.version)
    return None


def _create_model(client: "MlflowClient", name: str) -> None:
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)


def _write_model(folder: Path, stored: Champion, *, features: pd.DataFrame, output: pd.DataFrame, run_id: str) -> None:
    """The stored files with an MLmodel beside them; requirements are given, since to infer them takes half a minute."""
    from mlflow.models import Model, infer_signature

    shutil.copytree(stored.folder, folder)
    model = Model(artifact_path=f"model-{stored.version}", run_id=run_id, signature=infer_signature(_open_types(features), output))
    if (folder / BOOSTER).exists():
        import lightgbm

        model.add_flavor("lightgbm", data=BOOSTER, lgb_version=lightgbm.__version__, model_class="lightgbm.basic.Booster", code=None)
    model.add_flavor(FLAVOR, learner=stored.manifest.get("learner"), manifest=MANIFEST, version=stored.version)
    model.save(str(folder / "MLmodel"))
    (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in stored.manifest.get("requirements", [])))


def _open_types(features: pd.DataFrame) -> pd.DataFrame:
    """Numbers as doubles and the rest as text: a whole-number column may hold nulls tomorrow, a category new values."""
    return pd.DataFrame(
        {
            name: column.astype("float64") if pd.api.types.is_numeric_dtype(column) else column.astype("object").fillna("").astype(str)
            for name, column in features.items()
        }
    )


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
