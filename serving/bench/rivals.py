"""Two plain ways to serve the same models, as their own documentation shows them, started as servers of their own.

In: a home with champions. Out: running servers. `Plain` is a BentoML service in its usual configuration that reads features through
Feast's SDK and asks LightGBM's scikit-learn wrapper with a DataFrame; the other is `mlflow models serve` with the same booster. Both run
with one thread each, without which they would be far slower. The files are written into a folder that the caller removes.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from models.classifier import Classifier
from pipelines import registry
from pipelines.settings import QUIET_ENVIRONMENT
from serving.companions import RUN
from serving.process import THREADS, ServiceError

START_S = 240.0
CANDIDATES = 100
_ROOT = Path(__file__).resolve().parents[2]

_PLAIN = '''
import json
from pathlib import Path

import bentoml
import lightgbm as lgb
import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.preprocessing import LabelEncoder

from models.silence import ROLES, Silence
from pipelines import windows
from serving.profile import feature_store

HOME, FOLDER, AT = Path({home!r}), Path({folder!r}), pd.Timestamp({at!r})


def wrapped(kind, path):
    """LightGBM's scikit-learn wrapper around trees that are there."""
    model = kind()
    model._Booster = lgb.Booster(model_file=str(path))
    model._n_features = model._n_features_in = model._Booster.num_feature()
    model.fitted_ = True
    if kind is lgb.LGBMClassifier:
        model._n_classes, model._objective = 2, "binary"
        model._le = LabelEncoder().fit([0, 1])
        model._classes, model._class_map = model._le.classes_, {{0: 0, 1: 1}}
    return model


@bentoml.service
class Plain:
    def __init__(self):
        self.store = feature_store(HOME)
        told = json.loads((FOLDER / "classifier.json").read_text())
        self.names, self.categories, (self.slope, self.intercept) = told["feature_names"], told["categories"], told["calibration"]
        self.silence, self.history = told["silence"] and Silence.from_json(told["silence"]), told["params"]["history"] or {{}}
        self.model = wrapped(lgb.LGBMClassifier, FOLDER / "model.lgb")
        self.features = self.store.get_feature_service({service!r})
        if (FOLDER / "items.npy").exists():
            from implicit.cpu.als import AlternatingLeastSquares

            items, customers = np.load(FOLDER / "items.npy"), np.load(FOLDER / "customers.npy")
            self.als = AlternatingLeastSquares(factors=items.shape[1], num_threads=1)
            self.als.item_factors, self.als.user_factors = items, customers
            self.rows = {{name: row for row, name in enumerate(np.load(FOLDER / "customer_ids.npy").tolist())}}
            self.item_ids = np.load(FOLDER / "item_ids.npy")
            self.nothing = sparse.csr_matrix((1, len(items)), dtype=np.float32)
            self.ranker = wrapped(lgb.LGBMRanker, FOLDER / "ranker.lgb") if (FOLDER / "ranker.lgb").exists() else None
            self.columns = self.ranker._Booster.feature_name() if self.ranker else []

    @bentoml.api
    def churn(self, customer_ids: list[str]) -> dict:
        rows = self.store.get_online_features(features=self.features, entity_rows=[{{"customer_id": c}} for c in customer_ids]).to_df()
        frame = windows.derive(rows.drop(columns="customer_id"), AT.to_pydatetime())[self.names]
        for name, values in self.categories.items():
            frame[name] = frame[name].map({{value: float(code) for code, value in enumerate(values)}}).astype(float)
        p = self.model.predict_proba(frame.astype(float))[:, 1]
        raw = np.log(p / (1 - p))
        if self.silence:
            raw += self.silence.logit(frame[[self.history[role] for role in ROLES]].to_numpy(float))
        logit = self.slope * raw + self.intercept
        return {{"predictions": [
            {{"customer_id": c, "probability": float(v)}} for c, v in zip(customer_ids, 1 / (1 + np.exp(-logit)))
        ]}}

    @bentoml.api
    def recommend(self, customer_id: str, k: int = 10) -> dict:
        self.store.get_online_features(features=self.features, entity_rows=[{{"customer_id": customer_id}}]).to_df()
        found, scores = self.als.recommend(
            self.rows[customer_id], self.nothing, N={candidates}, filter_already_liked_items=False
        )
        if self.ranker is not None:
            frame = pd.DataFrame(np.nan, index=range(len(found)), columns=self.columns)
            frame["factors_score"], frame["factors_rank"] = scores, np.arange(1, len(found) + 1)
            scores = self.ranker.predict(frame)
        best = np.argsort(-scores)[:k]
        return {{"items": [{{"item_id": str(self.item_ids[found[i]]), "score": float(scores[i])}} for i in best]}}
