"""What the page shows is what the JSON says; both are whole files, and the page needs no network."""

import json
import re
import subprocess
import sys
from datetime import UTC, datetime
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from monitoring import bias, drift, reports
from pipelines import tables
from pipelines.settings import MonitoringSettings, Settings

AS_OF = datetime(2025, 7, 1, tzinfo=UTC)
SETTINGS = Settings(monitoring=MonitoringSettings(sample_rows=1_000))


def shop(rng, n):
    price = rng.lognormal(8, 1, n)
    price[:3] = np.nan, np.inf, -np.inf
    frame = pd.DataFrame(
        {
            "customer_id": np.arange(n).astype(str),
            "event_timestamp": pd.Series([AS_OF] * n, dtype="datetime64[us, UTC]"),
            "revenue_cents_30d": price,
            "purchases_total": rng.poisson(8, n),
            "region": rng.choice(["north", "south", None], n),
            "gender": rng.choice(["f", "m"], n),
            "is_new": rng.random(n) < 0.1,
            "all_null": np.nan,
            "constant": 1,
            "label": (rng.random(n) < 0.3).astype(int),
            "probability": rng.beta(2, 5, n),
        }
    )
    return frame.assign(probability=np.where(frame["gender"] == "f", frame["probability"] * 0.3, frame["probability"]))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A judged home: the price has risen, women are scored lower, intent was never trained. Evidently costs seconds, so once."""
    home, rng = tmp_path_factory.mktemp("home"), np.random.default_rng(5)
    splits = [shop(rng, 1_500).assign(split=name) for name in ("train", "validation", "test")]
    tables.write(home, tables.TRAINING_CHURN, pd.concat(splits, ignore_index=True))
    now = shop(rng, 2_000).drop(columns=["label"])
    tables.write(
        home, tables.SCORED_CHURN, now.assign(revenue_cents_30d=now["revenue_cents_30d"] * 1.5, purchases_total=now["purchases_total"] * 2)
    )
    kept, (write_drift, write_bias) = SimpleNamespace(path=home), (reports.write_drift, reports.write_bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reports, "write_drift", lambda *a, **k: setattr(kept, "drift_snapshots", write_drift(*a, **k)))
        patch.setattr(reports, "write_bias", lambda *a, **k: setattr(kept, "bias_snapshots", write_bias(*a, **k)))
        kept.drift = drift.run(home, settings=SETTINGS, as_of=AS_OF)
        kept.bias = bias.run(home, settings=SETTINGS, as_of=AS_OF)
    return kept


def stored(home, name):
    return json.loads((home.path / "reports" / f"{name}.json").read_text())


def page(home, name):
    return (home.path / "reports" / f"{name}.html").read_text()


def rows(value):
    """A stored data frame as its rows, missing figures as None."""
    frame = pd.DataFrame(value)
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def metrics(snapshot, kind):
    return [m for m in json.loads(snapshot.json())["metrics"] if m["config"]["type"].endswith(kind)]


def test_the_fixture_alarms_where_it_was_planted(home):
    assert home.drift.subjects["churn"].drifted == ("revenue_cents_30d",)
    assert home.drift.subjects["churn"].ageing.keys() == {"purchases_total"}
    assert {m.attribute for m in home.bias.subjects["churn"].metrics if m.verdict == "alarm"} == {"gender"}
    assert home.drift.verdict == home.bias.verdict == "alarm"


def test_every_limit_that_a_column_is_judged_by_stands_in_the_page(home):
    limits = SETTINGS.monitoring
    for said in (
        f"PSI from {limits.psi_limit:g}",
        f"W1 from {limits.w1_limit:g}",
        f"by {limits.null_limit:.0%}",
        f"at most {drift.ALPHA:g}",
    ):
        assert said in page(home, "drift")


def test_the_drift_snapshot_holds_the_numbers_of_the_json(home):
    (found,) = metrics(home.drift_snapshots[0], "DriftVerdicts")
    assert rows(found["value"]) == stored(home, "drift")["subjects"]["churn"]["columns"]


def test_evidentlys_drift_score_is_our_effect_for_every_column_drawn(home):
    expected = {c["column"]: c["effect"] for c in stored(home, "drift")["subjects"]["churn"]["columns"]}
    found = {m["config"]["column"]: m["value"] for m in metrics(home.drift_snapshots[0], "ValueDrift")}
    assert set(expected) - set(found) == {"all_null"}  # nothing to draw
    assert found == {name: pytest.approx(expected[name]) for name in found}


def test_the_bias_snapshot_holds_the_numbers_of_the_json(home):
    found = [row for metric in metrics(home.bias_snapshots[0], "GroupFairness") for row in rows(metric["value"])]
    assert found == stored(home, "bias")["subjects"]["churn"]["metrics"]


def test_missing_values_are_counted_in_samples_of_the_asked_size(home):
    for snapshot, columns in ((home.drift_snapshots[0], {"region", "revenue_cents_30d"}), (home.bias_snapshots[0], {"region", "gender"})):
        found = {m["config"]["column"]: m["value"] for m in metrics(snapshot, "MissingValueCount")}
        assert columns <= set(found)
        assert found["region"]["count"] / found["region"]["share"] == pytest.approx(1_000)


@pytest.mark.parametrize("name", ["drift", "bias"])
def test_the_page_carries_verdicts_and_figures_of_the_json(home, name):
    html, subject = page(home, name), stored(home, name)["subjects"]["churn"]
    assert f"<title>Rapport: {name}</title>" in html
    assert subject["why"][1:] in html
    for row in subject["columns"] if name == "drift" else subject["metrics"]:
        value = row["effect" if name == "drift" else "value"]
        assert value is None or (f"{value:.3g}" if name == "drift" else f"{value:.3f}") in html
    assert "training_intent" in html  # what was not judged is said on the page


@pytest.mark.parametrize("name", ["drift", "bias"])
def test_the_page_loads_nothing_from_outside(home, name):
    html = page(home, name)
    loaded = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*(?:src|href)\s*=|(?:@import|url\()\s*(?:url\()?["']?(?:https?:)?//""")
    outside = [m.group(0) for m in loaded.finditer(html)]
    assert outside == []
    assert loaded.search('<script src="https://cdn.example/x.js">')  # the control
    assert loaded.search("url(//cdn.example/font.woff2)")


def test_the_same_content_gives_the_same_sample():
    frame = pd.DataFrame({"x": np.arange(5_000)})
    first, again, other = (reports._sample(frame, 100, reports._seed("churn", content)) for content in ("a", "a", "b"))
    pd.testing.assert_frame_equal(first, again)
    assert not first.equals(other)


def test_a_home_with_nothing_to_judge_still_gets_a_page(tmp_path):
    for run in (drift.run, bias.run):
        run(tmp_path, settings=SETTINGS, as_of=AS_OF)
    for name in ("drift", "bias"):
        assert "was not judged: training_churn" in (tmp_path / "reports" / f"{name}.html").read_text()
    assert sorted(p.name for p in (tmp_path / "reports").iterdir()) == ["bias.html", "bias.json", "drift.html", "drift.json"]


def test_a_failed_write_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "x.json"
    reports.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        reports.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_what_could_be_judged_outweighs_what_could_not():
    assert reports.worst(["not_enough_data", "ok"]) == "ok"
    assert reports.worst(["ok", "alarm", "drift"]) == "alarm"
    assert reports.worst([]) == "not_enough_data"


def test_importing_the_monitors_does_not_load_evidently():
    code = "import sys, monitoring.drift, monitoring.bias, monitoring.reports; print({'evidently', 'fairlearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
