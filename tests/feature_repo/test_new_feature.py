"""A new feature is one declaration: in a copy of the declarations it is added, applied, built, materialised, framed and read online."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import feature_repo

pytestmark = pytest.mark.slow

REPOSITORY = Path(feature_repo.__file__).parents[1]
DECLARED = '        Sum("returns", types=("return",), has_total=True),\n'
NEW = '        Sum("searches", types=("search",), windows=("7d",)),\n        Sum("searched", types=("search",), windows=("24h",)),\n'
RATIO = '    Ratio("cart_to_view", "cart_adds_total", "views_total"),\n'
NEW_RATIO = '    Ratio("searches_share_24h", "searched_24h", "searches_7d"),\n'

# What a data scientist does, in a process of its own that sees the copy.
SCRIPT = """
import json, sys
from datetime import timedelta
from pathlib import Path
import pandas as pd
import pyarrow as pa
from pipelines import feature_store, features, tables
from pipelines.tiles import Tiles
from pipelines.windows import CUSTOMER_ACTIVITY

home, at = Path(sys.argv[1]), pd.Timestamp("2025-01-01", tz="UTC")
when = [at, at + timedelta(days=2), at + timedelta(days=2, hours=1)]
rows = pd.DataFrame({"event_timestamp": when, "created_timestamp": when, "received_timestamp": when, "type": ["search", "search", "view"]})
rows = rows.assign(customer_id="c1", item_id="i1")
tables.write(home, tables.EVENTS, pa.Table.from_pandas(rows.reindex(columns=tables.EVENTS.schema.names), tables.EVENTS.schema))
tables.write(home, tables.CUSTOMER_PROFILE, tables.CUSTOMER_PROFILE.schema.empty_table())
features.build(home)
feature_store.apply(home)
now = at + timedelta(days=2, hours=2)
feature_store.materialize(home, as_of=now)
frame = feature_store.training_frame(home, pd.DataFrame({"customer_id": ["c1"], "event_timestamp": [now]}), service="churn_v1")
wanted = ["customer_activity:searches_7d", "customer_activity:searched_24h"]
online = feature_store.store(home).get_online_features(wanted, [{"customer_id": "c1"}]).to_dict()
state = Tiles(CUSTOMER_ACTIVITY)
for row in rows.to_dict("records"):
    us = row["event_timestamp"].value // 1000
    nulls = dict.fromkeys(("order_id", "session_id", "price_cents", "revenue_cents"))
    state.add({"type": row["type"], "ts": us, "item_id": "i1", **nulls}, us)
print(json.dumps({
    "frame": frame.iloc[0][["searches_7d", "searched_24h", "searches_share_24h"]].tolist(),
    "online": [online["searches_7d"][0], online["searched_24h"][0]],
    "stream": [state.values()["searches_7d"], state.values()["searched_24h"]],
}))
"""


def copied(tmp_path: Path, **edits: tuple[str, str]) -> Path:
    """The packages with the declarations edited: `old` replaced by `new`."""
    for name in ("feature_repo", "pipelines"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "feature_repo" / "aggregates.py"
    text = path.read_text()
    for old, new in edits.values():
        assert text.count(old) == 1
        text = text.replace(old, new)
    path.write_text(text)
    return tmp_path


def run(root: Path) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAPPORT_")} | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(root / "home")]
    return subprocess.run(command, cwd=root, env=clean, capture_output=True, text=True, timeout=300, check=False)


def test_one_line_makes_a_feature_that_is_built_trained_with_and_served(tmp_path):
    done = run(copied(tmp_path, counts=(DECLARED, DECLARED + NEW), ratio=(RATIO, RATIO + NEW_RATIO)))
    assert done.returncode == 0, done.stderr[-2_000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"frame": [2.0, 1.0, 0.5], "online": [2, 1], "stream": [2, 1]}


def test_without_the_line_the_feature_is_nowhere(tmp_path):
    """Control."""
    done = run(copied(tmp_path))
    assert done.returncode != 0
    assert "searches_7d" in done.stderr
