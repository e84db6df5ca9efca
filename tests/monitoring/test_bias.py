"""Not unfair by accident: fair worlds pass at every size, planted gaps are found, and small groups are named."""

import json
from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from monitoring import bias, reports
from pipelines import registry, tables
from pipelines.errors import RegistryError
from pipelines.settings import MonitoringSettings, Settings

LIMITS = MonitoringSettings()
AS_OF = datetime(2025, 7, 1, tzinfo=UTC)


def world(rng, n, *, gap=0.0):
    """Four groups, one of them 1 %; a calibrated score. `gap`: that much is taken from the score of the second group."""
    group = rng.choice(["a", "b", "c", "d"], n, p=[0.5, 0.3, 0.19, 0.01])
    chance = rng.beta(2, 3, n)
    frame = pd.DataFrame({"customer_id": np.arange(n), "region": group, "label": (rng.random(n) < chance).astype(int)})
    return frame.assign(probability=chance - gap * (group == "b"))


def judged(frame, protected=("region",), threshold=0.4, **options):
    return bias.judge(frame, protected, threshold=threshold, settings=LIMITS, **options)


def found(report, group, metric, attribute="region"):
    return next(m for m in report.metrics if (m.attribute, m.group, m.metric) == (attribute, group, metric))


@pytest.fixture
def rng():
    return np.random.default_rng(33)


@pytest.mark.parametrize(("n", "worlds"), [(1_000, 40), (5_000, 20), (50_000, 3)])
def test_a_fair_model_passes_at_every_size(rng, n, worlds):
    assert sum(judged(world(rng, n)).verdict == "alarm" for _ in range(worlds)) <= worlds // 50


def test_gaps_alone_would_flag_the_same_fair_worlds(rng):
    """The control of the test above: without intervals and a smallest group, most fair worlds show a gap beyond the tolerated one."""
    loose = LIMITS.model_copy(update={"min_group": 30, "min_group_positives": 5})
    reports_of_fair = [bias.judge(world(rng, 4_000), ["region"], threshold=0.4, settings=loose) for _ in range(6)]
    shown = [max(abs(m.gap) for m in r.metrics if m.gap is not None) for r in reports_of_fair]
    assert np.mean(np.array(shown) > LIMITS.tolerated_gap) > 0.3


def test_a_planted_gap_of_15_points_fails_with_its_group_named(rng):
    report = judged(world(rng, 50_000, gap=0.15))
    assert report.verdict == "alarm"
    assert report.verdict == "alarm"
    for metric in ("selection_rate", "true_positive_rate", "calibration"):
        assert found(report, "b", metric).verdict == "alarm"
    assert found(report, "b", "auc").verdict == "ok"  # the order inside the group is untouched
    assert found(report, "b", "calibration").gap == pytest.approx(0.15, abs=0.02)
    assert "beyond 0.1" in found(report, "b", "selection_rate").why


def test_a_gap_within_the_tolerated_one_is_significant_and_no_alarm(rng):
    report = judged(world(rng, 50_000, gap=0.03))
    assert found(report, "b", "calibration").p_adjusted < 0.001
    assert report.verdict == "ok"


def test_base_rates_are_shown_and_never_alarm(rng):
    frame = world(rng, 20_000)
    more = frame.assign(label=np.where((frame["region"] == "b") & (rng.random(len(frame)) < 0.5), 1, frame["label"]))
    base = found(judged(more), "b", bias.CONTEXT)
    assert base.verdict == "context"
    assert base.gap > 0.2


def test_group_aucs_are_those_of_the_groups(rng):
    """A library that hands out the whole data's AUC for every group would pass no one's notice."""
    frame = world(rng, 4_000)
    blind = rng.random(len(frame))
    frame = frame.assign(probability=np.where(frame["region"] == "b", blind, frame["probability"]))
    report = judged(frame)
    for group in ("a", "b", "c"):
        rows = frame[frame["region"] == group]
        assert found(report, group, "auc").value == pytest.approx(roc_auc_score(rows["label"], rows["probability"]))
    assert found(report, "a", "auc").value - found(report, "b", "auc").value > 0.15
    assert found(report, "b", "auc").verdict == "alarm"


