"""The loop over real event files: it finishes, trains what the data can carry, says why where it cannot, and serves either way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def demo(events, mapping, home):
    words = ("demo", "--events", str(events), "--mapping", mapping, "--trials", "1", "--no-serve", "--json")
    quick = {
        "RAPPORT_TRAINING__BOOTSTRAP_DRAWS": "100",
        "RAPPORT_TRAINING__RANKING_CUTOFFS": "2",
        "RAPPORT_MONITORING__SAMPLE_ROWS": "1000",
    }
    env = os.environ | quick | {"RAPPORT_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "rapport.py"), *words], env=env, cwd=home, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_retailrocket_runs_through_the_loop_as_of_its_last_event(shared_data, tmp_path):
    result = demo(shared_data / "retailrocket_subset" / "events.parquet", "retailrocket", tmp_path)
    assert result["events"] == {"accepted": 97_381, "duplicate": 0, "quarantined": 0, "consent_dropped": 0}
    assert json.loads((tmp_path / "clock.json").read_text())["as_of"].startswith("2015-09-18")
    churn, intent = result["models"]["churn"], result["models"]["intent"]
    assert churn["value"] > churn["rival_value"]  # the recency rule; one trial and 100 draws do not carry the interval clear of it
    assert intent["trainable"] is False
    assert "2,174 of the log's 2,174 customers are buyers" in intent["why"]
    assert result["models"]["recommender"]["value"] > result["models"]["recommender"]["rival_value"]
    assert result["latency_ms"]["/intent"]["p50"] > 0  # its endpoint answers all the same


def test_online_retail_runs_through_the_loop_with_its_returns_and_lines_without_customer(shared_data, tmp_path):
    result = demo(shared_data / "online_retail" / "online_retail.parquet", "online_retail", tmp_path)
    assert result["events"] == {"accepted": 401_604, "duplicate": 5_225, "quarantined": 135_080, "consent_dropped": 0}
    for name in ("churn", "recommender"):
        assert result["models"][name]["low"] > 0, name
    assert result["models"]["intent"]["trainable"] is False
    assert "no view" in result["models"]["intent"]["why"]
