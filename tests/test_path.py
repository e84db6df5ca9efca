"""A small shop walked from raw event to served decision, through the front door a user would take."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import tables

ROOT = Path(__file__).parents[1]
CUSTOMERS = 700

pytestmark = pytest.mark.slow


def rapport(*words, env, timeout=900):
    return subprocess.run(
        [sys.executable, str(ROOT / "rapport.py"), *words], env=env, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.fixture(scope="module")
def walked(guarded, tmp_path_factory):
    """The whole loop once, with every process guarded; what it printed and where it wrote."""
    home = tmp_path_factory.mktemp("walk") / "home"
    env = guarded | {"RAPPORT_HOME": str(home)}
    words = ("demo", "--customers", str(CUSTOMERS), "--trials", "2", "--no-serve", "--json")
    done = rapport(*words, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return {"home": home, "env": env, "words": words, "result": json.loads(done.stdout.splitlines()[-1]), "stderr": done.stderr}


def test_demo_prints_what_other_programs_read(walked):
    result = walked["result"]
    assert {"events", "models", "latency_ms", "reports", "urls", "took_s"} <= set(result)
    assert {"accepted", "duplicate", "quarantined"} <= set(result["events"])
    assert set(result["models"]) == {"churn", "intent", "recommender"}
    assert set(result["latency_ms"]) == {"/recommend", "/churn", "/intent"}
    for latency in result["latency_ms"].values():
        assert 0 < latency["p50"] <= latency["p99"]
    for model in result["models"].values():
        assert model["trainable"] is True
        assert {"metric", "value", "rival", "rival_value", "optimum", "version"} <= set(model)


def test_no_process_of_the_loop_connects_outside(walked):
    assert Path(walked["env"]["CONNECTIONS_LOG"]).read_text() == ""


def test_guard_sees_a_connection_when_there_is_one(guarded, tmp_path):
    env = guarded | {"CONNECTIONS_LOG": str(tmp_path / "log")}
    attempt = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"
    assert subprocess.run([sys.executable, "-c", attempt], env=env, capture_output=True, check=False).returncode != 0
    assert "192.0.2.1" in (tmp_path / "log").read_text()


def test_every_line_received_is_accounted_for(walked):
    received = (walked["home"] / "raw" / "events.jsonl").read_bytes().count(b"\n")
    events = walked["result"]["events"]
    assert events["accepted"] + events["duplicate"] + events["quarantined"] == received
    assert events["duplicate"] > 0
    assert events["quarantined"] == tables.count(walked["home"], tables.QUARANTINE) > 0


def test_models_are_ahead_of_their_rivals_and_not_above_the_optimum(walked):
    models = walked["result"]["models"]
    assert models["churn"]["value"] > models["churn"]["rival_value"]
    assert models["recommender"]["value"] > models["recommender"]["rival_value"]
    for model in models.values():
        assert model["value"] <= model["optimum"] + 0.03  # one small draw of labels


def test_second_run_repeats_no_step_and_counts_nothing_twice(walked):
    again = rapport(*walked["words"], env=walked["env"])
    assert again.returncode == 0, again.stderr[-3000:]
    steps = [line for line in again.stderr.splitlines() if line.endswith(("unchanged", " s"))]
    assert len(steps) == 13, steps
    assert all(line.endswith("unchanged") for line in steps), steps
    result = json.loads(again.stdout.splitlines()[-1])
    assert result["events"] == walked["result"]["events"]
    assert {n: m["version"] for n, m in result["models"].items()} == {n: m["version"] for n, m in walked["result"]["models"].items()}


def test_champions_are_registered_with_signature_data_hash_and_commit(walked):
    script = """
import json, mlflow
client = mlflow.MlflowClient()
found = {}
for name in ("churn", "intent", "recommender"):
    version = client.get_model_version_by_alias(name, "champion")
    run = client.get_run(version.run_id)
    info = mlflow.models.get_model_info(f"models:/{name}/{version.version}")
    trials = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{version.run_id}'")
    tags = run.data.tags | version.tags
    found[name] = {"tags": tags, "metrics": run.data.metrics, "signed": info.signature is not None, "trials": len(trials)}
print(json.dumps(found))
"""
    uri = f"sqlite:///{walked['home']}/mlflow/mlflow.db"
    env = walked["env"] | {"MLFLOW_TRACKING_URI": uri, "MLFLOW_REGISTRY_URI": uri}
    done = subprocess.run([sys.executable, "-c", script], env=env, cwd=walked["home"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, version in json.loads(done.stdout.splitlines()[-1]).items():
        assert version["signed"], name
        assert version["trials"] == 2, name
        assert version["metrics"], name
        assert {"data.sha256", "git.commit"} <= set(version["tags"]), name


def test_known_customer_is_served_personally_and_a_stranger_gets_what_is_popular(walked, monkeypatch):
    import httpx

    from pipelines.settings import Settings
    from serving import process

    monkeypatch.setenv("RAPPORT_HOME", str(walked["home"]))
    known = tables.read(walked["home"], tables.RECOMMENDATIONS, ["customer_id"])["customer_id"].iloc[0]
    key = (walked["home"] / "keys" / "decide.key").read_text().strip()
    with process.start(Settings(serving={"port": 0})) as service, httpx.Client(base_url=service.url) as client:
        client.headers["Authorization"] = f"Bearer {key}"
        personal = client.post("/recommend", json={"customer_id": known, "k": 5}).json()
        stranger = client.post("/recommend", json={"customer_id": "nobody", "k": 5}).json()
        churn = client.post("/churn", json={"customer_ids": [known]}).json()
        refused = httpx.post(f"{service.url}/churn", json={"customer_ids": [known]})
    assert personal["source"] == "personal"
    assert len(personal["items"]) == 5
    assert stranger["source"] == "popular"
    assert len(stranger["items"]) == 5
    assert churn["source"] == "personal"
    assert 0 <= churn["predictions"][0]["probability"] <= 1
    assert refused.status_code == 401


def test_reports_open_without_the_network(walked):
    for name in ("drift", "bias"):
        page = (walked["home"] / "reports" / f"{name}.html").read_text()
        assert "<html" in page.lower()
        assert json.loads((walked["home"] / "reports" / f"{name}.json").read_text())["verdict"] in {"ok", "alarm", "not_enough_data"}


def test_killed_run_resumes_without_repeating_or_losing(guarded, tmp_path):
    env = guarded | {"RAPPORT_HOME": str(tmp_path / "home"), "RAPPORT_SIMULATION__DAYS": "60"}
    words = [sys.executable, str(ROOT / "rapport.py"), "demo", "--customers", "100", "--trials", "1", "--no-serve", "--json"]
    with subprocess.Popen(
        words, env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        for line in run.stderr:
            if line.startswith("ingest"):
                time.sleep(0.3)  # somewhere inside the next step
                os.killpg(run.pid, signal.SIGKILL)
                break
    before = tables.count(tmp_path / "home", tables.EVENTS)
    done = rapport("features", "build", env=env)
    assert done.returncode == 0, done.stderr
    assert tables.count(tmp_path / "home", tables.EVENTS) == before > 0
    assert tables.count(tmp_path / "home", tables.CUSTOMER_ACTIVITY) > 0
    assert not [p for p in (tmp_path / "home" / "tables").iterdir() if p.suffix == ".link"]