def test_rates_and_intervals_are_wilsons_and_newcombes(rng):
    frame = world(rng, 3_000)
    metric = found(judged(frame), "b", "selection_rate")
    chosen, inside = frame["probability"] >= 0.4, frame["region"] == "b"
    hits, n, other_hits, others = (chosen & inside).sum(), inside.sum(), (chosen & ~inside).sum(), (~inside).sum()
    assert metric.n_effective == metric.n == n
    assert (metric.value, metric.rest) == (hits / n, other_hits / others)
    assert (metric.low, metric.high) == pytest.approx(proportion_confint(hits, n, method="wilson"))
    expected = confint_proportions_2indep(hits, n, other_hits, others, compare="diff", method="newcomb")
    assert (metric.gap_low, metric.gap_high) == pytest.approx(expected)


def test_auc_intervals_cover_the_truth_as_often_as_they_say(rng):
    def auc(n):
        frame = world(rng, n)
        value, variance = bias._auc(frame["label"].to_numpy(float), frame["probability"].to_numpy(), np.arange(n))
        return value, 1.96 * np.sqrt(variance)

    truth = auc(500_000)[0]
    estimates = [auc(1_000) for _ in range(400)]
    assert np.mean([abs(value - truth) <= half for value, half in estimates]) == pytest.approx(0.95, abs=0.03)


def test_repeated_rows_of_a_customer_do_not_narrow_the_intervals(rng):
    once = world(rng, 2_000)
    five = once.loc[once.index.repeat(5)]
    for metric in (*bias.JUDGED, bias.CONTEXT):
        alone, repeated = found(judged(once), "b", metric), found(judged(five), "b", metric)
        assert repeated.n == 5 * alone.n
        assert repeated.gap_high - repeated.gap_low == pytest.approx(alone.gap_high - alone.gap_low, rel=0.02)
    free = found(judged(five.assign(customer_id=np.arange(len(five)))), "b", "selection_rate")  # the control
    assert free.gap_high - free.gap_low < 0.6 * (alone.gap_high - alone.gap_low)


def test_small_groups_are_named_as_not_enough_data(rng):
    report = judged(world(rng, 5_000))
    small = found(report, "d", "selection_rate")
    assert (small.verdict, small.value, small.gap) == ("not_enough_data", None, None)
    assert "200 are needed" in small.why
    rare = judged(world(rng, 2_000).assign(label=lambda f: (np.arange(len(f)) < 20).astype(int)))
    assert found(rare, "a", "true_positive_rate").verdict == "not_enough_data"
    assert "positives, 30 are needed" in found(rare, "a", "true_positive_rate").why
    assert found(rare, "a", "selection_rate").verdict == "ok"


def test_a_test_of_few_rows_is_not_judged_at_all(rng):
    report = judged(world(rng, 150))
    assert report.verdict == "not_enough_data"
    assert report.verdict != "alarm"


def test_protected_columns_that_cannot_be_used_are_said(rng):
    frame = world(rng, 2_000).assign(gender=None, age_band="18-24")
    report = judged(frame, protected=("region", "gender", "age_band", "language"))
    assert set(report.not_judged) == {"gender", "age_band", "language"}
    assert "unknown for all" in report.not_judged["gender"]
    assert "the same for all" in report.not_judged["age_band"]
    assert "not among the data" in report.not_judged["language"]
    assert {m.attribute for m in report.metrics} == {"region"}


