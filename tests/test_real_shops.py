"""The loop over real event files: it finishes, trains what the data can carry, says why where it cannot, and serves either way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from pipelines.vault import open_vault

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def demo(events, mapping, home):
    words = ("demo", "--events", str(events), "--mapping", mapping, "--trials", "1", "--no-serve", "--json")
    quick = {
        "RAPPORT_TRAINING__BOOTSTRAP_DRAWS": "100",
        "RAPPORT_TRAINING__RANKING_CUTOFFS": "2",
        "RAPPORT_MONITORING__SAMPLE_ROWS": "1000",
    }
    open_vault(home).close()  # whose names are the same in every run: in which order people come decides a little of what is learned
    env = os.environ | quick | {"RAPPORT_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "rapport.py"), *words], env=env, cwd=home, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def part_of(path, to, *, customer, nth, item, at_least):
    """The lines of every nth customer, and of nobody, with items that stand in so many of them."""
    whole = pd.read_parquet(path)
    some = whole[whole[customer].isna() | (whole[customer] % nth == 0)]
    some[some.groupby(item)[item].transform("size") >= at_least].to_parquet(to, index=False)
    return to


def test_retailrocket_runs_through_the_loop_as_of_its_last_event(shared_data, tmp_path):
    path = shared_data / "retailrocket_subset" / "events.parquet"
    events = part_of(path, tmp_path / "events.parquet", customer="visitorid", nth=3, item="itemid", at_least=1)
    result = demo(events, "retailrocket", tmp_path)
    assert result["events"] == {"accepted": 32_913, "duplicate": 0, "quarantined": 0, "consent_dropped": 0}
    assert json.loads((tmp_path / "clock.json").read_text())["as_of"].startswith("2015-09-18")
    churn, intent, recommender = (result["models"][name] for name in ("churn", "intent", "recommender"))
    assert churn["trainable"] is False
    assert "20 of each class" in churn["why"]
    assert intent["trainable"] is False
    assert "725 of the log's 725 customers are buyers" in intent["why"]
    assert recommender["value"] > recommender["rival_value"]
    assert result["latency_ms"]["/intent"]["p50"] > 0  # its endpoint answers all the same


def test_online_retail_runs_through_the_loop_with_its_returns_and_lines_without_customer(shared_data, tmp_path):
    path = shared_data / "online_retail" / "online_retail.parquet"
    events = part_of(path, tmp_path / "events.parquet", customer="CustomerID", nth=12, item="StockCode", at_least=100)
    lines = pd.read_parquet(events)
    known = lines.dropna(subset="CustomerID")
    accepted = len(known.drop_duplicates())
    assert accepted < len(known)  # control: some lines are there twice
    result = demo(events, "online_retail", tmp_path)
    assert result["events"] == {
        "accepted": accepted,
        "duplicate": len(known) - accepted,
        "quarantined": len(lines) - len(known),
        "consent_dropped": 0,
    }
    assert result["models"]["churn"]["value"] > result["models"]["churn"]["rival_value"]
    assert result["models"]["recommender"]["low"] > 0
    assert result["models"]["intent"]["trainable"] is False
    assert "no view" in result["models"]["intent"]["why"]