'''


@dataclass(frozen=True)
class Rival:
    """A running server. `headers`: what every request to it carries."""

    child: "subprocess.Popen[bytes]"
    host: str
    port: int
    headers: Mapping[str, str]


def write_plain(home: Path, folder: Path, *, at: str, has_recommender: bool = True) -> None:
    """The plain BentoML service of the home's champions, as `service.py` and the files that it loads."""
    folder.mkdir(parents=True)
    champion = registry.load_champion(home, "churn")
    for name in ("model.lgb", "classifier.json"):
        shutil.copy(champion.folder / name, folder)
    if has_recommender:
        other = registry.load_champion(home, "recommender").folder
        for name, to in (
            ("item_factors", "items"),
            ("customer_factors", "customers"),
            ("customer_ids", "customer_ids"),
            ("item_ids", "item_ids"),
        ):
            shutil.copy(other / f"{name}.npy", folder / f"{to}.npy")
        trees = other / "second_stage" / "all_items" / "ranker.lgb"
        if trees.exists():
            shutil.copy(trees, folder)
    service = champion.manifest.get("feature_service", "churn_v1")
    text = _PLAIN.format(home=str(home.resolve()), folder=str(folder.resolve()), at=at, service=service, candidates=CANDIDATES)
    (folder / "service.py").write_text(text)


def write_mlflow(home: Path, folder: Path) -> None:
    """The churn champion's booster as a model of MLflow's, with a signature."""
    import lightgbm
    import mlflow.lightgbm
    import numpy as np
    import pandas as pd
    from mlflow.models import infer_signature

    champion = registry.load_champion(home, "churn")
    learner = Classifier.load(champion.folder)
    rows = pd.DataFrame(np.zeros((2, len(learner.feature_names_))), columns=learner.feature_names_)
    signature = infer_signature(rows, np.zeros(2))
    wanted = [f"lightgbm=={lightgbm.__version__}"]
    mlflow.lightgbm.save_model(learner.booster_, path=str(folder), signature=signature, pip_requirements=wanted)


@contextlib.contextmanager
def plain(folder: Path) -> Iterator[Rival]:
    """BentoML's usual server over what `write_plain` wrote; not waited for, see `wait_for`."""
    port = _free_port()
    command = ["bentoml", "serve", "service:Plain", "--working-dir", ".", "--host", "127.0.0.1", "--port", str(port)]
    with _child(command, folder, port, path=str(_ROOT)) as rival:
        yield rival


@contextlib.contextmanager
def mlflow_serve(folder: Path) -> Iterator[Rival]:
    """`mlflow models serve` over what `write_mlflow` wrote; not waited for, see `wait_for`."""
    port = _free_port()
    command = ["mlflow", "models", "serve", "-m", ".", "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    with _child([*command, "--workers", "1"], folder, port, path="") as rival:
        yield rival


def wait_for(rival: Rival, path: str, body: bytes) -> bytes:
    """Its first answer with 200. Raises ServiceError where it ended, or the time is up."""
    until = time.monotonic() + START_S
    found = "nothing"
    while time.monotonic() < until and rival.child.poll() is None:
        with contextlib.suppress(OSError, HTTPException):
            status, answer = ask(rival, path, body)
            if status == 200:
                return answer
            found = f"{status} {answer[:300].decode(errors='replace')}"
        time.sleep(0.2)
    raise ServiceError(f"bench: a rival did not answer {path} in {START_S:g} s (last: {found}); its log lies beside its files")


def ask(rival: Rival, path: str, body: bytes) -> tuple[int, bytes]:
    """Status and body of one request."""
    connection = HTTPConnection(rival.host, rival.port, timeout=30.0)
    with contextlib.closing(connection):
        connection.request("POST", path, body=body, headers=dict(rival.headers))
        response = connection.getresponse()
        return response.status, response.read()


def rows_of(matrix: list[list[float | None]], names: list[str]) -> str:
    """A request of `mlflow models serve` with these rows, null where a value is missing."""
    return json.dumps({"dataframe_split": {"columns": names, "data": matrix}})


@contextlib.contextmanager
def _child(command: list[str], folder: Path, port: int, *, path: str) -> Iterator[Rival]:
    variables = {
        **os.environ,
        **QUIET_ENVIRONMENT,
        **dict.fromkeys(THREADS, "1"),
        "BENTOML_HOME": str(folder / "bentoml"),
        "PYTHONPATH": path,
        "PYTHONSAFEPATH": "1",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/tracking.db",
    }
    with (folder / "rival.log").open("wb") as sink:
        child = subprocess.Popen(
            [sys.executable, "-c", RUN, " ".join(command), str(os.getpid())],
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Rival(child, "127.0.0.1", port, {"Content-Type": "application/json"})
    finally:
        _end(child)


def _end(child: "subprocess.Popen[bytes]") -> None:
    """End it and what it started: they share a process group."""
    for how, patience_s in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(patience_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