def test_rows_of_unknown_group_are_counted_and_left_out(rng):
    frame = world(rng, 3_000)
    frame["region"] = frame["region"].where(rng.random(len(frame)) < 0.9)
    report = judged(frame)
    assert report.unknown["region"] == frame["region"].isna().sum() > 0
    assert sum(g.n for g in report.groups) == frame["region"].notna().sum()


def test_one_class_or_one_decision_everywhere_does_not_crash(rng):
    frame = world(rng, 1_000)
    for label, probability in ((0, 0.1), (1, 0.9)):
        report = judged(frame.assign(label=label, probability=probability))
        assert report.verdict == "ok"
        assert found(report, "a", "auc").verdict == "not_enough_data"
        json.dumps([vars(m) for m in report.metrics], allow_nan=False)


# -- a home ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pages(monkeypatch):
    """The pages are tested in test_reports.py; they cost seconds."""
    drawn = []
    monkeypatch.setattr(reports, "write_bias", lambda path, run, frames, *, settings: drawn.append((path, run, frames)))
    return drawn


def fill(home, frame):
    other = frame.assign(split="train", probability=1.0, label=0)  # rows that must not count
    tables.write(home, tables.TRAINING_CHURN, pd.concat([frame.assign(split="test"), other], ignore_index=True))


def test_a_home_without_tables_is_said_not_crashed(tmp_path, pages):
    run = bias.run(tmp_path, settings=Settings(), as_of=AS_OF)
    assert (run.verdict, run.subjects) == ("not_enough_data", {})
    assert "training_churn holds no rows" in run.not_judged["churn"]


def test_the_test_rows_of_a_home_are_judged_and_stored(tmp_path, rng, pages):
    fill(tmp_path, world(rng, 3_000))
    run = bias.run(tmp_path, settings=Settings(), as_of=AS_OF)
    report = run.subjects["churn"]
    assert (run.verdict, report.rows) == ("ok", 3_000)
    assert (report.threshold, report.threshold_source) == (0.5, "default, because no champion names one")
    assert set(report.not_judged) == {"age_band", "gender"}
    stored = json.loads((tmp_path / "reports" / "bias.json").read_text())
    assert stored == json.loads(json.dumps(pages[0][1]))
    assert stored["subjects"]["churn"]["metrics"][0]["gap"] == report.metrics[0].gap


def test_the_champions_threshold_is_used(tmp_path, rng, pages, monkeypatch):
    fill(tmp_path, world(rng, 3_000))

    def load(home, name):
        if name != "churn":
            raise RegistryError("none")
        return registry.Champion(name, 4, tmp_path, {"threshold": 0.25})

    monkeypatch.setattr(registry, "load_champion", load)
    report = bias.run(tmp_path, settings=Settings(), as_of=AS_OF).subjects["churn"]
    assert (report.threshold, report.threshold_source) == (0.25, "champion version 4")


def test_every_task_with_a_champion_is_judged_on_its_own_rows(tmp_path, rng, pages):
    """One task scores women lower, the other does not: each control of the other."""
    fair = world(rng, 3_000).assign(gender=rng.choice(["f", "m"], 3_000), split="test")
    unfair = fair.assign(probability=np.where(fair["gender"] == "f", fair["probability"] * 0.3, fair["probability"]))
    both = pd.concat([fair.assign(model="intent_7d"), unfair.assign(model="return_risk")], ignore_index=True)
    tables.write(tmp_path, tables.TRAINING_TASKS, both)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "champions.json").write_text(json.dumps({name: {"version": 1} for name in ("intent_7d", "return_risk")}))
    run = bias.run(tmp_path, settings=Settings(), as_of=AS_OF)
    assert {name: report.verdict for name, report in run.subjects.items()} == {"intent_7d": "ok", "return_risk": "alarm"}
    assert {m.attribute for m in run.subjects["return_risk"].metrics if m.verdict == "alarm"} == {"gender"}
    assert run.subjects["intent_7d"].rows == 3_000
    assert set(run.not_judged) == {"churn", "intent"}
